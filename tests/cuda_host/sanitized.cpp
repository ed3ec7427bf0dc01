// Both operators with every buffer allocated to its exact size, for the address and undefined-behaviour sanitizers.
// Arguments: images n d k rank, for LeverageTopK; cross-attention takes d as its width, with 2 heads.
// Prints what is kept.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "cross_attention_topk/launch.h"
#include "cuda_host.h"
#include "leverage_topk/launch.h"

using namespace tokprune;

namespace {

std::mt19937 generator(1);

template <class T>
std::unique_ptr<T[]> poisoned(size_t count) {
    std::unique_ptr<T[]> values(new T[count]);
    std::memset(values.get(), 0xff, count * sizeof(T));
    return values;
}

std::unique_ptr<float[]> normal(size_t count) {
    std::normal_distribution<float> distribution;
    std::unique_ptr<float[]> values(new float[count]);
    for (size_t i = 0; i < count; ++i) values[i] = distribution(generator);
    return values;
}

void report(cudaError_t status, int64_t const* kept, int count) {
    if (status != cudaSuccess) {
        std::fprintf(stderr, "error %d: %s\n", static_cast<int>(status), cuda_host::lastError());
        std::exit(1);
    }
    for (int i = 0; i < count; ++i) std::printf("%lld ", static_cast<long long>(kept[i]));
    std::printf("\n");
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 6) return 2;
    int sizes[5];
    for (int i = 0; i < 5; ++i) sizes[i] = std::atoi(arguments[i + 1]);
    auto const [images, n, d, k, rank] = sizes;
    size_t const rows = static_cast<size_t>(images) * n;
    auto const kept = poisoned<int64_t>(static_cast<size_t>(images) * k);
    auto const scores = poisoned<float>(rows);

    LeverageTopK const leverage{images, n, d, k, rank, 0, 64, 8, 16, 45, 0};
    auto const x = normal(rows * d);
    auto workspace = poisoned<unsigned char>(leverageTopKWorkspace(leverage));
    report(leverageTopK(leverage, DataType::kFloat, x.get(), kept.get(), scores.get(), workspace.get(), nullptr),
           kept.get(), images * k);

    int const m = 5, inner = 2 * d + 1;
    CrossAttentionTopK const cross{images, n, m, d, 2, inner, k, 1e-6f};
    size_t const text = static_cast<size_t>(images) * m;
    auto const v = normal(rows * d), q = normal(rows * d), key = normal(text * d), u = normal(text * d);
    std::unique_ptr<bool[]> const valid(new bool[text]);
    for (size_t i = 0; i < text; ++i) valid[i] = i % m != 2;
    size_t const lengths[9] = {static_cast<size_t>(d) * d, static_cast<size_t>(d), static_cast<size_t>(inner) * d,
                               static_cast<size_t>(inner), static_cast<size_t>(d) * inner, static_cast<size_t>(d),
                               static_cast<size_t>(d), static_cast<size_t>(2 * d), 2};
    std::unique_ptr<float[]> w[9];
    for (int i = 0; i < 9; ++i) w[i] = normal(lengths[i]);
    CrossAttentionWeights const weights{w[0].get(), w[1].get(), w[2].get(), w[3].get(), w[4].get(),
                                        w[5].get(), w[6].get(), w[7].get(), w[8].get()};
    workspace = poisoned<unsigned char>(crossAttentionTopKWorkspace(cross));
    report(crossAttentionTopK(cross, v.get(), q.get(), key.get(), u.get(), valid.get(), weights, kept.get(),
                              scores.get(), workspace.get(), nullptr),
           kept.get(), images * k);
}
