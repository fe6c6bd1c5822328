// Handlers of dsv4.dense_linear. Operands: x, then n weights; results: n y, then scratch.
#include <cstdint>

#include "common/linear_cpu.h"
#include "common/linear_ffi.h"
#include "dense_linear/dense_linear.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "dense_linear";

LaunchCounts counts;

ffi::Error Fill(int32_t abi, int32_t regime, const ffi::AnyBuffer& x,
                const ffi::RemainingArgs& weights, const ffi::RemainingRets& results,
                LinearsParams& params) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  return FillLinears(kOp, WeightForm::kBf16, static_cast<int32_t>(ActForm::kBf16), regime, x,
                     weights, results, params);
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, int32_t regime, ffi::AnyBuffer x,
                   ffi::RemainingArgs weights, ffi::RemainingRets results) {
  LinearsParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, regime, x, weights, results, params));
  for (int p = 0; p < params.n_parts; ++p) RunLinearCpu(pool, params.parts[p], DenseLinearCpu);
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, int32_t regime, ffi::AnyBuffer x,
                    ffi::RemainingArgs weights, ffi::RemainingRets results) {
  LinearsParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, regime, x, weights, results, params));
  DSV4_RETURN_IF_ERROR(CheckLinearAlignment(kOp, params));
  if (params.n_parts == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts,
                    [&](cudaStream_t on) { return DenseLinearCuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<int32_t>("regime")
      .Arg<ffi::AnyBuffer>()  // x [t, k] or [t, g, k]
      .RemainingArgs()        // weights [n_i, k]
      .RemainingRets();       // y [t, n_i] or [t, g, n_i / g], then scratch [bytes]
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<int32_t>("regime")
                           .Arg<ffi::AnyBuffer>()  // x [t, k] or [t, g, k]
                           .RemainingArgs()        // weights [n_i, k]
                           .RemainingRets());      // y [t, n_i] or [t, g, n_i / g], scratch [bytes]
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target DenseLinearTarget() { return {"dsv4.dense_linear", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
