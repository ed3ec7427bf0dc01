// What both operators have in common as TensorRT plugins (IPluginV3): rows in, kept_indices and scores out.
//
// An operator is a struct `Op`:
//   Call                     sizes and attributes of one call
//   kName, kAttributes       of the ONNX node
//   kInputs                  how many it has; input 0 is [I, N, ...]: I images of N rows
//   check(call)              throws if the attributes contradict each other
//   takes(input, type)       whether that input may be of that type
//   setSizes(call, shapes)   the call's sizes by its inputs' shapes; throws if they do not fit each other
//   workspace(call)          bytes of scratch, 0 for sizes that the kernels do not take
//   enqueue(call, type, inputs, keptIndices, scores, workspace, stream)    `type` is that of input 0
#pragma once

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <array>
#include <stdexcept>
#include <string>

#include "attributes.h"
#include "report.h"

namespace tokprune {

constexpr char const* kVersion = "1";
constexpr char const* kNamespace = "tokprune";

template <typename Op>
class SelectorPlugin final : public nvinfer1::IPluginV3,
                             public nvinfer1::IPluginV3OneCore,
                             public nvinfer1::IPluginV3OneBuild,
                             public nvinfer1::IPluginV3OneRuntime {
    using Call = typename Op::Call;
    using Shapes = std::array<nvinfer1::Dims, Op::kInputs>;
    static constexpr int32_t kOutputs = 2;

public:
    // `call` holds attributes; its sizes follow from the inputs.
    explicit SelectorPlugin(Call const& call) : call(call) { Op::check(call); }

    // IPluginV3

    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore*>(this);
            case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
        }
        report(Op::kName, "a capability was asked for that this version does not know");
        return nullptr;
    }

    nvinfer1::IPluginV3* clone() noexcept override {
        return guarded<nvinfer1::IPluginV3*>(Op::kName, nullptr, [&] { return new SelectorPlugin(call); });
    }

    // IPluginV3OneCore

    char const* getPluginName() const noexcept override { return Op::kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

    // IPluginV3OneBuild

    int32_t getNbOutputs() const noexcept override { return kOutputs; }

    int32_t getOutputDataTypes(nvinfer1::DataType* outputTypes, int32_t nbOutputs,
                               nvinfer1::DataType const* inputTypes, int32_t nbInputs) const noexcept override {
        return guarded(Op::kName, 1, [&] {
            checkCounts(nbInputs, nbOutputs);
            for (int32_t input = 0; input < nbInputs; ++input) {  // here, so that the parser can name the node
                if (!Op::takes(input, inputTypes[input])) {
                    throw std::invalid_argument("input " + std::to_string(input) +
                                                " is of a type that the operator does not take");
                }
            }
            outputTypes[0] = nvinfer1::DataType::kINT64;
            outputTypes[1] = nvinfer1::DataType::kFLOAT;
            return 0;
        });
    }

    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t nbInputs, nvinfer1::DimsExprs const*, int32_t,
                            nvinfer1::DimsExprs* outputs, int32_t nbOutputs,
                            nvinfer1::IExprBuilder& exprBuilder) noexcept override {
        return guarded(Op::kName, 1, [&] {
            checkCounts(nbInputs, nbOutputs);
            if (inputs[0].nbDims != 3) {
                throw std::invalid_argument("input 0 has " + std::to_string(inputs[0].nbDims) + " axes, not 3");
            }
            nvinfer1::IDimensionExpr const* const columns[] = {exprBuilder.constant(call.k), inputs[0].d[1]};
            for (int32_t output = 0; output < kOutputs; ++output) {
                outputs[output].nbDims = 2;
                outputs[output].d[0] = inputs[0].d[0];
                outputs[output].d[1] = columns[output];
            }
            return 0;
        });
    }

    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* inOut, int32_t nbInputs,
                                   int32_t nbOutputs) noexcept override {
        return guarded(Op::kName, false, [&] {
            checkCounts(nbInputs, nbOutputs);
            nvinfer1::PluginTensorDesc const& tensor = inOut[pos].desc;
            bool const fits = pos == nbInputs       ? tensor.type == nvinfer1::DataType::kINT64
                              : pos == nbInputs + 1 ? tensor.type == nvinfer1::DataType::kFLOAT
                                                    : Op::takes(pos, tensor.type);
            return fits && tensor.format == nvinfer1::TensorFormat::kLINEAR;
        });
    }

    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, int32_t nbInputs,
                            nvinfer1::DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept override {
        return guarded(Op::kName, 1, [&] {
            checkCounts(nbInputs, nbOutputs);
            for (int32_t axis = 1; axis < in[0].max.nbDims; ++axis) {  // fewer rows may need more scratch, not less
                if (in[0].min.d[axis] != in[0].max.d[axis]) {
                    throw std::invalid_argument("axis " + std::to_string(axis) + " of input 0 is open, and only axis 0 "
                                                "may be");
                }
            }
            scratch(largest(in));
            return 0;
        });
    }

    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
                            nvinfer1::DynamicPluginTensorDesc const*, int32_t nbOutputs) const noexcept override {
        return guarded<size_t>(Op::kName, 0, [&] {
            checkCounts(nbInputs, nbOutputs);
            return scratch(largest(inputs));
        });
    }

    // IPluginV3OneRuntime

    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, int32_t nbInputs, nvinfer1::PluginTensorDesc const*,
                          int32_t nbOutputs) noexcept override {
        return guarded(Op::kName, 1, [&] {
            checkCounts(nbInputs, nbOutputs);
            scratch(actual(in));
            return 0;
        });
    }

    int32_t enqueue(nvinfer1::PluginTensorDesc const* inputDesc, nvinfer1::PluginTensorDesc const*,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override {
        return guarded(Op::kName, 1, [&] {
            cudaError_t const status =
                Op::enqueue(sized(actual(inputDesc)), inputDesc[0].type, inputs, static_cast<int64_t*>(outputs[0]),
                            static_cast<float*>(outputs[1]), workspace, stream);
            if (status != cudaSuccess) {
                throw std::runtime_error(std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status));
            }
            return 0;
        });
    }

    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override {
        fields = makeFields(Op::kAttributes, &call);
        collection = {static_cast<int32_t>(fields.size()), fields.data()};
        return &collection;
    }

