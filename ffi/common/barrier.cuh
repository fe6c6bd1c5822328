// Barriers in shared memory, and the copies that complete on them (sm_90 and later).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/program.h"

namespace dsv4 {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void InitBarrier(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void Arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void ArriveExpecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void Wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void CopyTile(uint32_t to, const CUtensorMap* map, int x, int y,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}
// What is read once is the first to leave the L2, before what the next layer reads again: code,
// caches, the results of other kernels.
__device__ __forceinline__ void CopyTileOnce(uint32_t to, const CUtensorMap* map, int x, int y,
                                             uint32_t barrier) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void CopyBytes(uint32_t to, const void* from, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// A line of 128 bytes into the L2; it does not matter who writes it last.
__device__ __forceinline__ void Prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// What the thread has written to shared memory, before the tensor cores or the copy engine read it.
__device__ __forceinline__ void FenceForAsyncReads() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same in another thread block of the cluster, or into several at once.
__device__ __forceinline__ uint32_t AddressIn(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void ArriveIn(uint32_t barrier, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(AddressIn(barrier, rank))
               : "memory");
}
__device__ __forceinline__ void CopyTileToAll(uint32_t to, const CUtensorMap* map, int x, int y,
                                              uint32_t barrier, uint16_t ranks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::"
      "cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(ranks)
      : "memory");
}

// Of the device that is current at the first call; an H100's where it cannot be told.
inline int Multiprocessors() {
  static const int count = [] {
    int device = 0, value = 132;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
    return value;
  }();
  return count;
}

// Every thread of a cluster arrives and waits once: then all of its thread blocks have begun, and
// what they fenced before is seen.
__device__ __forceinline__ void ArriveAtCluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void WaitForCluster() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// A float into another thread block of the cluster, which counts its bytes on its barrier: `at` and
// `barrier` are where they are in this one.
__device__ __forceinline__ void StoreIn(const void* at, uint32_t barrier, int rank, float x) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   AddressIn(SharedAddress(at), rank)),
               "r"(__float_as_uint(x)), "r"(AddressIn(barrier, rank))
               : "memory");
}

__device__ __forceinline__ void StoreIn(const void* at, uint32_t barrier, int rank, float4 x) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(AddressIn(SharedAddress(at), rank)),
      "r"(__float_as_uint(x.x)), "r"(__float_as_uint(x.y)), "r"(__float_as_uint(x.z)),
      "r"(__float_as_uint(x.w)), "r"(AddressIn(barrier, rank))
      : "memory");
}

// A kernel launched by LaunchDependent may begin before the one ahead of it in the stream has
// ended: as soon as all of that one's thread blocks say so. Before it reads what that one writes,
// it waits.
__device__ __forceinline__ void LetNextBegin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void WaitForPrevious() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

inline cudaLaunchAttribute ClusterOf(int thread_blocks) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(thread_blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// A dependent launch, unless the next one has to wait for whatever is ahead.
inline cudaLaunchAttribute Dependent(bool may) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = !TakeBarrier() && may;
  return attribute;
}

template <typename... Params, typename... Args>
cudaError_t LaunchKernel(bool dependent, void (*kernel)(Params...), dim3 grid, int threads,
                         int shared_bytes, cudaStream_t stream, int cluster, const Args&... args) {
  cudaLaunchAttribute attributes[2] = {Dependent(dependent), ClusterOf(cluster)};
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// As LaunchDependent, of the first kernel of an op, which waits before it lets the next one begin:
// so nothing behind it has to know what is ahead. Dependent in a program alone.
template <typename... Params, typename... Args>
cudaError_t LaunchFirst(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                        cudaStream_t stream, int cluster, const Args&... args) {
  return LaunchKernel(CurrentProgram() != nullptr, kernel, grid, threads, shared_bytes, stream,
                      cluster, args...);
}

template <typename Params>
cudaError_t LaunchDependent(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes,
                            cudaStream_t stream, const Params& params, int cluster = 1) {
  return LaunchKernel(true, kernel, grid, threads, shared_bytes, stream, cluster, params);
}

// Clusters of a kernel that run at once on the current device.
template <typename Params>
cudaError_t MostClusters(void (*kernel)(Params), int threads, int shared_bytes, int cluster,
                         int& count) {
  cudaLaunchAttribute attribute = ClusterOf(cluster);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaOccupancyMaxActiveClusters(&count, kernel, &config);
}

}  // namespace dsv4
