// LeverageTopK: the sequence of launches.
//
// 1. XXᵀ in FP32. 2. Subspace iteration Q ← orth((XXᵀ − c)Q) from a fixed start, the shifts c being a Chebyshev
// filter's. 3. For a thin subspace, one pass with X itself, Q ← orth(X(XᵀQ)): some of what XXᵀ lost by squaring the
// condition number returns. 4. T = (XᵀQ)ᵀ(XᵀQ), its projector, scores, the k best. plugins/leverage_topk/body.py does
// the same in ONNX nodes, but for which round first has a shift.

#include "launch.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "../cuda/topk.cuh"
#include "compress.cuh"
#include "gram.cuh"
#include "input.cuh"
#include "orthonormal.cuh"
#include "purify.cuh"

namespace tokprune {
namespace leverage {
namespace {

// Share of the columns taken out of all others in every round, before the full elimination if there is one, and the
// least number. Those of massive rows and the mean come first; FP32 can factor the products of what is left.
constexpr int kLeadingShare = 4, kLeastLeading = 4;

bool sizesOf(LeverageTopK const& call, Sizes& sizes) {
    bool const ranked = call.rank > 0, byEnergy = call.energy > 0 && call.energy < 1 && call.maxRank > 0;
    if (call.images < 1 || call.images > kGridLimit || call.d < 1 || call.n < 2 || call.n > kMostRows) return false;
    if (call.k < 1 || call.k > call.n || call.rank < 0 || call.rank >= call.n || ranked == byEnergy) return false;
    if (call.rounds < 1 || call.oversampling < 0 || call.purifications < 1) return false;
    int64_t const wanted = static_cast<int64_t>(ranked ? call.rank : call.maxRank) + call.oversampling;
    sizes.n = call.n;
    sizes.d = call.d;
    sizes.q = static_cast<int>(std::min<int64_t>({wanted, call.n, call.d}));
    if (sizes.q > kMostWidth) return false;
    sizes.nPadded = ceilDiv(call.n, kTile) * kTile;
    sizes.qPadded = *std::lower_bound(std::begin(kWidths), std::end(kWidths), sizes.q);
    sizes.dPadded = ceilDiv(call.d, kStrip) * kStrip;
    sizes.rank = ranked ? call.rank : std::min(call.maxRank, call.n - 1);
    sizes.energy = ranked ? 0 : call.energy;
    sizes.strips = sizes.nPadded / kStrip;
    int const side = sizes.nPadded / kTile, chunk = kChunk<Half>, chunks = ceilDiv(call.d, chunk);
    sizes.tiles = side * (side + 1) / 2;
    sizes.gramChunk = ceilDiv(chunks, std::min(chunks, ceilDiv(kBlocksWanted, sizes.tiles))) * chunk;
    sizes.gramSplits = ceilDiv(call.d, sizes.gramChunk);
    sizes.inputSplit = ceilDiv(call.d, std::min({kMostSplits, chunks, ceilDiv(kBlocksWanted, sizes.strips)}));
    sizes.inputSplits = ceilDiv(call.d, sizes.inputSplit);
    sizes.inputParts = isWide(sizes.qPadded) ? kSquareSplits : std::min(kMostParts, sizes.dPadded / kStrip);
    sizes.vector = false;
    sizes.seed = static_cast<uint32_t>(call.seed);
    return true;
}

size_t workspaceOf(Sizes const& sizes, int images) {
    Scratch scratch;
    return static_cast<size_t>(layOut(sizes, nullptr, scratch)) * images * sizeof(float);
}

// Enqueues kernels one after the other until one fails; `from` says which of the two bases is the current one.
template <int QT, class T>
class Sequence {
    static constexpr bool kWide = isWide(16 * QT);

  public:
    Sequence(LeverageTopK const& call, Sizes const& sizes, T const* x, float* workspace, cudaStream_t stream)
        : call_(call), sizes_(sizes), x_(x), workspace_(workspace), stream_(stream) {}

    cudaError_t run(int64_t* kept, float* scores) {
        int const images = call_.images;
        dim3 const strips(sizes_.strips, 1, images);
        add(gramKernel<T>, dim3(sizes_.tiles, sizes_.gramSplits, images), kTileThreads, kTileShared, x_, workspace_);
        add(gatherGramKernel, dim3(sizes_.tiles, 1, images), kGatherThreads, kGatherShared, workspace_);
        for (int turn = 0; turn < call_.rounds; ++turn) {
            if constexpr (kWide) {
                add(wideMultiplyKernel<QT>, dim3(sizes_.strips, 2, images), kThinThreads, Multiply<QT>::kShared,
                    workspace_, from_, turn, node(turn));
            } else {
                add(multiplyKernel<QT>, strips, kThinThreads, Thin<QT>::kShared, workspace_, from_, turn, node(turn));
            }
            from_ = 1 - from_;
            // Many columns of a first product are too nearly parallel to be left to the second turn.
            orthonormalise((call_.rounds - 1 - turn) % 2 == 0 || (kWide && turn == 0));
        }
        if constexpr (kWide) {
            dim3 const blocks(ceilDiv(sizes_.dPadded, kInputTiles * kStrip), 2, images);
            add(wideProjectKernel<QT, T>, blocks, kThinThreads, Project<QT>::kShared, x_, workspace_, from_);
            square(true, kSquareSplits);
        } else {
            dim3 const parts(sizes_.inputParts, 1, images);
            add(projectKernel<QT, T>, parts, kThinThreads, Thin<QT>::kShared, x_, workspace_, from_, false);
            add(applyKernel<QT, T>, dim3(sizes_.strips, sizes_.inputSplits, images), kThinThreads, Thin<QT>::kShared,
                x_, workspace_);
            add(gatherSplitsKernel<QT>, strips, kThinThreads, Thin<QT>::kShared, workspace_, from_);
            from_ = 1 - from_;
            orthonormalise(true);
            add(projectKernel<QT, T>, parts, kThinThreads, Thin<QT>::kShared, x_, workspace_, from_, true);
            add(sumPartsKernel, dim3(sizes_.qPadded * sizes_.qPadded / kSumThreads, 1, images), kSumThreads, 0,
                workspace_);
        }
        add(compressKernel<QT>, dim3(1, 1, images), kThinThreads, Compress<QT>::kShared, workspace_);
        add(purifyKernel<QT>, dim3(1, 1, images), kPurifyThreads, Purify<QT>::kShared, workspace_, call_.purifications);
        add(scoreKernel<QT>, strips, kThinThreads, Thin<QT>::kShared, workspace_, from_, scores);
        if (status_ == cudaSuccess) status_ = topK(scores, images, sizes_.n, call_.k, kept, stream_);
        return status_;
    }

