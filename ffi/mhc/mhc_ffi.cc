// Handlers of dsv4.mhc. Operands: streams; with `write` branch, post, comb; with `mixes` fn, base,
// scale, norm and, for a static one, the global scale of NVFP4. Results: with `write` the streams;
// with 24 mixes post and comb; the forms of x that the bits of `forms` name (1: BF16; 2: NVFP4 as
// code, block_scale, token_scale; 4: FP8 as code, scale); with `mixes` scratch.
#include <cstdint>
#include <string>

#include "common/bytes.h"
#include "common/handler.h"
#include "common/nvfp4.h"
#include "common/parallel.h"
#include "mhc/mhc.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "mhc";
constexpr int64_t kGrainChannels = 1 << 11;
constexpr int64_t kAlignment = 16;

LaunchCounts counts;

struct Attributes {
  int32_t abi, write, mixes, forms, iters, regime;
  float hc_eps, rms_eps;
};

// Takes operands and results in their order; the first error stays.
class Buffers {
 public:
  Buffers(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets)
      : args_(args), rets_(rets) {}

  template <typename T>
  const T* Operand(const char* name, ffi::DataType dtype, std::initializer_list<int64_t> shape) {
    auto buffer = args_.get<ffi::AnyBuffer>(next_arg_++);
    return static_cast<const T*>(
        Checked(buffer.has_value(), name, dtype, shape, [&] { return *buffer; }));
  }

  template <typename T>
  T* Result(const char* name, ffi::DataType dtype, std::initializer_list<int64_t> shape) {
    auto buffer = rets_.get<ffi::AnyBuffer>(next_ret_++);
    return static_cast<T*>(
        Checked(buffer.has_value(), name, dtype, shape, [&] { return ffi::AnyBuffer(**buffer); }));
  }

  const ffi::Error& error() const { return error_; }
  // The first that a kernel cannot take for its address.
  const std::string& misaligned() const { return misaligned_; }

 private:
  template <typename Get>
  void* Checked(bool there, const char* name, ffi::DataType dtype,
                std::initializer_list<int64_t> shape, const Get& get) {
    if (error_.failure()) return nullptr;
    if (!there) {
      error_ = InvalidArgument(kOp, std::string(name) + " must be a buffer");
      return nullptr;
    }
    const ffi::AnyBuffer buffer = get();
    error_ = CheckDtype(kOp, name, buffer.element_type(), {dtype});
    if (error_.success()) error_ = CheckShape(kOp, name, buffer.dimensions(), shape);
    if (!IsAligned(buffer.untyped_data(), 0, kAlignment) && misaligned_.empty()) misaligned_ = name;
    return buffer.untyped_data();
  }

  const ffi::RemainingArgs& args_;
  const ffi::RemainingRets& rets_;
  size_t next_arg_ = 0, next_ret_ = 0;
  ffi::Error error_ = ffi::Error::Success();
  std::string misaligned_;
};

ffi::Error CheckAttributes(const Attributes& a) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, a.abi));
  if (a.write != 0 && a.write != 1) {
    return InvalidArgument(kOp, "write must be 0 or 1, got " + std::to_string(a.write));
  }
  if (a.mixes != 0 && a.mixes != kMhcHeadMixes && a.mixes != kMhcMixes) {
    return InvalidArgument(
        kOp, "mixes must be 0 (no read), 4 (head) or 24, got " + std::to_string(a.mixes));
  }
  if (a.write == 0 && a.mixes == 0) {
    return InvalidArgument(kOp, "write and mixes must not both be 0");
  }
  const bool read = a.mixes != 0;
  if (a.forms < (read ? 1 : 0) || a.forms > (read ? 7 : 0)) {
    return InvalidArgument(
        kOp, "forms must be 1..7 with a read, 0 without, got " + std::to_string(a.forms));
  }
  if (a.mixes == kMhcMixes && a.iters < 1) {
    return InvalidArgument(kOp, "iters must be at least 1, got " + std::to_string(a.iters));
  }
  if (a.regime < 0 || a.regime > static_cast<int32_t>(Regime::kExact)) {
    return InvalidArgument(kOp,
                           "regime must be 0 (any), 1 (decode), 2 (prefill) or 3 (exact), got " +
                               std::to_string(a.regime));
  }
  return ffi::Error::Success();
}

