// Handlers of dsv4.rmsnorm_nvfp4. Operands: x, weight and, for a static one, the global scale;
// results: code, block_scale, token_scale.
#include <cstdint>
#include <string>

#include "common/bytes.h"
#include "common/handler.h"
#include "common/nvfp4.h"
#include "common/parallel.h"
#include "rmsnorm_nvfp4/rmsnorm_nvfp4.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "rmsnorm_nvfp4";
constexpr int64_t kGrainChannels = 1 << 15;

LaunchCounts counts;

using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Error Fill(int32_t abi, float eps, const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight,
                const ffi::RemainingArgs& scales, Out code, Out block_scale, Out token_scale,
                RmsnormNvfp4Params& params) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "x", x.element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "weight", weight.element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "code", code->element_type(), {ffi::DataType::F4E2M1FN}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "block_scale", block_scale->element_type(), {ffi::DataType::F8E4M3FN}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "token_scale", token_scale->element_type(), {ffi::DataType::F32}));
  const Dims dims = x.dimensions();
  if (dims.size() != 2) return InvalidArgument(kOp, "x must be [t, d], got " + ToString(dims));
  const int64_t t = dims[0], d = dims[1];
  if (d < kNvfp4Block || d % kNvfp4Block != 0 || d > kNormMaxDim) {
    return InvalidArgument(kOp, "x must have a multiple of 16 channels, 16.." +
                                    std::to_string(kNormMaxDim) + ", got " + ToString(dims));
  }
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "weight", weight.dimensions(), {d}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "code", code->dimensions(), {t, d}));
  DSV4_RETURN_IF_ERROR(
      CheckShape(kOp, "block_scale", block_scale->dimensions(), {t, d / kNvfp4Block}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "token_scale", token_scale->dimensions(), {t}));
  params.global_scale = nullptr;
  if (scales.size() > 1) {
    return InvalidArgument(
        kOp, "must have at most one global_scale, got " + std::to_string(scales.size()));
  }
  if (scales.size() == 1) {
    auto scale = scales.get<ffi::AnyBuffer>(0);
    if (!scale) return InvalidArgument(kOp, "global_scale must be a buffer");
    DSV4_RETURN_IF_ERROR(
        CheckDtype(kOp, "global_scale", scale->element_type(), {ffi::DataType::F32}));
    DSV4_RETURN_IF_ERROR(CheckShape(kOp, "global_scale", scale->dimensions(), {}));
    params.global_scale = static_cast<const float*>(scale->untyped_data());
  }
  params.x = static_cast<const uint16_t*>(x.untyped_data());
  params.weight = static_cast<const uint16_t*>(weight.untyped_data());
  params.code = static_cast<uint8_t*>(code->untyped_data());
  params.block_scale = static_cast<uint8_t*>(block_scale->untyped_data());
  params.token_scale = static_cast<float*>(token_scale->untyped_data());
  params.t = t;
  params.d = d;
  params.eps = eps;
  params.reciprocal_d = 1.0f / static_cast<float>(d);
  return ffi::Error::Success();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, float eps, ffi::AnyBuffer x,
                   ffi::AnyBuffer weight, ffi::RemainingArgs scales, Out code, Out block_scale,
                   Out token_scale) {
  RmsnormNvfp4Params params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, eps, x, weight, scales, code, block_scale, token_scale, params));
  ParallelFor(pool, params.t, kGrainChannels / params.d + 1,
              [&](int64_t begin, int64_t end) { RmsnormNvfp4Cpu(params, begin, end); });
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, float eps, ffi::AnyBuffer x,
                    ffi::AnyBuffer weight, ffi::RemainingArgs scales, Out code, Out block_scale,
                    Out token_scale) {
  RmsnormNvfp4Params params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, eps, x, weight, scales, code, block_scale, token_scale, params));
  if (!IsAligned(params.code, params.d / 2, 8)) {
    return InvalidArgument(kOp, "code must be aligned to 8 bytes");
  }
  if (params.t == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts,
                    [&](cudaStream_t on) { return RmsnormNvfp4Cuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<float>("eps")
      .Arg<ffi::AnyBuffer>()   // x [t, d]
      .Arg<ffi::AnyBuffer>()   // weight [d]
      .RemainingArgs()         // global_scale [], if static
      .Ret<ffi::AnyBuffer>()   // code [t, d]
      .Ret<ffi::AnyBuffer>()   // block_scale [t, d / 16]
      .Ret<ffi::AnyBuffer>();  // token_scale [t]
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<float>("eps")
                           .Arg<ffi::AnyBuffer>()    // x [t, d]
                           .Arg<ffi::AnyBuffer>()    // weight [d]
                           .RemainingArgs()          // global_scale [], if static
                           .Ret<ffi::AnyBuffer>()    // code [t, d]
                           .Ret<ffi::AnyBuffer>()    // block_scale [t, d / 16]
                           .Ret<ffi::AnyBuffer>());  // token_scale [t]
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target RmsnormNvfp4Target() { return {"dsv4.rmsnorm_nvfp4", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
