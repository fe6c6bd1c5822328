// Handlers of dsv4.key_finish. Operands: x, weight, start, frequencies; for a ring, count and its
// nope, scale, rope; for a norm of queries, its x and weight. Results: nope, scale, rope of the
// rows; the ring's, aliased to the operands; code and scale of the norm, or it in BF16.
#include <cstdint>
#include <cstring>
#include <string>

#include "common/bytes.h"
#include "common/handler.h"
#include "common/parallel.h"
#include "key_finish/key_finish.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "key_finish";
constexpr int64_t kGrainChannels = 1 << 15;
constexpr int64_t kGrainBytes = 1 << 18;
constexpr int kParts = 3;  // of a store

LaunchCounts counts;

// A ring whose operand and result are not one buffer (the caller did not donate it).
struct Copy {
  void* to[kParts];
  const void* from[kParts];
  int64_t bytes[kParts];
  int n = 0;
};

// Parts of a store [b, s, ...], results first, first + 1, first + 2.
ffi::Error FillStore(const std::string& name, const ffi::RemainingRets& rets, int first, int64_t s,
                     const KeyFinishParams& params, KeyStore& store) {
  const int64_t nope = params.d - params.rotary;
  const char* const parts[kParts] = {" nope", " scale", " rope"};
  const ffi::DataType dtypes[kParts] = {ffi::DataType::F8E4M3FN, ffi::DataType::F8E8M0FNU,
                                        ffi::DataType::BF16};
  const int64_t widths[kParts] = {nope, nope / kKeyBlock, params.rotary};
  void* data[kParts];
  for (int i = 0; i < kParts; ++i) {
    auto part = rets.get<ffi::AnyBuffer>(first + i);
    if (!part) return InvalidArgument(kOp, name + " must be buffers");
    DSV4_RETURN_IF_ERROR(CheckDtype(kOp, name + parts[i], (*part)->element_type(), {dtypes[i]}));
    DSV4_RETURN_IF_ERROR(
        CheckShape(kOp, name + parts[i], (*part)->dimensions(), {params.b, s, widths[i]}));
    data[i] = (*part)->untyped_data();
  }
  store = {static_cast<uint8_t*>(data[0]), static_cast<uint8_t*>(data[1]),
           static_cast<uint16_t*>(data[2])};
  return ffi::Error::Success();
}

ffi::Error FillRing(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                    KeyFinishParams& params, Copy& copy) {
  auto count = args.get<ffi::AnyBuffer>(0);
  auto codes = args.get<ffi::AnyBuffer>(1);
  if (!count || !codes) return InvalidArgument(kOp, "operands must be buffers");
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "count", count->element_type(), {ffi::DataType::S32}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "count", count->dimensions(), {params.b}));
  params.count = static_cast<const int32_t*>(count->untyped_data());
  const Dims dims = codes->dimensions();
  if (dims.size() != 3) {
    return InvalidArgument(kOp, "ring nope must be [b, s, nope], got " + ToString(dims));
  }
  params.slots = dims[1];
  DSV4_RETURN_IF_ERROR(FillStore("ring", rets, kParts, params.slots, params, params.ring));
  for (int i = 0; i < kParts; ++i) {
    auto from = args.get<ffi::AnyBuffer>(1 + i);
    auto to = rets.get<ffi::AnyBuffer>(kParts + i);
    if (!from || !to) return InvalidArgument(kOp, "operands must be buffers");
    const std::string name = "ring operand " + std::to_string(i);
    DSV4_RETURN_IF_ERROR(CheckDtype(kOp, name, from->element_type(), {(*to)->element_type()}));
    const Dims want = (*to)->dimensions();
    DSV4_RETURN_IF_ERROR(CheckShape(kOp, name, from->dimensions(), {want[0], want[1], want[2]}));
    const int64_t bytes =
        PackedBytes(from->element_type(), static_cast<int64_t>(from->element_count()));
    if (from->untyped_data() == (*to)->untyped_data() || bytes == 0) continue;
    copy.to[copy.n] = (*to)->untyped_data();
    copy.from[copy.n] = from->untyped_data();
    copy.bytes[copy.n++] = bytes;
  }
  return ffi::Error::Success();
}

