// What kernels need beyond plain CUDA C++: element types, tensor-core products, asynchronous copies.
//
// The only file with PTX; sm_80 is enough for all of it. Without nvcc the same names come from the tests' emulation on
// a CPU (tests/cuda_host), under which all kernels here also compile and run. Knows no operator.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
// A block's dynamic shared memory; no kernel has any other.
#define TOKPRUNE_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "cuda_host.h"
#endif

namespace tokprune {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr float kTiny = 1e-30f;  // keeps divisions finite where all is zero

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

__host__ __device__ constexpr int ceilDiv(int a, int b) {
    return (a + b - 1) / b;
}

__device__ inline float toFloat(float value) {
    return value;
}

__device__ inline float toFloat(BFloat16 value) {
    return __uint_as_float(static_cast<uint32_t>(value.bits) << 16);
}

// Sum over the lanes of a warp, the same bits in all of them.
__device__ inline float warpSum(float value) {
    for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(kFullWarp, value, mask);
    return value;
}

__device__ inline float warpMax(float value) {
    for (int mask = 16; mask > 0; mask /= 2) value = fmaxf(value, __shfl_xor_sync(kFullWarp, value, mask));
    return value;
}

#if defined(__CUDACC__)

__device__ inline float toFloat(Half value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

// Two FP16 numbers nearest to the values, the first in the low half.
__device__ inline uint32_t toHalves(float first, float second) {
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

// TF32 nearest to value, ties away from zero, as the bits of a float.
__device__ inline uint32_t toTf32(float value) {
    uint32_t result;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
    return result;
}

#define TOKPRUNE_MMA(NAME, SHAPE)                                                                                   \
    __device__ inline void NAME(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {                    \
        asm volatile("mma.sync.aligned." SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"             \
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                               \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                           \
    }
// c [16, 8] += a [16, K] b [K, 8] by one warp; PTX's fragments. K = 16 for 16-bit types, 8 for TF32.
TOKPRUNE_MMA(mmaHalf, "m16n8k16.row.col.f32.f16.f16.f32")
TOKPRUNE_MMA(mmaBFloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
TOKPRUNE_MMA(mmaTf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef TOKPRUNE_MMA

// Starts copying 16 bytes, both ends aligned to 16, or zeros if not valid; source must be an address all the same.
__device__ inline void copyAsync(void* shared, void const* source, bool valid) {
    auto const target = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    int const bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(bytes) : "memory");
}

__device__ inline void copyCommit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `Pending` of this thread's groups are under way.
template <int Pending>
__device__ inline void copyWait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

#else

inline float toFloat(Half value) {
    return cuda_host::halfToFloat(value.bits);
}
using cuda_host::copyAsync;
using cuda_host::copyCommit;
using cuda_host::copyWait;
using cuda_host::mmaBFloat16;
using cuda_host::mmaHalf;
using cuda_host::mmaTf32;
using cuda_host::toHalves;
using cuda_host::toTf32;

#endif

// c += a b to about FP32's accuracy, for one TF32 step: a and b each as two TF32 numbers, the least product left out.
// The small products go first, as the tensor core cuts off what lies below its running sum.
__device__ inline void mmaFloat(float (&c)[4], float const (&a)[4], float const (&b)[2]) {
    uint32_t aLarge[4], aSmall[4], bLarge[2], bSmall[2];
    for (int i = 0; i < 4; ++i) {
        aLarge[i] = toTf32(a[i]);
        aSmall[i] = toTf32(a[i] - __uint_as_float(aLarge[i]));
    }
    for (int i = 0; i < 2; ++i) {
        bLarge[i] = toTf32(b[i]);
        bSmall[i] = toTf32(b[i] - __uint_as_float(bLarge[i]));
    }
    mmaTf32(c, aSmall, bLarge);
    mmaTf32(c, aLarge, bSmall);
    mmaTf32(c, aLarge, bLarge);
}

}  // namespace tokprune
