// What bounds it: a few tokens are latency (lengths, then every slot at once, one or two
// reductions, the stores), many tokens are memory: each row of kv and gate is read once, by the one
// window that wants it. Both jobs of a layer are one launch.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "common/barrier.cuh"
#include "compressor/compressor.h"
#include "compressor/compressor_overlap.cuh"
#include "compressor/compressor_whole.cuh"

namespace dsv4 {
namespace {

using namespace compressor;

constexpr int64_t kFewWindows = 4;  // of clusters twice as large

Width WidthOf(int64_t d) {
  return {1.0f / static_cast<float>(d),
          static_cast<float>(1.0 / std::sqrt(static_cast<double>(d)))};
}

bool FitsGrid(int64_t blocks) { return blocks <= INT32_MAX; }

cudaError_t LaunchOverlap(const CompressorParams& params, cudaStream_t stream) {
  OverlapParams kernel{};
  kernel.p = params;
  const int64_t windows = (params.t + kOverlapRatio - 1) / kOverlapRatio;
  const int64_t items = (windows + kOverlapCluster - 1) / kOverlapCluster * kOverlapCluster;
  int64_t blocks = 0;
  for (int j = 0; j < params.n_jobs; ++j) {
    const int64_t per_cluster = kOverlapWarps / TilesOf(params.jobs[j].d) * kOverlapCluster;
    kernel.width[j] = WidthOf(params.jobs[j].d);
    blocks += (params.b * items + per_cluster - 1) / per_cluster * kOverlapCluster;
    if (j == 0) kernel.first_job_blocks = static_cast<uint32_t>(blocks);
  }
  if (!FitsGrid(params.b * items) || !FitsGrid(blocks)) return cudaErrorInvalidConfiguration;
  kernel.items = static_cast<uint32_t>(items);
  return LaunchFirst(OverlapKernel, dim3(static_cast<unsigned>(blocks)), kOverlapThreads, 0, stream,
                     kOverlapCluster, kernel);
}

cudaError_t LaunchOverlapToken(const CompressorParams& params, cudaStream_t stream) {
  TokenParams kernel{};
  kernel.p = params;
  for (int j = 0; j < params.n_jobs; ++j) {
    while (1 << kernel.log_cluster < PartsOf(params.jobs[j].d)) ++kernel.log_cluster;
  }
  const int cluster = 1 << kernel.log_cluster;
  int64_t blocks = 0;
  for (int j = 0; j < params.n_jobs; ++j) {
    const int64_t per_cluster = cluster / PartsOf(params.jobs[j].d);
    kernel.width[j] = WidthOf(params.jobs[j].d);
    blocks += (params.b + per_cluster - 1) / per_cluster * cluster;
    if (j == 0) kernel.first_job_blocks = static_cast<uint32_t>(blocks);
  }
  if (!FitsGrid(blocks)) return cudaErrorInvalidConfiguration;
  return LaunchFirst(OverlapTokenKernel, dim3(static_cast<unsigned>(blocks)), kTokenThreads, 0,
                     stream, cluster, kernel);
}

template <bool kModel, int kOwn>
cudaError_t PrepareWhole() {
  constexpr auto kKernel = WholeKernel<kModel, kOwn>;
  const cudaError_t error = cudaFuncSetAttribute(
      kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(WholeShared<kOwn>));
  if (error != cudaSuccess || kOwn == kChannels) return error;
  return cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

template <bool kModel, int kOwn>
cudaError_t RunWhole(const WholeParams& params, cudaStream_t stream) {
  const cudaError_t error = PrepareWhole<kModel, kOwn>();
  if (error != cudaSuccess) return error;
  const int64_t blocks = params.p.b * params.windows * params.cluster;
  return LaunchFirst(WholeKernel<kModel, kOwn>,
                     dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(params.p.n_jobs)),
                     kWholeThreads, sizeof(WholeShared<kOwn>), stream, params.cluster, params);
}

// Windows that may take clusters twice as large: those that run at once, where any do, of the
// device that is current at the first call.
int64_t FewWindows() {
  static const int64_t few = [] {
    int count = 0;
    if (PrepareWhole<true, 1>() != cudaSuccess ||
        MostClusters(WholeKernel<true, 1>, kWholeThreads, sizeof(WholeShared<1>), 2 * kModelTiles,
                     count) != cudaSuccess) {
      cudaGetLastError();
      return int64_t{0};
    }
    return std::min<int64_t>(kFewWindows, count);
  }();
  return few;
}

cudaError_t LaunchWhole(const CompressorParams& params, cudaStream_t stream) {
  WholeParams kernel{};
  kernel.p = params;
  kernel.cluster = 1;
  bool model = params.ratio == kCompressorMaxRatio;
  for (int j = 0; j < params.n_jobs; ++j) {
    const CompressorJob& job = params.jobs[j];
    kernel.width[j] = WidthOf(job.d);
    kernel.cluster = std::max(kernel.cluster, TilesOf(job.d));
    model = model && job.d == kModelWidth && job.ring % params.ratio == 0;
  }
  const int64_t windows = (params.t + params.ratio - 1) / params.ratio;
  kernel.windows = static_cast<uint32_t>(windows);
  if (!FitsGrid(params.b * windows * kernel.cluster * 2)) return cudaErrorInvalidConfiguration;
  if (!model) return RunWhole<false, 2>(kernel, stream);
  if (params.b * windows * params.n_jobs > FewWindows()) return RunWhole<true, 2>(kernel, stream);
  kernel.cluster *= 2;
  return RunWhole<true, 1>(kernel, stream);
}

}  // namespace

cudaError_t CompressorCuda(const CompressorParams& params, cudaStream_t stream) {
  if (params.b == 0 || params.t == 0) return cudaSuccess;
  if (!Overlaps(params)) return LaunchWhole(params, stream);
  return params.t == 1 ? LaunchOverlapToken(params, stream) : LaunchOverlap(params, stream);
}

}  // namespace dsv4