// Operands `arg`, arg + 1, results from `ret` on: code and scale, or y alone.
ffi::Error FillNorm(float eps, const ffi::RemainingArgs& args, size_t arg,
                    const ffi::RemainingRets& rets, size_t ret, QueryNormParams& norm) {
  const bool coded = rets.size() == ret + 2;
  auto x = args.get<ffi::AnyBuffer>(arg), weight = args.get<ffi::AnyBuffer>(arg + 1);
  auto code = rets.get<ffi::AnyBuffer>(ret), scale = rets.get<ffi::AnyBuffer>(ret + coded);
  if (!x || !weight || !code || !scale) return InvalidArgument(kOp, "query must be buffers");
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "query x", x->element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "query weight", weight->element_type(), {ffi::DataType::BF16}));
  if (coded) {
    DSV4_RETURN_IF_ERROR(
        CheckDtype(kOp, "query code", (*code)->element_type(), {ffi::DataType::F8E4M3FN}));
    DSV4_RETURN_IF_ERROR(
        CheckDtype(kOp, "query scale", (*scale)->element_type(), {ffi::DataType::F8E8M0FNU}));
  } else {
    DSV4_RETURN_IF_ERROR(
        CheckDtype(kOp, "query y", (*code)->element_type(), {ffi::DataType::BF16}));
  }
  const Dims dims = x->dimensions();
  if (dims.size() != 2)
    return InvalidArgument(kOp, "query x must be [n, r], got " + ToString(dims));
  const int64_t n = dims[0], r = dims[1];
  if (r < kNormBlock || r % kNormBlock != 0 || r > kNormMaxDim) {
    return InvalidArgument(kOp, "query x must have a multiple of 16 channels, 16.." +
                                    std::to_string(kNormMaxDim) + ", got " + ToString(dims));
  }
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "query weight", weight->dimensions(), {r}));
  DSV4_RETURN_IF_ERROR(
      CheckShape(kOp, coded ? "query code" : "query y", (*code)->dimensions(), {n, r}));
  if (coded) {
    DSV4_RETURN_IF_ERROR(CheckShape(kOp, "query scale", (*scale)->dimensions(),
                                    {n, (r + kActBlock - 1) / kActBlock}));
    norm.code = static_cast<uint8_t*>((*code)->untyped_data());
    norm.scale = static_cast<uint8_t*>((*scale)->untyped_data());
  } else {
    norm.y = static_cast<uint16_t*>((*code)->untyped_data());
  }
  norm.x = static_cast<const uint16_t*>(x->untyped_data());
  norm.weight = static_cast<const uint16_t*>(weight->untyped_data());
  norm.t = n;
  norm.d = r;
  norm.eps = eps;
  norm.reciprocal_d = 1.0f / static_cast<float>(r);
  return ffi::Error::Success();
}

// Without a norm `norm.x` stays as it is.
ffi::Error Fill(int32_t abi, float eps, const ffi::AnyBuffer& x, const ffi::AnyBuffer& weight,
                const ffi::AnyBuffer& start, const ffi::AnyBuffer& frequencies,
                const ffi::RemainingArgs& args, const ffi::RemainingRets& rets,
                KeyFinishParams& params, QueryNormParams& norm, Copy& copy) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "x", x.element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "weight", weight.element_type(), {ffi::DataType::BF16}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "start", start.element_type(), {ffi::DataType::S32}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "frequencies", frequencies.element_type(), {ffi::DataType::F32}));
  const Dims dims = x.dimensions();
  if (dims.size() != 3) return InvalidArgument(kOp, "x must be [b, t, d], got " + ToString(dims));
  params.b = dims[0];
  params.t = dims[1];
  params.d = dims[2];
  const Dims pairs = frequencies.dimensions();
  params.rotary = pairs.size() == 1 ? 2 * pairs[0] : -1;
  if (params.rotary < 0 || params.rotary % kChunkChannels != 0 || params.rotary > kMaxRotary) {
    return InvalidArgument(
        kOp, "frequencies must be a multiple of 4, at most 32, got " + ToString(pairs));
  }
  const int64_t nope = params.d - params.rotary;
  if (nope < kKeyBlock || nope % kKeyBlock != 0 || params.d > kRowMaxChannels) {
    return InvalidArgument(kOp, "x must have a multiple of 64 channels before the rotary " +
                                    std::to_string(params.rotary) + ", at most " +
                                    std::to_string(kRowMaxChannels) + " with them, got " +
                                    ToString(dims));
  }
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "weight", weight.dimensions(), {params.d}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "start", start.dimensions(), {params.b}));
  const size_t n_args = args.size(), n_rets = rets.size();
  const bool ring = n_args >= 1 + kParts;
  const size_t norm_arg = ring ? 1 + kParts : 0, norm_ret = ring ? 2 * kParts : kParts;
  const bool normed = n_args > norm_arg;
  const bool results_fit =
      normed ? n_rets == norm_ret + 1 || n_rets == norm_ret + 2 : n_rets == norm_ret;
  if (n_args != norm_arg + (normed ? 2 : 0) || !results_fit) {
    return InvalidArgument(kOp,
                           "must have 4 operands and 3 results, 4 and 3 more with a ring, 2 and 1 "
                           "or 2 more with a query, got " +
                               std::to_string(4 + n_args) + " and " + std::to_string(n_rets));
  }
  if (normed) DSV4_RETURN_IF_ERROR(FillNorm(eps, args, norm_arg, rets, norm_ret, norm));
  DSV4_RETURN_IF_ERROR(FillStore("rows", rets, 0, params.t, params, params.rows));
  params.x = static_cast<const uint16_t*>(x.untyped_data());
  params.weight = static_cast<const uint16_t*>(weight.untyped_data());
  params.start = static_cast<const int32_t*>(start.untyped_data());
  params.frequencies = static_cast<const float*>(frequencies.untyped_data());
  params.eps = eps;
  params.reciprocal_d = 1.0f / static_cast<float>(params.d);
  return ring ? FillRing(args, rets, params, copy) : ffi::Error::Success();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, float eps, ffi::AnyBuffer x,
                   ffi::AnyBuffer weight, ffi::AnyBuffer start, ffi::AnyBuffer frequencies,
                   ffi::RemainingArgs args, ffi::RemainingRets rets) {
  KeyFinishParams params{};
  QueryNormParams norm{};
  Copy copy;
  DSV4_RETURN_IF_ERROR(
      Fill(abi, eps, x, weight, start, frequencies, args, rets, params, norm, copy));
  for (int i = 0; i < copy.n; ++i) {
    ParallelFor(pool, copy.bytes[i], kGrainBytes, [&](int64_t begin, int64_t end) {
      std::memcpy(static_cast<char*>(copy.to[i]) + begin,
                  static_cast<const char*>(copy.from[i]) + begin, end - begin);
    });
  }
  ParallelFor(pool, params.b * params.t, kGrainChannels / params.d + 1,
              [&](int64_t begin, int64_t end) { KeyFinishCpu(params, begin, end); });
  if (norm.x == nullptr) return ffi::Error::Success();
  ParallelFor(pool, norm.t, kGrainChannels / norm.d + 1,
              [&](int64_t begin, int64_t end) { QueryNormCpu(norm, begin, end); });
  return ffi::Error::Success();
}

