// Handlers of dsv4.index_query_finish. Operands: x, positions, frequencies and, for a query_finish
// of the same tokens, its x; results: code, scale and then its y.
#include <cmath>
#include <cstdint>
#include <string>

#include "common/bytes.h"
#include "common/handler.h"
#include "common/parallel.h"
#include "index_query_finish/index_query_finish.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "index_query_finish";
constexpr int64_t kGrainChannels = 1 << 14;

LaunchCounts counts;

using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Error Fill(int32_t abi, int32_t form, const ffi::AnyBuffer& x, const ffi::AnyBuffer& positions,
                const ffi::AnyBuffer& frequencies, Out code, Out scale,
                IndexQueryFinishParams& params) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  if (form != 1 && form != 2) {
    return InvalidArgument(kOp, "form must be 1 (MXFP4) or 2 (FP8), got " + std::to_string(form));
  }
  params.form = static_cast<IndexQueryForm>(form);
  const bool fp8 = params.form == IndexQueryForm::kFp8;
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "x", x.element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "positions", positions.element_type(), {ffi::DataType::S32}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "frequencies", frequencies.element_type(), {ffi::DataType::F32}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "code", code->element_type(),
                                  {fp8 ? ffi::DataType::F8E4M3FN : ffi::DataType::F4E2M1FN}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "scale", scale->element_type(), {ffi::DataType::F8E8M0FNU}));
  const Dims dims = x.dimensions();
  if (dims.size() != 3) return InvalidArgument(kOp, "x must be [t, h, d], got " + ToString(dims));
  params.t = dims[0];
  params.h = dims[1];
  params.d = dims[2];
  if (params.d != 32 && params.d != 64 && params.d != kIndexQueryMaxWidth) {
    return InvalidArgument(kOp, "x must have 32, 64 or 128 channels, got " + ToString(dims));
  }
  const Dims pairs = frequencies.dimensions();
  params.rotary = pairs.size() == 1 ? 2 * pairs[0] : -1;
  if (params.rotary < 0 || params.rotary % kChunkChannels != 0 || params.rotary > kMaxRotary ||
      params.rotary > params.d) {
    return InvalidArgument(kOp, "frequencies must be a multiple of 4, at most 32 and half of x's " +
                                    std::to_string(params.d) + " channels, got " + ToString(pairs));
  }
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "positions", positions.dimensions(), {params.t}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "code", code->dimensions(), {params.t, params.h, params.d}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "scale", scale->dimensions(),
                                  {params.t, params.h, fp8 ? 1 : params.d / kIndexQueryBlock}));
  params.x = static_cast<const uint16_t*>(x.untyped_data());
  params.positions = static_cast<const int32_t*>(positions.untyped_data());
  params.frequencies = static_cast<const float*>(frequencies.untyped_data());
  params.code = static_cast<uint8_t*>(code->untyped_data());
  params.scale = static_cast<uint8_t*>(scale->untyped_data());
  params.norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(params.d)));
  return ffi::Error::Success();
}

