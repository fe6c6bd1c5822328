// Handlers of dsv4.nvfp4_linear. Operands: x, weight, block_scale, global_scale and, for a
// static one, act_scale; results: y, scratch.
#include <cstdint>

#include "common/linear_cpu.h"
#include "common/linear_ffi.h"
#include "nvfp4_linear/nvfp4_linear.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "nvfp4_linear";

LaunchCounts counts;

ffi::Error Fill(int32_t abi, int32_t act, int32_t regime, const ffi::AnyBuffer& x,
                const ffi::AnyBuffer& weight, const ffi::AnyBuffer& block_scale,
                const ffi::AnyBuffer& global_scale, const ffi::RemainingArgs& act_scale,
                LinearResult y, LinearResult scratch, LinearParams& params) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  return FillLinear({kOp, WeightForm::kNvfp4, x, weight, &block_scale, &global_scale, &act_scale},
                    act, regime, y, scratch, params);
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, int32_t act, int32_t regime, ffi::AnyBuffer x,
                   ffi::AnyBuffer weight, ffi::AnyBuffer block_scale, ffi::AnyBuffer global_scale,
                   ffi::RemainingArgs act_scale, LinearResult y, LinearResult scratch) {
  LinearParams params{};
  DSV4_RETURN_IF_ERROR(
      Fill(abi, act, regime, x, weight, block_scale, global_scale, act_scale, y, scratch, params));
  RunLinearCpu(pool, params, Nvfp4LinearCpu);
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, int32_t act, int32_t regime, ffi::AnyBuffer x,
                    ffi::AnyBuffer weight, ffi::AnyBuffer block_scale, ffi::AnyBuffer global_scale,
                    ffi::RemainingArgs act_scale, LinearResult y, LinearResult scratch) {
  LinearParams params{};
  DSV4_RETURN_IF_ERROR(
      Fill(abi, act, regime, x, weight, block_scale, global_scale, act_scale, y, scratch, params));
  DSV4_RETURN_IF_ERROR(CheckLinearAlignment(kOp, params));
  if (params.t == 0 || params.n == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts,
                    [&](cudaStream_t on) { return Nvfp4LinearCuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<int32_t>("act")
      .Attr<int32_t>("regime")
      .Arg<ffi::AnyBuffer>()   // x [t, k] or [t, g, k]
      .Arg<ffi::AnyBuffer>()   // weight [n, k]
      .Arg<ffi::AnyBuffer>()   // block_scale [n, k / 16]
      .Arg<ffi::AnyBuffer>()   // global_scale []
      .RemainingArgs()         // act_scale [], if static
      .Ret<ffi::AnyBuffer>()   // y [t, n] or [t, g, n / g]
      .Ret<ffi::AnyBuffer>();  // scratch [bytes]
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<int32_t>("act")
                           .Attr<int32_t>("regime")
                           .Arg<ffi::AnyBuffer>()    // x [t, k] or [t, g, k]
                           .Arg<ffi::AnyBuffer>()    // weight [n, k]
                           .Arg<ffi::AnyBuffer>()    // block_scale [n, k / 16]
                           .Arg<ffi::AnyBuffer>()    // global_scale []
                           .RemainingArgs()          // act_scale [], if static
                           .Ret<ffi::AnyBuffer>()    // y [t, n] or [t, g, n / g]
                           .Ret<ffi::AnyBuffer>());  // scratch [bytes]
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target Nvfp4LinearTarget() { return {"dsv4.nvfp4_linear", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
