// Launching from a handler: is this the right device, did the launch succeed, and, in debug mode,
// did the kernel. For handlers and module.cc; knows nothing of XLA.
#pragma once

#ifdef DSV4_CUDA
#include <cuda_runtime_api.h>
#endif

#include <atomic>
#include <cstdint>
#include <string>

namespace dsv4 {

// Launches of one op since the process began: into a stream that was being captured into a graph,
// and straight onto the device.
struct LaunchCounts {
  std::atomic<int64_t> captured{0};
  std::atomic<int64_t> eager{0};
};

// Whether every launch is followed by a synchronisation (environment variable DSV4_SYNC).
std::atomic<bool>& SyncAfterLaunch();

// Architectures that the library holds code for, such as "sm_90a, sm_100a"; empty for a CPU build.
const char* CudaArchs();

// Versions as CUDA counts them (13000 = 13.0); 0 where there is none.
int CudaRuntimeVersion();
int CudaDriverVersion();

// The sentence for a driver that is older than the runtime in the library.
std::string OldDriverMessage(int driver, int runtime);

enum class LaunchError { kNone, kUnimplemented, kInternal };

struct LaunchStatus {
  LaunchError error = LaunchError::kNone;
  std::string message;
};

// What a handler reports in a build without CUDA.
LaunchStatus NotBuiltForCuda();

#ifdef DSV4_CUDA
// Whether the current device is a Hopper GPU.
bool OnHopper();

// Whether the current device can run code of the library. `archs` narrows the library's list to
// those an op has code for (of "90a,100a").
LaunchStatus CheckDevice(const char* archs = nullptr);

// Turns the launcher's result into a status, counts the launch and synchronises if asked to.
LaunchStatus FinishLaunch(const char* op, cudaError_t launched, cudaStream_t stream,
                          LaunchCounts& counts);
#endif

}  // namespace dsv4
