// Cross-attention from visual to text rows, and what is done row by row. All FP32.
#pragma once

#include "../cuda/launch.cuh"

namespace tokprune::cross_attention {

constexpr int kRows = 8;        // visual rows of a block, one a warp
constexpr int kAttentionThreads = 32 * kRows, kTextChunk = 32;  // text rows at a time, one a lane
constexpr int kWidestHead = 256;

__host__ __device__ constexpr size_t attentionShared(int headWidth) {
    return ((2 * kTextChunk) * (headWidth + 1) + kRows * (2 * headWidth + kTextChunk)) * sizeof(float) +
           kTextChunk * sizeof(int);
}

// mixed [images, n, width] = softmax(q keyᵀ / √headWidth) u for each head; grid (ceil(n / kRows), heads, images). Text
// rows that only fill up are not read, and get no share. Softmax in one pass: sums are rescaled when the maximum grows.
static __global__ void __launch_bounds__(kAttentionThreads, 1)
    attentionKernel(float const* q, float const* key, float const* u, bool const* textValid, float* mixed, int n, int m,
                    int width, int headWidth) {
    TOKPRUNE_SHARED(memory);
    int const lane = threadIdx.x % 32, warp = threadIdx.x / 32, pitch = headWidth + 1;
    float* const keys = reinterpret_cast<float*>(memory);     // [kTextChunk][pitch]
    float* const values = keys + kTextChunk * pitch;          // [kTextChunk][pitch]
    float* const queries = values + kTextChunk * pitch;       // [kRows][headWidth]
    float* const sums = queries + kRows * headWidth;          // [kRows][headWidth]
    float* const shares = sums + kRows * headWidth;           // [kRows][kTextChunk]
    int* const valid = reinterpret_cast<int*>(shares + kRows * kTextChunk);  // [kTextChunk]
    int const row = blockIdx.x * kRows + warp, head = blockIdx.y * headWidth;
    int64_t const visual = (static_cast<int64_t>(blockIdx.z) * n + row) * width + head;
    int64_t const text = static_cast<int64_t>(blockIdx.z) * m;
    float const scale = 1 / sqrtf(static_cast<float>(headWidth));
    float *const mine = sums + warp * headWidth, *const query = queries + warp * headWidth;
    for (int c = lane; c < headWidth; c += 32) {
        query[c] = row < n ? q[visual + c] * scale : 0;
        mine[c] = 0;
    }
    float most = -INFINITY, total = 0;
    for (int base = 0; base < m; base += kTextChunk) {
        __syncthreads();  // the chunk before is done with
        if (threadIdx.x < kTextChunk) {
            int const at = base + threadIdx.x;
            valid[threadIdx.x] = at < m && textValid[text + at];
        }
        __syncthreads();
        for (int i = threadIdx.x; i < kTextChunk * headWidth; i += kAttentionThreads) {
            int const t = i / headWidth, c = i % headWidth;
            int64_t const at = (text + base + t) * width + head + c;
            keys[t * pitch + c] = valid[t] ? key[at] : 0;
            values[t * pitch + c] = valid[t] ? u[at] : 0;
        }
        __syncthreads();
        float logit = 0;
        for (int c = 0; c < headWidth; ++c) logit += query[c] * keys[lane * pitch + c];
        if (!valid[lane]) logit = -INFINITY;
        float const before = most;
        most = fmaxf(most, warpMax(logit));
        // Until a valid row comes, nothing is summed up, and -∞ − -∞ has to be avoided.
        float const rescale = before == most ? 1 : expf(before - most), share = valid[lane] ? expf(logit - most) : 0;
        total = total * rescale + warpSum(share);
        shares[warp * kTextChunk + lane] = share;
        __syncwarp();
        for (int c = lane; c < headWidth; c += 32) {
            float sum = 0;
            for (int t = 0; t < kTextChunk; ++t) sum += shares[warp * kTextChunk + t] * values[t * pitch + c];
            mine[c] = mine[c] * rescale + sum;
        }
        __syncwarp();
    }
    if (row >= n) return;
    for (int c = lane; c < headWidth; c += 32) mixed[visual + c] = mine[c] / fmaxf(total, kTiny);
}

constexpr int kRowThreads = 256;  // a warp for each row

__device__ inline float inverseNorm(float const* row, int width, float eps) {
    float squares = 0;
    for (int c = threadIdx.x % 32; c < width; c += 32) squares += row[c] * row[c];
    return 1 / sqrtf(warpSum(squares) / static_cast<float>(width) + eps);
}

// out = RMSNorm(x) · weight for each of `rows` rows.
static __global__ void __launch_bounds__(kRowThreads)
    normKernel(float const* x, float const* weight, float* out, int rows, int width, float eps) {
    int const row = blockIdx.x * (kRowThreads / 32) + threadIdx.x / 32;
    if (row >= rows) return;
    int64_t const first = static_cast<int64_t>(row) * width;
    float const inverse = inverseNorm(x + first, width, eps);
    for (int c = threadIdx.x % 32; c < width; c += 32) out[first + c] = x[first + c] * inverse * weight[c];
}

// scores = keep − drop, the two logits of RMSNorm(x) · norm.
static __global__ void __launch_bounds__(kRowThreads)
    headKernel(float const* x, float const* norm, float const* head, float const* bias, float* scores, int rows,
               int width, float eps) {
    int const row = blockIdx.x * (kRowThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    float const* const from = x + static_cast<int64_t>(row) * width;
    float const inverse = inverseNorm(from, width, eps);
    float keep = 0, drop = 0;
    for (int c = lane; c < width; c += 32) {
        float const value = from[c] * inverse * norm[c];
        keep += value * head[c];
        drop += value * head[width + c];
    }
    keep = warpSum(keep);
    drop = warpSum(drop);
    if (lane == 0) scores[row] = keep + bias[0] - (drop + bias[1]);
}

}  // namespace tokprune::cross_attention
