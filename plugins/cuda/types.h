// The element types that a tensor may have. Knows no framework.
#pragma once

#include <cstdint>

namespace tokprune {

enum class DataType : int32_t { kFloat = 0, kHalf = 1, kBFloat16 = 2 };

}  // namespace tokprune
