// The FFI targets of the library, one line an op. `module.cc` registers them.
#pragma once

#include <array>

#include "common/handler.h"

namespace dsv4 {

Target AttentionTarget();
Target CacheWriteTarget();
Target CompressorTarget();
Target DenseLinearTarget();
Target Fp8LinearTarget();
Target IndexQueryFinishTarget();
Target IndexTopkTarget();
Target KeyFinishTarget();
Target MhcTarget();
Target MoeTarget();
Target Mxfp4LinearTarget();
Target Nvfp4LinearTarget();
Target ProgramTarget();
Target QueryFinishTarget();
Target RmsnormFp8Target();
Target RmsnormNvfp4Target();
Target RouterTarget();

inline auto Targets() {
  return std::array{
      AttentionTarget(),    CacheWriteTarget(),  CompressorTarget(),
      DenseLinearTarget(),  Fp8LinearTarget(),   IndexQueryFinishTarget(),
      IndexTopkTarget(),    KeyFinishTarget(),   MhcTarget(),
      MoeTarget(),          Mxfp4LinearTarget(), Nvfp4LinearTarget(),
      ProgramTarget(),      QueryFinishTarget(), RmsnormFp8Target(),
      RmsnormNvfp4Target(), RouterTarget(),
  };
}

}  // namespace dsv4
