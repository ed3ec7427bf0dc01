// The spectral projector P of T's largest eigenvalues from T (T + μ)⁻¹, and the scores ℓ = rowsum(QP ∘ Q).
//
// No eigensolver: SP2 purification (Niklasson, Phys. Rev. B 66, 155115, 2002). Two maps of [0, 1] keep 0, 1 and the
// order of eigenvalues: x² lowers, 2x − x² raises. Each step takes the one whose trace comes nearer to the target:
// x² if (tr X − tr X²)(tr X − target) > 0. Going by tr X > target alone would, once converged, feed rounding errors
// to the map that doubles them.
#pragma once

#include "thin.cuh"

namespace tokprune::leverage {

constexpr int kPurifyThreads = 512, kPurifyWarps = kPurifyThreads / 32;

template <int QT>
struct Purify {
    static constexpr int kWidth = 16 * QT, kPitch = kWidth + 4;  // fragments fall into different banks
    static constexpr int kBlocks = QT * (QT + 1) / 2;            // of 16 x 16 in the upper half, with the diagonal
    static constexpr int kMine = ceilDiv(kBlocks, kPurifyWarps);
    // Shared memory, in floats: X, then two vectors of the width.
    static constexpr int kVectorsAt = kWidth * kPitch;
    static constexpr size_t kShared = (kVectorsAt + 2 * kWidth) * sizeof(float);
};

// Calls visit(i, j, value) for the elements of the 16 x 16 block at (row, column) that this lane holds and that lie on
// or above the diagonal: what is below mirrors them.
template <class Visit>
__device__ void forBlock(float (&values)[2][4], int row, int column, Visit visit) {
    int const lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            int const i = row + lane / 4 + 8 * (e / 2), j = column + 8 * n + 2 * (lane % 4) + e % 2;
            if (i <= j) visit(i, j, values[n][e]);
        }
}

// The 16 x 16 block at (row, column) of X², X symmetric in shared memory.
template <int QT>
__device__ void squareBlock(float const* x, int row, int column, float (&values)[2][4]) {
    constexpr int kPitch = Purify<QT>::kPitch;
    int const lane = threadIdx.x % 32, r = lane / 4;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) values[n][e] = 0;
#pragma unroll
    for (int step = 0; step < 2 * QT; ++step) {
        int const k = 8 * step + lane % 4;
        float const* const left = x + (row + r) * kPitch + k;
        float const a[4] = {left[0], left[8 * kPitch], left[4], left[8 * kPitch + 4]};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float const* const right = x + (column + 8 * n + r) * kPitch + k;
            float const b[2] = {right[0], right[4]};
            mmaFloat(values[n], a, b);
        }
    }
}

// Grid (1, 1, images): `projector` of rank `target` from what stands there.
template <int QT>
__global__ void __launch_bounds__(kPurifyThreads) purifyKernel(Sizes sizes, float* workspace, int steps) {
    using Layout = Purify<QT>;
    TOKPRUNE_SHARED(memory);
    float* const x = reinterpret_cast<float*>(memory);
    constexpr int kWidth = Layout::kWidth, kPitch = Layout::kPitch, kMine = Layout::kMine;
    float *const diagonal = x + Layout::kVectorsAt, *const difference = diagonal + kWidth;
    int const thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    auto const sumOf = [&](float const* vector) {
        float sum = 0;
        for (int j = lane; j < kWidth; j += 32) sum += vector[j];
        return warpSum(sum);
    };
    float const target = *scratch.target;
    for (int i = thread; i < kWidth * kWidth; i += kPurifyThreads) {
        int const r = i / kWidth, c = i % kWidth;
        x[r * kPitch + c] = scratch.projector[min(r, c) * kWidth + max(r, c)];
    }
    __syncthreads();

    int rows[kMine], columns[kMine];
#pragma unroll
    for (int b = 0; b < kMine; ++b) {
        int index = warp + b * kPurifyWarps, row = 0;
        while (row < QT && index >= QT - row) index -= QT - row++;
        rows[b] = 16 * row;  // QT blocks down: none
        columns[b] = 16 * (row + index);
    }
    for (int step = 0; step < steps; ++step) {
        float squares[kMine][2][4];
#pragma unroll
        for (int b = 0; b < kMine; ++b) {
            if (rows[b] == kWidth) continue;
            squareBlock<QT>(x, rows[b], columns[b], squares[b]);
            forBlock(squares[b], rows[b], columns[b], [&](int i, int j, float square) {
                if (i != j) return;
                diagonal[i] = x[i * kPitch + i];
                difference[i] = x[i * kPitch + i] - square;
            });
        }
        __syncthreads();
        bool const lower = (sumOf(diagonal) - target) * sumOf(difference) > 0;
#pragma unroll
        for (int b = 0; b < kMine; ++b) {
            if (rows[b] == kWidth) continue;
            forBlock(squares[b], rows[b], columns[b], [&](int i, int j, float square) {
                float const old = x[i * kPitch + j], value = lower ? square : old + (old - square);
                x[i * kPitch + j] = value;
                x[j * kPitch + i] = value;
            });
        }
        __syncthreads();
    }
    for (int i = thread; i < kWidth * kWidth; i += kPurifyThreads)
        scratch.projector[i] = x[i / kWidth * kPitch + i % kWidth];
}

// Grid (strips, 1, images): scores [images, n] of Q = basis[from] and the projector.
template <int QT>
__global__ void __launch_bounds__(kThinThreads) scoreKernel(Sizes sizes, float* workspace, int from, float* scores) {
    TOKPRUNE_SHARED(memory);
    float* const shared = reinterpret_cast<float*>(memory);
    constexpr int kWidth = Thin<QT>::kWidth;
    float *const tile = shared + Thin<QT>::kTileAt, *const scales = shared + Thin<QT>::kVectorAt;
    int const row = threadIdx.x / 16, column = threadIdx.x % 16, first = blockIdx.x * kStrip;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    columnScales<QT>(sizes, scratch.parts[from], scales, shared + Thin<QT>::kSharesAt);
    for (int i = threadIdx.x; i < kStrip * kWidth; i += kThinThreads)
        tile[i] = scratch.basis[from][first * kWidth + i] * scales[i % kWidth];
    __syncthreads();
    float values[QT] = {};
    for (int i = 0; i < kWidth; ++i)
#pragma unroll
        for (int b = 0; b < QT; ++b)
            values[b] += tile[row * kWidth + i] * scratch.projector[i * kWidth + column + 16 * b];
    float score = 0;
#pragma unroll
    for (int b = 0; b < QT; ++b) score += values[b] * tile[row * kWidth + column + 16 * b];
    for (int mask = 8; mask > 0; mask /= 2) score += __shfl_xor_sync(kFullWarp, score, mask);
    if (column == 0 && first + row < sizes.n)
        scores[static_cast<int64_t>(blockIdx.z) * sizes.n + first + row] = score < 0 ? 0 : score;  // NaN stays NaN
}

}  // namespace tokprune::leverage
