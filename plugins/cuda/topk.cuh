// The order rule that all selectors share (plugins/topk.py): best score first, ties to the lower index, ascending.
#pragma once

#include "launch.cuh"

namespace tokprune {

constexpr int kTopKThreads = 512, kMostRows = 4096;

// A number that orders as the score does: -0 as 0, NaN below all.
__device__ inline uint32_t orderOf(float score) {
    if (score != score) return 0;
    uint32_t const bits = __float_as_uint(score + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// kept [images, k] of scores [images, n]; one block an image. A row is kept if fewer than k rows go before it.
static __global__ void __launch_bounds__(kTopKThreads) topKKernel(float const* scores, int n, int k, int64_t* kept) {
    TOKPRUNE_SHARED(shared);
    uint32_t* const order = reinterpret_cast<uint32_t*>(shared);  // [n]
    int* const perWarp = reinterpret_cast<int*>(order + n);       // [warps]
    int const thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    scores += static_cast<int64_t>(blockIdx.x) * n;
    kept += static_cast<int64_t>(blockIdx.x) * k;
    for (int i = thread; i < n; i += kTopKThreads) order[i] = orderOf(scores[i]);
    __syncthreads();
    int found = 0;  // rows kept before this turn's
    for (int base = 0; base < n; base += kTopKThreads) {
        int const row = base + thread;
        bool keep = false;
        if (row < n) {
            uint32_t const mine = order[row];
            int before = 0;
            for (int i = 0; i < n; ++i) before += order[i] > mine || (order[i] == mine && i < row);
            keep = before < k;
        }
        unsigned const ballot = __ballot_sync(kFullWarp, keep);
        if (lane == 0) perWarp[warp] = __popc(ballot);
        __syncthreads();
        int place = found + __popc(ballot & ((1u << lane) - 1));
        for (int i = 0; i < kTopKThreads / 32; ++i) {
            if (i < warp) place += perWarp[i];
            found += perWarp[i];
        }
        if (keep) kept[place] = row;
        __syncthreads();  // before perWarp is written again
    }
}

inline cudaError_t topK(float const* scores, int images, int n, int k, int64_t* kept, cudaStream_t stream) {
    size_t const shared = (static_cast<size_t>(n) + kTopKThreads / 32) * sizeof(uint32_t);
    return launch(topKKernel, dim3(images), kTopKThreads, shared, stream, scores, n, k, kept);
}

}  // namespace tokprune
