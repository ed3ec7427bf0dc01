// CrossAttentionTopK: the sequence of launches, as plugins/cross_attention_topk/reference.py behind its projections.

#include "launch.h"

#include "../cuda/topk.cuh"
#include "attention.cuh"
#include "linear.cuh"

namespace tokprune {
namespace cross_attention {
namespace {

constexpr size_t kAlignment = 256;

bool isTaken(CrossAttentionTopK const& call) {
    if (call.images < 1 || call.images > kGridLimit || call.n < 1 || call.n > kMostRows || call.m < 1) return false;
    if (call.k < 1 || call.k > call.n || call.width < 1 || call.intermediate < 1) return false;
    if (call.heads < 1 || call.heads > kGridLimit || call.width % call.heads) return false;
    // Rows of all images are numbered by int, and a grid's y is as short as its z.
    if (static_cast<int64_t>(call.images) * call.n > INT32_MAX - kTile) return false;
    if (ceilDiv(call.width, kTile) > kGridLimit || ceilDiv(call.intermediate, kTile) > kGridLimit) return false;
    return call.width / call.heads <= kWidestHead;
}

// Where each intermediate lies; all have images · n rows.
struct Scratch {
    float *mixed, *attended, *inner;  // [W], [W], [F]; `mixed` is later the normed rows, then the module's last ones
};

size_t layOut(CrossAttentionTopK const& call, unsigned char* base, Scratch& scratch) {
    size_t length = 0;
    auto const take = [&](int32_t width) {
        float* const start = reinterpret_cast<float*>(base + length);
        size_t const bytes = static_cast<size_t>(call.images) * call.n * width * sizeof(float);
        length += (bytes + kAlignment - 1) / kAlignment * kAlignment;
        return start;
    };
    scratch.mixed = take(call.width);
    scratch.attended = take(call.width);
    scratch.inner = take(call.intermediate);
    return length;
}

}  // namespace
}  // namespace cross_attention

size_t crossAttentionTopKWorkspace(CrossAttentionTopK const& call) noexcept {
    cross_attention::Scratch scratch;
    return cross_attention::isTaken(call) ? cross_attention::layOut(call, nullptr, scratch) : 0;
}

cudaError_t crossAttentionTopK(CrossAttentionTopK const& call, float const* v, float const* q, float const* key,
                               float const* u, bool const* textValid, CrossAttentionWeights const& weights,
                               int64_t* keptIndices, float* scores, void* workspace, cudaStream_t stream) noexcept {
    using namespace cross_attention;
    if (!isTaken(call)) return cudaErrorInvalidValue;
    Scratch scratch;
    layOut(call, static_cast<unsigned char*>(workspace), scratch);
    int const rows = call.images * call.n, width = call.width, inner = call.intermediate;
    dim3 const warps(ceilDiv(rows, kRowThreads / 32));
    cudaError_t status = launch(attentionKernel, dim3(ceilDiv(call.n, kRows), call.heads, call.images),
                                kAttentionThreads, attentionShared(width / call.heads), stream, q, key, u, textValid,
                                scratch.mixed, call.n, call.m, width, width / call.heads);
    if (status != cudaSuccess) return status;
    status = linear({scratch.mixed, weights.oProj, nullptr, v, scratch.attended, rows, width, width}, stream);
    if (status != cudaSuccess) return status;
    float* const normed = scratch.mixed;
    status = launch(normKernel, warps, kRowThreads, 0, stream, scratch.attended, weights.mlpNorm, normed, rows, width,
                    call.eps);
    if (status != cudaSuccess) return status;
    status = linear({normed, weights.upProj, weights.upBias, nullptr, scratch.inner, rows, width, inner, true}, stream);
    if (status != cudaSuccess) return status;
    float* const last = scratch.mixed;
    status = linear({scratch.inner, weights.downProj, weights.downBias, scratch.attended, last, rows, inner, width},
                    stream);
    if (status != cudaSuccess) return status;
    status = launch(headKernel, warps, kRowThreads, 0, stream, last, weights.headNorm, weights.head, weights.headBias,
                    scores, rows, width, call.eps);
    if (status != cudaSuccess) return status;
    return topK(scores, call.images, call.n, call.k, keptIndices, stream);
}

}  // namespace tokprune
