// CrossAttentionTopK on a GPU: what a binding may call. Raw device pointers; knows no framework.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace tokprune {

struct CrossAttentionTopK {
    int32_t images, n, m, width, heads, intermediate, k;
    float eps;
};

// The module's weights behind its projections, float32, matrices [out, in]; W width, F intermediate.
struct CrossAttentionWeights {
    float const* oProj;     // [W, W]
    float const* mlpNorm;   // [W]
    float const* upProj;    // [F, W]
    float const* upBias;    // [F]
    float const* downProj;  // [W, F]
    float const* downBias;  // [W]
    float const* headNorm;  // [W]
    float const* head;      // [2, W]: keep, drop
    float const* headBias;  // [2]
};

// Bytes of scratch that crossAttentionTopK needs; 0 for sizes it does not take.
size_t crossAttentionTopKWorkspace(CrossAttentionTopK const& call) noexcept;

// Enqueues the scores of each image's n visual rows and its k best rows, ascending. Device pointers, all float32 and
// row-major, aligned to their element, `workspace` to 256 bytes. Allocates nothing, waits for nothing.
// cudaErrorInvalidValue for sizes it does not take: n up to 4096, width / heads up to 256.
cudaError_t crossAttentionTopK(CrossAttentionTopK const& call, float const* v /* [I, N, W] projected visual rows */,
                               float const* q /* [I, N, W] not scaled */, float const* key /* [I, M, W] */,
                               float const* u /* [I, M, W] values */, bool const* textValid /* [I, M] */,
                               CrossAttentionWeights const& weights, int64_t* keptIndices /* [I, k] */,
                               float* scores /* [I, N] */, void* workspace, cudaStream_t stream) noexcept;

}  // namespace tokprune