private:
    static void checkCounts(int32_t nbInputs, int32_t nbOutputs) {
        if (nbInputs != Op::kInputs || nbOutputs != kOutputs) {
            throw std::invalid_argument("the node has " + std::to_string(nbInputs) + " inputs and " +
                                        std::to_string(nbOutputs) + " outputs, the operator " +
                                        std::to_string(Op::kInputs) + " and " + std::to_string(kOutputs));
        }
    }

    static Shapes largest(nvinfer1::DynamicPluginTensorDesc const* inputs) {
        Shapes shapes;
        for (int32_t i = 0; i < Op::kInputs; ++i) {
            shapes[i] = inputs[i].max;
        }
        return shapes;
    }

    static Shapes actual(nvinfer1::PluginTensorDesc const* inputs) {
        Shapes shapes;
        for (int32_t i = 0; i < Op::kInputs; ++i) {
            shapes[i] = inputs[i].dims;
        }
        return shapes;
    }

    Call sized(Shapes const& shapes) const {
        Call sized = call;
        Op::setSizes(sized, shapes);
        if (sized.k > sized.n) {
            throw std::invalid_argument("k = " + std::to_string(sized.k) + " of " + std::to_string(sized.n) + " rows");
        }
        return sized;
    }

    // Bytes for inputs of these shapes; throws if the kernels do not take them.
    size_t scratch(Shapes const& shapes) const {
        size_t const bytes = Op::workspace(sized(shapes));
        if (bytes == 0) {
            throw std::invalid_argument("the kernels take no inputs of these sizes, or not with these attributes");
        }
        return bytes;
    }

    Call const call;
    decltype(makeFields(Op::kAttributes, &call)) fields;  // what getFieldsToSerialize returned last
    nvinfer1::PluginFieldCollection collection{};
};

template <typename Op>
class SelectorCreator final : public nvinfer1::IPluginCreatorV3One {
public:
    nvinfer1::IPluginV3* createPlugin(char const*, nvinfer1::PluginFieldCollection const* fc,
                                      nvinfer1::TensorRTPhase) noexcept override {
        return guarded<nvinfer1::IPluginV3*>(
            Op::kName, nullptr, [&] { return new SelectorPlugin<Op>(readFields(Op::kAttributes, fc)); });
    }

    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection; }
    char const* getPluginName() const noexcept override { return Op::kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

private:
    std::array<nvinfer1::PluginField, Op::kAttributes.size()> fields =
        makeFields(Op::kAttributes, static_cast<typename Op::Call const*>(nullptr));
    nvinfer1::PluginFieldCollection collection{static_cast<int32_t>(fields.size()), fields.data()};
};

// Of input `index`, which `shape` must have `axes` of, throwing otherwise.
inline void checkAxes(nvinfer1::Dims const& shape, int32_t index, int32_t axes) {
    if (shape.nbDims != axes) {
        throw std::invalid_argument("input " + std::to_string(index) + " has " + std::to_string(shape.nbDims) +
                                    " axes, not " + std::to_string(axes));
    }
    for (int32_t axis = 0; axis < axes; ++axis) {
        if (shape.d[axis] < 0 || shape.d[axis] > INT32_MAX) {
            throw std::invalid_argument("input " + std::to_string(index) + " has an axis of length " +
                                        std::to_string(shape.d[axis]));
        }
    }
}

}  // namespace tokprune
