// What the handlers of the linears share: the check of operands, results and attributes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/bytes.h"
#include "common/handler.h"
#include "common/linear.h"

namespace dsv4 {

using LinearResult = ffi::Result<ffi::AnyBuffer>;

// The operands of one call; what a form of weights does not have is nullptr.
struct LinearOperands {
  const char* op;
  WeightForm form;
  const ffi::AnyBuffer& x;                       // [t, k] or [t, g, k]
  const ffi::AnyBuffer& weight;                  // [n, k]
  const ffi::AnyBuffer* scale = nullptr;         // all but kBf16
  const ffi::AnyBuffer* global_scale = nullptr;  // kNvfp4: []
  const ffi::AnyBuffer* act_scale = nullptr;     // kNvfp4: [], if static
  const ffi::AnyBuffer* x_scale = nullptr;       // of x as codes (kFp8): [t, k / 128], [t, g, ..]
  const ffi::AnyBuffer* up = nullptr;            // beside x that is its gate (kFp8, kNvfp4): as x
  std::string index = {};                        // of weight, scales and y in messages, if several
};

inline ffi::DataType LinearWeightDtype(WeightForm form) {
  switch (form) {
    case WeightForm::kBf16:
      return ffi::DataType::BF16;
    case WeightForm::kFp8:
      return ffi::DataType::F8E4M3FN;
    default:
      return ffi::DataType::F4E2M1FN;
  }
}

inline ffi::Error CheckLinearScale(const LinearOperands& in, const std::string& name, int64_t n,
                                   int64_t k) {
  const ffi::AnyBuffer& scale = *in.scale;
  if (in.form == WeightForm::kFp8) {
    DSV4_RETURN_IF_ERROR(CheckDtype(in.op, name, scale.element_type(), {ffi::DataType::F8E8M0FNU}));
    return CheckShape(in.op, name, scale.dimensions(), {(n + 127) / 128, (k + 127) / 128});
  }
  const bool mxfp4 = in.form == WeightForm::kMxfp4;
  const int64_t block = mxfp4 ? 32 : 16;
  DSV4_RETURN_IF_ERROR(CheckDtype(in.op, name, scale.element_type(),
                                  {mxfp4 ? ffi::DataType::F8E8M0FNU : ffi::DataType::F8E4M3FN}));
  if (k % block != 0) {
    return InvalidArgument(in.op, "weight must have a multiple of " + std::to_string(block) +
                                      " inputs, got " + ToString(in.weight.dimensions()));
  }
  return CheckShape(in.op, name, scale.dimensions(), {n, k / block});
}

inline ffi::Error CheckLinearScalar(const LinearOperands& in, const std::string& name,
                                    const ffi::AnyBuffer& scalar, const float*& data) {
  DSV4_RETURN_IF_ERROR(CheckDtype(in.op, name, scalar.element_type(), {ffi::DataType::F32}));
  DSV4_RETURN_IF_ERROR(CheckShape(in.op, name, scalar.dimensions(), {}));
  data = static_cast<const float*>(scalar.untyped_data());
  return ffi::Error::Success();
}

inline ffi::Error CheckLinearAttributes(const LinearOperands& in, int32_t act, int32_t regime,
                                        LinearParams& params) {
  const bool act_fits =
      act == static_cast<int32_t>(ActForm::kBf16) ||
      (act == static_cast<int32_t>(ActForm::kFp8) && in.form != WeightForm::kBf16) ||
      (act == static_cast<int32_t>(ActForm::kNvfp4) && in.form == WeightForm::kNvfp4);
  if (!act_fits) {
    return InvalidArgument(
        in.op, std::string("act must be 0 (bfloat16)") +
                   (in.form == WeightForm::kNvfp4 ? ", 1 (fp8) or 2 (nvfp4)" : " or 1 (fp8)") +
                   ", got " + std::to_string(act));
  }
  if (regime < 0 || regime > static_cast<int32_t>(Regime::kExact)) {
    return InvalidArgument(in.op,
                           "regime must be 0 (by the number of tokens), 1 (decode), 2 (prefill) or "
                           "3 (exact), got " +
                               std::to_string(regime));
  }
  params.act = static_cast<ActForm>(act);
  params.regime = static_cast<Regime>(regime);
  return ffi::Error::Success();
}

// x as E4M3 codes, which its dtype says.
inline ffi::Error CheckCodedInput(const LinearOperands& in, const Dims& dims,
                                  LinearParams& params) {
  const int64_t k = dims[dims.size() - 1];
  if (params.act != ActForm::kFp8 || k % 128 != 0) {
    return InvalidArgument(in.op,
                           "x as float8_e4m3fn must come with act 1 (fp8) and a multiple of "
                           "128 inputs, got act " +
                               std::to_string(static_cast<int32_t>(params.act)) + " and " +
                               ToString(dims));
  }
  DSV4_RETURN_IF_ERROR(
      CheckDtype(in.op, "x_scale", in.x_scale->element_type(), {ffi::DataType::F8E8M0FNU}));
  DSV4_RETURN_IF_ERROR(
      dims.size() == 3
          ? CheckShape(in.op, "x_scale", in.x_scale->dimensions(), {dims[0], dims[1], k / 128})
          : CheckShape(in.op, "x_scale", in.x_scale->dimensions(), {dims[0], k / 128}));
  params.x_scale = static_cast<const uint8_t*>(in.x_scale->untyped_data());
  return ffi::Error::Success();
}

// x as the gate of `up`.
inline ffi::Error CheckGatedInput(const LinearOperands& in, const Dims& dims,
                                  LinearParams& params) {
  const bool nvfp4 = in.form == WeightForm::kNvfp4;
  if (params.act != (nvfp4 ? ActForm::kNvfp4 : ActForm::kFp8)) {
    return InvalidArgument(in.op, std::string("up must come with act ") +
                                      (nvfp4 ? "2 (nvfp4)" : "1 (fp8)") + ", got act " +
                                      std::to_string(static_cast<int32_t>(params.act)));
  }
  DSV4_RETURN_IF_ERROR(CheckDtype(in.op, "x with up", in.x.element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(CheckDtype(in.op, "up", in.up->element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(
      dims.size() == 3 ? CheckShape(in.op, "up", in.up->dimensions(), {dims[0], dims[1], dims[2]})
                       : CheckShape(in.op, "up", in.up->dimensions(), {dims[0], dims[1]}));
  params.up = in.up->untyped_data();
  return ffi::Error::Success();
}

inline ffi::Error FillLinear(const LinearOperands& in, int32_t act, int32_t regime, LinearResult y,
                             LinearResult scratch, LinearParams& params) {
  DSV4_RETURN_IF_ERROR(CheckLinearAttributes(in, act, regime, params));
  const std::string weight_name = "weight" + in.index, y_name = "y" + in.index;
  const bool dense = in.form == WeightForm::kBf16;
  if (in.x_scale == nullptr) {
    DSV4_RETURN_IF_ERROR(dense ? CheckDtype(in.op, "x", in.x.element_type(), {ffi::DataType::BF16})
                               : CheckDtype(in.op, "x", in.x.element_type(),
                                            {ffi::DataType::BF16, ffi::DataType::F32}));
  }
  DSV4_RETURN_IF_ERROR(
      CheckDtype(in.op, weight_name, in.weight.element_type(), {LinearWeightDtype(in.form)}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(in.op, y_name, y->element_type(), {ffi::DataType::BF16, ffi::DataType::F32}));
  DSV4_RETURN_IF_ERROR(CheckDtype(in.op, "scratch", scratch->element_type(), {ffi::DataType::U8}));
  const Dims dims = in.x.dimensions(), weight_dims = in.weight.dimensions();
  if (dims.size() != 2 && dims.size() != 3) {
    return InvalidArgument(in.op, "x must be [t, k] or [t, g, k], got " + ToString(dims));
  }
  if (weight_dims.size() != 2) {
    return InvalidArgument(in.op, weight_name + " must be [n, k], got " + ToString(weight_dims));
  }
  const bool grouped = dims.size() == 3;
  const int64_t t = dims[0], g = grouped ? dims[1] : 1, k = dims[dims.size() - 1];
  const int64_t n = weight_dims[0];
  if (k < 1 || weight_dims[1] != k) {
    return InvalidArgument(in.op, "x and " + weight_name +
                                      " must agree on the last axis, at least 1, got " +
                                      ToString(dims) + " and " + ToString(weight_dims));
  }
  if (g < 1 || n % g != 0) {
    return InvalidArgument(in.op, weight_name + " must split evenly over x's " + std::to_string(g) +
                                      " groups, got " + ToString(weight_dims));
  }
  if (in.x_scale != nullptr) {
    DSV4_RETURN_IF_ERROR(CheckCodedInput(in, dims, params));
  }
  if (in.up != nullptr) {
    DSV4_RETURN_IF_ERROR(CheckGatedInput(in, dims, params));
  }
  if (in.scale != nullptr) {
    const bool nvfp4 = in.form == WeightForm::kNvfp4;
    DSV4_RETURN_IF_ERROR(CheckLinearScale(in, (nvfp4 ? "block_scale" : "scale") + in.index, n, k));
    params.scale = static_cast<const uint8_t*>(in.scale->untyped_data());
  }
  if (in.global_scale != nullptr) {
    DSV4_RETURN_IF_ERROR(
        CheckLinearScalar(in, "global_scale" + in.index, *in.global_scale, params.global_scale));
  }
  if (in.act_scale != nullptr) {
    if (params.act != ActForm::kNvfp4) {
      return InvalidArgument(
          in.op, "act_scale must come with act 2 (nvfp4), got act " + std::to_string(act));
    }
    DSV4_RETURN_IF_ERROR(CheckLinearScalar(in, "act_scale", *in.act_scale, params.act_scale));
  }
  DSV4_RETURN_IF_ERROR(grouped ? CheckShape(in.op, y_name, y->dimensions(), {t, g, n / g})
                               : CheckShape(in.op, y_name, y->dimensions(), {t, n}));
  const Dims scratch_dims = scratch->dimensions();
  const int64_t least = LinearScratchBytes(t, g, k);
  if (scratch_dims.size() != 1 || scratch_dims[0] < least) {
    return InvalidArgument(in.op, "scratch must be [at least " + std::to_string(least) + "], got " +
                                      ToString(scratch_dims));
  }
  params.x = in.x.untyped_data();
  params.weight = in.weight.untyped_data();
  params.y = y->untyped_data();
  params.scratch = scratch->untyped_data();
  params.t = t;
  params.groups = g;
  params.n = n;
  params.k = k;
  params.x_float32 = in.x.element_type() == ffi::DataType::F32;
  params.y_bf16 = y->element_type() == ffi::DataType::BF16;
  return ffi::Error::Success();
}

// A call with several weights: operands are those, then as many scales (all but kBf16), as many
// global scales and maybe one act_scale (kNvfp4), then that of x if it is E4M3 (kFp8), or of one
// weight maybe up (kFp8, kNvfp4), which `limit` belongs to; results y of each, then scratch. Parts
// without rows or tokens are left out.
inline ffi::Error FillLinears(const char* op, WeightForm form, int32_t act, int32_t regime,
                              const ffi::AnyBuffer& x, const ffi::RemainingArgs& operands,
                              const ffi::RemainingRets& results, LinearsParams& params,
                              float limit = 0.0f) {
  const bool scaled = form != WeightForm::kBf16, nvfp4 = form == WeightForm::kNvfp4;
  const bool coded = form == WeightForm::kFp8 && x.element_type() == ffi::DataType::F8E4M3FN;
  const size_t each = nvfp4 ? 3 : scaled ? 2 : 1, n = results.size() - 1;
  const size_t more = operands.size() - std::min(operands.size(), each * n);
  bool gated = form == WeightForm::kFp8 && !coded && n == 1 && more == 1;
  if (nvfp4 && n == 1 && more > 0) {  // act_scale has no axes
    auto last = operands.get<ffi::AnyBuffer>(operands.size() - 1);
    gated = last && last->dimensions().size() > 1;
  }
  const bool fixed = nvfp4 && more == (gated ? 2 : 1);  // act_scale
  const size_t expected = (coded || gated ? 1 : 0) + (fixed ? 1 : 0);
  if (results.size() < 2 || n > kMaxLinearParts || operands.size() != each * n + expected) {
    return InvalidArgument(op, std::string("must have x") +
                                   (coded    ? ", n weights, n scales and x_scale"
                                    : nvfp4  ? ", n weights, n block_scales, n global_scales"
                                               " and maybe act_scale, of one weight up,"
                                    : scaled ? ", n weights and n scales, or one of each and up,"
                                             : " and n weights") +
                                   " for n results and scratch, n = 1.." +
                                   std::to_string(kMaxLinearParts) + ", got " +
                                   std::to_string(operands.size()) +
                                   (scaled ? " operands beside x and " : " weights and ") +
                                   std::to_string(results.size()) + " results");
  }
  auto scratch = results.get<ffi::AnyBuffer>(n);
  for (size_t i = 0; i < n; ++i) {
    auto weight = operands.get<ffi::AnyBuffer>(i);
    auto scale = operands.get<ffi::AnyBuffer>(scaled ? n + i : i);
    auto global_scale = operands.get<ffi::AnyBuffer>(nvfp4 ? 2 * n + i : i);
    auto y = results.get<ffi::AnyBuffer>(i);
    auto last = operands.get<ffi::AnyBuffer>(operands.size() - 1);  // of x, if any
    if (!weight || !scale || !global_scale || !y || !scratch || !last) {
      return InvalidArgument(op, "operands and results must be buffers");
    }
    LinearOperands in{op, form, x, *weight};
    if (scaled) in.scale = &*scale;
    if (nvfp4) in.global_scale = &*global_scale;
    auto act_scale = operands.get<ffi::AnyBuffer>(operands.size() - (gated ? 2 : 1));
    if (fixed) in.act_scale = &*act_scale;
    if (coded) in.x_scale = &*last;
    if (gated) in.up = &*last;
    if (n > 1) in.index = "[" + std::to_string(i) + "]";
    LinearParams part{};
    part.limit = limit;
    DSV4_RETURN_IF_ERROR(FillLinear(in, act, regime, *y, *scratch, part));
    if (part.t > 0 && part.n > 0) params.parts[params.n_parts++] = part;
  }
  return ffi::Error::Success();
}

// Operands may begin anywhere (the kernels look); results are written in pairs, scratch in 16
// bytes.
inline ffi::Error CheckLinearAlignment(const char* op, const LinearParams& params) {
  if (IsAligned(params.y, 0, 4) && IsAligned(params.scratch, 0, 16)) return ffi::Error::Success();
  return InvalidArgument(op, "y must be aligned to 4 bytes and scratch to 16");
}
inline ffi::Error CheckLinearAlignment(const char* op, const LinearsParams& params) {
  for (int p = 0; p < params.n_parts; ++p) {
    DSV4_RETURN_IF_ERROR(CheckLinearAlignment(op, params.parts[p]));
  }
  return ffi::Error::Success();
}

}  // namespace dsv4
