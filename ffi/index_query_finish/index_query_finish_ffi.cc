// Handlers of dsv4.index_query_finish. Operands: x, positions, frequencies; results: code, scale.
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

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, int32_t form, ffi::AnyBuffer x,
                   ffi::AnyBuffer positions, ffi::AnyBuffer frequencies, Out code, Out scale) {
  IndexQueryFinishParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, form, x, positions, frequencies, code, scale, params));
  ParallelFor(pool, params.t, kGrainChannels / (params.h * params.d + 1) + 1,
              [&](int64_t begin, int64_t end) { IndexQueryFinishCpu(params, begin, end); });
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, int32_t form, ffi::AnyBuffer x,
                    ffi::AnyBuffer positions, ffi::AnyBuffer frequencies, Out code, Out scale) {
  IndexQueryFinishParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, form, x, positions, frequencies, code, scale, params));
  if (!IsAligned(params.code, params.d / 2, 8)) {
    return InvalidArgument(kOp, "code must be aligned to 8 bytes");
  }
  if (params.t == 0 || params.h == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts,
                    [&](cudaStream_t on) { return IndexQueryFinishCuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<int32_t>("form")
      .Arg<ffi::AnyBuffer>()   // x [t, h, d]
      .Arg<ffi::AnyBuffer>()   // positions [t]
      .Arg<ffi::AnyBuffer>()   // frequencies [rotary / 2]
      .Ret<ffi::AnyBuffer>()   // code [t, h, d]
      .Ret<ffi::AnyBuffer>();  // scale [t, h, d / 32] or [t, h, 1]
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<int32_t>("form")
                           .Arg<ffi::AnyBuffer>()    // x [t, h, d]
                           .Arg<ffi::AnyBuffer>()    // positions [t]
                           .Arg<ffi::AnyBuffer>()    // frequencies [rotary / 2]
                           .Ret<ffi::AnyBuffer>()    // code [t, h, d]
                           .Ret<ffi::AnyBuffer>());  // scale [t, h, d / 32] or [t, h, 1]
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target IndexQueryFinishTarget() {
  return {"dsv4.index_query_finish", kCpu, kCuda, kCudaDebug, &counts};
}

}  // namespace dsv4
