// Handlers of dsv4.fp8_linear. Operands: x, weight, scale; results: y, scratch.
#include <cstdint>

#include "common/linear_cpu.h"
#include "common/linear_ffi.h"
#include "fp8_linear/fp8_linear.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "fp8_linear";

LaunchCounts counts;

ffi::Error Fill(int32_t abi, int32_t act, int32_t regime, const ffi::AnyBuffer& x,
                const ffi::AnyBuffer& weight, const ffi::AnyBuffer& scale, LinearResult y,
                LinearResult scratch, LinearParams& params) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  return FillLinear({kOp, WeightForm::kFp8, x, weight, &scale}, act, regime, y, scratch, params);
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, int32_t act, int32_t regime, ffi::AnyBuffer x,
                   ffi::AnyBuffer weight, ffi::AnyBuffer scale, LinearResult y,
                   LinearResult scratch) {
  LinearParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, act, regime, x, weight, scale, y, scratch, params));
  RunLinearCpu(pool, params, Fp8LinearCpu);
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, int32_t act, int32_t regime, ffi::AnyBuffer x,
                    ffi::AnyBuffer weight, ffi::AnyBuffer scale, LinearResult y,
                    LinearResult scratch) {
  LinearParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, act, regime, x, weight, scale, y, scratch, params));
  DSV4_RETURN_IF_ERROR(CheckLinearAlignment(kOp, params));
  if (params.t == 0 || params.n == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts,
                    [&](cudaStream_t on) { return Fp8LinearCuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<int32_t>("act")
      .Attr<int32_t>("regime")
      .Arg<ffi::AnyBuffer>()   // x [t, k] or [t, g, k]
      .Arg<ffi::AnyBuffer>()   // weight [n, k]
      .Arg<ffi::AnyBuffer>()   // scale [ceil(n / 128), ceil(k / 128)]
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
                           .Arg<ffi::AnyBuffer>()    // scale [ceil(n / 128), ceil(k / 128)]
                           .Ret<ffi::AnyBuffer>()    // y [t, n] or [t, g, n / g]
                           .Ret<ffi::AnyBuffer>());  // scratch [bytes]
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target Fp8LinearTarget() { return {"dsv4.fp8_linear", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
