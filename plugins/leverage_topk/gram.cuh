// XXᵀ in FP32, and the start of the iteration.
#pragma once

#include "sizes.cuh"

namespace tokprune::leverage {

// Grid (tiles, splits, images): one split's share of one tile.
template <class T>
__global__ void __launch_bounds__(kTileThreads) gramKernel(Sizes sizes, T const* x, float* workspace) {
    TOKPRUNE_SHARED(shared);
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    x += static_cast<int64_t>(blockIdx.z) * sizes.n * sizes.d;
    int row, column;
    tileOf(blockIdx.x, sizes.nPadded / kTile, row, column);
    auto const rows = [&](int tile) {
        int const first = tile * kTile;
        return Rows<T>{x + static_cast<int64_t>(first) * sizes.d, min(kTile, sizes.n - first), sizes.d, sizes.vector};
    };
    int const begin = min(static_cast<int>(blockIdx.y) * sizes.gramChunk, sizes.d);
    int const end = min(begin + sizes.gramChunk, sizes.d);
    float sums[2][4][4];
    tileProduct(rows(row), rows(column), begin, end, shared, sums);
    int64_t const part = static_cast<int64_t>(blockIdx.y) * sizes.tiles + blockIdx.x;
    float* const out = scratch.gramParts + part * kTile * kTile;
    forTile(sums, [&](int i, int j, float value) { out[i * kTile + j] = value; });
}

// A number for (seed, row, column) from roughly a normal distribution: the sum of four uniform ones, by a 32-bit hash.
__device__ inline float startValue(uint32_t seed, uint32_t row, uint32_t column) {
    uint32_t state = seed * 0x9e3779b9u + row * kMostWidth + column;
    float sum = 0;
    for (int i = 0; i < 4; ++i) {
        state += 0x6d2b79f5u;
        uint32_t hash = (state ^ (state >> 16)) * 0x7feb352du;
        hash = (hash ^ (hash >> 15)) * 0x846ca68bu;
        sum += static_cast<float>((hash ^ (hash >> 16)) >> 8) * 0x1p-24f - 0.5f;
    }
    return sum;
}

constexpr int kGatherThreads = 256;
constexpr size_t kGatherShared = kTile * (kTile + 1) * sizeof(float);

// ‖x_row‖² from the splits' tiles on the diagonal: what the Gram matrix has there.
__device__ inline float normOf(Sizes const& sizes, Scratch const& scratch, int row) {
    int const tile = row / kTile, at = row % kTile, side = sizes.nPadded / kTile;
    int const index = tile * side - tile * (tile - 1) / 2;
    float sum = 0;
    for (int split = 0; split < sizes.gramSplits; ++split)
        sum += scratch.gramParts[((static_cast<int64_t>(split) * sizes.tiles + index) * kTile + at) * kTile + at];
    return sum;
}

// tr(XXᵀ), and the start basis, of which each block makes some strips. Its rows weigh less where those of X are longer:
// else all columns of XXᵀQ are nearly parallel where a few rows are massive, and one elimination leaves them far from
// orthogonal.
__device__ inline void startBasis(Sizes const& sizes, Scratch const& scratch, float* sums /* [warps] */) {
    float sum = 0;
    for (int i = threadIdx.x; i < sizes.n; i += kGatherThreads) sum += normOf(sizes, scratch, i);
    sum = warpSum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float trace = kTiny;
    for (int i = 0; i < kGatherThreads / 32; ++i) trace += sums[i];
    if (blockIdx.x == 0 && threadIdx.x == 0) *scratch.inverseTrace = 1 / trace;
    for (int strip = blockIdx.x; strip < sizes.strips; strip += sizes.tiles)
        for (int i = threadIdx.x; i < kStrip * sizes.qPadded; i += kGatherThreads) {
            int const row = strip * kStrip + i / sizes.qPadded, column = i % sizes.qPadded;
            float value = 0;
            if (row < sizes.n && column < sizes.q)
                value = startValue(sizes.seed, row, column) * sqrtf(trace / fmaxf(normOf(sizes, scratch, row), kTiny));
            scratch.basis[0][row * sizes.qPadded + column] = value;
        }
}

// Grid (tiles, 1, images): the tile's splits added up, and written to both halves of the Gram matrix; and the start.
static __global__ void __launch_bounds__(kGatherThreads) gatherGramKernel(Sizes sizes, float* workspace) {
    TOKPRUNE_SHARED(shared);
    float* const tile = reinterpret_cast<float*>(shared);  // [64][65]
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    int row, column;
    tileOf(blockIdx.x, sizes.nPadded / kTile, row, column);
    float const* const parts = scratch.gramParts + static_cast<int64_t>(blockIdx.x) * kTile * kTile;
    for (int i = threadIdx.x; i < kTile * kTile; i += kGatherThreads) {
        float sum = 0;
        for (int split = 0; split < sizes.gramSplits; ++split)
            sum += parts[static_cast<int64_t>(split) * sizes.tiles * kTile * kTile + i];
        tile[i / kTile * (kTile + 1) + i % kTile] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < kTile * kTile; i += kGatherThreads) {
        int const r = i / kTile, c = i % kTile;
        bool const lower = row == column && r > c;  // of a tile on the diagonal the upper half counts, for both
        float* const gram = scratch.gram;
        gram[static_cast<int64_t>(row * kTile + r) * sizes.nPadded + column * kTile + c] =
            lower ? tile[c * (kTile + 1) + r] : tile[r * (kTile + 1) + c];
        if (row != column)
            gram[static_cast<int64_t>(column * kTile + r) * sizes.nPadded + row * kTile + c] =
                tile[c * (kTile + 1) + r];
    }
    __syncthreads();
    startBasis(sizes, scratch, tile);
}

}  // namespace tokprune::leverage
