// The FFI targets of the library, one line an op. `module.cc` registers them.
#pragma once

#include <array>

#include "common/handler.h"

namespace dsv4 {

Target CacheWriteTarget();
Target RmsnormNvfp4Target();

inline auto Targets() { return std::array{CacheWriteTarget(), RmsnormNvfp4Target()}; }

}  // namespace dsv4
