// Handlers of dsv4.nvfp4_linear. Operands: x, n weights, n block_scales, n global_scales, for a
// static one act_scale, and of one weight maybe up, which x is the gate of and `limit` clamps;
// results: n y, then scratch.
#include <cstdint>

#include "common/linear_cpu.h"
#include "common/linear_ffi.h"
#include "nvfp4_linear/nvfp4_linear.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "nvfp4_linear";

LaunchCounts counts;

ffi::Error Fill(int32_t abi, int32_t act, int32_t regime, float limit, const ffi::AnyBuffer& x,
                const ffi::RemainingArgs& operands, const ffi::RemainingRets& results,
                LinearsParams& params) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  return FillLinears(kOp, WeightForm::kNvfp4, act, regime, x, operands, results, params, limit);
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, int32_t act, int32_t regime, float limit,
                   ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::RemainingRets results) {
  LinearsParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, act, regime, limit, x, operands, results, params));
  for (int p = 0; p < params.n_parts; ++p) RunLinearCpu(pool, params.parts[p], Nvfp4LinearCpu);
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, int32_t act, int32_t regime, float limit,
                    ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::RemainingRets results) {
  LinearsParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, act, regime, limit, x, operands, results, params));
  DSV4_RETURN_IF_ERROR(CheckLinearAlignment(kOp, params));
  if (params.n_parts == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts,
                    [&](cudaStream_t on) { return Nvfp4LinearCuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<int32_t>("act")
      .Attr<int32_t>("regime")
      .Attr<float>("limit")
      .Arg<ffi::AnyBuffer>()  // x [t, k] or [t, g, k]
      .RemainingArgs()        // weights [n_i, k], scales [n_i, k / 16] and [], act_scale, up
      .RemainingRets();       // y [t, n_i] or [t, g, n_i / g], then scratch [bytes]
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<int32_t>("act")
                           .Attr<int32_t>("regime")
                           .Attr<float>("limit")
                           .Arg<ffi::AnyBuffer>()  // x [t, k] or [t, g, k]
                           .RemainingArgs()  // weights [n_i, k], scales [n_i, k / 16], [], act, up
                           .RemainingRets());  // y [t, n_i] or [t, g, n_i / g], scratch [bytes]
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target Nvfp4LinearTarget() { return {"dsv4.nvfp4_linear", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
