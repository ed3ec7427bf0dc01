// How every kernel is launched: one call, checked. Knows no operator.
#pragma once

#include <cstddef>

#include "device.cuh"

namespace tokprune {

constexpr size_t kSharedByDefault = 48 << 10;  // more has to be asked for, kernel by kernel
constexpr size_t kSharedLimit = 99 << 10;      // what a block may have on sm_86, 89 and 120, the least of all
constexpr int kGridLimit = 65535;              // of a grid's y and z

// Enqueues `kernel`; what the launch itself returned.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared, cudaStream_t stream,
                   Arguments... arguments) {
    if (shared > kSharedByDefault) {
        cudaError_t const status = cudaFuncSetAttribute(reinterpret_cast<void const*>(kernel),
                                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                        static_cast<int>(shared));
        if (status != cudaSuccess) return status;
    }
#if defined(__CUDACC__)
    kernel<<<grid, static_cast<unsigned>(threads), shared, stream>>>(arguments...);
    return cudaGetLastError();
#else
    return cuda_host::launch(kernel, grid, threads, shared, stream, arguments...);
#endif
}

}  // namespace tokprune