ffi::Error Fill(const Attributes& a, const ffi::AnyBuffer& streams, const ffi::RemainingArgs& args,
                const ffi::RemainingRets& rets, MhcParams& p, std::string& misaligned) {
  using Type = ffi::DataType;
  DSV4_RETURN_IF_ERROR(CheckAttributes(a));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "streams", streams.element_type(), {Type::BF16}));
  const Dims dims = streams.dimensions();
  if (dims.size() != 3 || dims[1] != kMhcStreams || dims[2] < kMhcTile || dims[2] % kMhcTile != 0 ||
      dims[2] > kMhcMaxDim) {
    return InvalidArgument(kOp, "streams must be [t, 4, d] with d a multiple of 128 up to " +
                                    std::to_string(kMhcMaxDim) + ", got " + ToString(dims));
  }
  const bool read = a.mixes != 0, branch = a.mixes == kMhcMixes;
  const bool bf16 = a.forms & kMhcBf16, nvfp4 = a.forms & kMhcNvfp4, fp8 = a.forms & kMhcFp8;
  const int64_t t = dims[0], d = dims[2];
  const int64_t n_args = 3 * a.write + (read ? 4 : 0);
  const int64_t n_rets =
      a.write + (branch ? 2 : 0) + (bf16 ? 1 : 0) + (nvfp4 ? 3 : 0) + (fp8 ? 2 : 0) + read;
  const int64_t extra = static_cast<int64_t>(args.size()) - n_args;
  if (extra < 0 || extra > (nvfp4 ? 1 : 0) || static_cast<int64_t>(rets.size()) != n_rets) {
    return InvalidArgument(kOp, "must have " + std::to_string(n_args) +
                                    " operands behind streams (for NVFP4 maybe one more) and " +
                                    std::to_string(n_rets) + " results, got " +
                                    std::to_string(args.size()) + " and " +
                                    std::to_string(rets.size()));
  }
  p.t = t;
  p.d = d;
  p.mixes = a.mixes;
  p.iters = a.iters;
  p.regime = static_cast<Regime>(a.regime);
  p.hc_eps = a.hc_eps;
  p.rms_eps = a.rms_eps;
  p.reciprocal_d = 1.0f / static_cast<float>(d);
  p.reciprocal_flat = 1.0f / static_cast<float>(kMhcStreams * d);
  p.streams = static_cast<const uint16_t*>(streams.untyped_data());
  Buffers buffers(args, rets);
  if (a.write) {
    p.branch = buffers.Operand<uint16_t>("branch", Type::BF16, {t, d});
    p.post = buffers.Operand<float>("post", Type::F32, {t, kMhcStreams});
    p.comb = buffers.Operand<float>("comb", Type::F32, {t, kMhcStreams, kMhcStreams});
    p.new_streams = buffers.Result<uint16_t>("new streams", Type::BF16, {t, kMhcStreams, d});
  }
  if (read) {
    p.fn = buffers.Operand<float>("fn", Type::F32, {a.mixes, kMhcStreams * d});
    p.base = buffers.Operand<float>("base", Type::F32, {a.mixes});
    p.scale = buffers.Operand<float>("scale", Type::F32, {branch ? 3 : 1});
    p.norm = buffers.Operand<uint16_t>("norm", Type::BF16, {d});
  }
  if (extra == 1) p.global_scale = buffers.Operand<float>("global_scale", Type::F32, {});
  if (branch) {
    p.next_post = buffers.Result<float>("next post", Type::F32, {t, kMhcStreams});
    p.next_comb = buffers.Result<float>("next comb", Type::F32, {t, kMhcStreams, kMhcStreams});
  }
  if (bf16) p.x = buffers.Result<uint16_t>("x", Type::BF16, {t, d});
  if (nvfp4) {
    p.code4 = buffers.Result<uint8_t>("NVFP4 code", Type::F4E2M1FN, {t, d});
    p.block_scale =
        buffers.Result<uint8_t>("NVFP4 block_scale", Type::F8E4M3FN, {t, d / kNvfp4Block});
    p.token_scale = buffers.Result<float>("NVFP4 token_scale", Type::F32, {t});
  }
  if (fp8) {
    p.code8 = buffers.Result<uint8_t>("FP8 code", Type::F8E4M3FN, {t, d});
    p.scale8 = buffers.Result<uint8_t>("FP8 scale", Type::F8E8M0FNU, {t, d / kMhcTile});
  }
  if (read) p.scratch = buffers.Result<float>("scratch", Type::U8, {MhcScratchBytes(t, d)});
  // An empty buffer may be nowhere: there is nothing to do then.
  if (t != 0) misaligned = buffers.misaligned();
  if (!IsAligned(p.streams, 0, kAlignment) && t != 0) misaligned = "streams";
  return buffers.error();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, int32_t write, int32_t mixes, int32_t forms,
                   int32_t iters, int32_t regime, float hc_eps, float rms_eps,
                   ffi::AnyBuffer streams, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  MhcParams params{};
  std::string misaligned;
  DSV4_RETURN_IF_ERROR(Fill({abi, write, mixes, forms, iters, regime, hc_eps, rms_eps}, streams,
                            args, rets, params, misaligned));
  ParallelFor(pool, params.t, kGrainChannels / params.d + 1,
              [&](int64_t begin, int64_t end) { MhcCpu(params, begin, end); });
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, int32_t write, int32_t mixes, int32_t forms,
                    int32_t iters, int32_t regime, float hc_eps, float rms_eps,
                    ffi::AnyBuffer streams, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  MhcParams params{};
  std::string misaligned;
  DSV4_RETURN_IF_ERROR(Fill({abi, write, mixes, forms, iters, regime, hc_eps, rms_eps}, streams,
                            args, rets, params, misaligned));
  if (!misaligned.empty()) {
    return InvalidArgument(kOp, misaligned + " must be aligned to 16 bytes");
  }
  if (params.t == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts, [&](cudaStream_t on) { return MhcCuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<int32_t>("write")
      .Attr<int32_t>("mixes")
      .Attr<int32_t>("forms")
      .Attr<int32_t>("iters")
      .Attr<int32_t>("regime")
      .Attr<float>("hc_eps")
      .Attr<float>("rms_eps")
      .Arg<ffi::AnyBuffer>()  // streams [t, 4, d]
      .RemainingArgs()        // branch, post, comb; fn, base, scale, norm; global_scale
      .RemainingRets();       // streams; post, comb; forms of x; scratch
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<int32_t>("write")
                           .Attr<int32_t>("mixes")
                           .Attr<int32_t>("forms")
                           .Attr<int32_t>("iters")
                           .Attr<int32_t>("regime")
                           .Attr<float>("hc_eps")
                           .Attr<float>("rms_eps")
                           .Arg<ffi::AnyBuffer>()  // streams [t, 4, d]
                           .RemainingArgs()        // branch, post, comb; fn, ..., global_scale
                           .RemainingRets());      // streams; post, comb; forms of x; scratch
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target MhcTarget() { return {"dsv4.mhc", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
