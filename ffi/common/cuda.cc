#include "common/cuda.h"

#include <algorithm>
#include <sstream>
#include <vector>

namespace dsv4 {
namespace {

std::string Version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::atomic<bool>& SyncAfterLaunch() {
  static std::atomic<bool> sync{false};
  return sync;
}

std::string OldDriverMessage(int driver, int runtime) {
  return "the NVIDIA driver supports CUDA " + Version(driver) +
         ", the library was built with CUDA " + Version(runtime) + ": update the driver";
}

LaunchStatus NotBuiltForCuda() {
  return {LaunchError::kUnimplemented,
          "this build of dsv4_jax has no CUDA code: install it where nvcc is on PATH, or with "
          "DSV4_CUDA=pypi pip install --force-reinstall --no-deps ."};
}

#ifdef DSV4_CUDA

namespace {

// "90a,100a" -> {"90a", "100a"}
std::vector<std::string> Split(const char* archs) {
  std::vector<std::string> parts;
  std::stringstream stream(archs);
  for (std::string part; std::getline(stream, part, ',');) parts.push_back(part);
  return parts;
}

std::string Named(const std::vector<std::string>& archs) {
  std::string names;
  for (const std::string& arch : archs) names += (names.empty() ? "sm_" : ", sm_") + arch;
  return names;
}

LaunchStatus CudaError(cudaError_t error, const char* where) {
  if (error == cudaErrorInsufficientDriver) {
    return {LaunchError::kInternal, OldDriverMessage(CudaDriverVersion(), CudaRuntimeVersion())};
  }
  return {LaunchError::kInternal, std::string("CUDA error ") + where + ": " +
                                      cudaGetErrorName(error) + ", " + cudaGetErrorString(error)};
}

}  // namespace

const char* CudaArchs() {
  static const std::string archs = Named(Split(DSV4_CUDA_ARCHS));
  return archs.c_str();
}

int CudaRuntimeVersion() { return CUDART_VERSION; }

int CudaDriverVersion() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

bool OnHopper() {
  int device = 0, major = 0;
  return cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         major == 9;
}

LaunchStatus CheckDevice(const char* archs) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (error != cudaSuccess) return CudaError(error, "before the launch");
  std::vector<std::string> built = Split(DSV4_CUDA_ARCHS);
  if (archs != nullptr) {
    const std::vector<std::string> own = Split(archs);
    built.erase(std::remove_if(built.begin(), built.end(),
                               [&](const std::string& arch) {
                                 return std::find(own.begin(), own.end(), arch) == own.end();
                               }),
                built.end());
  }
  const std::string arch = std::to_string(major * 10 + minor);
  // "90a" runs on 9.0 alone: architecture-specific code is neither forward nor family compatible.
  if (std::find(built.begin(), built.end(), arch + "a") != built.end()) return {};
  return {LaunchError::kUnimplemented,
          "built for " + Named(built) + ", device is sm_" + arch +
              ": reinstall with -C cmake.define.DSV4_CUDA_ARCHS set to the device's"};
}

LaunchStatus FinishLaunch(const char* op, cudaError_t launched, cudaStream_t stream,
                          LaunchCounts& counts) {
  if (launched != cudaSuccess) {
    return CudaError(launched, (std::string("at or before dsv4.") + op +
                                " (if it persists, restart the process; DSV4_SYNC=1 pins it)")
                                   .c_str());
  }
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  cudaStreamIsCapturing(stream, &capture);
  const bool captured = capture != cudaStreamCaptureStatusNone;
  (captured ? counts.captured : counts.eager).fetch_add(1, std::memory_order_relaxed);
  if (captured || !SyncAfterLaunch().load(std::memory_order_relaxed)) return {};
  const cudaError_t error = cudaStreamSynchronize(stream);
  if (error == cudaSuccess) return {};
  return CudaError(error, (std::string("in dsv4.") + op +
                           " or an op of XLA just before it (DSV4_SYNC); restart the process")
                              .c_str());
}

#else  // DSV4_CUDA

const char* CudaArchs() { return ""; }
int CudaRuntimeVersion() { return 0; }
int CudaDriverVersion() { return 0; }

#endif  // DSV4_CUDA

}  // namespace dsv4
