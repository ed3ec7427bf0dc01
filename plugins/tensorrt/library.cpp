// What libtokprune_plugins.so exports: TensorRT's registry asks the last two when it loads the library. They need no
// symbol of TensorRT's libraries, so that one file serves full, lean and RTX.
#include "creators.h"
#include "report.h"

namespace tokprune {

nvinfer1::IPluginCreatorInterface* const* allCreators(int32_t& count) noexcept {
    static nvinfer1::IPluginCreatorInterface* const creators[] = {leverageTopKCreator(), crossAttentionTopKCreator()};
    count = 2;
    return creators;
}

}  // namespace tokprune

extern "C" TOKPRUNE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& nbCreators) {
    return tokprune::allCreators(nbCreators);
}

extern "C" TOKPRUNE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { tokprune::setFinder(finder); }
