// From T = (XᵀQ)ᵀ(XᵀQ) to T (T + μ)⁻¹ with μ near its rank-th eigenvalue: what purification starts from.
//
// The eigenvectors and their order stay. Eigenvalues come to lie in [0, 1), those about μ around a half, whatever the
// grading above: purifying T itself would spend two steps on every factor of four between the first one and μ.
#pragma once

#include "thin.cuh"

namespace tokprune::leverage {

// σ_j² at most this share of σ_1² is rounding, and its direction carries no leverage: the reference's RANK_TOLERANCE².
constexpr float kRankTolerance = 1e-10f;

template <int QT>
struct Compress {
    static constexpr int kWidth = 16 * QT;
    // Shared memory, in floats: T's diagonal, the scales, forPivots' four vectors.
    static constexpr size_t kShared = 6 * kWidth * sizeof(float);
};

// How many eigenvalues the projector takes: `rank`, or as many as hold the energy, and none that is rounding.
// `ritz` [q] are T's diagonal, nearly descending, of a trace that all eigenvalues would bring to 1.
__device__ inline int targetOf(Sizes const& sizes, float const* ritz, float floor) {
    int significant = 0, needed = 1;
    float held = 0;
    for (int j = 0; j < sizes.q; ++j) {
        significant += ritz[j] > floor;
        held += ritz[j];
        needed += held < sizes.energy;
    }
    return min(sizes.energy > 0 ? min(sizes.rank, needed) : sizes.rank, significant);
}

// m [Q, Q], symmetric positive definite and held as addSquare does, becomes −m⁻¹: the sweep operator on its rows.
template <int QT>
__device__ void sweep(float (&m)[QT][QT], float* shared) {
    int const row = threadIdx.x / 16, column = threadIdx.x % 16;
    forPivots<QT>(m, 16 * QT, shared, [&](int, int j, float const* pivotRow, float const* pivotColumn) {
        float const inverse = 1 / pivotRow[j];
#pragma unroll
        for (int a = 0; a < QT; ++a)
#pragma unroll
            for (int b = 0; b < QT; ++b) {
                int const i = row + 16 * a, c = column + 16 * b;
                if (i == j || c == j) m[a][b] = i == c ? -inverse : m[a][b] * inverse;
                else m[a][b] -= pivotColumn[i] * inverse * pivotRow[c];
            }
    });
}

// Grid (1, 1, images): `projector` = T (T + μ)⁻¹ from T in `small`, or from its splits in `inputParts` if wide, and its
// rank to be in `target`.
template <int QT>
__global__ void __launch_bounds__(kThinThreads, 1) compressKernel(Sizes sizes, float* workspace) {
    TOKPRUNE_SHARED(memory);
    constexpr int kWidth = Compress<QT>::kWidth;
    float *const ritz = reinterpret_cast<float*>(memory), *const scales = ritz + kWidth;
    float* const pivots = scales + kWidth;
    int const row = threadIdx.x / 16, column = threadIdx.x % 16;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    float m[QT][QT];
#pragma unroll
    for (int a = 0; a < QT; ++a)
#pragma unroll
        for (int b = 0; b < QT; ++b) {
            int const i = row + 16 * a, c = column + 16 * b, at = min(i, c) * kWidth + max(i, c);
            if constexpr (isWide(kWidth)) {
                float sum = 0;
                for (int split = 0; split < kSquareSplits; ++split)
                    sum += scratch.inputParts[split * kWidth * kWidth + at];
                m[a][b] = sum * *scratch.inverseTrace;
            } else {
                m[a][b] = scratch.small[at];
            }
            if (i == c) ritz[i] = m[a][b];
        }
    __syncthreads();
    float most = 0;
    for (int j = threadIdx.x % 32; j < sizes.q; j += 32) most = fmaxf(most, ritz[j]);
    float const floor = warpMax(most) * kRankTolerance;
    int const target = targetOf(sizes, ritz, floor);
    float const mu = fmaxf(target > 0 ? ritz[target - 1] : 0, fmaxf(floor, kTiny));
    if (threadIdx.x == 0) *scratch.target = static_cast<float>(target);
    auto const counts = [&](int i) { return ritz[i] > floor; };
    if (threadIdx.x < kWidth) scales[threadIdx.x] = 1 / sqrtf(mu + (counts(threadIdx.x) ? ritz[threadIdx.x] : 0));
    __syncthreads();
#pragma unroll
    for (int a = 0; a < QT; ++a)
#pragma unroll
        for (int b = 0; b < QT; ++b) {
            int const i = row + 16 * a, c = column + 16 * b;
            float const value = counts(i) && counts(c) ? m[a][b] : 0;
            m[a][b] = i == c ? 1 : value * scales[i] * scales[c];
        }
    sweep<QT>(m, pivots);
#pragma unroll
    for (int a = 0; a < QT; ++a)
#pragma unroll
        for (int b = 0; b < QT; ++b) {
            int const i = row + 16 * a, c = column + 16 * b;
            float const value = (i == c ? 1.0f : 0.0f) + mu * scales[i] * scales[c] * m[a][b];
            scratch.projector[i * kWidth + c] = counts(i) && counts(c) ? value : 0;
        }
}

}  // namespace tokprune::leverage
