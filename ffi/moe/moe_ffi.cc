// Handlers of dsv4.moe. Operands: x, expert_idx, expert_weight, valid, the leaves of w1, of w3 and
// of w2 (weight, scale and, for NVFP4, global_scale), then `shared` with the attribute has_shared,
// then static scales of the activations, if any: up_act_scale, down_act_scale; results: y and
// scratch.
#include <cstdint>
#include <string>

#include "common/bytes.h"
#include "common/handler.h"
#include "common/parallel.h"
#include "moe/moe.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "moe";
constexpr int64_t kMaxInt32 = INT32_MAX;

LaunchCounts counts;

using Out = ffi::Result<ffi::AnyBuffer>;

struct Attributes {
  int32_t abi, form, act, regime, first_expert, has_shared, power_of_two;
  float limit;
};

int64_t Block(WeightForm form) { return form == WeightForm::kMxfp4 ? 32 : 16; }

// The leaves of one stack [e, rows, inputs], from `at` on.
ffi::Error FillWeights(const std::string& name, WeightForm form, const ffi::RemainingArgs& leaves,
                       int64_t at, int64_t e, int64_t rows, int64_t inputs, ExpertWeights& w) {
  const bool mxfp4 = form == WeightForm::kMxfp4;
  auto weight = leaves.get<ffi::AnyBuffer>(at), scale = leaves.get<ffi::AnyBuffer>(at + 1);
  if (!weight || !scale) return InvalidArgument(kOp, name + " must be buffers");
  const std::string scale_name = name + (mxfp4 ? " scale" : " block_scale");
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, name + " weight", weight->element_type(), {ffi::DataType::F4E2M1FN}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, scale_name, scale->element_type(),
                                  {mxfp4 ? ffi::DataType::F8E8M0FNU : ffi::DataType::F8E4M3FN}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, name + " weight", weight->dimensions(), {e, rows, inputs}));
  DSV4_RETURN_IF_ERROR(
      CheckShape(kOp, scale_name, scale->dimensions(), {e, rows, inputs / Block(form)}));
  w.weight = static_cast<const uint8_t*>(weight->untyped_data());
  w.scale = static_cast<const uint8_t*>(scale->untyped_data());
  w.global_scale = nullptr;
  if (mxfp4) return ffi::Error::Success();
  auto global_scale = leaves.get<ffi::AnyBuffer>(at + 2);
  if (!global_scale) return InvalidArgument(kOp, name + " must be buffers");
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, name + " global_scale", global_scale->element_type(), {ffi::DataType::F32}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, name + " global_scale", global_scale->dimensions(), {e}));
  w.global_scale = static_cast<const float*>(global_scale->untyped_data());
  return ffi::Error::Success();
}

// Scales of the experts' activations, at `at`.
ffi::Error FillActScale(const std::string& name, const ffi::RemainingArgs& rest, int64_t at,
                        int64_t e, const float*& scale) {
  auto found = rest.get<ffi::AnyBuffer>(at);
  if (!found) return InvalidArgument(kOp, name + " must be a buffer");
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, name, found->element_type(), {ffi::DataType::F32}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, name, found->dimensions(), {e}));
  scale = static_cast<const float*>(found->untyped_data());
  return ffi::Error::Success();
}

ffi::Error CheckAttributes(const Attributes& a) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, a.abi));
  const auto form = static_cast<WeightForm>(a.form);
  if (form != WeightForm::kMxfp4 && form != WeightForm::kNvfp4) {
    return InvalidArgument(kOp,
                           "form must be 2 (MXFP4) or 3 (NVFP4), got " + std::to_string(a.form));
  }
  const int32_t acts = form == WeightForm::kMxfp4 ? 2 : 3;
  if (a.act < 0 || a.act >= acts) {
    return InvalidArgument(kOp, "act must be 0 (BF16), 1 (FP8) or, for NVFP4, 2 (NVFP4), got " +
                                    std::to_string(a.act));
  }
  if (a.regime < 0 || a.regime > static_cast<int32_t>(Regime::kExact)) {
    return InvalidArgument(kOp,
                           "regime must be 0 (any), 1 (decode), 2 (prefill) or 3 (exact), got " +
                               std::to_string(a.regime));
  }
  if (a.power_of_two < 0 || a.power_of_two > (form == WeightForm::kNvfp4 && a.act == 1)) {
    return InvalidArgument(kOp, "power_of_two must be 0 or, for NVFP4 with act 1 (FP8), 1, got " +
                                    std::to_string(a.power_of_two));
  }
  if (a.has_shared != 0 && a.has_shared != 1) {
    return InvalidArgument(kOp, "has_shared must be 0 or 1, got " + std::to_string(a.has_shared));
  }
  return ffi::Error::Success();
}

