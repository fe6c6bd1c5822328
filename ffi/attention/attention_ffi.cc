// Handlers of dsv4.attention. Operands: q, positions, sink and the ring (nope, scale, rope); then,
// as far as the attributes has_... say so, the chunk and start, the pool and n_visible, topk_idx,
// frequencies. Results: o and lse.
#include <cstdint>
#include <string>

#include "attention/attention.h"
#include "common/bytes.h"
#include "common/handler.h"
#include "common/parallel.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "attention";
constexpr int64_t kScaleBlock = 64;

LaunchCounts counts;

using Out = ffi::Result<ffi::AnyBuffer>;

struct Attributes {
  int32_t abi, window, regime, has_chunk, has_pool, has_topk, has_frequencies;
};

// The next of the operands that not every call has.
class Rest {
 public:
  explicit Rest(const ffi::RemainingArgs& args) : args_(args) {}

  // `buffer` must have the dtype and, `shape` being given, the shape.
  template <typename T>
  ffi::Error Take(const std::string& name, ffi::DataType dtype,
                  std::initializer_list<int64_t> shape, const T*& data) {
    auto buffer = args_.get<ffi::AnyBuffer>(next_++);
    if (!buffer) return InvalidArgument(kOp, name + " must be a buffer");
    DSV4_RETURN_IF_ERROR(CheckDtype(kOp, name, buffer->element_type(), {dtype}));
    DSV4_RETURN_IF_ERROR(CheckShape(kOp, name, buffer->dimensions(), shape));
    data = static_cast<const T*>(buffer->untyped_data());
    return ffi::Error::Success();
  }

  // The shape of the one that comes next.
  ffi::Error Peek(const std::string& name, Dims& dims) const {
    auto buffer = args_.get<ffi::AnyBuffer>(next_);
    if (!buffer) return InvalidArgument(kOp, name + " must be a buffer");
    dims = buffer->dimensions();
    return ffi::Error::Success();
  }

 private:
  const ffi::RemainingArgs& args_;
  int64_t next_ = 0;
};

// A store [b, slots, ...] whose first part is the next operand. `params` knows b, nope and rope.
ffi::Error TakeRows(const std::string& name, Rest& rest, const AttentionParams& params,
                    KeyRows& rows) {
  Dims dims;
  DSV4_RETURN_IF_ERROR(rest.Peek(name + " nope", dims));
  if (dims.size() != 3) {
    return InvalidArgument(kOp, name + " nope must be [b, s, nope], got " + ToString(dims));
  }
  const int64_t b = params.b, s = dims[1], blocks = params.nope / kScaleBlock;
  DSV4_RETURN_IF_ERROR(
      rest.Take(name + " nope", ffi::DataType::F8E4M3FN, {b, s, params.nope}, rows.nope));
  DSV4_RETURN_IF_ERROR(
      rest.Take(name + " scale", ffi::DataType::F8E8M0FNU, {b, s, blocks}, rows.scale));
  DSV4_RETURN_IF_ERROR(
      rest.Take(name + " rope", ffi::DataType::BF16, {b, s, params.rope}, rows.rope));
  rows.slots = s;
  rows.stride_nope = params.nope;
  rows.stride_scale = blocks;
  rows.stride_rope = params.rope;
  return ffi::Error::Success();
}

ffi::Error CheckAttributes(const Attributes& a) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, a.abi));
  if (a.window < 1) {
    return InvalidArgument(kOp, "window must be at least 1, got " + std::to_string(a.window));
  }
  if (a.regime < 0 || a.regime > static_cast<int32_t>(Regime::kExact)) {
    return InvalidArgument(kOp,
                           "regime must be 0 (any), 1 (decode), 2 (prefill) or 3 (exact), got " +
                               std::to_string(a.regime));
  }
  const struct {
    const char* name;
    int32_t value;
  } flags[] = {{"has_chunk", a.has_chunk},
               {"has_pool", a.has_pool},
               {"has_topk", a.has_topk},
               {"has_frequencies", a.has_frequencies}};
  for (const auto& flag : flags) {
    if (flag.value != 0 && flag.value != 1) {
      return InvalidArgument(
          kOp, std::string(flag.name) + " must be 0 or 1, got " + std::to_string(flag.value));
    }
  }
  if (a.has_topk > a.has_pool) {
    return InvalidArgument(kOp, "has_topk must be 0 without has_pool, got 1");
  }
  return ffi::Error::Success();
}

