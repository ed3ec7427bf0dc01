// out = act(a wᵀ + bias) + residual, float matrices row by row, by tensor cores with about FP32's accuracy.
#pragma once

#include "../cuda/launch.cuh"
#include "../cuda/product.cuh"

namespace tokprune::cross_attention {

struct Linear {
    float const* a;         // [rows, in]
    float const* weight;    // [outs, in]
    float const* bias;      // [outs], or null
    float const* residual;  // [rows, outs], or null
    float* out;             // [rows, outs]
    int rows, in, outs;
    bool silu = false, aVector = false, weightVector = false;  // the last two are filled in by linear()
};

// Grid (ceil(rows / 64), ceil(outs / 64)).
static __global__ void __launch_bounds__(kTileThreads) linearKernel(Linear call) {
    TOKPRUNE_SHARED(shared);
    int const row = blockIdx.x * kTile, column = blockIdx.y * kTile;
    Rows<float> const a{call.a + static_cast<int64_t>(row) * call.in, min(kTile, call.rows - row), call.in,
                        call.aVector};
    Rows<float> const weight{call.weight + static_cast<int64_t>(column) * call.in, min(kTile, call.outs - column),
                             call.in, call.weightVector};
    float sums[2][4][4];
    tileProduct(a, weight, 0, call.in, shared, sums);
    forTile(sums, [&](int i, int j, float value) {
        if (row + i >= call.rows || column + j >= call.outs) return;
        int64_t const at = static_cast<int64_t>(row + i) * call.outs + column + j;
        if (call.bias) value += call.bias[column + j];
        if (call.silu) value /= 1 + expf(-value);
        if (call.residual) value += call.residual[at];
        call.out[at] = value;
    });
}

inline cudaError_t linear(Linear call, cudaStream_t stream) {
    call.aVector = isVector(call.a, call.in);
    call.weightVector = isVector(call.weight, call.in);
    dim3 const grid(ceilDiv(call.rows, kTile), ceilDiv(call.outs, kTile));
    return launch(linearKernel, grid, kTileThreads, kTileShared, stream, call);
}

}  // namespace tokprune::cross_attention
