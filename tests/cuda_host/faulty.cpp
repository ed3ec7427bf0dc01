// Kernels with one fault each: what the emulation must find. And one without any.

#include "cuda_host.h"

namespace {

// Each thread reads what its neighbour wrote, without a barrier in between.
void race(float* out) {
    TOKPRUNE_SHARED(memory);
    float* const shared = reinterpret_cast<float*>(memory);
    shared[threadIdx.x] = static_cast<float>(threadIdx.x);
    out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

void noRace(float* out) {
    TOKPRUNE_SHARED(memory);
    float* const shared = reinterpret_cast<float*>(memory);
    shared[threadIdx.x] = static_cast<float>(threadIdx.x);
    __syncthreads();
    out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

void raceOfBlocks(float* out) {
    out[threadIdx.x] = static_cast<float>(blockIdx.x);
}

void missedBarrier(float*) {
    if (threadIdx.x > 0) __syncthreads();
}

void otherBarrier(float*) {
    if (threadIdx.x % 2) __syncthreads();
    else __syncthreads(__builtin_FILE(), -1);
}

void missedShuffle(float* out) {
    if (threadIdx.x != 5) out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
}

void partialMask(float* out) {
    out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1);
}

alignas(16) float const kSource[64] = {1, 2, 3, 4};

void notWaitedFor(float* out) {
    TOKPRUNE_SHARED(memory);
    if (threadIdx.x == 0) {
        cuda_host::copyAsync(memory, kSource, true);
        cuda_host::copyCommit();
        out[0] = *reinterpret_cast<float*>(memory);
        cuda_host::copyWait<0>();
    }
}

void neverWaitedFor(float*) {
    TOKPRUNE_SHARED(memory);
    if (threadIdx.x == 0) cuda_host::copyAsync(memory, kSource, true);
}

void misaligned(float*) {
    TOKPRUNE_SHARED(memory);
    if (threadIdx.x == 0) cuda_host::copyAsync(memory, kSource + 1, true);
}

void uninitialised(float* out) {
    TOKPRUNE_SHARED(memory);
    out[threadIdx.x] = reinterpret_cast<float*>(memory)[threadIdx.x];
}

void outOfBounds(float*) {
    TOKPRUNE_SHARED(memory);
    if (threadIdx.x == 0) memory[blockDim.x * sizeof(float)] = 1;
}

struct Case {
    char const* name;
    void (*kernel)(float*);
} const cases[] = {
    {"race", race},
    {"no race", noRace},
    {"race of blocks", raceOfBlocks},
    {"missed barrier", missedBarrier},
    {"other barrier", otherBarrier},
    {"missed shuffle", missedShuffle},
    {"partial mask", partialMask},
    {"not waited for", notWaitedFor},
    {"never waited for", neverWaitedFor},
    {"misaligned", misaligned},
    {"uninitialised", uninitialised},
    {"out of bounds", outOfBounds},
};

}  // namespace

// Runs the case `name` on two blocks of 64 threads with 256 bytes of shared memory; out [64].
extern "C" int run_faulty(char const* name, float* out) {
    for (Case const& one : cases)
        if (std::string(one.name) == name) return cuda_host::launch(one.kernel, dim3(2), 64, 256, nullptr, out);
    return -1;
}

extern "C" int run_with_shared(size_t bytes, bool allowed) {
    float out[64];
    if (allowed)
        cudaFuncSetAttribute(reinterpret_cast<void const*>(noRace), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes));
    return cuda_host::launch(noRace, dim3(1), 64, bytes, nullptr, static_cast<float*>(out));
}