// b, t, h, nope and rope, from q and the parts of the ring.
ffi::Error FillSizes(const ffi::AnyBuffer& q, Rest ring, AttentionParams& params) {
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "q", q.element_type(), {ffi::DataType::BF16}));
  const Dims dims = q.dimensions();
  if (dims.size() != 4) {
    return InvalidArgument(kOp, "q must be [b, t, h, d], got " + ToString(dims));
  }
  params.b = dims[0];
  params.t = dims[1];
  params.h = dims[2];
  Dims nope_dims;
  DSV4_RETURN_IF_ERROR(ring.Peek("ring nope", nope_dims));
  const int64_t d = dims[3], nope = nope_dims.size() == 3 ? nope_dims[2] : -1;
  if (nope < kScaleBlock || nope % kScaleBlock != 0 || nope > d) {
    return InvalidArgument(
        kOp, "ring nope must be [b, s, nope] with a multiple of 64 channels, at most q's " +
                 std::to_string(d) + ", got " + ToString(nope_dims));
  }
  if ((d - nope) % 2 != 0 || d > kAttentionMaxWidth) {
    return InvalidArgument(kOp, "q must have an even number of channels, at most " +
                                    std::to_string(kAttentionMaxWidth) + ", got " + ToString(dims));
  }
  params.nope = nope;
  params.rope = d - nope;
  return ffi::Error::Success();
}

ffi::Error CheckRing(const Attributes& a, const AttentionParams& params) {
  const int64_t least = a.has_chunk ? params.window - 1 : params.window + params.t - 1;
  if (params.t == 0 || params.ring.slots >= least) return ffi::Error::Success();
  return InvalidArgument(kOp, "ring must have at least " + std::to_string(least) + " slots for " +
                                  std::to_string(params.t) + " tokens and window " +
                                  std::to_string(params.window) + ", got " +
                                  std::to_string(params.ring.slots));
}

