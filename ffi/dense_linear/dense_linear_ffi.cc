// Handlers of dsv4.dense_linear. Operands: x, then n weights; results: n y, then scratch.
#include <cstdint>
#include <string>

#include "common/linear_cpu.h"
#include "common/linear_ffi.h"
#include "dense_linear/dense_linear.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "dense_linear";

LaunchCounts counts;

ffi::Error Fill(int32_t abi, int32_t regime, const ffi::AnyBuffer& x,
                const ffi::RemainingArgs& weights, const ffi::RemainingRets& results,
                DenseLinearParams& params) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  const size_t n = weights.size();
  if (n < 1 || n > kMaxDenseLinearParts || results.size() != n + 1) {
    return InvalidArgument(kOp, "must have x and n weights for n results and scratch, n = 1.." +
                                    std::to_string(kMaxDenseLinearParts) + ", got " +
                                    std::to_string(n) + " weights and " +
                                    std::to_string(results.size()) + " results");
  }
  auto first = results.get<ffi::AnyBuffer>(0), scratch = results.get<ffi::AnyBuffer>(n);
  for (size_t i = 0; i < n; ++i) {
    auto weight = weights.get<ffi::AnyBuffer>(i);
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!weight || !y || !first || !scratch) {
      return InvalidArgument(kOp, "operands and results must be buffers");
    }
    LinearOperands in{kOp, WeightForm::kBf16, x, *weight};
    if (n > 1) in.index = "[" + std::to_string(i) + "]";
    LinearParams part{};
    DSV4_RETURN_IF_ERROR(
        FillLinear(in, static_cast<int32_t>(ActForm::kBf16), regime, *y, *scratch, part));
    DSV4_RETURN_IF_ERROR(
        CheckDtype(kOp, "y" + in.index, (*y)->element_type(), {(*first)->element_type()}));
    if (part.t > 0 && part.n > 0) params.parts[params.n_parts++] = part;
  }
  return ffi::Error::Success();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, int32_t regime, ffi::AnyBuffer x,
                   ffi::RemainingArgs weights, ffi::RemainingRets results) {
  DenseLinearParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, regime, x, weights, results, params));
  for (int p = 0; p < params.n_parts; ++p) RunLinearCpu(pool, params.parts[p], DenseLinearCpu);
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, int32_t regime, ffi::AnyBuffer x,
                    ffi::RemainingArgs weights, ffi::RemainingRets results) {
  DenseLinearParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, regime, x, weights, results, params));
  for (int p = 0; p < params.n_parts; ++p) {
    DSV4_RETURN_IF_ERROR(CheckLinearAlignment(kOp, params.parts[p]));
  }
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
