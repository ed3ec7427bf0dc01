// C = A Bᵀ by tensor cores, a tile of 64 x 64 a block: A and B row by row, float, FP16 or BF16, accumulated in FP32.
//
// Products of 16-bit types are exact; floats go as two TF32 numbers each (mmaFloat). The tensor core's accumulation
// cuts off where FP32 would round, always towards zero, so its sums are kept short and added up in FP32 proper.
#pragma once

#include "device.cuh"

namespace tokprune {

constexpr int kTile = 64, kTileThreads = 128;  // four warps, each a quarter of 32 x 32
constexpr int kChunkBytes = 128;               // of each row, per stage
constexpr int kPitch = kChunkBytes + 16;       // a row in shared memory: fragments fall into different banks
constexpr int kStages = 3;
constexpr size_t kTileShared = kStages * 2 * kTile * kPitch;

template <class T>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));  // elements of a row per stage

__device__ inline void mmaWords(Half, float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
    mmaHalf(c, a, b);
}

__device__ inline void mmaWords(BFloat16, float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
    mmaBFloat16(c, a, b);
}

__device__ inline void mmaWords(float, float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
    float const fa[4] = {__uint_as_float(a[0]), __uint_as_float(a[1]), __uint_as_float(a[2]), __uint_as_float(a[3])};
    float const fb[2] = {__uint_as_float(b[0]), __uint_as_float(b[1])};
    mmaFloat(c, fa, fb);
}

// `rows` of a matrix from `data` on, `length` elements apart. `vector`: rows begin on 16-byte boundaries.
template <class T>
struct Rows {
    T const* data;
    int rows, length;
    bool vector;
};

template <class T>
__host__ __device__ inline bool isVector(T const* data, int length) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && length * sizeof(T) % 16 == 0;
}

// Elements [k, k + kChunk) of 64 rows into shared memory; zeros behind the last row and from `end` on.
template <class T>
__device__ void loadChunk(Rows<T> const& source, int k, int end, unsigned char* shared) {
    constexpr int kSegment = 16 / static_cast<int>(sizeof(T));
    for (int i = threadIdx.x; i < kTile * kChunkBytes / 16; i += kTileThreads) {
        int const row = i / (kChunkBytes / 16), segment = i % (kChunkBytes / 16), first = k + segment * kSegment;
        unsigned char* const target = shared + row * kPitch + segment * 16;
        T const* const from = source.data + static_cast<int64_t>(row) * source.length + first;
        if (source.vector) {
            bool const valid = row < source.rows && first < end;
            copyAsync(target, valid ? from : source.data, valid);
        } else {
            for (int e = 0; e < kSegment; ++e)
                reinterpret_cast<T*>(target)[e] = row < source.rows && first + e < end ? from[e] : T{};
        }
    }
}

// The block's tile over k in [begin, end), begin a multiple of the chunk, in PTX's fragments: sums[m][n] is the warp's
// 16 x 8 tile at row 16 m, column 8 n of its quarter.
template <class T>
__device__ void tileProduct(Rows<T> const& a, Rows<T> const& b, int begin, int end, unsigned char* shared,
                            float (&sums)[2][4][4]) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int const aRow = 32 * (warp % 2) + lane / 4, bRow = 32 * (warp / 2) + lane / 4;
    int const chunks = ceilDiv(end - begin, kChunk<T>);
    auto const load = [&](int chunk) {
        unsigned char* const stage = shared + chunk % kStages * (2 * kTile * kPitch);
        if (chunk < chunks) {
            loadChunk(a, begin + chunk * kChunk<T>, end, stage);
            loadChunk(b, begin + chunk * kChunk<T>, end, stage + kTile * kPitch);
        }
        copyCommit();
    };
    for (auto& row : sums)
        for (auto& tile : row)
            for (float& value : tile) value = 0;
    for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        copyWait<kStages - 2>();
        __syncthreads();  // this chunk is there for all, and all are done with the one that the next load overwrites
        load(chunk + kStages - 1);
        unsigned char const* const stage = shared + chunk % kStages * (2 * kTile * kPitch);
        auto const word = [&](int row, int index) {
            return *reinterpret_cast<uint32_t const*>(stage + row * kPitch + 4 * index);
        };
        float part[2][4][4] = {};
#pragma unroll
        for (int step = 0; step < kChunkBytes / 32; ++step) {
            int const at = 8 * step + lane % 4;
            uint32_t fragments[2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                fragments[m][0] = word(aRow + 16 * m, at);
                fragments[m][1] = word(aRow + 16 * m + 8, at);
                fragments[m][2] = word(aRow + 16 * m, at + 4);
                fragments[m][3] = word(aRow + 16 * m + 8, at + 4);
            }
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                uint32_t const other[2] = {word(kTile + bRow + 8 * n, at), word(kTile + bRow + 8 * n, at + 4)};
#pragma unroll
                for (int m = 0; m < 2; ++m) mmaWords(T{}, part[m][n], fragments[m], other);
            }
        }
#pragma unroll
        for (int m = 0; m < 2; ++m)
#pragma unroll
            for (int n = 0; n < 4; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) sums[m][n][i] += part[m][n][i];
    }
    copyWait<0>();
}

// Calls visit(row, column, value) for every element of the block's tile that this thread holds.
template <class Visit>
__device__ void forTile(float const (&sums)[2][4][4], Visit visit) {
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int const row = 32 * (warp % 2) + lane / 4, column = 32 * (warp / 2) + 2 * (lane % 4);
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) visit(row + 16 * m + 8 * (i / 2), column + 8 * n + i % 2, sums[m][n][i]);
}

}  // namespace tokprune
