// The operators' launch functions under the emulation, by C's conventions for ctypes.

#include "cross_attention_topk/launch.h"
#include "cuda_host.h"
#include "leverage_topk/launch.h"

using namespace tokprune;

extern "C" {

size_t leverage_workspace(LeverageTopK const* call) {
    return leverageTopKWorkspace(*call);
}

int leverage(LeverageTopK const* call, int type, void const* x, int64_t* kept, float* scores, void* workspace) {
    return leverageTopK(*call, static_cast<DataType>(type), x, kept, scores, workspace, nullptr);
}

size_t cross_attention_workspace(CrossAttentionTopK const* call) {
    return crossAttentionTopKWorkspace(*call);
}

// inputs: v, q, key, u, text_valid; weights: as CrossAttentionWeights lists them.
int cross_attention(CrossAttentionTopK const* call, void* const* inputs, float* const* weights, int64_t* kept,
                    float* scores, void* workspace) {
    auto const matrix = [&](int i) { return static_cast<float const*>(inputs[i]); };
    CrossAttentionWeights const w{weights[0], weights[1], weights[2], weights[3], weights[4],
                                  weights[5], weights[6], weights[7], weights[8]};
    return crossAttentionTopK(*call, matrix(0), matrix(1), matrix(2), matrix(3), static_cast<bool const*>(inputs[4]), w,
                              kept, scores, workspace, nullptr);
}

void set_order(unsigned order) {
    cuda_host::setOrder(order);
}

char const* last_error() {
    return cuda_host::lastError();
}
}
