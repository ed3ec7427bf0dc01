// CholeskyQR in column order: Y ← Y L⁻ᵀ with YᵀY = LDLᵀ, its columns scaled to unit norm before.
//
// Rows of massive activation grade the spectrum over many decades. Gram-Schmidt order keeps small directions exact,
// where a symmetric or a pivoted method would drown them in the rounding of the large ones.
#pragma once

#include "wide.cuh"

namespace tokprune::leverage {

template <int QT>
struct Orthonormal {
    static constexpr int kWidth = 16 * QT;
    // So that what a warp reads at once falls into different banks.
    static constexpr int kPitch = kWidth + (isWide(kWidth) ? 4 : 1), kTilePitch = kWidth + (isWide(kWidth) ? 4 : 0);
    // Shared memory, in floats: the factor, the strip, forPivots' four vectors, the scales.
    static constexpr int kTileAt = kWidth * kPitch, kPivotsAt = kTileAt + kStrip * kTilePitch;
    static constexpr int kScalesAt = kPivotsAt + 4 * kWidth;
    static constexpr size_t kShared = (kScalesAt + kWidth) * sizeof(float);
};

// Eliminates the first `columns` columns of the unit-diagonal matrix m [Q, Q], held as addSquare does, from all later
// rows, in place: row j ends as L⁻¹'s below the diagonal, as DLᵀ's from it on.
template <int QT>
__device__ void eliminate(float (&m)[QT][QT], int columns, float* shared) {
    int const row = threadIdx.x / 16, column = threadIdx.x % 16;
    forPivots<QT>(m, columns, shared, [&](int t, int j, float const* pivotRow, float const* pivotColumn) {
        float const pivot = pivotRow[j], inverse = pivot > kFloor ? 1 / pivot : 0;
#pragma unroll
        for (int a = 0; a < QT; ++a) {
            if (a < t) continue;  // rows before the pivot's stay as they are
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

// values[b] = (tile factorᵀ) at the thread's row of the strip and its column + 16 b, by CUDA cores.
template <int QT>
__device__ void thinApply(float const* tile, float const* factor, float (&values)[QT]) {
    using Layout = Orthonormal<QT>;
    int const row = threadIdx.x / 16, column = threadIdx.x % 16;
    for (float& value : values) value = 0;
    for (int i = 0; i < Layout::kWidth; ++i)
#pragma unroll
        for (int b = 0; b < QT; ++b)
            values[b] += tile[row * Layout::kTilePitch + i] * factor[(column + 16 * b) * Layout::kPitch + i];
}

// The same by tensor cores, to `out` [16, kTilePitch], which may be the tile: warps share out blocks of eight columns.
template <int QT>
__device__ void wideApply(float const* tile, float const* factor, float* out) {
    using Layout = Orthonormal<QT>;
    constexpr int kBlocks = 2 * QT, kMine = ceilDiv(kBlocks, kThinWarps);
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, inGroup = lane % 4;
    float sums[kMine][4] = {};
#pragma unroll 2
    for (int k = inGroup; k < Layout::kWidth; k += kStep) {
        float const* const left = tile + group * Layout::kTilePitch + k;
        float const a[4] = {left[0], left[8 * Layout::kTilePitch], left[4], left[8 * Layout::kTilePitch + 4]};
#pragma unroll
        for (int m = 0; m < kMine; ++m) {
            int const block = warp + m * kThinWarps;
            if (block >= kBlocks) continue;
            float const* const right = factor + (8 * block + group) * Layout::kPitch + k;
            float const b[2] = {right[0], right[4]};
            mmaFloat(sums[m], a, b);
        }
    }
    __syncthreads();  // all have read the tile
#pragma unroll
    for (int m = 0; m < kMine; ++m) {
        int const block = warp + m * kThinWarps;
        if (block >= kBlocks) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e)
            out[(group + 8 * (e / 2)) * Layout::kTilePitch + 8 * block + 2 * inGroup + e % 2] = sums[m][e];
    }
}

// Grid (strips, 1, images): Y of basis[from], its columns scaled and the first `columns` taken out of all later ones,
// to the other basis, and its part there. Every block does the same elimination, of YᵀY from its parts, or from `small`
// if wide. `floor`: least squares of a column that is scaled to unit norm.
template <int QT>
__global__ void __launch_bounds__(kThinThreads)
    orthonormaliseKernel(Sizes sizes, float* workspace, int from, int columns, float floor) {
    using Layout = Orthonormal<QT>;
    TOKPRUNE_SHARED(memory);
    float* const factor = reinterpret_cast<float*>(memory);
    float *const tile = factor + Layout::kTileAt, *const scales = factor + Layout::kScalesAt;
    constexpr int kWidth = Layout::kWidth, kPitch = Layout::kPitch, kTilePitch = Layout::kTilePitch;
    int const row = threadIdx.x / 16, column = threadIdx.x % 16, first = blockIdx.x * kStrip * kWidth;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    float const* const parts = isWide(kWidth) ? scratch.small : scratch.parts[from];
    int const count = isWide(kWidth) ? 1 : sizes.strips;
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
    for (int i = threadIdx.x; i < kStrip * kWidth; i += kThinThreads)
        tile[i / kWidth * kTilePitch + i % kWidth] = scratch.basis[from][first + i];
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
    float* const out = scratch.basis[1 - from] + first;
    if constexpr (isWide(kWidth)) {
        wideApply<QT>(tile, factor, tile);
        __syncthreads();
        for (int i = threadIdx.x; i < kStrip * kWidth; i += kThinThreads)
            out[i] = tile[i / kWidth * kTilePitch + i % kWidth];
        if (threadIdx.x < kWidth) {
            float square = 0;
            for (int r = 0; r < kStrip; ++r) {
                float const value = tile[r * kTilePitch + threadIdx.x];
                square += value * value;
            }
            scratch.parts[1 - from][blockIdx.x * kWidth + threadIdx.x] = square;
        }
    } else {
        float values[QT];
        thinApply<QT>(tile, factor, values);
        __syncthreads();
#pragma unroll
        for (int b = 0; b < QT; ++b) {
            int const at = row * kWidth + column + 16 * b;
            tile[at] = values[b];
            out[at] = values[b];
        }
        __syncthreads();
        writePart<QT>(tile, scratch.parts[1 - from] + static_cast<int64_t>(blockIdx.x) * kWidth * kWidth);
    }
}

}  // namespace tokprune::leverage
