// What a thin subspace has of X itself: the pass Q ← X (XᵀQ), and T = (XᵀQ)ᵀ(XᵀQ).
#pragma once

#include "thin.cuh"

namespace tokprune::leverage {

template <class T>
struct alignas(4 * sizeof(T)) Four {
    T values[4];
};

template <class T>
struct InputColumns {  // Xᵀ's rows
    T const* x;
    int d;
    bool vector;
    __device__ float4 operator()(int k, int column) const {
        T const* const from = x + static_cast<int64_t>(k) * d + column;
        Four<T> four{};
        if (vector) {
            if (column < d) four = *reinterpret_cast<Four<T> const*>(from);
        } else {
            for (int i = 0; i < 4; ++i)
                if (column + i < d) four.values[i] = from[i];
        }
        return {toFloat(four.values[0]), toFloat(four.values[1]), toFloat(four.values[2]), toFloat(four.values[3])};
    }
};

template <class T>
struct InputRows {  // X's rows
    T const* x;
    int n, d;
    __device__ float4 operator()(int k, int row) const {
        float values[4];
        for (int i = 0; i < 4; ++i) values[i] = row + i < n ? toFloat(x[static_cast<int64_t>(row + i) * d + k]) : 0;
        return {values[0], values[1], values[2], values[3]};
    }
};

// Grid (inputParts, 1, images): B = XᵀQ for Q = basis[from], to `projected`, or else only the part of BᵀB / tr(XXᵀ).
template <int QT, class T>
__global__ void __launch_bounds__(kThinThreads, 1)
    projectKernel(Sizes sizes, T const* x, float* workspace, int from, bool square) {
    TOKPRUNE_SHARED(memory);
    float* const shared = reinterpret_cast<float*>(memory);
    constexpr int kWidth = Thin<QT>::kWidth;
    float *const tile = shared + Thin<QT>::kTileAt, *const scales = shared + Thin<QT>::kVectorAt;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    x += static_cast<int64_t>(blockIdx.z) * sizes.n * sizes.d;
    columnScales<QT>(sizes, scratch.parts[from], scales, shared + Thin<QT>::kSharesAt);
    float sums[QT][QT] = {};
    for (int column = blockIdx.x * kStrip; column < sizes.d; column += sizes.inputParts * kStrip) {
        thinProduct<QT>(InputColumns<T>{x, sizes.d, sizes.vector}, column, scratch.basis[from], 0, sizes.n, shared);
        for (int i = threadIdx.x; i < kStrip * kWidth; i += kThinThreads) {
            tile[i] *= scales[i % kWidth];
            if (!square) scratch.projected[static_cast<int64_t>(column) * kWidth + i] = tile[i];
        }
        __syncthreads();
        if (square) addSquare<QT>(tile, sums);
    }
    if (!square) return;
    float const inverseTrace = *scratch.inverseTrace;
#pragma unroll
    for (int a = 0; a < QT; ++a)
#pragma unroll
        for (int b = 0; b < QT; ++b) sums[a][b] *= inverseTrace;
    writeSquare<QT>(sums, scratch.inputParts + static_cast<int64_t>(blockIdx.x) * kWidth * kWidth);
}

constexpr int kSumThreads = 256;

// Grid (qPadded² / kSumThreads, 1, images): `small` = the sum of projectKernel's parts.
static __global__ void __launch_bounds__(kSumThreads) sumPartsKernel(Sizes sizes, float* workspace) {
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    int const i = blockIdx.x * kSumThreads + threadIdx.x, square = sizes.qPadded * sizes.qPadded;
    float sum = 0;
#pragma unroll 8
    for (int part = 0; part < sizes.inputParts; ++part)
        sum += scratch.inputParts[static_cast<int64_t>(part) * square + i];
    scratch.small[i] = sum;
}

// Grid (strips, inputSplits, images): one split's share of X B.
template <int QT, class T>
__global__ void __launch_bounds__(kThinThreads, 1) applyKernel(Sizes sizes, T const* x, float* workspace) {
    TOKPRUNE_SHARED(memory);
    float* const shared = reinterpret_cast<float*>(memory);
    constexpr int kWidth = Thin<QT>::kWidth;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    x += static_cast<int64_t>(blockIdx.z) * sizes.n * sizes.d;
    int const row = blockIdx.x * kStrip, begin = min(static_cast<int>(blockIdx.y) * sizes.inputSplit, sizes.d);
    int const end = min(begin + sizes.inputSplit, sizes.d);
    thinProduct<QT>(InputRows<T>{x, sizes.n, sizes.d}, row, scratch.projected, begin, end, shared);
    float* const out = scratch.split + (static_cast<int64_t>(blockIdx.y) * sizes.nPadded + row) * kWidth;
    for (int i = threadIdx.x; i < kStrip * kWidth; i += kThinThreads) out[i] = shared[Thin<QT>::kTileAt + i];
}

// Grid (strips, 1, images): Y = X B / tr(XXᵀ) from its splits to the basis beside basis[from], and its part of YᵀY.
template <int QT>
__global__ void __launch_bounds__(kThinThreads) gatherSplitsKernel(Sizes sizes, float* workspace, int from) {
    TOKPRUNE_SHARED(memory);
    float* const tile = reinterpret_cast<float*>(memory);
    constexpr int kWidth = Thin<QT>::kWidth;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    int const first = blockIdx.x * kStrip * kWidth;
    for (int i = threadIdx.x; i < kStrip * kWidth; i += kThinThreads) {
        float sum = 0;
        for (int split = 0; split < sizes.inputSplits; ++split)
            sum += scratch.split[static_cast<int64_t>(split) * sizes.nPadded * kWidth + first + i];
        tile[i] = sum * *scratch.inverseTrace;
        scratch.basis[1 - from][first + i] = tile[i];
    }
    __syncthreads();
    writePart<QT>(tile, scratch.parts[1 - from] + static_cast<int64_t>(blockIdx.x) * kWidth * kWidth);
}

}  // namespace tokprune::leverage
