// CUDA kernels on a CPU: the same sources, compiled by a C++ compiler, run block after block.
//
// The threads of a block are fibers. One runs until it meets others: at __syncthreads, where all threads of the block
// must arrive, or at a warp's operation, where all 32 lanes must, and at the same line of source. So a divergent
// barrier is an error here, and an order of threads can be chosen: between two meetings each thread runs alone, in
// that order, and so do blocks. Results that depend on the order show a race.
//
// Shared memory is filled with NaN before each block and has guards behind it; asynchronous copies land only when
// they are waited for. Tensor-core products are exact, summed up in double and then cut off towards zero to FP32:
// a real one sums up less exactly, but it does cut off.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define TOKPRUNE_SHARED(name) unsigned char* const name = cuda_host::sharedMemory()

struct float4 {
    float x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

constexpr int kWarp = 32;

unsigned char* sharedMemory();
// Stops the launch: it returns cudaErrorLaunchFailure, and lastError() says why.
[[noreturn]] void fail(std::string const& why);
void blockBarrier(char const* file, int line);
// Waits for all lanes of the warp to come here; the last one runs `operation` on what each of them posted.
void warpMeeting(char const* file, int line, void* mine, void (*operation)(void* const* posts));
cudaError_t runGrid(void const* kernel, dim3 grid, int threads, size_t shared, std::function<void()> const& body);

void copyAsync(void* shared, void const* source, bool valid);
void copyCommit();
void copyWaitFor(int pending);
template <int Pending>
void copyWait() {
    copyWaitFor(Pending);
}

float halfToFloat(uint16_t bits);
uint32_t toHalves(float first, float second);
uint32_t toTf32(float value);
void mmaHalf(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]);
void mmaBFloat16(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]);
void mmaTf32(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]);

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t,
                   Arguments... arguments) {
    return runGrid(reinterpret_cast<void const*>(kernel), grid, threads, shared, [=] { kernel(arguments...); });
}

// --- for tests

// 0: threads and blocks ascending, 1: descending, else shuffled by this seed.
void setOrder(unsigned order);
char const* lastError();

}  // namespace cuda_host

inline void __syncthreads(char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
    cuda_host::blockBarrier(file, line);
}

inline void __syncwarp(unsigned mask = ~0u, char const* file = __builtin_FILE(), int line = __builtin_LINE()) {
    if (mask != ~0u) cuda_host::fail("a warp's operation without all of its lanes");
    cuda_host::warpMeeting(file, line, nullptr, [](void* const*) {});
}

inline float __shfl_xor_sync(unsigned mask, float value, int distance, char const* file = __builtin_FILE(),
                             int line = __builtin_LINE()) {
    struct Post {
        float value;
        int distance;
        float result;
    } post{value, distance, 0};
    if (mask != ~0u) cuda_host::fail("a warp's operation without all of its lanes");
    cuda_host::warpMeeting(file, line, &post, [](void* const* posts) {
        for (int lane = 0; lane < cuda_host::kWarp; ++lane) {
            Post* const mine = static_cast<Post*>(posts[lane]);
            mine->result = static_cast<Post*>(posts[lane ^ mine->distance])->value;
        }
    });
    return post.result;
}

inline unsigned __ballot_sync(unsigned mask, bool predicate, char const* file = __builtin_FILE(),
                              int line = __builtin_LINE()) {
    struct Post {
        bool predicate;
        unsigned result;
    } post{predicate, 0};
    if (mask != ~0u) cuda_host::fail("a warp's operation without all of its lanes");
    cuda_host::warpMeeting(file, line, &post, [](void* const* posts) {
        unsigned ballot = 0;
        for (int lane = 0; lane < cuda_host::kWarp; ++lane)
            ballot |= static_cast<unsigned>(static_cast<Post*>(posts[lane])->predicate) << lane;
        for (int lane = 0; lane < cuda_host::kWarp; ++lane) static_cast<Post*>(posts[lane])->result = ballot;
    });
    return post.result;
}

inline int __popc(unsigned bits) {
    return __builtin_popcount(bits);
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}
using std::max;
using std::min;
