// The creators that the library has, one an operator.
#pragma once

#include <NvInferRuntime.h>

#include "report.h"

namespace tokprune {

nvinfer1::IPluginCreatorInterface* leverageTopKCreator() noexcept;
nvinfer1::IPluginCreatorInterface* crossAttentionTopKCreator() noexcept;

// All of them. For the registering library, too: `getCreators` is what every plugin library exports, so that a call
// by that name could reach another's.
TOKPRUNE_EXPORT nvinfer1::IPluginCreatorInterface* const* allCreators(int32_t& count) noexcept;

}  // namespace tokprune
