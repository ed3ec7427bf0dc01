// The sizes that LeverageTopK's kernels share, and where each intermediate lies in an image's scratch.
#pragma once

#include "../cuda/launch.cuh"
#include "../cuda/product.cuh"
#include "launch.h"

namespace tokprune::leverage {

constexpr int kStrip = 16;         // rows of a tall matrix that a block of the thin kernels works on
constexpr int kWidths[] = {16, 32, 48, 64, 96, 128};  // of the subspace, that kernels are compiled for
constexpr int kMostWidth = 128;
constexpr int kMostSplits = 8;     // of the sum over D in X (XᵀQ)
constexpr int kMostParts = 128;    // of (XᵀQ)ᵀ(XᵀQ)
constexpr int kBlocksWanted = 264;  // two for each of an H200's multiprocessors
constexpr int kSquareSplits = 4;   // of (XᵀQ)ᵀ(XᵀQ) where the subspace is wide
// Up to this many columns, products by CUDA cores and every block's own sum of a small matrix' parts cost less than
// launches would; a pass with X itself is then cheap, too.
constexpr int kWidestThin = 32;

__host__ __device__ constexpr bool isWide(int width) {
    return width > kWidestThin;
}

struct Sizes {
    int n, d, q;           // rows and columns of X, columns of the subspace
    int nPadded, qPadded;  // to whole tiles of the Gram matrix, to one of kWidths; what is behind n and q is zero
    int dPadded;           // to 16
    int rank;              // at most, for an energy rank
    float energy;          // or 0
    int strips;            // of kStrip rows of X
    int tiles, gramSplits, gramChunk;         // of the Gram matrix's upper half; its sum over D in splits of a length
    int inputSplits, inputSplit;  // X B: its sum over D in splits of a length
    int inputParts;               // of (XᵀQ)ᵀ(XᵀQ): blocks of XᵀQ or, if wide, splits of the sum over D
    bool vector;           // X may be read in vectors
    uint32_t seed;
};

// Two matrices of the same length, one behind the other: kernels go from one to the other and back.
struct Pair {
    float* first;
    int64_t length;
    __device__ float* operator[](int which) const { return first + which * length; }
};

// One image's scratch, in floats. What stands in one line lives one after the other in the same place.
struct Scratch {
    float* gram;                       // [nPadded, nPadded]
    float *gramParts, *inputParts;     // [gramSplits, tiles, 64, 64]; [inputParts, qPadded, qPadded]
    Pair basis;                        // [nPadded, qPadded], its columns not yet of unit norm
    Pair parts;                        // [strips, qPadded, qPadded]: each strip's share of basisᵀ basis; if wide
                                       // [strips, qPadded], of its diagonal
    Pair quotients;                    // [strips, qPadded]: each strip's share of the Rayleigh quotients
    float* small;                      // [qPadded, qPadded]: a sum of parts
    float* projector;                  // [qPadded, qPadded]
    float* projected;                  // [dPadded, qPadded]: XᵀQ
    float* split;                      // [inputSplits, nPadded, qPadded], unless wide
    float* inverseTrace;               // [1]
    float* target;                     // [1]: the projector's rank
};

// Lays out an image's scratch from `base` on; returns its length in floats, a multiple of 64.
__host__ __device__ inline int64_t layOut(Sizes const& sizes, float* base, Scratch& scratch) {
    int64_t length = 0;
    auto const take = [&](int64_t count) {
        float* const start = base + length;
        length += (count + 63) / 64 * 64;
        return start;
    };
    int64_t const n = sizes.nPadded, q = sizes.qPadded, strips = sizes.strips;
    int64_t const gramParts = static_cast<int64_t>(sizes.gramSplits) * sizes.tiles * kTile * kTile;
    bool const wide = isWide(sizes.qPadded);
    int64_t const inputParts = sizes.inputParts * q * q;
    int64_t const part = wide ? q : q * q;
    scratch.gram = take(n * n);
    scratch.gramParts = scratch.inputParts = take(gramParts > inputParts ? gramParts : inputParts);
    scratch.basis = {take(2 * n * q), n * q};
    scratch.parts = {take(2 * strips * part), strips * part};
    scratch.quotients = {take(2 * strips * q), strips * q};
    scratch.small = take(q * q);
    scratch.projector = take(q * q);
    scratch.projected = take(sizes.dPadded * q);
    scratch.split = take(wide ? 0 : sizes.inputSplits * n * q);
    scratch.inverseTrace = take(1);
    scratch.target = take(1);
    return length;
}

__device__ inline Scratch scratchOf(Sizes const& sizes, float* workspace, int image) {
    Scratch scratch;
    int64_t const length = layOut(sizes, nullptr, scratch);
    layOut(sizes, workspace + image * length, scratch);
    return scratch;
}

// Row and column, in tiles, of the `index`-th tile of the upper half, row by row.
__device__ inline void tileOf(int index, int perSide, int& row, int& column) {
    row = 0;
    while (index >= perSide - row) index -= perSide - row++;
    column = row + index;
}

}  // namespace tokprune::leverage
