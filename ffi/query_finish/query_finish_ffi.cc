// Handlers of dsv4.query_finish. Operands: x, positions, frequencies; result: y.
#include <cstdint>
#include <string>

#include "common/bytes.h"
#include "common/handler.h"
#include "common/parallel.h"
#include "query_finish/query_finish.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "query_finish";
constexpr int64_t kGrainChannels = 1 << 15;

LaunchCounts counts;

using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Error Fill(int32_t abi, float eps, int32_t bf16_steps, const ffi::AnyBuffer& x,
                const ffi::AnyBuffer& positions, const ffi::AnyBuffer& frequencies, Out y,
                QueryFinishParams& params) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "x", x.element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "positions", positions.element_type(), {ffi::DataType::S32}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "frequencies", frequencies.element_type(), {ffi::DataType::F32}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "y", y->element_type(), {ffi::DataType::BF16}));
  const Dims dims = x.dimensions();
  if (dims.size() != 3) return InvalidArgument(kOp, "x must be [t, h, d], got " + ToString(dims));
  params.t = dims[0];
  params.h = dims[1];
  params.d = dims[2];
  if (params.d < kChunkChannels || params.d % kChunkChannels != 0 || params.d > kRowMaxChannels) {
    return InvalidArgument(kOp, "x must have a multiple of 8 channels, 8.." +
                                    std::to_string(kRowMaxChannels) + ", got " + ToString(dims));
  }
  const Dims pairs = frequencies.dimensions();
  params.rotary = pairs.size() == 1 ? 2 * pairs[0] : -1;
  if (params.rotary < 0 || params.rotary % kChunkChannels != 0 || params.rotary > kMaxRotary ||
      params.rotary > params.d) {
    return InvalidArgument(kOp, "frequencies must be a multiple of 4, at most 32 and half of x's " +
                                    std::to_string(params.d) + " channels, got " + ToString(pairs));
  }
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "positions", positions.dimensions(), {params.t}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "y", y->dimensions(), {params.t, params.h, params.d}));
  if (bf16_steps != 0 && bf16_steps != 1) {
    return InvalidArgument(kOp, "bf16_steps must be 0 or 1, got " + std::to_string(bf16_steps));
  }
  params.x = static_cast<const uint16_t*>(x.untyped_data());
  params.positions = static_cast<const int32_t*>(positions.untyped_data());
  params.frequencies = static_cast<const float*>(frequencies.untyped_data());
  params.y = static_cast<uint16_t*>(y->untyped_data());
  params.eps = eps;
  params.reciprocal_d = 1.0f / static_cast<float>(params.d);
  params.bf16_steps = bf16_steps == 1;
  return ffi::Error::Success();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, float eps, int32_t bf16_steps,
                   ffi::AnyBuffer x, ffi::AnyBuffer positions, ffi::AnyBuffer frequencies, Out y) {
  QueryFinishParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, eps, bf16_steps, x, positions, frequencies, y, params));
  ParallelFor(pool, params.t, kGrainChannels / (params.h * params.d + 1) + 1,
              [&](int64_t begin, int64_t end) { QueryFinishCpu(params, begin, end); });
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, float eps, int32_t bf16_steps, ffi::AnyBuffer x,
                    ffi::AnyBuffer positions, ffi::AnyBuffer frequencies, Out y) {
  QueryFinishParams params{};
  DSV4_RETURN_IF_ERROR(Fill(abi, eps, bf16_steps, x, positions, frequencies, y, params));
  if (!IsAligned(params.y, 2 * params.d, 16)) {
    return InvalidArgument(kOp, "y must be aligned to 16 bytes");
  }
  if (params.t == 0 || params.h == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts,
                    [&](cudaStream_t on) { return QueryFinishCuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<float>("eps")
      .Attr<int32_t>("bf16_steps")
      .Arg<ffi::AnyBuffer>()   // x [t, h, d]
      .Arg<ffi::AnyBuffer>()   // positions [t]
      .Arg<ffi::AnyBuffer>()   // frequencies [rotary / 2]
      .Ret<ffi::AnyBuffer>();  // y [t, h, d]
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<float>("eps")
                           .Attr<int32_t>("bf16_steps")
                           .Arg<ffi::AnyBuffer>()    // x [t, h, d]
                           .Arg<ffi::AnyBuffer>()    // positions [t]
                           .Arg<ffi::AnyBuffer>()    // frequencies [rotary / 2]
                           .Ret<ffi::AnyBuffer>());  // y [t, h, d]
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target QueryFinishTarget() { return {"dsv4.query_finish", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
