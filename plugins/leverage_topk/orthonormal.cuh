// CholeskyQR in column order: Y ← Y L⁻ᵀ with YᵀY = LDLᵀ, its columns scaled to unit norm before.
//
// Rows of massive activation grade the spectrum over many decades. Gram-Schmidt order keeps small directions exact,
// where a symmetric or a pivoted method would drown them in the rounding of the large ones.
#pragma once

#include "thin.cuh"

namespace tokprune::leverage {

constexpr int kSumThreads = 256;

// Grid (qPadded² / kSumThreads, 1, images): `small` = the sum of `count` parts.
static __global__ void __launch_bounds__(kSumThreads)
    sumPartsKernel(Sizes sizes, float* workspace, int from, bool input, int count) {
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    float const* const parts = input ? scratch.inputParts : scratch.parts[from];
    int const i = blockIdx.x * kSumThreads + threadIdx.x, square = sizes.qPadded * sizes.qPadded;
    float sum = 0;
#pragma unroll 8
    for (int part = 0; part < count; ++part) sum += parts[static_cast<int64_t>(part) * square + i];
    scratch.small[i] = sum;
}

template <int QT>
struct Orthonormal {
    static constexpr int kWidth = 16 * QT, kPitch = kWidth + 1;
    // Shared memory, in floats: the factor, the strip, forPivots' four vectors, the scales.
    static constexpr int kTileAt = kWidth * kPitch, kPivotsAt = kTileAt + kStrip * kWidth;
    static constexpr int kScalesAt = kPivotsAt + 4 * kWidth;
    static constexpr size_t kShared = (kScalesAt + kWidth) * sizeof(float);
};

// Eliminates the first `columns` columns of the unit-diagonal matrix m [Q, Q], held as addSquare does, from all later
// rows, in place: row j ends as L⁻¹'s below the diagonal, as DLᵀ's from it on.
template <int QT>
__device__ void eliminate(float (&m)[QT][QT], int columns, float* shared) {
    int const row = threadIdx.x / 16, column = threadIdx.x % 16;
    forPivots<QT>(m, columns, shared, [&](int j, float const* pivotRow, float const* pivotColumn) {
        float const pivot = pivotRow[j], inverse = pivot > kFloor ? 1 / pivot : 0;
#pragma unroll
        for (int a = 0; a < QT; ++a) {
            int const i = row + 16 * a;
            float const factor = i > j ? pivotColumn[i] * inverse : 0;
#pragma unroll
            for (int b = 0; b < QT; ++b) {
                int const c = column + 16 * b;
                if (c != j) m[a][b] -= factor * pivotRow[c];
                else if (i > j) m[a][b] = -factor;
            }
        }
    });
}

// Grid (strips, 1, images): Y of basis[from], its columns scaled and the first `columns` taken out of all later ones,
// to the other basis, and its part there. Every block does the same elimination. `floor`: least squares of a column
// that is scaled to unit norm. `gathered`: the parts are already summed up in `small`.
template <int QT>
__global__ void __launch_bounds__(kThinThreads)
    orthonormaliseKernel(Sizes sizes, float* workspace, int from, int columns, float floor, bool gathered) {
    using Layout = Orthonormal<QT>;
    TOKPRUNE_SHARED(memory);
    float* const factor = reinterpret_cast<float*>(memory);
    float *const tile = factor + Layout::kTileAt, *const scales = factor + Layout::kScalesAt;
    constexpr int kWidth = Layout::kWidth, kPitch = Layout::kPitch;
    int const row = threadIdx.x / 16, column = threadIdx.x % 16, first = blockIdx.x * kStrip * kWidth;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    float const* const parts = gathered ? scratch.small : scratch.parts[from];
    int const count = gathered ? 1 : sizes.strips;
    float m[QT][QT] = {};
#pragma unroll 4
    for (int part = 0; part < count; ++part)
#pragma unroll
        for (int a = 0; a < QT; ++a)
#pragma unroll
            for (int b = 0; b < QT; ++b)
                m[a][b] += parts[part * kWidth * kWidth + (row + 16 * a) * kWidth + column + 16 * b];
    if (row == column) {
#pragma unroll
        for (int a = 0; a < QT; ++a) scales[row + 16 * a] = 1 / sqrtf(fmaxf(m[a][a], floor));
    }
    for (int i = threadIdx.x; i < kStrip * kWidth; i += kThinThreads) tile[i] = scratch.basis[from][first + i];
    __syncthreads();
#pragma unroll
    for (int a = 0; a < QT; ++a)
#pragma unroll
        for (int b = 0; b < QT; ++b) m[a][b] *= scales[row + 16 * a] * scales[column + 16 * b];
    eliminate<QT>(m, columns, factor + Layout::kPivotsAt);
#pragma unroll
    for (int a = 0; a < QT; ++a)
#pragma unroll
        for (int b = 0; b < QT; ++b) {
            int const i = row + 16 * a, c = column + 16 * b;
            float const inverse = c == i ? 1 : c < min(i, columns) ? m[a][b] : 0;
            factor[i * kPitch + c] = inverse * scales[c];
        }
    __syncthreads();
    float values[QT] = {};
    for (int i = 0; i < kWidth; ++i)
#pragma unroll
        for (int b = 0; b < QT; ++b) values[b] += tile[row * kWidth + i] * factor[(column + 16 * b) * kPitch + i];
    __syncthreads();
#pragma unroll
    for (int b = 0; b < QT; ++b) {
        int const at = row * kWidth + column + 16 * b;
        tile[at] = values[b];
        scratch.basis[1 - from][first + at] = values[b];
    }
    __syncthreads();
    writePart<QT>(tile, scratch.parts[1 - from] + static_cast<int64_t>(blockIdx.x) * kWidth * kWidth);
}

}  // namespace tokprune::leverage
