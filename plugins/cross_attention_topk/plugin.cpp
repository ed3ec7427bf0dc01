// CrossAttentionTopK as a TensorRT plugin.
#include "../tensorrt/creators.h"
#include "../tensorrt/selector.h"
#include "launch.h"

namespace tokprune {
namespace {

struct CrossAttentionTopKOp {
    using Call = CrossAttentionTopK;

    // In the order of the node's inputs: rows, which of the text rows are valid, weights.
    enum Input : int32_t {
        kV, kQ, kKey, kU, kTextValid,
        kOProj, kMlpNorm, kUpProj, kUpBias, kDownProj, kDownBias, kHeadNorm, kHead, kHeadBias,
        kInputs
    };

    static constexpr char const* kName = "CrossAttentionTopK";
    static constexpr std::array<Attribute<Call>, 3> kAttributes{{
        {"k", &Call::k},
        {"heads", &Call::heads},
        {"eps", &Call::eps},
    }};

    static void check(Call const& call) {
        if (call.k < 1 || call.heads < 1 || !(call.eps > 0.0F)) {
            throw std::invalid_argument("k, heads and eps are to be positive");
        }
    }

    static bool takes(int32_t input, nvinfer1::DataType type) {
        return type == (input == kTextValid ? nvinfer1::DataType::kBOOL : nvinfer1::DataType::kFLOAT);
    }

    static void setSizes(Call& call, std::array<nvinfer1::Dims, kInputs> const& shapes) {
        checkAxes(shapes[kV], kV, 3);
        checkAxes(shapes[kKey], kKey, 3);
        checkAxes(shapes[kUpProj], kUpProj, 2);
        call.images = static_cast<int32_t>(shapes[kV].d[0]);
        call.n = static_cast<int32_t>(shapes[kV].d[1]);
        call.width = static_cast<int32_t>(shapes[kV].d[2]);
        call.m = static_cast<int32_t>(shapes[kKey].d[1]);
        call.intermediate = static_cast<int32_t>(shapes[kUpProj].d[0]);
        if (call.width % call.heads != 0) {
            throw std::invalid_argument(std::to_string(call.heads) + " heads do not divide the width " +
                                        std::to_string(call.width));
        }
        int64_t const i = call.images, n = call.n, m = call.m, w = call.width, f = call.intermediate;
        std::array<Shape, kInputs> const wanted{{
            {3, {i, n, w}}, {3, {i, n, w}}, {3, {i, m, w}}, {3, {i, m, w}}, {2, {i, m}},
            {2, {w, w}}, {1, {w}}, {2, {f, w}}, {1, {f}}, {2, {w, f}}, {1, {w}}, {1, {w}}, {2, {2, w}}, {1, {2}},
        }};
        for (int32_t input = 0; input < kInputs; ++input) {
            checkAxes(shapes[input], input, wanted[input].axes);
            for (int32_t axis = 0; axis < wanted[input].axes; ++axis) {
                if (shapes[input].d[axis] != wanted[input].lengths[axis]) {
                    throw std::invalid_argument("input " + std::to_string(input) + " has " +
                                                std::to_string(shapes[input].d[axis]) + " on axis " +
                                                std::to_string(axis) + ", not " +
                                                std::to_string(wanted[input].lengths[axis]));
                }
            }
        }
    }

    static size_t workspace(Call const& call) { return crossAttentionTopKWorkspace(call); }

    static cudaError_t enqueue(Call const& call, nvinfer1::DataType, void const* const* inputs, int64_t* keptIndices,
                               float* scores, void* workspace, cudaStream_t stream) {
        auto const tensor = [inputs](Input input) { return static_cast<float const*>(inputs[input]); };
        CrossAttentionWeights const weights{tensor(kOProj),    tensor(kMlpNorm),  tensor(kUpProj),
                                            tensor(kUpBias),   tensor(kDownProj), tensor(kDownBias),
                                            tensor(kHeadNorm), tensor(kHead),     tensor(kHeadBias)};
        return crossAttentionTopK(call, tensor(kV), tensor(kQ), tensor(kKey), tensor(kU),
                                  static_cast<bool const*>(inputs[kTextValid]), weights, keptIndices, scores,
                                  workspace, stream);
    }

private:
    struct Shape {
        int32_t axes;
        int64_t lengths[3];
    };
};

}  // namespace

nvinfer1::IPluginCreatorInterface* crossAttentionTopKCreator() noexcept {
    static SelectorCreator<CrossAttentionTopKOp> creator;
    return &creator;
}

}  // namespace tokprune
