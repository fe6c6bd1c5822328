// The lightning indexer on Hopper: scores by FP8 tensor cores (index_topk_scores.cuh), then the
// choice (index_topk_select.cuh), as many queries at a time as scratch has room for the scores of.
#include <cuda_runtime.h>

#include <algorithm>

#include "index_topk/index_topk.h"
#include "index_topk/index_topk_scores.cuh"
#include "index_topk/index_topk_select.cuh"

namespace dsv4 {
namespace {

using namespace index_topk;

constexpr int64_t kScratchBudget = int64_t{1} << 26;
constexpr int kSmallThreads = 512, kSmallVectors = 4;   // of a choice: 8,192 entries
constexpr int kLargeThreads = 1024, kLargeVectors = 8;  // 32,768 entries
constexpr int64_t kSmallEntries = 4 * kSmallThreads * kSmallVectors;
constexpr int64_t kLargeEntries = 4 * kLargeThreads * kLargeVectors;
constexpr int64_t kMaxSlots = kMaxCluster * kLargeEntries;

int Multiprocessors() {
  static const int count = [] {
    int device = 0, value = 132;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
    return value;
  }();
  return count;
}

template <IndexForm kForm, int kQueries>
cudaError_t LaunchScores(const ScoreArgs& args, cudaStream_t stream) {
  const auto kernel = IndexScoresSm90Kernel<kForm, kQueries>;
  constexpr int kSharedBytes = sizeof(ScoreShared<kForm, kQueries>);
  static_assert(kSharedBytes <= 232448);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = args.groups * ((args.p.slots + kTileKeys - 1) / kTileKeys);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, Multiprocessors()));
  return LaunchDependent(kernel, dim3(blocks), kThreads, kSharedBytes, stream, args);
}

template <IndexForm kForm>
cudaError_t LaunchScores(const ScoreArgs& args, int queries, cudaStream_t stream) {
  switch (queries) {
    case 1:
      return LaunchScores<kForm, 1>(args, stream);
    case 2:
      return LaunchScores<kForm, 2>(args, stream);
    case 8:
      return LaunchScores<kForm, 8>(args, stream);
    default:
      return LaunchScores<IndexForm::kMxfp4, 16>(args, stream);
  }
}

cudaError_t LaunchScores(const ScoreArgs& args, int queries, cudaStream_t stream) {
  return args.p.form == IndexForm::kMxfp4 ? LaunchScores<IndexForm::kMxfp4>(args, queries, stream)
                                          : LaunchScores<IndexForm::kFp8>(args, queries, stream);
}

int PowerOfTwoAtLeast(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

template <int kThreads, int kVectors>
cudaError_t LaunchSelect(const SelectArgs& args, cudaStream_t stream) {
  const auto kernel = IndexSelectSm90Kernel<kThreads, kVectors>;
  if (args.cluster > 8) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  return LaunchDependent(kernel, dim3(static_cast<unsigned>(args.rows * args.cluster)), kThreads, 0,
                         stream, args, args.cluster);
}

cudaError_t LaunchSelectNext(const SelectArgs& args, cudaStream_t stream) {
  const auto kernel = IndexSelectNextSm90Kernel<kLargeThreads, kLargeVectors>;
  constexpr int kBytes = 4 * kLargeEntries;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(args.rows, Multiprocessors()));
  return LaunchDependent(kernel, dim3(blocks), kLargeThreads, kBytes, stream, args);
}

cudaError_t LaunchSelect(SelectArgs args, int64_t rows, cudaStream_t stream) {
  args.rows = rows;
  const int64_t slots = args.p.slots;
  const int small = PowerOfTwoAtLeast((slots + kSmallEntries - 1) / kSmallEntries);
  // Few queries: more thread blocks, of fewer entries.
  if (small == 1 || (small <= 8 && small * rows <= Multiprocessors())) {
    args.cluster = small;
    args.bounded = small == 1 && rows > Multiprocessors();
    return LaunchSelect<kSmallThreads, kSmallVectors>(args, stream);
  }
  args.cluster = PowerOfTwoAtLeast((slots + kLargeEntries - 1) / kLargeEntries);
  if (args.cluster > 1) return LaunchSelect<kLargeThreads, kLargeVectors>(args, stream);
  args.bounded = true;
  return LaunchSelectNext(args, stream);
}

// Queries that share decoded keys; `rows` scores of all slots are in scratch.
int QueriesOf(const IndexTopkParams& params, int64_t rows) {
  const bool decoded = params.form == IndexForm::kMxfp4;  // what sharing saves most of
  const int queries = params.t >= 32 && decoded ? 16 : params.t >= 6 ? 8 : params.t >= 2 ? 2 : 1;
  return rows >= queries ? queries : 1;
}

}  // namespace

bool IndexTopkSm90Takes(const IndexTopkParams& params) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const int64_t whole = params.form == IndexForm::kMxfp4 ? 4 : 16;  // slots of 16 scale bytes
  return params.h == kHeads && params.d == kChannels && params.topk >= 1 &&
         params.topk <= kMaxTopk && params.slots >= 1 && params.slots <= kMaxSlots &&
         params.slots % whole == 0 && params.b * params.t <= INT32_MAX / kMaxCluster &&
         aligned(params.q) && aligned(params.key) && aligned(params.key_scale) &&
         aligned(params.scratch);
}

int64_t IndexTopkSm90ScratchBytes(const IndexTopkParams& params) {
  if (params.scores == nullptr && params.slots <= params.topk) return 0;
  const int64_t row = 4 * params.slots;
  return row * std::min(params.b * params.t, std::max<int64_t>(kScratchBudget / row, 1));
}

cudaError_t IndexTopkSm90(const IndexTopkParams& params, cudaStream_t stream) {
  const int64_t tokens = params.b * params.t;
  if (tokens == 0) return cudaSuccess;
  SelectArgs select = {};
  select.p = params;
  select.order = static_cast<const uint32_t*>(params.scratch);
  if (IndexTopkSm90ScratchBytes(params) == 0) return LaunchSelect(select, tokens, stream);
  const int64_t rows = params.scratch_bytes / (4 * params.slots);
  if (rows == 0) return cudaErrorInvalidValue;
  const int queries = QueriesOf(params, rows);
  ScoreArgs scores = {};
  scores.p = params;
  scores.order = static_cast<uint32_t*>(params.scratch);
  scores.groups_per_batch = static_cast<int>((params.t + queries - 1) / queries);
  const int64_t groups = params.b * scores.groups_per_batch;
  const int64_t most = std::min<int64_t>(rows / queries, kMaxGroups);
  const auto token_of = [&](int64_t group) {
    const int64_t batch = group / scores.groups_per_batch;
    return batch * params.t + (group - batch * scores.groups_per_batch) * queries;
  };
  for (int64_t group = 0; group < groups; group += most) {
    scores.first_group = group;
    scores.groups = static_cast<int>(std::min(most, groups - group));
    scores.first_token = select.first_token = token_of(group);
    const int64_t count = token_of(group + scores.groups) - scores.first_token;
    scores.tokens = static_cast<uint32_t>(count);
    cudaError_t error = LaunchScores(scores, queries, stream);
    if (error == cudaSuccess) error = LaunchSelect(select, count, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace dsv4
