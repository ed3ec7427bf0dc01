// Drives a plugin object as TensorRT would: creator, plugin, configuration, serialised fields, runtime plugin, context,
// and on a GPU its own enqueue. Needs no TensorRT library. For `make plugin-check` and `make gpu-check`.
//
//   tokprune_plugins_harness fields CASE…   prints the fields that a plugin made from its own fields has; needs no GPU
//   tokprune_plugins_harness run CASE…      runs one after the other
//
// A CASE is a text file, paths in it relative to the working directory:
//   op LeverageTopK
//   int k 64                       an attribute, also `float`
//   input half x.bin 1 576 4096    type, file of raw values, shape; also float, bf16, bool
//   out kept.bin scores.bin        where kept_indices (int64) and scores (float) go
//
// Outputs are poisoned before each run. `run` prints one line of JSON a case. Exits 1, with a sentence, at the first case
// in which a call fails, two runs differ by a bit, or a CUDA graph of the run does.
#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

// what the library exports for TensorRT's registry
extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators);

namespace {

using nvinfer1::DataType;
using Bytes = std::vector<char>;

constexpr int kRuns = 20, kTimed = 200;

void require(bool isFine, std::string const& what) {
    if (!isFine) {
        throw std::runtime_error(what);
    }
}

void check(cudaError_t status, char const* what) {
    require(status == cudaSuccess, std::string(what) + ": " + cudaGetErrorString(status));
}

struct Input {
    DataType type;
    nvinfer1::Dims shape;
    Bytes values;
};

struct Case {
    std::string op, keptFile, scoresFile;
    std::deque<std::string> names;  // a deque, so that fields may point into it
    std::deque<int32_t> integers;
    std::deque<float> reals;
    std::vector<nvinfer1::PluginField> fields;
    std::vector<Input> inputs;
};

Case readCase(std::string const& path) {
    std::map<std::string, DataType> const types{
        {"float", DataType::kFLOAT}, {"half", DataType::kHALF}, {"bf16", DataType::kBF16}, {"bool", DataType::kBOOL}};
    std::ifstream file(path);
    require(file.good(), path + " cannot be read");
    Case found;
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string what, name;
        words >> what >> name;
        if (what == "op") {
            found.op = name;
        } else if (what == "int") {
            words >> found.integers.emplace_back();
            found.names.push_back(name);
            found.fields.emplace_back(found.names.back().c_str(), &found.integers.back(),
                                      nvinfer1::PluginFieldType::kINT32, 1);
        } else if (what == "float") {
            words >> found.reals.emplace_back();
            found.names.push_back(name);
            found.fields.emplace_back(found.names.back().c_str(), &found.reals.back(),
                                      nvinfer1::PluginFieldType::kFLOAT32, 1);
        } else if (what == "input") {
            Input input{types.at(name), {}, {}};
            words >> name;
            for (int64_t length; words >> length;) {
                input.shape.d[input.shape.nbDims++] = length;
            }
            words.clear();
            std::ifstream values(name, std::ios::binary);
            require(values.good(), name + " cannot be read");
            input.values.assign(std::istreambuf_iterator<char>(values), {});
            found.inputs.push_back(std::move(input));
        } else if (what == "out") {
            found.keptFile = name;
            words >> found.scoresFile;
        }
        require(!words.fail(), path + " has a line that is not understood: " + line);
    }
    return found;
}

nvinfer1::IPluginCreatorV3One& findCreator(std::string const& op) {
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
    for (int32_t i = 0; i < count; ++i) {
        auto* const creator = static_cast<nvinfer1::IPluginCreatorV3One*>(creators[i]);
        if (op == creator->getPluginName()) {
            return *creator;
        }
    }
    throw std::runtime_error("the library has no plugin " + op);
}

template <typename Capability>
Capability& capability(nvinfer1::IPluginV3* plugin, nvinfer1::PluginCapabilityType type) {
    require(plugin != nullptr, "no plugin object was made");
    auto* const found = static_cast<Capability*>(plugin->getCapabilityInterface(type));
    require(found != nullptr, "the plugin object lacks a capability");
    return *found;
}

