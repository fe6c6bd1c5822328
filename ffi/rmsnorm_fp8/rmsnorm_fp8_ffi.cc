// Handlers of dsv4.rmsnorm_fp8. Operands: x, weight; results: code, scale.
#include <cstdint>
#include <string>

#include "common/bytes.h"
#include "common/handler.h"
#include "common/parallel.h"
#include "rmsnorm_fp8/rmsnorm_fp8.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "rmsnorm_fp8";
constexpr int64_t kGrainChannels = 1 << 15;

LaunchCounts counts;

using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Error Fill(int32_t abi, float eps, const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight,
                Out code, Out scale, RmsnormFp8Params& params) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "x", x.element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "weight", weight.element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "code", code->element_type(), {ffi::DataType::F8E4M3FN}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "scale", scale->element_type(), {ffi::DataType::F8E8M0FNU}));
  const Dims dims = x.dimensions();
  if (dims.size() != 2) return InvalidArgument(kOp, "x must be [t, d], got " + ToString(dims));
  const int64_t t = dims[0], d = dims[1];
  if (d < kNormBlock || d % kNormBlock != 0 || d > kNormMaxDim) {
    return InvalidArgument(kOp, "x must have a multiple of 16 channels, 16.." +
                                    std::to_string(kNormMaxDim) + ", got " + ToString(dims));
  }
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "weight", weight.dimensions(), {d}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "code", code->dimensions(), {t, d}));
  DSV4_RETURN_IF_ERROR(
      CheckShape(kOp, "scale", scale->dimensions(), {t, (d + kActBlock - 1) / kActBlock}));
  params.x = static_cast<const uint16_t*>(x.untyped_data());
  params.weight = static_cast<const uint16_t*>(weight.untyped_data());
  params.code = static_cast<uint8_t*>(code->untyped_data());
  params.scale = static_cast<uint8_t*>(scale->untyped_data());
  params.t = t;
  params.d = d;
  params.eps = eps;
  params.reciprocal_d = 1.0f / static_cast<float>(d);
  return ffi::Error::Success();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, float eps, ffi::AnyBuffer x,
                   ffi::AnyBuffer weight, Out code, Out scale) {
  RmsnormFp8Params params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, eps, x, weight, code, scale, params));
  ParallelFor(pool, params.t, kGrainChannels / params.d + 1,
              [&](int64_t begin, int64_t end) { RmsnormFp8Cpu(params, begin, end); });
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, float eps, ffi::AnyBuffer x,
                    ffi::AnyBuffer weight, Out code, Out scale) {
  RmsnormFp8Params params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, eps, x, weight, code, scale, params));
  if (!IsAligned(params.code, params.d, 16)) {
    return InvalidArgument(kOp, "code must be aligned to 16 bytes");
  }
  if (params.t == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts,
                    [&](cudaStream_t on) { return RmsnormFp8Cuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<float>("eps")
      .Arg<ffi::AnyBuffer>()   // x [t, d]
      .Arg<ffi::AnyBuffer>()   // weight [d]
      .Ret<ffi::AnyBuffer>()   // code [t, d]
      .Ret<ffi::AnyBuffer>();  // scale [t, ceil(d / 128)]
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<float>("eps")
                           .Arg<ffi::AnyBuffer>()    // x [t, d]
                           .Arg<ffi::AnyBuffer>()    // weight [d]
                           .Ret<ffi::AnyBuffer>()    // code [t, d]
                           .Ret<ffi::AnyBuffer>());  // scale [t, ceil(d / 128)]
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target RmsnormFp8Target() { return {"dsv4.rmsnorm_fp8", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