// The second job; `params` is that of the first. Without one `heads.x` stays as it is.
ffi::Error FillHeads(float eps, int32_t bf16_steps, const ffi::RemainingArgs& args,
                     const ffi::RemainingRets& rets, const IndexQueryFinishParams& params,
                     QueryFinishParams& heads) {
  if (bf16_steps != 0 && bf16_steps != 1) {
    return InvalidArgument(kOp, "bf16_steps must be 0 or 1, got " + std::to_string(bf16_steps));
  }
  if (args.size() > 1 || args.size() != rets.size()) {
    return InvalidArgument(
        kOp, "must have 3 operands and 2 results, 1 and 1 more with heads, got " +
                 std::to_string(3 + args.size()) + " and " + std::to_string(2 + rets.size()));
  }
  if (args.size() == 0) return ffi::Error::Success();
  auto x = args.get<ffi::AnyBuffer>(0);
  auto y = rets.get<ffi::AnyBuffer>(0);
  if (!x || !y) return InvalidArgument(kOp, "heads must be buffers");
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "heads x", x->element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "heads y", (*y)->element_type(), {ffi::DataType::BF16}));
  const Dims dims = x->dimensions();
  if (dims.size() != 3 || dims[2] < kChunkChannels || dims[2] % kChunkChannels != 0 ||
      dims[2] > kRowMaxChannels || dims[2] < params.rotary) {
    return InvalidArgument(kOp, "heads x must be [t, n, c] with c a multiple of 8, rotary " +
                                    std::to_string(params.rotary) + ".." +
                                    std::to_string(kRowMaxChannels) + ", got " + ToString(dims));
  }
  heads.t = params.t;
  heads.h = dims[1];
  heads.d = dims[2];
  heads.rotary = params.rotary;
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "heads x", dims, {heads.t, heads.h, heads.d}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "heads y", (*y)->dimensions(), {heads.t, heads.h, heads.d}));
  heads.x = static_cast<const uint16_t*>(x->untyped_data());
  heads.positions = params.positions;
  heads.frequencies = params.frequencies;
  heads.y = static_cast<uint16_t*>((*y)->untyped_data());
  heads.eps = eps;
  heads.reciprocal_d = 1.0f / static_cast<float>(heads.d);
  heads.bf16_steps = bf16_steps == 1;
  return ffi::Error::Success();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, int32_t form, float eps, int32_t bf16_steps,
                   ffi::AnyBuffer x, ffi::AnyBuffer positions, ffi::AnyBuffer frequencies,
                   ffi::RemainingArgs args, Out code, Out scale, ffi::RemainingRets rets) {
  IndexQueryFinishParams params{};
  QueryFinishParams heads{};
  DSV4_RETURN_IF_ERROR(Fill(abi, form, x, positions, frequencies, code, scale, params));
  DSV4_RETURN_IF_ERROR(FillHeads(eps, bf16_steps, args, rets, params, heads));
  ParallelFor(pool, params.t, kGrainChannels / (params.h * params.d + 1) + 1,
              [&](int64_t begin, int64_t end) { IndexQueryFinishCpu(params, begin, end); });
  if (heads.x == nullptr) return ffi::Error::Success();
  ParallelFor(pool, heads.t, 2 * kGrainChannels / (heads.h * heads.d + 1) + 1,
              [&](int64_t begin, int64_t end) { QueryFinishCpu(heads, begin, end); });
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, int32_t form, float eps, int32_t bf16_steps,
                    ffi::AnyBuffer x, ffi::AnyBuffer positions, ffi::AnyBuffer frequencies,
                    ffi::RemainingArgs args, Out code, Out scale, ffi::RemainingRets rets) {
  IndexQueryFinishParams params{};
  QueryFinishParams heads{};
  DSV4_RETURN_IF_ERROR(Fill(abi, form, x, positions, frequencies, code, scale, params));
  DSV4_RETURN_IF_ERROR(FillHeads(eps, bf16_steps, args, rets, params, heads));
  if (!IsAligned(params.code, params.d / 2, 8)) {
    return InvalidArgument(kOp, "code must be aligned to 8 bytes");
  }
  if (heads.x != nullptr && !IsAligned(heads.y, 2 * heads.d, 16)) {
    return InvalidArgument(kOp, "heads y must be aligned to 16 bytes");
  }
  if (params.t == 0 || (params.h == 0 && heads.h == 0)) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts, [&](cudaStream_t on) {
    return heads.x == nullptr ? IndexQueryFinishCuda(params, on)
                              : BothQueriesCuda(params, heads, on);
  });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<int32_t>("form")
      .Attr<float>("eps")
      .Attr<int32_t>("bf16_steps")
      .Arg<ffi::AnyBuffer>()  // x [t, h, d]
      .Arg<ffi::AnyBuffer>()  // positions [t]
      .Arg<ffi::AnyBuffer>()  // frequencies [rotary / 2]
      .RemainingArgs()        // heads x [t, n, c]
      .Ret<ffi::AnyBuffer>()  // code [t, h, d]
      .Ret<ffi::AnyBuffer>()  // scale [t, h, d / 32] or [t, h, 1]
      .RemainingRets();       // heads y [t, n, c]
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<int32_t>("form")
                           .Attr<float>("eps")
                           .Attr<int32_t>("bf16_steps")
                           .Arg<ffi::AnyBuffer>()  // x [t, h, d]
                           .Arg<ffi::AnyBuffer>()  // positions [t]
                           .Arg<ffi::AnyBuffer>()  // frequencies [rotary / 2]
                           .RemainingArgs()        // heads x [t, n, c]
                           .Ret<ffi::AnyBuffer>()  // code [t, h, d]
                           .Ret<ffi::AnyBuffer>()  // scale [t, h, d / 32] or [t, h, 1]
                           .RemainingRets());      // heads y [t, n, c]
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target IndexQueryFinishTarget() {
  return {"dsv4.index_query_finish", kCpu, kCuda, kCudaDebug, &counts};
}

}  // namespace dsv4
