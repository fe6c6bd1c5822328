// Handlers of dsv4.index_topk. The dtype of the codes tells the form; scores of no entries are not
// wanted.
#include <cstdint>
#include <limits>
#include <string>

#include "common/handler.h"
#include "common/parallel.h"
#include "index_topk/index_topk.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "index_topk";
constexpr int64_t kMxfp4Block = 32;

LaunchCounts counts;

using Out = ffi::Result<ffi::AnyBuffer>;

struct Operands {
  ffi::AnyBuffer q, q_scale, weight, key, key_scale, n_visible;
};

struct Results {
  Out idx, scores, scratch;
};

// The form and all sizes.
ffi::Error FillSizes(const Operands& in, IndexTopkParams& params) {
  const ffi::DataType codes = in.q.element_type();
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "q", codes, {ffi::DataType::F4E2M1FN, ffi::DataType::F8E4M3FN}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "key", in.key.element_type(), {codes}));
  params.form = codes == ffi::DataType::F4E2M1FN ? IndexForm::kMxfp4 : IndexForm::kFp8;
  const Dims q = in.q.dimensions(), key = in.key.dimensions();
  if (q.size() != 4) {
    return InvalidArgument(kOp, "q must be [b, t, h, d], got " + ToString(q));
  }
  const int64_t block = params.form == IndexForm::kMxfp4 ? kMxfp4Block : 1;
  if (q[3] < 1 || q[3] % block != 0 || q[3] > kIndexTopkMaxWidth) {
    return InvalidArgument(kOp, "q must have a multiple of " + std::to_string(block) +
                                    " channels, 1.." + std::to_string(kIndexTopkMaxWidth) +
                                    ", got " + ToString(q));
  }
  if (key.size() != 3 || key[1] > std::numeric_limits<int32_t>::max()) {
    return InvalidArgument(
        kOp, "key must be [b, s, d] with less than 2^31 entries a row, got " + ToString(key));
  }
  params.b = q[0];
  params.t = q[1];
  params.h = q[2];
  params.d = q[3];
  params.slots = key[1];
  const int64_t b = params.b, t = params.t, h = params.h, s = params.slots;
  const int64_t scales = params.form == IndexForm::kMxfp4 ? params.d / kMxfp4Block : 1;
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "key", key, {b, s, params.d}));
  const struct {
    const char* name;
    const ffi::AnyBuffer& buffer;
    ffi::DataType dtype;
    std::initializer_list<int64_t> shape;
  } others[] = {{"q scale", in.q_scale, ffi::DataType::F8E8M0FNU, {b, t, h, scales}},
                {"key scale", in.key_scale, ffi::DataType::F8E8M0FNU, {b, s, scales}},
                {"n_visible", in.n_visible, ffi::DataType::S32, {b, t}}};
  for (const auto& other : others) {
    DSV4_RETURN_IF_ERROR(CheckDtype(kOp, other.name, other.buffer.element_type(), {other.dtype}));
    DSV4_RETURN_IF_ERROR(CheckShape(kOp, other.name, other.buffer.dimensions(), other.shape));
  }
  const ffi::DataType weights = in.weight.element_type();
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "weight", weights, {ffi::DataType::BF16, ffi::DataType::F32}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "weight", in.weight.dimensions(), {b, t, h}));
  params.bf16_weight = weights == ffi::DataType::BF16;
  return ffi::Error::Success();
}

ffi::Error FillResults(Results out, IndexTopkParams& params) {
  const int64_t b = params.b, t = params.t, s = params.slots;
  const Dims idx = out.idx->dimensions(), scores = out.scores->dimensions();
  const Dims scratch = out.scratch->dimensions();
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "idx", out.idx->element_type(), {ffi::DataType::S32}));
  params.topk = idx.size() == 3 ? idx[2] : 0;
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "idx", idx, {b, t, params.topk}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "scores", out.scores->element_type(), {ffi::DataType::F32}));
  const bool wanted = scores.size() != 3 || scores[2] != 0;
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "scores", scores, {b, t, wanted ? s : 0}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "scratch", out.scratch->element_type(), {ffi::DataType::U8}));
  const int64_t bytes = IndexTopkScratchBytes(b * t, s);
  if (scratch.size() != 1 || scratch[0] < bytes) {
    return InvalidArgument(
        kOp, "scratch must be at least [" + std::to_string(bytes) + "], got " + ToString(scratch));
  }
  params.idx = static_cast<int32_t*>(out.idx->untyped_data());
  params.scores = wanted ? static_cast<float*>(out.scores->untyped_data()) : nullptr;
  params.scratch = out.scratch->untyped_data();
  params.scratch_bytes = scratch[0];
  return ffi::Error::Success();
}

