// The arithmetic of cuda_host.h: tensor-core products and the types that C++ lacks.

#include <cfloat>
#include <cstring>
#include <vector>

#include "cuda_host.h"

namespace cuda_host {
namespace {

float towardsZero(double value) {
    double const size = std::abs(value);
    if (size > FLT_MIN && size < FLT_MAX) {  // a float's bits are the first ones of the double's
        uint64_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits &= ~((uint64_t{1} << 29) - 1);
        std::memcpy(&value, &bits, sizeof bits);
        return static_cast<float>(value);
    }
    float const nearest = static_cast<float>(value);
    return std::abs(static_cast<double>(nearest)) > std::abs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}

struct Fragments {
    float* c;
    uint32_t const *a, *b;
};

// c += a b over PTX's fragments of m16n8k(8 · Each): a register holds `Each` elements, which `get(register, e)` gives.
template <int Each, class Get>
void multiply(void* const* posts, Get get) {
    constexpr int kDepth = 8 * Each;
    static double a[16][kDepth], b[kDepth][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        Fragments const& mine = *static_cast<Fragments*>(posts[lane]);
        for (int e = 0; e < Each; ++e) {
            int const row = lane / 4, k = lane % 4 * Each + e;
            a[row][k] = get(mine.a[0], e);
            a[row + 8][k] = get(mine.a[1], e);
            a[row][k + 4 * Each] = get(mine.a[2], e);
            a[row + 8][k + 4 * Each] = get(mine.a[3], e);
            b[k][row] = get(mine.b[0], e);
            b[k + 4 * Each][row] = get(mine.b[1], e);
        }
    }
    for (int row = 0; row < 16; ++row) {
        // c's two columns of a lane lie side by side, so four lanes hold a row
        float* columns[4];
        for (int i = 0; i < 4; ++i) columns[i] = static_cast<Fragments*>(posts[row % 8 * 4 + i])->c + row / 8 * 2;
        double sums[8];
        for (int column = 0; column < 8; ++column) sums[column] = columns[column / 2][column % 2];
        for (int k = 0; k < kDepth; ++k)
            for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
        for (int column = 0; column < 8; ++column) columns[column / 2][column % 2] = towardsZero(sums[column]);
    }
}

void meet(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2], int line, void (*operation)(void* const*)) {
    Fragments mine{c, a, b};
    warpMeeting(__FILE__, line, &mine, operation);
}

}  // namespace

float halfToFloat(uint16_t bits) {
    static std::vector<float> const table = [] {
        std::vector<float> values(1 << 16);
        for (int i = 0; i < 1 << 16; ++i) {
            int const exponent = i >> 10 & 31, fraction = i & 1023;
            float value = exponent ? std::ldexp(1024.0f + static_cast<float>(fraction), exponent - 25)
                                   : std::ldexp(static_cast<float>(fraction), -24);
            if (exponent == 31) value = fraction ? NAN : INFINITY;
            values[static_cast<size_t>(i)] = i >> 15 ? -value : value;
        }
        return values;
    }();
    return table[bits];
}

static uint32_t toHalf(float value) {
    uint32_t const bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u;
    float const size = std::abs(value);
    if (value != value) return sign | 0x7e00u;
    if (size >= 65520.0f) return sign | 0x7c00u;
    if (size < 0x1p-14f) return sign | static_cast<uint32_t>(std::nearbyintf(size * 0x1p24f));  // 1024 is 2^-14 itself
    uint32_t const above = bits & 0x7fffffffu;
    return sign | (above - 0x38000000u + 0xfffu + (above >> 13 & 1)) >> 13;  // ties to even
}

uint32_t toHalves(float first, float second) {
    return toHalf(first) | toHalf(second) << 16;
}

uint32_t toTf32(float value) {
    return (__float_as_uint(value) + 0x1000u) & ~0x1fffu;
}

void mmaHalf(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
    meet(c, a, b, __LINE__, [](void* const* posts) {
        multiply<2>(posts, [](uint32_t word, int e) { return halfToFloat(static_cast<uint16_t>(word >> 16 * e)); });
    });
}

void mmaBFloat16(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
    meet(c, a, b, __LINE__, [](void* const* posts) {
        multiply<2>(posts, [](uint32_t word, int e) { return __uint_as_float((word >> 16 * e) << 16); });
    });
}

void mmaTf32(float (&c)[4], uint32_t const (&a)[4], uint32_t const (&b)[2]) {
    meet(c, a, b, __LINE__, [](void* const* posts) {  // hardware does not look at the low bits
        multiply<1>(posts, [](uint32_t word, int) { return __uint_as_float(word & ~0x1fffu); });
    });
}

}  // namespace cuda_host
