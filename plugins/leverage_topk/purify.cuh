// The spectral projector P of T's largest eigenvalues from T (T + μ)⁻¹, and the scores ℓ = rowsum(QP ∘ Q).
//
// No eigensolver: SP2 purification (Niklasson, Phys. Rev. B 66, 155115, 2002). Two maps of [0, 1] keep 0, 1 and the
// order of eigenvalues: x² lowers, 2x − x² raises. Each step takes the one whose trace comes nearer to the target:
// x² if (tr X − tr X²)(tr X − target) > 0. Going by tr X > target alone would, once converged, feed rounding errors
// to the map that doubles them.
#pragma once

#include "thin.cuh"

namespace tokprune::leverage {

constexpr int kPurifyThreads = 576, kPurifyWarps = kPurifyThreads / 32;  // two blocks of 16 x 16 a warp at most
// Once tr(X − X²) is this small, all eigenvalues are near 0 or 1, and each further step squares one side's distance.
constexpr float kNearlyPure = 1e-3f;
constexpr int kLastSteps = 4;

template <int QT>
struct Purify {
    static constexpr int kWidth = 16 * QT, kPitch = kWidth / 2 + 4;  // in pairs; fragments fall into different banks
    static constexpr int kBlocks = QT * (QT + 1) / 2;                // of 16 x 16 in the upper half, with the diagonal
    static constexpr int kMine = ceilDiv(kBlocks, kPurifyWarps);
    // Shared memory, in words: X's larger and smaller halves, then two vectors of the width.
    static constexpr int kSmallAt = kWidth * kPitch, kVectorsAt = 2 * kSmallAt;
    static constexpr size_t kShared = (kVectorsAt + 2 * kWidth) * sizeof(float);
};

// A block of 16 x 16 of the upper half that a warp holds, in PTX's fragments: values[n] is its 16 x 8 at column 8 n.
struct Block {
    int row, column;
    float values[2][4];
};

// Calls visit(i, j, value) for each element that this lane holds. On the diagonal the upper half counts, for both.
template <class Element, class Visit>
__device__ void forBlock(Element (&values)[2][4], Block const& block, Visit visit) {
    int const lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            int const i = block.row + lane / 4 + 8 * (e / 2), j = block.column + 8 * n + 2 * (lane % 4) + e % 2;
            if (i <= j) visit(i, j, values[n][e]);
        }
}

// The smaller half counts in units of 2^-11, so that it does not leave FP16's range.
constexpr float kSmallUnit = 0x1p-11f;

// X[i][j] and X[j][i] = value into both halves.
template <int QT>
__device__ void setHalves(uint32_t* x, int i, int j, float value) {
    using Layout = Purify<QT>;
    uint32_t const large = toHalves(value, 0);
    uint32_t const small = toHalves((value - toFloat(Half{static_cast<uint16_t>(large)})) / kSmallUnit, 0);
    uint16_t* const larges = reinterpret_cast<uint16_t*>(x);
    uint16_t* const smalls = reinterpret_cast<uint16_t*>(x + Layout::kSmallAt);
    larges[i * 2 * Layout::kPitch + j] = larges[j * 2 * Layout::kPitch + i] = static_cast<uint16_t>(large);
    smalls[i * 2 * Layout::kPitch + j] = smalls[j * 2 * Layout::kPitch + i] = static_cast<uint16_t>(small);
}

// The block of X², X symmetric in shared memory: to about 2^-22, as two FP16 numbers hold X and the least product is left
// out.
template <int QT>
__device__ void squareBlock(uint32_t const* x, Block const& block, float (&squares)[2][4]) {
    using Layout = Purify<QT>;
    int const lane = threadIdx.x % 32, r = lane / 4;
    float small[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) squares[n][e] = 0;
#pragma unroll 4
    for (int step = 0; step < QT; ++step) {
        int const k = 8 * step + lane % 4;
        uint32_t a[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t const* const left = x + half * Layout::kSmallAt + (block.row + r) * Layout::kPitch + k;
            a[half][0] = left[0];
            a[half][1] = left[8 * Layout::kPitch];
            a[half][2] = left[4];
            a[half][3] = left[8 * Layout::kPitch + 4];
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            uint32_t const* const right = x + (block.column + 8 * n + r) * Layout::kPitch + k;
            uint32_t const b[2][2] = {{right[0], right[4]}, {right[Layout::kSmallAt], right[Layout::kSmallAt + 4]}};
            mmaHalf(small[n], a[0], b[1]);
            mmaHalf(small[n], a[1], b[0]);
            mmaHalf(squares[n], a[0], b[0]);
        }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) squares[n][e] += small[n][e] * kSmallUnit;
}

// Grid (1, 1, images): `projector` of rank `target` from what stands there, in at most so many steps.
template <int QT>
__global__ void __launch_bounds__(kPurifyThreads) purifyKernel(Sizes sizes, float* workspace, int steps) {
    using Layout = Purify<QT>;
    TOKPRUNE_SHARED(memory);
    uint32_t* const x = reinterpret_cast<uint32_t*>(memory);
    constexpr int kWidth = Layout::kWidth, kMine = Layout::kMine;
    float *const diagonal = reinterpret_cast<float*>(x) + Layout::kVectorsAt, *const difference = diagonal + kWidth;
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    auto const sumOf = [&](float const* vector) {
        float sum = 0;
        for (int j = lane; j < kWidth; j += 32) sum += vector[j];
        return warpSum(sum);
    };
    float const target = *scratch.target;
    Block blocks[kMine]{};
#pragma unroll
    for (int b = 0; b < kMine; ++b) {
        int const index = warp + b * kPurifyWarps;
        int row = QT, column = QT;  // QT blocks down: none
        if (index < Layout::kBlocks) tileOf(index, QT, row, column);
        blocks[b].row = 16 * row;
        blocks[b].column = 16 * column;
        if (row == QT) continue;
        forBlock(blocks[b].values, blocks[b], [&](int i, int j, float& value) {
            value = scratch.projector[i * kWidth + j];
            setHalves<QT>(x, i, j, value);
        });
    }
    __syncthreads();
    for (int left = steps; left > 0; --left) {
        float squares[kMine][2][4];
#pragma unroll
        for (int b = 0; b < kMine; ++b) {
            if (blocks[b].row == kWidth) continue;
            squareBlock<QT>(x, blocks[b], squares[b]);
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) squares[b][n][e] = blocks[b].values[n][e] - squares[b][n][e];
            forBlock(squares[b], blocks[b], [&](int i, int j, float rest) {
                if (i == j) difference[i] = rest;
            });
            forBlock(blocks[b].values, blocks[b], [&](int i, int j, float value) {
                if (i == j) diagonal[i] = value;
            });
        }
        __syncthreads();
        float const impure = sumOf(difference);
        bool const lower = (sumOf(diagonal) - target) * impure > 0;
        if (fabsf(impure) < kNearlyPure) left = min(left, kLastSteps);
#pragma unroll
        for (int b = 0; b < kMine; ++b) {
            if (blocks[b].row == kWidth) continue;
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) blocks[b].values[n][e] += lower ? -squares[b][n][e] : squares[b][n][e];
            forBlock(blocks[b].values, blocks[b], [&](int i, int j, float value) { setHalves<QT>(x, i, j, value); });
        }
        __syncthreads();
    }
#pragma unroll
    for (int b = 0; b < kMine; ++b) {
        if (blocks[b].row == kWidth) continue;
        forBlock(blocks[b].values, blocks[b], [&](int i, int j, float value) {
            scratch.projector[i * kWidth + j] = scratch.projector[j * kWidth + i] = value;
        });
    }
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
