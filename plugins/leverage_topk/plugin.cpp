// LeverageTopK as a TensorRT plugin.
#include "../tensorrt/creators.h"
#include "../tensorrt/selector.h"
#include "launch.h"

namespace tokprune {
namespace {

struct LeverageTopKOp {
    using Call = LeverageTopK;

    static constexpr char const* kName = "LeverageTopK";
    static constexpr int32_t kInputs = 1;  // X [I, N, D]
    static constexpr std::array<Attribute<Call>, 8> kAttributes{{
        {"k", &Call::k},
        {"rank", &Call::rank},
        {"energy", &Call::energy},
        {"max_rank", &Call::maxRank},
        {"rounds", &Call::rounds},
        {"oversampling", &Call::oversampling},
        {"purifications", &Call::purifications},
        {"seed", &Call::seed},
    }};

    static void check(Call const& call) {
        bool const hasRank = call.rank != 0, hasEnergy = call.energy != 0.0F;
        if (hasRank == hasEnergy || call.rank < 0 || call.energy < 0.0F || call.energy >= 1.0F) {
            throw std::invalid_argument("rank = " + std::to_string(call.rank) + " and energy = " +
                                        std::to_string(call.energy) + ", not either a rank or an energy in (0, 1)");
        }
        if (call.k < 1 || call.maxRank < 1 || call.rounds < 1 || call.oversampling < 0 || call.purifications < 1) {
            throw std::invalid_argument("an attribute is below its least value");
        }
    }

    static bool takes(int32_t, nvinfer1::DataType type) {
        return type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kHALF ||
               type == nvinfer1::DataType::kBF16;
    }

    static void setSizes(Call& call, std::array<nvinfer1::Dims, kInputs> const& shapes) {
        checkAxes(shapes[0], 0, 3);
        call.images = static_cast<int32_t>(shapes[0].d[0]);
        call.n = static_cast<int32_t>(shapes[0].d[1]);
        call.d = static_cast<int32_t>(shapes[0].d[2]);
        if (call.rank >= call.n) {
            throw std::invalid_argument("rank = " + std::to_string(call.rank) + " of " + std::to_string(call.n) +
                                        " rows, whose scores would all be 1");
        }
    }

    static size_t workspace(Call const& call) { return leverageTopKWorkspace(call); }

    static cudaError_t enqueue(Call const& call, nvinfer1::DataType type, void const* const* inputs,
                               int64_t* keptIndices, float* scores, void* workspace, cudaStream_t stream) {
        DataType const element = type == nvinfer1::DataType::kHALF   ? DataType::kHalf
                                 : type == nvinfer1::DataType::kBF16 ? DataType::kBFloat16
                                                                     : DataType::kFloat;
        return leverageTopK(call, element, inputs[0], keptIndices, scores, workspace, stream);
    }
};

}  // namespace

nvinfer1::IPluginCreatorInterface* leverageTopKCreator() noexcept {
    static SelectorCreator<LeverageTopKOp> creator;
    return &creator;
}

}  // namespace tokprune