bool Aligned(const KeyStore& store, int64_t rotary) {
  return IsAligned(store.nope, 0, 8) && IsAligned(store.rope, 2 * rotary, 16);
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, float eps, ffi::AnyBuffer x,
                    ffi::AnyBuffer weight, ffi::AnyBuffer start, ffi::AnyBuffer frequencies,
                    ffi::RemainingArgs args, ffi::RemainingRets rets) {
  KeyFinishParams params{};
  QueryNormParams norm{};
  Copy copy;
  DSV4_RETURN_IF_ERROR(
      Fill(abi, eps, x, weight, start, frequencies, args, rets, params, norm, copy));
  if (!Aligned(params.rows, params.rotary) || !Aligned(params.ring, params.rotary) ||
      !IsAligned(norm.code, norm.d, 16) || !IsAligned(norm.y, 2 * norm.d, 16)) {
    return InvalidArgument(kOp, "results must be aligned to 16 bytes");
  }
  if (copy.n == 0 && params.b * params.t == 0 && norm.t == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts, [&](cudaStream_t on) {
    for (int i = 0; i < copy.n; ++i) {
      const cudaError_t error =
          cudaMemcpyAsync(copy.to[i], copy.from[i], copy.bytes[i], cudaMemcpyDeviceToDevice, on);
      if (error != cudaSuccess) return error;
    }
    if (norm.x == nullptr) return KeyFinishCuda(params, on);
    return KeyFinishNormCuda(params, norm, on);
  });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<float>("eps")
      .Arg<ffi::AnyBuffer>()  // x [b, t, d]
      .Arg<ffi::AnyBuffer>()  // weight [d]
      .Arg<ffi::AnyBuffer>()  // start [b]
      .Arg<ffi::AnyBuffer>()  // frequencies [rotary / 2]
      .RemainingArgs()        // count [b]; nope, scale, rope of the ring; query x [n, r], weight
      .RemainingRets();       // nope, scale, rope of the rows, of the ring; query code, scale, or y
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<float>("eps")
                           .Arg<ffi::AnyBuffer>()  // x [b, t, d]
                           .Arg<ffi::AnyBuffer>()  // weight [d]
                           .Arg<ffi::AnyBuffer>()  // start [b]
                           .Arg<ffi::AnyBuffer>()  // frequencies [rotary / 2]
                           .RemainingArgs()    // count [b]; nope, scale, rope of the ring; query
                           .RemainingRets());  // of the rows, of the ring; query code, scale, or y
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target KeyFinishTarget() { return {"dsv4.key_finish", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