ffi::Error Fill(const Attributes& a, const ffi::AnyBuffer& q, const ffi::AnyBuffer& positions,
                const ffi::AnyBuffer& sink, const ffi::RemainingArgs& args, Out o, Out lse,
                AttentionParams& params) {
  DSV4_RETURN_IF_ERROR(CheckAttributes(a));
  const int64_t expected = 3 + 4 * a.has_chunk + 4 * a.has_pool + a.has_topk + a.has_frequencies;
  if (static_cast<int64_t>(args.size()) != expected) {
    return InvalidArgument(kOp, "must have " + std::to_string(expected) +
                                    " operands behind sink (ring, chunk and start, pool and "
                                    "n_visible, topk_idx, frequencies), got " +
                                    std::to_string(args.size()));
  }
  Rest rest(args);
  DSV4_RETURN_IF_ERROR(FillSizes(q, rest, params));
  const int64_t b = params.b, t = params.t, h = params.h, d = params.nope + params.rope;
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "positions", positions.element_type(), {ffi::DataType::S32}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "positions", positions.dimensions(), {b, t}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "sink", sink.element_type(), {ffi::DataType::F32}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "sink", sink.dimensions(), {h}));
  params.window = a.window;
  DSV4_RETURN_IF_ERROR(TakeRows("ring", rest, params, params.ring));
  DSV4_RETURN_IF_ERROR(CheckRing(a, params));
  if (a.has_chunk) {
    DSV4_RETURN_IF_ERROR(TakeRows("chunk", rest, params, params.chunk));
    DSV4_RETURN_IF_ERROR(rest.Take("start", ffi::DataType::S32, {b}, params.start));
  }
  if (a.has_pool) {
    DSV4_RETURN_IF_ERROR(TakeRows("pool", rest, params, params.pool));
    DSV4_RETURN_IF_ERROR(rest.Take("n_visible", ffi::DataType::S32, {b, t}, params.n_visible));
  }
  if (a.has_topk) {
    Dims dims;
    DSV4_RETURN_IF_ERROR(rest.Peek("topk_idx", dims));
    params.topk = dims.size() == 3 ? dims[2] : 0;
    DSV4_RETURN_IF_ERROR(
        rest.Take("topk_idx", ffi::DataType::S32, {b, t, params.topk}, params.topk_idx));
  }
  if (a.has_frequencies) {
    DSV4_RETURN_IF_ERROR(
        rest.Take("frequencies", ffi::DataType::F32, {params.rope / 2}, params.frequencies));
  }
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "o", o->element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "o", o->dimensions(), {b, t, h, d}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "lse", lse->element_type(), {ffi::DataType::F32}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "lse", lse->dimensions(), {b, t, h}));
  params.q = static_cast<const uint16_t*>(q.untyped_data());
  params.positions = static_cast<const int32_t*>(positions.untyped_data());
  params.sink = static_cast<const float*>(sink.untyped_data());
  params.o = static_cast<uint16_t*>(o->untyped_data());
  params.lse = static_cast<float*>(lse->untyped_data());
  params.stride_q = h * d;
  params.stride_o = h * d;
  params.regime = static_cast<Regime>(a.regime);
  return ffi::Error::Success();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, int32_t window, int32_t regime,
                   int32_t has_chunk, int32_t has_pool, int32_t has_topk, int32_t has_frequencies,
                   ffi::AnyBuffer q, ffi::AnyBuffer positions, ffi::AnyBuffer sink,
                   ffi::RemainingArgs rest, Out o, Out lse) {
  AttentionParams params{};
  DSV4_RETURN_IF_ERROR(Fill({abi, window, regime, has_chunk, has_pool, has_topk, has_frequencies},
                            q, positions, sink, rest, o, lse, params));
  AttentionCpu(params, [&](int64_t count, int64_t grain, const auto& body) {
    ParallelFor(pool, count, grain, body);
  });
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, int32_t window, int32_t regime,
                    int32_t has_chunk, int32_t has_pool, int32_t has_topk, int32_t has_frequencies,
                    ffi::AnyBuffer q, ffi::AnyBuffer positions, ffi::AnyBuffer sink,
                    ffi::RemainingArgs rest, Out o, Out lse) {
  AttentionParams params{};
  DSV4_RETURN_IF_ERROR(Fill({abi, window, regime, has_chunk, has_pool, has_topk, has_frequencies},
                            q, positions, sink, rest, o, lse, params));
  if (!IsAligned(params.o, 0, 4)) return InvalidArgument(kOp, "o must be aligned to 4 bytes");
  if (params.b * params.t * params.h == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts,
                    [&](cudaStream_t on) { return AttentionCuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<int32_t>("window")
      .Attr<int32_t>("regime")
      .Attr<int32_t>("has_chunk")
      .Attr<int32_t>("has_pool")
      .Attr<int32_t>("has_topk")
      .Attr<int32_t>("has_frequencies")
      .Arg<ffi::AnyBuffer>()   // q [b, t, h, d]
      .Arg<ffi::AnyBuffer>()   // positions [b, t]
      .Arg<ffi::AnyBuffer>()   // sink [h]
      .RemainingArgs()         // ring; chunk, start; pool, n_visible; topk_idx; frequencies
      .Ret<ffi::AnyBuffer>()   // o [b, t, h, d]
      .Ret<ffi::AnyBuffer>();  // lse [b, t, h]
}

XLA_FFI_DEFINE_HANDLER(
    kCpu, CpuImpl,
    ffi::Ffi::Bind()
        .Ctx<ffi::ThreadPool>()
        .Attr<int32_t>("abi")
        .Attr<int32_t>("window")
        .Attr<int32_t>("regime")
        .Attr<int32_t>("has_chunk")
        .Attr<int32_t>("has_pool")
        .Attr<int32_t>("has_topk")
        .Attr<int32_t>("has_frequencies")
        .Arg<ffi::AnyBuffer>()    // q [b, t, h, d]
        .Arg<ffi::AnyBuffer>()    // positions [b, t]
        .Arg<ffi::AnyBuffer>()    // sink [h]
        .RemainingArgs()          // ring; chunk, start; pool, n_visible; topk_idx; frequencies
        .Ret<ffi::AnyBuffer>()    // o [b, t, h, d]
        .Ret<ffi::AnyBuffer>());  // lse [b, t, h]
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target AttentionTarget() { return {"dsv4.attention", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
