// What every handler shares: names, the end of a CUDA launch, the table that module.cc reads.
#pragma once

#include <string>

#include "common/check.h"
#include "common/cuda.h"

namespace dsv4 {

inline ffi::Error ToError(const char* op, const LaunchStatus& status) {
  if (status.error == LaunchError::kNone) return ffi::Error::Success();
  const ffi::ErrorCode code = status.error == LaunchError::kUnimplemented
                                  ? ffi::ErrorCode::kUnimplemented
                                  : ffi::ErrorCode::kInternal;
  return ffi::Error(code, std::string("dsv4.") + op + ": " + status.message);
}

#ifdef DSV4_CUDA
using CudaStream = cudaStream_t;

// Runs `launch(stream)` (returns cudaError_t) on a device that the library has code for.
template <typename Launch>
ffi::Error LaunchCuda(const char* op, CudaStream stream, LaunchCounts& counts, Launch&& launch,
                      const char* archs = nullptr) {
  if (LaunchStatus status = CheckDevice(archs); status.error != LaunchError::kNone) {
    return ToError(op, status);
  }
  return ToError(op, FinishLaunch(op, launch(stream), stream, counts));
}
#else
using CudaStream = void*;

// `launch` would name a launcher that this build does not have; the macro never evaluates it.
#define LaunchCuda(op, stream, ...) (static_cast<void>(stream), ToError(op, NotBuiltForCuda()))
#endif

// One FFI target. `cuda_debug` is `cuda` without the command-buffer trait: XLA then calls it on
// every execution, which is what a synchronisation after each op needs.
struct Target {
  const char* name;
  XLA_FFI_Handler* cpu;
  XLA_FFI_Handler* cuda;
  XLA_FFI_Handler* cuda_debug;
  LaunchCounts* counts;
};

}  // namespace dsv4
