// Products with a tall, thin matrix of q ≤ 32 columns, in FP32 proper; wide.cuh has those of more columns.
//
// A block makes a strip of 16 rows; its eight warps share out the sum and add up in a fixed order. Q = 16 QT columns,
// those behind q being zero. Columns of a basis are scaled to unit norm by whoever reads it: the norms are not known
// before all strips are there.
#pragma once

#include "sizes.cuh"

namespace tokprune::leverage {

constexpr int kThinThreads = 256, kThinWarps = kThinThreads / 32;  // at least one block a multiprocessor: no spills
// Noise: on a unit diagonal, squares below this are rounding of FP32 products. Its columns are not scaled to unit norm,
// nor eliminated from others. A shift of the diagonal, the usual mend, leaves its share of u_1 in every column, which
// the next product multiplies by λ_1/λ_j: with gradings above 1e5 that diverges.
constexpr float kFloor = 5e-6f;

template <int QT>
struct Thin {
    static constexpr int kWidth = 16 * QT;
    // Shared memory, in floats: the warps' shares, the strip, a vector of the width and the shares it is the sum of.
    static constexpr int kTileAt = kThinWarps * kStrip * kWidth, kVectorAt = kTileAt + kStrip * kWidth;
    static constexpr int kSharesAt = kVectorAt + kWidth;
    static constexpr size_t kShared = (kSharesAt + kThinThreads) * sizeof(float);
};

// vector[j] = Σ source[i · stride + j · step] over i < count, for j < QT · 16: each thread adds every `groups`-th.
template <int QT>
__device__ void sumVector(float const* source, int count, int64_t stride, int step, float* vector, float* shares) {
    constexpr int kWidth = 16 * QT, kGroups = kThinThreads / kWidth;
    int const column = threadIdx.x % kWidth, group = threadIdx.x / kWidth;
    if (group < kGroups) {
        float sum = 0;
#pragma unroll 4
        for (int i = group; i < count; i += kGroups) sum += source[i * stride + column * step];
        shares[threadIdx.x] = sum;
    }
    __syncthreads();
    if (group == 0) {
        float sum = 0;
        for (int i = 0; i < kGroups; ++i) sum += shares[i * kWidth + column];
        vector[column] = sum;
    }
    __syncthreads();
}

// Factors that scale a basis' columns to unit norm, from its strips' shares of basisᵀ basis, or of its diagonal.
template <int QT>
__device__ void columnScales(Sizes const& sizes, float const* parts, float* scales, float* shares) {
    constexpr int kWidth = 16 * QT, kLength = isWide(kWidth) ? 1 : kWidth;  // of a part, in rows
    sumVector<QT>(parts, sizes.strips, kLength * kWidth, isWide(kWidth) ? 1 : kWidth + 1, scales, shares);
    if (threadIdx.x < kWidth) scales[threadIdx.x] = 1 / sqrtf(fmaxf(scales[threadIdx.x], kFloor));
    __syncthreads();
}

struct GramColumns {
    float const* gram;
    int pitch;
    __device__ float4 operator()(int k, int row) const {  // symmetric: columns are rows
        return *reinterpret_cast<float4 const*>(gram + static_cast<int64_t>(k) * pitch + row);
    }
};

// tile [16, Q] = Σ over k in [begin, end) of left(k, row) · right[k, :]. Ends with a barrier.
template <int QT, class Left>
__device__ void thinProduct(Left const& left, int row, float const* right, int begin, int end, float* shared) {
    constexpr int kWidth = Thin<QT>::kWidth;
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, rowAt = 4 * (lane / 8), columnAt = lane % 8;
    float sums[4][2 * QT] = {};
#pragma unroll 8  // as many loads under way as registers allow: the L2 cache is far
    for (int k = begin + warp; k < end; k += kThinWarps) {
        float4 const a = left(k, row + rowAt);
        float const* const b = right + static_cast<int64_t>(k) * kWidth + columnAt;
#pragma unroll
        for (int j = 0; j < 2 * QT; ++j) {
            float const value = b[8 * j];
            sums[0][j] += a.x * value;
            sums[1][j] += a.y * value;
            sums[2][j] += a.z * value;
            sums[3][j] += a.w * value;
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 2 * QT; ++j)
            shared[(warp * kStrip + rowAt + i) * kWidth + columnAt + 8 * j] = sums[i][j];
    __syncthreads();
    for (int i = threadIdx.x; i < kStrip * kWidth; i += kThinThreads) {
        float sum = 0;
        for (int w = 0; w < kThinWarps; ++w) sum += shared[w * kStrip * kWidth + i];
        shared[Thin<QT>::kTileAt + i] = sum;
    }
    __syncthreads();
}

// sums[a][b] += (tileᵀ tile) at row threadIdx.x / 16 + 16 a, column threadIdx.x % 16 + 16 b.
template <int QT>
__device__ void addSquare(float const* tile, float (&sums)[QT][QT]) {
    int const row = threadIdx.x / 16, column = threadIdx.x % 16;
    for (int r = 0; r < kStrip; ++r) {
        float left[QT], right[QT];
#pragma unroll
        for (int a = 0; a < QT; ++a) {
            left[a] = tile[r * 16 * QT + row + 16 * a];
            right[a] = tile[r * 16 * QT + column + 16 * a];
        }
#pragma unroll
        for (int a = 0; a < QT; ++a)
#pragma unroll
            for (int b = 0; b < QT; ++b) sums[a][b] += left[a] * right[b];
    }
}

// Writes a matrix [Q, Q] that the block holds as addSquare does.
template <int QT>
__device__ void writeSquare(float const (&sums)[QT][QT], float* out) {
    int const row = threadIdx.x / 16, column = threadIdx.x % 16;
#pragma unroll
    for (int a = 0; a < QT; ++a)
#pragma unroll
        for (int b = 0; b < QT; ++b) out[(row + 16 * a) * 16 * QT + column + 16 * b] = sums[a][b];
}

// Calls visit(j, row, column) for j < count with row and column j of the matrix m that the block holds as addSquare
// does, as they then are; visit may change m. `shared` [4 Q]: row and column, twice, in turn; one barrier for each j.
// The outer loop is unrolled so that m stays in registers; visit is told j / 16, too, as a constant.
template <int QT, class Visit>
__device__ void forPivots(float (&m)[QT][QT], int count, float* shared, Visit visit) {
    constexpr int kWidth = 16 * QT;
    int const row = threadIdx.x / 16, column = threadIdx.x % 16;
#pragma unroll
    for (int t = 0; t < QT; ++t)
#pragma unroll 1
        for (int s = 0; s < 16 && 16 * t + s < count; ++s) {
            float *const pivotRow = shared + s % 2 * 2 * kWidth, *const pivotColumn = pivotRow + kWidth;
#pragma unroll
            for (int b = 0; b < QT; ++b) {
                if (row == s) pivotRow[column + 16 * b] = m[t][b];
                if (column == s) pivotColumn[row + 16 * b] = m[b][t];
            }
            __syncthreads();
            visit(t, 16 * t + s, pivotRow, pivotColumn);
        }
}

template <int QT>
__device__ void writePart(float const* tile, float* part) {
    float sums[QT][QT] = {};
    addSquare<QT>(tile, sums);
    writeSquare<QT>(sums, part);
}

// c of the turn: `node`, which may be 0, is its share of the least Rayleigh quotient of the turn before.
template <int QT>
__device__ float shiftOf(Sizes const& sizes, Scratch const& scratch, int turn, float node, float* vector,
                         float* shares) {
    if (!(node > 0)) return 0;
    sumVector<QT>(scratch.quotients[(turn + 1) % 2], sizes.strips, 16 * QT, 1, vector, shares);
    float least = vector[0];
    for (int j = 1; j < sizes.q; ++j) least = fminf(least, vector[j]);
    __syncthreads();  // before the vector is written again
    return least * node;
}

// The scales of the columns of basis[from] in a turn: the first turn's Q is taken as it is.
template <int QT>
__device__ void basisScales(Sizes const& sizes, Scratch const& scratch, int from, int turn, float* scales,
                            float* shares) {
    if (turn > 0) {
        columnScales<QT>(sizes, scratch.parts[from], scales, shares);
    } else {
        if (threadIdx.x < 16 * QT) scales[threadIdx.x] = 1;
        __syncthreads();
    }
}

// Grid (strips, 1, images): Y = (XXᵀ / tr(XXᵀ) − c) Q from basis[from] to the other, and its part of YᵀY.
template <int QT>
__global__ void __launch_bounds__(kThinThreads, 1)
    multiplyKernel(Sizes sizes, float* workspace, int from, int turn, float node) {
    TOKPRUNE_SHARED(memory);
    float* const shared = reinterpret_cast<float*>(memory);
    constexpr int kWidth = Thin<QT>::kWidth;
    float *const tile = shared + Thin<QT>::kTileAt, *const vector = shared + Thin<QT>::kVectorAt;
    float* const shares = shared + Thin<QT>::kSharesAt;
    Scratch const scratch = scratchOf(sizes, workspace, blockIdx.z);
    int const row = blockIdx.x * kStrip;
    float const shift = shiftOf<QT>(sizes, scratch, turn, node, vector, shares);
    thinProduct<QT>(GramColumns{scratch.gram, sizes.nPadded}, row, scratch.basis[from], 0, sizes.n, shared);
    basisScales<QT>(sizes, scratch, from, turn, vector, shares);
    float const inverseTrace = *scratch.inverseTrace;
    float const* const before = scratch.basis[from] + row * kWidth;
    float* const products = shared;  // the warps' shares are done with; of basis and result, before the shift
    for (int i = threadIdx.x; i < kStrip * kWidth; i += kThinThreads) {
        float const scale = vector[i % kWidth], unit = before[i] * scale, value = tile[i] * scale * inverseTrace;
        products[i] = unit * value;
        tile[i] = value - shift * unit;
        scratch.basis[1 - from][row * kWidth + i] = tile[i];
    }
    __syncthreads();
    if (threadIdx.x < kWidth) {
        float quotient = 0;
        for (int r = 0; r < kStrip; ++r) quotient += products[r * kWidth + threadIdx.x];
        scratch.quotients[turn % 2][blockIdx.x * kWidth + threadIdx.x] = quotient;
    }
    writePart<QT>(tile, scratch.parts[1 - from] + static_cast<int64_t>(blockIdx.x) * kWidth * kWidth);
}

}  // namespace tokprune::leverage
