// libtokprune_plugins_register.so: loading it, by plain dlopen, registers the creators of libtokprune_plugins.so. For
// tools that do not load plugins through the registry: Polygraphy's LoadPlugins, trtexec --staticPlugins.
//
// TensorRT must be in the process already; it is looked for when this is loaded, not linked, because an undefined
// getPluginRegistry ends a process whose TensorRT was not loaded for all to see.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <string>

#include "creators.h"
#include "report.h"

namespace {

using Registry = nvinfer1::IPluginRegistry* (*)();
using Logger = nvinfer1::ILogger* (*)();

Logger getLoggerOf = nullptr;

struct Finder final : nvinfer1::ILoggerFinder {
    nvinfer1::ILogger* findLogger() override { return getLoggerOf == nullptr ? nullptr : getLoggerOf(); }
} finder;

// TensorRT's symbol `name`, wherever it is loaded in this process; nullptr if it is not.
void* find(char const* name) {
    if (void* const symbol = dlsym(RTLD_DEFAULT, name)) {
        return symbol;
    }
    std::string const major = std::to_string(NV_TENSORRT_MAJOR);
    for (std::string const& library : {"libnvinfer.so." + major, "libnvinfer_lean.so." + major}) {
        if (void* const handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD)) {
            void* const symbol = dlsym(handle, name);
            dlclose(handle);  // what had loaded it keeps it
            if (symbol != nullptr) {
                return symbol;
            }
        }
    }
    return nullptr;
}

__attribute__((constructor)) void registerCreators() {
    auto const registry = reinterpret_cast<Registry>(find("getPluginRegistry"));
    if (registry == nullptr) {
        std::fprintf(stderr,
                     "tokprune: no TensorRT %d is loaded in this process, so no plugin was registered: load "
                     "libtokprune_plugins_register.so after TensorRT\n",
                     NV_TENSORRT_MAJOR);
        return;
    }
    getLoggerOf = reinterpret_cast<Logger>(find("getLogger"));
    tokprune::setFinder(&finder);
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* const creators = tokprune::allCreators(count);
    for (int32_t i = 0; i < count; ++i) {
        if (!registry()->registerCreator(*creators[i], "tokprune")) {
            std::fprintf(stderr, "tokprune: TensorRT did not register plugin %d: it may be registered already\n", i);
        }
    }
}

}  // namespace