struct Device {
    explicit Device(size_t size) : size(size) { check(cudaMalloc(&data, std::max<size_t>(size, 1)), "cudaMalloc"); }
    Device(Device const&) = delete;
    ~Device() { cudaFree(data); }
    Bytes read() const {
        Bytes bytes(size);
        check(cudaMemcpy(bytes.data(), data, size, cudaMemcpyDeviceToHost), "cudaMemcpy");
        return bytes;
    }
    void* data = nullptr;
    size_t size;
};

void write(std::string const& path, Bytes const& bytes) {
    std::ofstream file(path, std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    require(file.good(), path + " cannot be written");
}

// The plugin objects of one node: as built, as an engine's bytes make it, as a context has it.
struct Plugins {
    explicit Plugins(Case const& given) {
        nvinfer1::IPluginCreatorV3One& creator = findCreator(given.op);
        nvinfer1::PluginFieldCollection const fields{static_cast<int32_t>(given.fields.size()), given.fields.data()};
        built.reset(creator.createPlugin("build", &fields, nvinfer1::TensorRTPhase::kBUILD));
        loaded.reset(creator.createPlugin("runtime", runtimeOf(built).getFieldsToSerialize(),
                                          nvinfer1::TensorRTPhase::kRUNTIME));
        attached.reset(runtimeOf(loaded).attachToContext(nullptr));
        require(attached != loaded, "attachToContext gave the object itself");
    }
    static nvinfer1::IPluginV3OneRuntime& runtimeOf(std::unique_ptr<nvinfer1::IPluginV3> const& plugin) {
        return capability<nvinfer1::IPluginV3OneRuntime>(plugin.get(), nvinfer1::PluginCapabilityType::kRUNTIME);
    }
    std::unique_ptr<nvinfer1::IPluginV3> built, loaded, attached;
};

void printFields(Case const& given) {
    Plugins const plugins(given);
    nvinfer1::PluginFieldCollection const& found = *Plugins::runtimeOf(plugins.attached).getFieldsToSerialize();
    for (int32_t i = 0; i < found.nbFields; ++i) {
        nvinfer1::PluginField const& field = found.fields[i];
        if (field.type == nvinfer1::PluginFieldType::kINT32) {
            std::printf("int %s %d\n", field.name, *static_cast<int32_t const*>(field.data));
        } else {
            std::printf("float %s %.9g\n", field.name, static_cast<double>(*static_cast<float const*>(field.data)));
        }
    }
}

void drive(Case const& given) {
    Plugins const plugins(given);
    auto& build = capability<nvinfer1::IPluginV3OneBuild>(plugins.built.get(), nvinfer1::PluginCapabilityType::kBUILD);

    int32_t k = 0;
    for (nvinfer1::PluginField const& field : given.fields) {
        k = std::strcmp(field.name, "k") == 0 ? *static_cast<int32_t const*>(field.data) : k;
    }
    int32_t const inputs = static_cast<int32_t>(given.inputs.size());
    std::vector<nvinfer1::PluginTensorDesc> descs;
    for (Input const& input : given.inputs) {
        descs.push_back({input.shape, input.type, nvinfer1::TensorFormat::kLINEAR, 1.0F});
    }
    require(!descs.empty() && descs[0].dims.nbDims == 3, "input 0 must have 3 axes");
    int64_t const images = descs[0].dims.d[0], rows = descs[0].dims.d[1];
    descs.push_back({nvinfer1::Dims{2, {images, k}}, DataType::kINT64, nvinfer1::TensorFormat::kLINEAR, 1.0F});
    descs.push_back({nvinfer1::Dims{2, {images, rows}}, DataType::kFLOAT, nvinfer1::TensorFormat::kLINEAR, 1.0F});
    std::vector<nvinfer1::DynamicPluginTensorDesc> open;
    for (nvinfer1::PluginTensorDesc const& desc : descs) {
        open.push_back({desc, desc.dims, desc.dims, desc.dims});
    }
    for (int32_t pos = 0; pos < inputs + 2; ++pos) {
        require(build.supportsFormatCombination(pos, open.data(), inputs, 2),
                "the plugin refuses the type of tensor " + std::to_string(pos));
    }
    require(build.configurePlugin(open.data(), inputs, open.data() + inputs, 2) == 0, "configurePlugin failed");
    Device const workspace(build.getWorkspaceSize(open.data(), inputs, open.data() + inputs, 2));

    nvinfer1::IPluginV3OneRuntime& plugin = Plugins::runtimeOf(plugins.attached);
    require(plugin.onShapeChange(descs.data(), inputs, descs.data() + inputs, 2) == 0, "onShapeChange failed");

    std::deque<Device> buffers;
    std::vector<void const*> sources;
    for (Input const& input : given.inputs) {
        Device& buffer = buffers.emplace_back(input.values.size());
        check(cudaMemcpy(buffer.data, input.values.data(), buffer.size, cudaMemcpyHostToDevice), "cudaMemcpy");
        sources.push_back(buffer.data);
    }
    Device const kept(static_cast<size_t>(images * k) * 8), scores(static_cast<size_t>(images * rows) * 4);
    void* const outputs[] = {kept.data, scores.data};

    cudaStream_t stream;
    check(cudaStreamCreate(&stream), "cudaStreamCreate");
    auto const enqueue = [&] {
        int32_t const status = plugin.enqueue(descs.data(), descs.data() + inputs, sources.data(), outputs,
                                              workspace.data, stream);
        require(status == 0, "enqueue failed with " + std::to_string(status));
    };
    auto const poison = [&] {
        for (Device const* buffer : {&kept, &scores, &workspace}) {
            check(cudaMemsetAsync(buffer->data, 0xFF, buffer->size, stream), "cudaMemsetAsync");
        }
    };
    auto const result = [&] {
        check(cudaStreamSynchronize(stream), "the kernels");
        Bytes bytes = kept.read(), more = scores.read();
        bytes.insert(bytes.end(), more.begin(), more.end());
        return bytes;
    };

    Bytes first;
    for (int run = 0; run < kRuns; ++run) {
        poison();
        enqueue();
        Bytes found = result();
        require(run == 0 || found == first, "run " + std::to_string(run) + " differs from the first");
        first = std::move(found);
    }

    cudaGraph_t graph;
    cudaGraphExec_t exec;
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "cudaStreamBeginCapture");
    enqueue();
    check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    check(cudaGraphInstantiateWithFlags(&exec, graph, 0), "cudaGraphInstantiate");
    poison();
    check(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
    require(result() == first, "the CUDA graph's run differs from the first");

    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    std::vector<float> direct, replayed;
    for (int run = 0; run < 2 * kTimed; ++run) {
        check(cudaEventRecord(begin, stream), "cudaEventRecord");
        if (run % 2 == 0) {
            enqueue();
        } else {
            check(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
        }
        check(cudaEventRecord(end, stream), "cudaEventRecord");
        check(cudaEventSynchronize(end), "cudaEventSynchronize");
        float milliseconds = 0;
        check(cudaEventElapsedTime(&milliseconds, begin, end), "cudaEventElapsedTime");
        (run % 2 == 0 ? direct : replayed).push_back(1000 * milliseconds);
    }
    std::sort(direct.begin(), direct.end());
    std::sort(replayed.begin(), replayed.end());
    check(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    check(cudaStreamDestroy(stream), "cudaStreamDestroy");

    write(given.keptFile, kept.read());
    write(given.scoresFile, scores.read());
    std::printf("{\"us\": %.2f, \"us_graph\": %.2f, \"workspace_bytes\": %zu, \"identical_runs\": %d}\n",
                direct[kTimed / 2], replayed[kTimed / 2], workspace.size, kRuns);
}

}  // namespace

int main(int argc, char** argv) {
    try {
        std::string const verb = argc >= 3 ? argv[1] : "";
        require(verb == "fields" || verb == "run", "give fields or run, and files that describe a case each");
        for (int i = 2; i < argc; ++i) {
            (verb == "run" ? drive : printFields)(readCase(argv[i]));
        }
    } catch (std::exception const& error) {
        std::fprintf(stderr, "harness: %s\n", error.what());
        return 1;
    }
    return 0;
}
