// The same products for wide subspaces, q > 32, by tensor cores: XXᵀ Q, XᵀQ and the Gram matrices of what they give.
//
// On CUDA cores the products of so many columns take longer than a launch does, and so do the parts of YᵀY that each
// strip would leave behind: a launch of its own makes YᵀY from Y. Floats go as two TF32 numbers each.
#pragma once

#include "thin.cuh"

namespace tokprune::leverage {

constexpr int kStep = 8;        // of the sum, that one tensor-core product takes
constexpr int kInputTiles = 2;  // of 16 columns of X, that a block multiplies with Q

// Shared memory, in floats, of a product with 16 R rows and 8 C columns: the warps' shares of 16 of these rows, the
// result, and what its caller needs beside it.
template <int R, int C>
struct Tiles {
    static constexpr int kColumns = 8 * C;
    static constexpr int kTileAt = kThinWarps * kStrip * kColumns, kMoreAt = kTileAt + R * kStrip * kColumns;
    static constexpr size_t kShared = kMoreAt * sizeof(float);
};

// tile [16 R, 8 C] = Σ over k in [begin, end) of left(k, row) · right[k · pitch + column]. Both are read up to the next
// multiple of kStep. The warps share out the sum and add up in a fixed order. Ends with a barrier.
template <int R, int C, class Left>
__device__ void tensorProduct(Left const& left, int row, float const* right, int pitch, int begin, int end,
                              float* shared) {
    using Layout = Tiles<R, C>;
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, inGroup = lane % 4;
    float sums[R][C][4] = {};
#pragma unroll 2
    for (int first = begin + kStep * warp; first < end; first += kStep * kThinWarps) {
        int const k = first + inGroup;
        float a[R][4];
#pragma unroll
        for (int r = 0; r < R; ++r) {
            int const at = row + kStrip * r + group;
            a[r][0] = left(k, at);
            a[r][1] = left(k, at + 8);
            a[r][2] = left(k + 4, at);
            a[r][3] = left(k + 4, at + 8);
        }
        float const* const from = right + static_cast<int64_t>(k) * pitch + group;
#pragma unroll
        for (int c = 0; c < C; ++c) {
            float const b[2] = {from[8 * c], from[4 * pitch + 8 * c]};
#pragma unroll
            for (int r = 0; r < R; ++r) mmaFloat(sums[r][c], a[r], b);
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
        float* const share = shared + warp * kStrip * Layout::kColumns;
#pragma unroll
        for (int c = 0; c < C; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                share[(group + 8 * (e / 2)) * Layout::kColumns + 8 * c + 2 * inGroup + e % 2] = sums[r][c][e];
        __syncthreads();
        for (int i = threadIdx.x; i < kStrip * Layout::kColumns; i += kThinThreads) {
            float sum = 0;
            for (int w = 0; w < kThinWarps; ++w) sum += shared[w * kStrip * Layout::kColumns + i];
            shared[Layout::kTileAt + r * kStrip * Layout::kColumns + i] = sum;
        }
        __syncthreads();
    }
}

struct GramElement {
    float const* gram;
    int pitch;
    __device__ float operator()(int k, int row) const { return gram[static_cast<int64_t>(k) * pitch + row]; }
};

template <class T>
struct InputElement {  // of Xᵀ
    T const* x;
    int n, d;
    __device__ float operator()(int k, int column) const {
        return k < n && column < d ? toFloat(x[static_cast<int64_t>(k) * d + column]) : 0;
    }
};

template <int QT>
struct Multiply : Tiles<1, QT> {
    static constexpr int kScalesAt = Tiles<1, QT>::kMoreAt, kSharesAt = kScalesAt + 16 * QT;
    static constexpr size_t kShared = (kSharesAt + kThinThreads) * sizeof(float);
};

// Grid (strips, 2, images): half the columns of Y = (XXᵀ / tr(XXᵀ) − c) Q, as multiplyKernel makes them.
template <int QT>
__global__ void __launch_bounds__(kThinThreads, 1)
    wideMultiplyKernel(Sizes sizes, float* workspace, int from, int turn, float node) {
    using Layout = Multiply<QT>;
    TOKPRUNE_SHARED(memory);
    float* const shared = reinterpret_cast<float*>(memory);
    constexpr int kWidth = 16 * QT, kHalf = Layout::kColumns;
    float *const tile = shared + Layout::kTileAt, *const scales = shared + Layout::kScalesAt;
    float* const shares = shared + Layout::kSharesAt;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    int const row = blockIdx.x * kStrip, columns = blockIdx.y * kHalf;
    float const shift = shiftOf<QT>(sizes, scratch, turn, node, scales, shares);
    tensorProduct<1, QT>(GramElement{scratch.gram, sizes.nPadded}, row, scratch.basis[from] + columns, kWidth, 0,
                         sizes.n, shared);
    basisScales<QT>(sizes, scratch, from, turn, scales, shares);
    float const inverseTrace = *scratch.inverseTrace;
    float* const products = shared;
    for (int i = threadIdx.x; i < kStrip * kHalf; i += kThinThreads) {
        int const at = (row + i / kHalf) * kWidth + columns + i % kHalf;
        float const scale = scales[columns + i % kHalf], unit = scratch.basis[from][at] * scale;
        float const value = tile[i] * scale * inverseTrace;
        products[i] = unit * value;
        scratch.basis[1 - from][at] = value - shift * unit;
    }
    __syncthreads();
    if (threadIdx.x < kHalf) {
        float quotient = 0;
        for (int r = 0; r < kStrip; ++r) quotient += products[r * kHalf + threadIdx.x];
        scratch.quotients[turn % 2][blockIdx.x * kWidth + columns + threadIdx.x] = quotient;
    }
}

template <int QT>
struct Project : Tiles<kInputTiles, QT> {
    static constexpr int kScalesAt = Tiles<kInputTiles, QT>::kMoreAt, kSharesAt = kScalesAt + 16 * QT;
    static constexpr size_t kShared = (kSharesAt + kThinThreads) * sizeof(float);
};

// Grid (blocks of 16 kInputTiles columns of X, 2, images): half the columns of XᵀQ for Q = basis[from].
template <int QT, class T>
__global__ void __launch_bounds__(kThinThreads, 1)
    wideProjectKernel(Sizes sizes, T const* x, float* workspace, int from) {
    using Layout = Project<QT>;
    TOKPRUNE_SHARED(memory);
    float* const shared = reinterpret_cast<float*>(memory);
    constexpr int kWidth = 16 * QT, kHalf = Layout::kColumns;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    x += static_cast<int64_t>(blockIdx.z) * sizes.n * sizes.d;
    int const first = blockIdx.x * kInputTiles * kStrip, columns = blockIdx.y * kHalf;
    float* const scales = shared + Layout::kScalesAt;
    columnScales<QT>(sizes, scratch.parts[from], scales, shared + Layout::kSharesAt);
    tensorProduct<kInputTiles, QT>(InputElement<T>{x, sizes.n, sizes.d}, first, scratch.basis[from] + columns, kWidth,
                                   0, sizes.n, shared);
    for (int i = threadIdx.x; i < kInputTiles * kStrip * kHalf; i += kThinThreads) {
        int const column = first + i / kHalf;
        if (column < sizes.dPadded)
            scratch.projected[static_cast<int64_t>(column) * kWidth + columns + i % kHalf] =
                shared[Layout::kTileAt + i] * scales[columns + i % kHalf];
    }
}

// Grid (QT (QT + 1) / 2, splits, images): one 16 x 16 block of YᵀY, and what mirrors it: of the basis, in one split, to
// `small`; of XᵀQ, if `input`, to the splits' `inputParts`.
template <int QT>
__global__ void __launch_bounds__(kThinThreads, 1)
    squareKernel(Sizes sizes, float* workspace, int from, bool input) {
    using Layout = Tiles<1, 2>;
    TOKPRUNE_SHARED(memory);
    float* const shared = reinterpret_cast<float*>(memory);
    constexpr int kWidth = 16 * QT;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    int row, column;
    tileOf(blockIdx.x, QT, row, column);
    float const* const y = input ? scratch.projected : scratch.basis[from];
    int const count = input ? sizes.dPadded : sizes.nPadded;
    int const length = ceilDiv(count, static_cast<int>(gridDim.y) * kStep) * kStep;
    int const begin = min(static_cast<int>(blockIdx.y) * length, count), end = min(begin + length, count);
    tensorProduct<1, 2>(GramElement{y, kWidth}, 16 * row, y + 16 * column, kWidth, begin, end, shared);
    float* const out = input ? scratch.inputParts + static_cast<int64_t>(blockIdx.y) * kWidth * kWidth : scratch.small;
    int const i = threadIdx.x / 16, j = threadIdx.x % 16;
    float const* const tile = shared + Layout::kTileAt;
    bool const lower = row == column && i > j;  // of a block on the diagonal the upper half counts, for both
    out[(16 * row + i) * kWidth + 16 * column + j] = lower ? tile[16 * j + i] : tile[16 * i + j];
    if (row != column) out[(16 * column + j) * kWidth + 16 * row + i] = tile[16 * i + j];
}

}  // namespace tokprune::leverage
