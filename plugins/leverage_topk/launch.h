// LeverageTopK on a GPU: what a binding may call. Raw device pointers; knows no framework.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "../cuda/types.h"

namespace tokprune {

// Sizes and attributes of one call; the attributes are those of the ONNX node (plugins/README.md).
struct LeverageTopK {
    int32_t images, n, d, k;
    int32_t rank;  // 0 if energy is given
    float energy;  // 0 if rank is given
    int32_t maxRank, rounds, oversampling, purifications, seed;
};

// Bytes of scratch that leverageTopK needs, in proportion to `images`; 0 for sizes it does not take.
size_t leverageTopKWorkspace(LeverageTopK const& call) noexcept;

// Enqueues the scores of x [images, n, d] and the k best rows of each image, ascending. All pointers are device
// pointers, `workspace` 256-byte aligned, the others to their element; x is finite. Allocates nothing, waits for
// nothing, and enqueues the same launches for the same sizes. cudaErrorInvalidValue for sizes it does not take: n up
// to 4096, and the subspace's width min((rank or maxRank) + oversampling, n, d) up to 128.
cudaError_t leverageTopK(LeverageTopK const& call, DataType type, void const* x, int64_t* keptIndices /* [images, k] */,
                         float* scores /* [images, n] */, void* workspace, cudaStream_t stream) noexcept;

}  // namespace tokprune
