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

// Many queries at once, and few.
using ManySelecting = Selecting<256, 2, 512, 2048, 4, true>;
using FewSelecting = Selecting<1024, 8, 512, 4096, 1, false>;
constexpr int kShortThreads = 1024;      // of few queries of short rows
constexpr int kAloneBytes = 120 * 1024;  // shared memory that keeps another thread block away
constexpr int64_t kMaxSlots = int64_t{FewSelecting::kGroups} * kIndexTopkGroup;

template <IndexForm kForm, int kQueries>
cudaError_t LaunchScores(const ScoreArgs& args, cudaStream_t stream) {
  const auto kernel = args.largest != nullptr ? IndexScoresSm90Kernel<kForm, kQueries, true>
                                              : IndexScoresSm90Kernel<kForm, kQueries, false>;
  constexpr int kSharedBytes = sizeof(ScoreShared<kForm, kQueries>);
  static_assert(kSharedBytes <= 232448);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const int64_t tiles = args.groups * ((args.p.slots + kTileKeys - 1) / kTileKeys);
  // As few as take no longer: the choice may begin on the others.
  const int64_t each = (tiles + Multiprocessors() - 1) / Multiprocessors();
  const auto blocks = static_cast<unsigned>((tiles + each - 1) / each);
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

template <typename Kernel>
cudaError_t LaunchSelect(Kernel kernel, int threads, int shared_bytes, const SelectArgs& args,
                         int64_t rows, cudaStream_t stream) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  return LaunchDependent(kernel, dim3(static_cast<unsigned>(rows)), threads, shared_bytes, stream,
                         args);
}

template <typename Size>
cudaError_t LaunchSelect(const SelectArgs& args, int64_t rows, cudaStream_t stream) {
  return LaunchSelect(IndexSelectSm90Kernel<Size>, Size::kThreads, sizeof(SelectShared<Size>), args,
                      rows, stream);
}

cudaError_t LaunchSelect(const SelectArgs& args, int64_t rows, cudaStream_t stream) {
  const bool many =
      rows > Multiprocessors() && IndexTopkGroups(args.p.slots) <= ManySelecting::kGroups;
  if (many) return LaunchSelect<ManySelecting>(args, rows, stream);
  if (args.p.slots > kShortRow) return LaunchSelect<FewSelecting>(args, rows, stream);
  return LaunchSelect(IndexSelectShortSm90Kernel<kShortThreads>, kShortThreads, kAloneBytes, args,
                      rows, stream);
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
         params.slots % whole == 0 && params.b * params.t <= INT32_MAX && aligned(params.q) &&
         aligned(params.key) && aligned(params.key_scale) && aligned(params.scratch);
}

int64_t IndexTopkSm90ScratchBytes(const IndexTopkParams& params) {
  if (params.scores == nullptr && params.slots <= params.topk) return 0;
  return IndexTopkScratchBytes(params.b * params.t, params.slots);
}

cudaError_t IndexTopkSm90(const IndexTopkParams& params, cudaStream_t stream) {
  const int64_t tokens = params.b * params.t;
  if (tokens == 0) return cudaSuccess;
  SelectArgs select = {};
  select.p = params;
  if (IndexTopkSm90ScratchBytes(params) == 0) return LaunchSelect(select, tokens, stream);
  const int64_t rows = std::min(params.scratch_bytes / IndexTopkRowBytes(params.slots), tokens);
  if (rows == 0) return cudaErrorInvalidValue;
  const int queries = QueriesOf(params, rows);
  ScoreArgs scores = {};
  scores.p = params;
  select.order = scores.order = static_cast<uint32_t*>(params.scratch);
  if (params.slots > kShortRow) {
    select.largest = scores.largest = scores.order + rows * params.slots;
  }
  scores.groups_per_batch = static_cast<int>((params.t + queries - 1) / queries);
  const int64_t groups = params.b * scores.groups_per_batch;
  const int64_t room = std::min<int64_t>(rows / queries, kMaxGroups);
  const int64_t chunks = (groups + room - 1) / room, most = (groups + chunks - 1) / chunks;
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