ffi::Error Fill(int32_t abi, float weight_scale, const Operands& in, const Results& out,
                IndexTopkParams& params) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  DSV4_RETURN_IF_ERROR(FillSizes(in, params));
  DSV4_RETURN_IF_ERROR(FillResults(out, params));
  params.q = static_cast<const uint8_t*>(in.q.untyped_data());
  params.q_scale = static_cast<const uint8_t*>(in.q_scale.untyped_data());
  params.weight = in.weight.untyped_data();
  params.weight_scale = weight_scale;
  params.key = static_cast<const uint8_t*>(in.key.untyped_data());
  params.key_scale = static_cast<const uint8_t*>(in.key_scale.untyped_data());
  params.n_visible = static_cast<const int32_t*>(in.n_visible.untyped_data());
  return ffi::Error::Success();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, float weight_scale, ffi::AnyBuffer q,
                   ffi::AnyBuffer q_scale, ffi::AnyBuffer weight, ffi::AnyBuffer key,
                   ffi::AnyBuffer key_scale, ffi::AnyBuffer n_visible, Out idx, Out scores,
                   Out scratch) {
  IndexTopkParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, weight_scale, {q, q_scale, weight, key, key_scale, n_visible},
                            {idx, scores, scratch}, params));
  IndexTopkCpu(params, [&](int64_t count, int64_t grain, const auto& body) {
    ParallelFor(pool, count, grain, body);
  });
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, float weight_scale, ffi::AnyBuffer q,
                    ffi::AnyBuffer q_scale, ffi::AnyBuffer weight, ffi::AnyBuffer key,
                    ffi::AnyBuffer key_scale, ffi::AnyBuffer n_visible, Out idx, Out scores,
                    Out scratch) {
  IndexTopkParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, weight_scale, {q, q_scale, weight, key, key_scale, n_visible},
                            {idx, scores, scratch}, params));
  if (params.b * params.t == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts,
                    [&](cudaStream_t on) { return IndexTopkCuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<float>("weight_scale")
      .Arg<ffi::AnyBuffer>()   // q [b, t, h, d]
      .Arg<ffi::AnyBuffer>()   // its scale [b, t, h, d / 32 or 1]
      .Arg<ffi::AnyBuffer>()   // weight [b, t, h]
      .Arg<ffi::AnyBuffer>()   // key [b, s, d]
      .Arg<ffi::AnyBuffer>()   // its scale [b, s, d / 32 or 1]
      .Arg<ffi::AnyBuffer>()   // n_visible [b, t]
      .Ret<ffi::AnyBuffer>()   // idx [b, t, k]
      .Ret<ffi::AnyBuffer>()   // scores [b, t, s or 0]
      .Ret<ffi::AnyBuffer>();  // scratch
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<float>("weight_scale")
                           .Arg<ffi::AnyBuffer>()    // q [b, t, h, d]
                           .Arg<ffi::AnyBuffer>()    // its scale [b, t, h, d / 32 or 1]
                           .Arg<ffi::AnyBuffer>()    // weight [b, t, h]
                           .Arg<ffi::AnyBuffer>()    // key [b, s, d]
                           .Arg<ffi::AnyBuffer>()    // its scale [b, s, d / 32 or 1]
                           .Arg<ffi::AnyBuffer>()    // n_visible [b, t]
                           .Ret<ffi::AnyBuffer>()    // idx [b, t, k]
                           .Ret<ffi::AnyBuffer>()    // scores [b, t, s or 0]
                           .Ret<ffi::AnyBuffer>());  // scratch
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target IndexTopkTarget() { return {"dsv4.index_topk", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