ffi::Error Fill(const Attributes& a, const ffi::AnyBuffer& x, const ffi::AnyBuffer& expert_idx,
                const ffi::AnyBuffer& expert_weight, const ffi::AnyBuffer& valid,
                const ffi::RemainingArgs& rest, Out y, Out scratch, MoeParams& params) {
  DSV4_RETURN_IF_ERROR(CheckAttributes(a));
  const auto form = static_cast<WeightForm>(a.form);
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "x", x.element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "expert_idx", expert_idx.element_type(), {ffi::DataType::S32}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "expert_weight", expert_weight.element_type(), {ffi::DataType::F32}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "valid", valid.element_type(), {ffi::DataType::U8}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "y", y->element_type(), {ffi::DataType::F32, ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "scratch", scratch->element_type(), {ffi::DataType::U8}));
  const int64_t leaves = form == WeightForm::kMxfp4 ? 2 : 3;
  const int64_t expected = 3 * leaves + a.has_shared;
  const auto given = static_cast<int64_t>(rest.size());
  const bool scalable = static_cast<ActForm>(a.act) == ActForm::kNvfp4;
  const bool scaled = scalable && given == expected + 2;
  if (given != expected && !scaled) {
    return InvalidArgument(
        kOp, "must have " + std::to_string(expected) +
                 " operands behind valid (leaves of w1, w3, w2" + (a.has_shared ? ", shared" : "") +
                 ")" + (scalable ? ", or two more (up_act_scale, down_act_scale)" : "") + ", got " +
                 std::to_string(given));
  }
  const Dims dims = x.dimensions(), idx_dims = expert_idx.dimensions();
  if (dims.size() != 2) return InvalidArgument(kOp, "x must be [t, d], got " + ToString(dims));
  const int64_t t = dims[0], d = dims[1];
  if (idx_dims.size() != 2 || idx_dims[0] != t || idx_dims[1] < 1) {
    return InvalidArgument(kOp, "expert_idx must be [" + std::to_string(t) +
                                    ", k] with k at least 1, got " + ToString(idx_dims));
  }
  const int64_t k = idx_dims[1];
  if (t > kMaxInt32 / k) {
    return InvalidArgument(kOp,
                           "expert_idx must hold less than 2^31 picks, got " + ToString(idx_dims));
  }
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "expert_weight", expert_weight.dimensions(), {t, k}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "valid", valid.dimensions(), {t}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "y", y->dimensions(), {t, d}));
  auto w1 = rest.get<ffi::AnyBuffer>(0);
  if (!w1) return InvalidArgument(kOp, "w1 must be buffers");
  const Dims w1_dims = w1->dimensions();
  if (w1_dims.size() != 3 || w1_dims[0] < 1) {
    return InvalidArgument(
        kOp, "w1 weight must be [e, inter, d] with at least one expert, got " + ToString(w1_dims));
  }
  const int64_t e = w1_dims[0], inter = w1_dims[1], block = Block(form);
  if (d < block || d % block != 0 || inter < block || inter % block != 0) {
    return InvalidArgument(kOp, "w1 weight must be [e, inter, d] with multiples of " +
                                    std::to_string(block) + ", got " + ToString(w1_dims));
  }
  DSV4_RETURN_IF_ERROR(FillWeights("w1", form, rest, 0, e, inter, d, params.w1));
  DSV4_RETURN_IF_ERROR(FillWeights("w3", form, rest, leaves, e, inter, d, params.w3));
  DSV4_RETURN_IF_ERROR(FillWeights("w2", form, rest, 2 * leaves, e, d, inter, params.w2));
  if (a.first_expert < 0 || a.first_expert > kMaxInt32 - e) {
    return InvalidArgument(kOp, "first_expert must be 0.." + std::to_string(kMaxInt32 - e) +
                                    " for " + std::to_string(e) + " experts, got " +
                                    std::to_string(a.first_expert));
  }
  params.shared = nullptr;
  if (a.has_shared) {
    auto shared = rest.get<ffi::AnyBuffer>(3 * leaves);
    if (!shared) return InvalidArgument(kOp, "shared must be a buffer");
    DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "shared", shared->element_type(), {ffi::DataType::BF16}));
    DSV4_RETURN_IF_ERROR(CheckShape(kOp, "shared", shared->dimensions(), {t, d}));
    params.shared = static_cast<const uint16_t*>(shared->untyped_data());
  }
  params.up_act_scale = params.down_act_scale = nullptr;
  if (scaled) {
    DSV4_RETURN_IF_ERROR(FillActScale("up_act_scale", rest, expected, e, params.up_act_scale));
    DSV4_RETURN_IF_ERROR(
        FillActScale("down_act_scale", rest, expected + 1, e, params.down_act_scale));
  }
  const Dims scratch_dims = scratch->dimensions();
  const int64_t bytes = MoeScratchBytes(t, k, e, d, inter);
  if (scratch_dims.size() != 1 || scratch_dims[0] < bytes) {
    return InvalidArgument(kOp, "scratch must be at least [" + std::to_string(bytes) + "], got " +
                                    ToString(scratch_dims));
  }
  params.x = static_cast<const uint16_t*>(x.untyped_data());
  params.expert_idx = static_cast<const int32_t*>(expert_idx.untyped_data());
  params.expert_weight = static_cast<const float*>(expert_weight.untyped_data());
  params.valid = static_cast<const uint8_t*>(valid.untyped_data());
  params.y = y->untyped_data();
  params.scratch = scratch->untyped_data();
  params.t = t;
  params.k = k;
  params.experts = e;
  params.d = d;
  params.inter = inter;
  params.first_expert = a.first_expert;
  params.limit = a.limit;
  params.y_bf16 = y->element_type() == ffi::DataType::BF16;
  params.form = form;
  params.act = static_cast<ActForm>(a.act);
  params.regime = static_cast<Regime>(a.regime);
  params.power_of_two = a.power_of_two != 0;
  return ffi::Error::Success();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, int32_t form, int32_t act, int32_t regime,
                   int32_t first_expert, int32_t has_shared, int32_t power_of_two, float limit,
                   ffi::AnyBuffer x, ffi::AnyBuffer expert_idx, ffi::AnyBuffer expert_weight,
                   ffi::AnyBuffer valid, ffi::RemainingArgs rest, Out y, Out scratch) {
  MoeParams params{};
  DSV4_RETURN_IF_ERROR(Fill({abi, form, act, regime, first_expert, has_shared, power_of_two, limit},
                            x, expert_idx, expert_weight, valid, rest, y, scratch, params));
  MoeCpu(params, [&](int64_t count, int64_t grain, const auto& body) {
    ParallelFor(pool, count, grain, body);
  });
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, int32_t form, int32_t act, int32_t regime,
                    int32_t first_expert, int32_t has_shared, int32_t power_of_two, float limit,
                    ffi::AnyBuffer x, ffi::AnyBuffer expert_idx, ffi::AnyBuffer expert_weight,
                    ffi::AnyBuffer valid, ffi::RemainingArgs rest, Out y, Out scratch) {
  MoeParams params{};
  DSV4_RETURN_IF_ERROR(Fill({abi, form, act, regime, first_expert, has_shared, power_of_two, limit},
                            x, expert_idx, expert_weight, valid, rest, y, scratch, params));
  if (params.t == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts, [&](cudaStream_t on) { return MoeCuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<int32_t>("form")
      .Attr<int32_t>("act")
      .Attr<int32_t>("regime")
      .Attr<int32_t>("first_expert")
      .Attr<int32_t>("has_shared")
      .Attr<int32_t>("power_of_two")
      .Attr<float>("limit")
      .Arg<ffi::AnyBuffer>()   // x [t, d]
      .Arg<ffi::AnyBuffer>()   // expert_idx [t, k]
      .Arg<ffi::AnyBuffer>()   // expert_weight [t, k]
      .Arg<ffi::AnyBuffer>()   // valid [t]
      .RemainingArgs()         // leaves of w1, w3, w2; shared [t, d]; up_, down_act_scale [e]
      .Ret<ffi::AnyBuffer>()   // y [t, d]
      .Ret<ffi::AnyBuffer>();  // scratch
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<int32_t>("form")
                           .Attr<int32_t>("act")
                           .Attr<int32_t>("regime")
                           .Attr<int32_t>("first_expert")
                           .Attr<int32_t>("has_shared")
                           .Attr<int32_t>("power_of_two")
                           .Attr<float>("limit")
                           .Arg<ffi::AnyBuffer>()    // x [t, d]
                           .Arg<ffi::AnyBuffer>()    // expert_idx [t, k]
                           .Arg<ffi::AnyBuffer>()    // expert_weight [t, k]
                           .Arg<ffi::AnyBuffer>()    // valid [t]
                           .RemainingArgs()          // as for CUDA
                           .Ret<ffi::AnyBuffer>()    // y [t, d]
                           .Ret<ffi::AnyBuffer>());  // scratch
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target MoeTarget() { return {"dsv4.moe", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