  private:
    template <class Kernel, class... Arguments>
    void add(Kernel kernel, dim3 grid, int threads, size_t shared, Arguments... arguments) {
        if (status_ == cudaSuccess) status_ = launch(kernel, grid, threads, shared, stream_, sizes_, arguments...);
    }

    // YᵀY of the basis or, if `input`, of XᵀQ.
    void square(bool input, int splits) {
        dim3 const blocks(QT * (QT + 1) / 2, splits, call_.images);
        add(squareKernel<QT>, blocks, kThinThreads, Tiles<1, 2>::kShared, workspace_, from_, input);
    }

    // The leading columns out of all others, and then, if `full`, all out of all.
    void orthonormalise(bool full) {
        eliminate(std::min(std::max(kLeastLeading, sizes_.q / kLeadingShare), sizes_.q - 1), kTiny);
        if (full) eliminate(sizes_.q - 1, kFloor);
    }

    void eliminate(int columns, float floor) {
        if constexpr (kWide) square(false, 1);
        add(orthonormaliseKernel<QT>, dim3(sizes_.strips, 1, call_.images), kThinThreads, Orthonormal<QT>::kShared,
            workspace_, from_, columns, floor);
        from_ = 1 - from_;
    }

    // Chebyshev's nodes on [0, 1], ascending, as shares of the least Rayleigh quotient of the turn before: unwanted
    // eigenvalues lie below it, and shifts all over there make them fade, against those above, as fast as any
    // polynomial of that degree can. The first turn's quotients say nothing yet, and a subspace that is the whole
    // space needs no filter: the last node would take a wanted direction away.
    float node(int turn) const {
        if (turn < 2 || sizes_.q == std::min(sizes_.n, sizes_.d)) return 0;
        double const pi = 3.14159265358979323846;
        return static_cast<float>((1 - std::cos(pi * (turn - 1.5) / (call_.rounds - 2))) / 2);
    }

    LeverageTopK const& call_;
    Sizes const& sizes_;
    T const* x_;
    float* workspace_;
    cudaStream_t stream_;
    int from_ = 0;
    cudaError_t status_ = cudaSuccess;
};

template <class T>
cudaError_t enqueue(LeverageTopK const& call, Sizes sizes, void const* input, int64_t* kept, float* scores,
                    void* workspace, cudaStream_t stream) {
    T const* const x = static_cast<T const*>(input);
    float* const scratch = static_cast<float*>(workspace);
    sizes.vector = isVector(x, sizes.d);
    switch (sizes.qPadded / 16) {  // kWidths
        case 1: return Sequence<1, T>(call, sizes, x, scratch, stream).run(kept, scores);
        case 2: return Sequence<2, T>(call, sizes, x, scratch, stream).run(kept, scores);
        case 3: return Sequence<3, T>(call, sizes, x, scratch, stream).run(kept, scores);
        case 4: return Sequence<4, T>(call, sizes, x, scratch, stream).run(kept, scores);
        case 6: return Sequence<6, T>(call, sizes, x, scratch, stream).run(kept, scores);
        case 8: return Sequence<8, T>(call, sizes, x, scratch, stream).run(kept, scores);
        default: return cudaErrorInvalidValue;
    }
}

}  // namespace
}  // namespace leverage

size_t leverageTopKWorkspace(LeverageTopK const& call) noexcept {
    leverage::Sizes sizes;
    return leverage::sizesOf(call, sizes) ? leverage::workspaceOf(sizes, call.images) : 0;
}

cudaError_t leverageTopK(LeverageTopK const& call, DataType type, void const* x, int64_t* keptIndices, float* scores,
                         void* workspace, cudaStream_t stream) noexcept {
    leverage::Sizes sizes;
    if (!leverage::sizesOf(call, sizes)) return cudaErrorInvalidValue;
    switch (type) {
        case DataType::kFloat: return leverage::enqueue<float>(call, sizes, x, keptIndices, scores, workspace, stream);
        case DataType::kHalf: return leverage::enqueue<Half>(call, sizes, x, keptIndices, scores, workspace, stream);
        case DataType::kBFloat16:
            return leverage::enqueue<BFloat16>(call, sizes, x, keptIndices, scores, workspace, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace tokprune
