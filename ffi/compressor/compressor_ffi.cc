// Handlers of dsv4.compressor. Operands: start, count and frequencies, then for each of one or two
// jobs kv, gate, ape, norm, both states and the parts of the pool (keys: nope, scale, rope; index
// keys: key, scale). Results: the states and the parts of every job, aliased to the operands.
#include <cstdint>
#include <cstring>
#include <string>

#include "common/bytes.h"
#include "common/handler.h"
#include "common/parallel.h"
#include "compressor/compressor.h"
#include "compressor/compressor_rows.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "compressor";
constexpr int64_t kGrainBytes = 1 << 18;
constexpr int kMaxWritten = 5 * kMaxCompressorJobs;
constexpr int64_t kMxfp4Block = 32;

LaunchCounts counts;

struct Attributes {
  int32_t abi, ratio, form0, form1;
  float eps;
};

// Results that are not in their operand's buffer (the caller did not donate it).
struct Copies {
  void* to[kMaxWritten];
  const void* from[kMaxWritten];
  int64_t bytes[kMaxWritten];
  int n = 0;
};

// Operands and results in their order.
class Buffers {
 public:
  Buffers(const ffi::RemainingArgs& args, const ffi::RemainingRets& rets, Copies& copies)
      : args_(args), rets_(rets), copies_(copies) {}

  // The next operand; with `shape`, it must have that.
  template <typename T>
  ffi::Error Take(const std::string& name, ffi::DataType dtype,
                  std::initializer_list<int64_t> shape, const T*& data) {
    auto buffer = args_.get<ffi::AnyBuffer>(next_arg_++);
    if (!buffer) return InvalidArgument(kOp, name + " must be a buffer");
    DSV4_RETURN_IF_ERROR(CheckDtype(kOp, name, buffer->element_type(), {dtype}));
    DSV4_RETURN_IF_ERROR(CheckShape(kOp, name, buffer->dimensions(), shape));
    data = static_cast<const T*>(buffer->untyped_data());
    return ffi::Error::Success();
  }

  // The next operand that is written, in the next result.
  template <typename T>
  ffi::Error TakeWritten(const std::string& name, ffi::DataType dtype,
                         std::initializer_list<int64_t> shape, T*& data) {
    const T* from = nullptr;
    DSV4_RETURN_IF_ERROR(Take(name, dtype, shape, from));
    auto result = rets_.get<ffi::AnyBuffer>(next_ret_++);
    if (!result) return InvalidArgument(kOp, "result " + name + " must be a buffer");
    ffi::AnyBuffer out = **result;
    DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "result " + name, out.element_type(), {dtype}));
    DSV4_RETURN_IF_ERROR(CheckShape(kOp, "result " + name, out.dimensions(), shape));
    data = static_cast<T*>(out.untyped_data());
    int64_t rows = 1, last = 1;
    for (const int64_t n : shape) {
      rows *= last;
      last = n;
    }
    const int64_t bytes = rows * PackedBytes(dtype, last);
    if (data != from && bytes > 0) {
      copies_.to[copies_.n] = data;
      copies_.from[copies_.n] = from;
      copies_.bytes[copies_.n++] = bytes;
    }
    return ffi::Error::Success();
  }

  // The shape of the operand `ahead` of the next.
  ffi::Error Peek(const std::string& name, int64_t ahead, Dims& dims) const {
    auto buffer = args_.get<ffi::AnyBuffer>(next_arg_ + ahead);
    if (!buffer) return InvalidArgument(kOp, name + " must be a buffer");
    dims = buffer->dimensions();
    return ffi::Error::Success();
  }

 private:
  const ffi::RemainingArgs& args_;
  const ffi::RemainingRets& rets_;
  Copies& copies_;
  int64_t next_arg_ = 0, next_ret_ = 0;
};

// Parts of a pool.
int64_t Parts(int32_t form) {
  if (form == 0) return 0;
  return form == static_cast<int32_t>(EntryForm::kKv) ? 3 : 2;
}

ffi::Error CheckWidth(const std::string& name, EntryForm form, int64_t d, int64_t rotary) {
  if (form == EntryForm::kKv) {
    const int64_t nope = d - rotary;
    if (nope >= 0 && nope % kSumChannels == 0 && d <= kCompressorMaxWidth &&
        d % kChannelsPerLane == 0 && d > 0) {
      return ffi::Error::Success();
    }
    return InvalidArgument(
        kOp, name + "norm must have a multiple of 64 and the rotary " + std::to_string(rotary) +
                 " channels, together a multiple of 4 and at most " +
                 std::to_string(kCompressorMaxWidth) + ", got [" + std::to_string(d) + "]");
  }
  if (d >= kMxfp4Block && d <= kCompressorMaxIndexWidth && (d & (d - 1)) == 0 && d >= rotary) {
    return ffi::Error::Success();
  }
  return InvalidArgument(kOp, name + "norm must have a power of two of channels, 32.." +
                                  std::to_string(kCompressorMaxIndexWidth) +
                                  ", not fewer than the rotary " + std::to_string(rotary) +
                                  ", got [" + std::to_string(d) + "]");
}

ffi::Error FillPool(const std::string& name, const CompressorParams& params, Buffers& buffers,
                    CompressorJob& job) {
  Dims dims;
  DSV4_RETURN_IF_ERROR(buffers.Peek(name + "pool", 0, dims));
  if (dims.size() != 3) {
    return InvalidArgument(kOp, name + "pool must be [b, s, ...], got " + ToString(dims));
  }
  const int64_t b = params.b, s = dims[1], nope = job.d - params.rotary;
  job.slots = s;
  switch (job.form) {
    case EntryForm::kKv:
      job.code_bytes = nope;
      job.scales = nope / kSumChannels;
      DSV4_RETURN_IF_ERROR(
          buffers.TakeWritten(name + "nope", ffi::DataType::F8E4M3FN, {b, s, nope}, job.code));
      break;
    case EntryForm::kMxfp4:
      job.code_bytes = job.d / 2;
      job.scales = job.d / kMxfp4Block;
      DSV4_RETURN_IF_ERROR(
          buffers.TakeWritten(name + "key", ffi::DataType::F4E2M1FN, {b, s, job.d}, job.code));
      break;
    case EntryForm::kFp8:
      job.code_bytes = job.d;
      job.scales = 1;
      DSV4_RETURN_IF_ERROR(
          buffers.TakeWritten(name + "key", ffi::DataType::F8E4M3FN, {b, s, job.d}, job.code));
      break;
  }
  DSV4_RETURN_IF_ERROR(
      buffers.TakeWritten(name + "scale", ffi::DataType::F8E8M0FNU, {b, s, job.scales}, job.scale));
  if (job.form != EntryForm::kKv) return ffi::Error::Success();
  return buffers.TakeWritten(name + "rope", ffi::DataType::BF16, {b, s, params.rotary}, job.rope);
}

// `params` knows b (of start), ratio and rotary; the first job tells t.
ffi::Error FillJob(int i, int32_t form, Buffers& buffers, CompressorParams& params) {
  const std::string name = "job " + std::to_string(i) + " ";
  if (form != static_cast<int32_t>(EntryForm::kKv) && !Overlaps(params)) {
    return InvalidArgument(
        kOp, name + "index keys must have ratio 4, got " + std::to_string(params.ratio));
  }
  CompressorJob& job = params.jobs[i];
  job.form = static_cast<EntryForm>(form);
  Dims kv, norm, state;
  DSV4_RETURN_IF_ERROR(buffers.Peek(name + "kv", 0, kv));
  DSV4_RETURN_IF_ERROR(buffers.Peek(name + "norm", 3, norm));
  DSV4_RETURN_IF_ERROR(buffers.Peek(name + "kv_state", 4, state));
  if (kv.size() != 3) {
    return InvalidArgument(kOp, name + "kv must be [b, t, c * d], got " + ToString(kv));
  }
  if (norm.size() != 1) {
    return InvalidArgument(kOp, name + "norm must be [d], got " + ToString(norm));
  }
  if (i == 0) params.t = kv[1];
  const int64_t b = params.b, t = params.t, d = norm[0], halves = Overlaps(params) ? 2 : 1;
  DSV4_RETURN_IF_ERROR(CheckWidth(name, job.form, d, params.rotary));
  if (state.size() != 3 || state[1] < halves * params.ratio) {
    return InvalidArgument(kOp,
                           name + "kv_state must be [b, ring, c * d] with a ring of at least " +
                               std::to_string(halves * params.ratio) + ", got " + ToString(state));
  }
  job.d = d;
  job.ring = state[1];
  const int64_t columns = halves * d;
  DSV4_RETURN_IF_ERROR(buffers.Take(name + "kv", ffi::DataType::F32, {b, t, columns}, job.kv));
  DSV4_RETURN_IF_ERROR(buffers.Take(name + "gate", ffi::DataType::F32, {b, t, columns}, job.gate));
  DSV4_RETURN_IF_ERROR(
      buffers.Take(name + "ape", ffi::DataType::F32, {params.ratio, columns}, job.ape));
  DSV4_RETURN_IF_ERROR(buffers.Take(name + "norm", ffi::DataType::BF16, {d}, job.norm));
  DSV4_RETURN_IF_ERROR(buffers.TakeWritten(name + "kv_state", ffi::DataType::F32,
                                           {b, job.ring, columns}, job.kv_state));
  DSV4_RETURN_IF_ERROR(buffers.TakeWritten(name + "gate_state", ffi::DataType::F32,
                                           {b, job.ring, columns}, job.gate_state));
  return FillPool(name, params, buffers, job);
}

ffi::Error CheckAttributes(const Attributes& a) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, a.abi));
  if (a.ratio < 1 || a.ratio > kCompressorMaxRatio) {
    return InvalidArgument(kOp, "ratio must be 1.." + std::to_string(kCompressorMaxRatio) +
                                    ", got " + std::to_string(a.ratio));
  }
  const auto most = static_cast<int32_t>(EntryForm::kFp8);
  if (a.form0 < 1 || a.form0 > most || a.form1 < 0 || a.form1 > most) {
    return InvalidArgument(kOp,
                           "form0 and form1 must be 1 (keys), 2 (MXFP4) or 3 (FP8), or form1 0, "
                           "got " +
                               std::to_string(a.form0) + " and " + std::to_string(a.form1));
  }
  return ffi::Error::Success();
}

ffi::Error Fill(const Attributes& a, const ffi::AnyBuffer& start, const ffi::AnyBuffer& count,
                const ffi::AnyBuffer& frequencies, const ffi::RemainingArgs& args,
                const ffi::RemainingRets& rets, CompressorParams& params, Copies& copies) {
  DSV4_RETURN_IF_ERROR(CheckAttributes(a));
  params.ratio = a.ratio;
  params.eps = a.eps;
  params.n_jobs = a.form1 == 0 ? 1 : 2;
  const int64_t parts = Parts(a.form0) + Parts(a.form1);
  const int64_t n_args = 6 * params.n_jobs + parts, n_rets = 2 * params.n_jobs + parts;
  if (static_cast<int64_t>(args.size()) != n_args || static_cast<int64_t>(rets.size()) != n_rets) {
    return InvalidArgument(kOp, "must have " + std::to_string(n_args) +
                                    " operands behind frequencies and " + std::to_string(n_rets) +
                                    " results for its forms, got " + std::to_string(args.size()) +
                                    " and " + std::to_string(rets.size()));
  }
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "start", start.element_type(), {ffi::DataType::S32}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "count", count.element_type(), {ffi::DataType::S32}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "frequencies", frequencies.element_type(), {ffi::DataType::F32}));
  if (start.dimensions().size() != 1) {
    return InvalidArgument(kOp, "start must be [b], got " + ToString(start.dimensions()));
  }
  params.b = start.dimensions()[0];
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "count", count.dimensions(), {params.b}));
  if (frequencies.dimensions().size() != 1) {
    return InvalidArgument(kOp,
                           "frequencies must be [f], got " + ToString(frequencies.dimensions()));
  }
  params.rotary = 2 * frequencies.dimensions()[0];
  params.start = static_cast<const int32_t*>(start.untyped_data());
  params.count = static_cast<const int32_t*>(count.untyped_data());
  params.frequencies = static_cast<const float*>(frequencies.untyped_data());
  Buffers buffers(args, rets, copies);
  DSV4_RETURN_IF_ERROR(FillJob(0, a.form0, buffers, params));
  if (params.n_jobs == 1) return ffi::Error::Success();
  return FillJob(1, a.form1, buffers, params);
}

// The kernels' widest accesses; rows are multiples of them.
ffi::Error CheckAligned(const CompressorParams& params) {
  for (int i = 0; i < params.n_jobs; ++i) {
    const CompressorJob& job = params.jobs[i];
    for (const float* rows : {job.kv, job.gate, job.ape, static_cast<const float*>(job.kv_state),
                              static_cast<const float*>(job.gate_state)}) {
      if (!IsAligned(rows, 0, 16)) {
        return InvalidArgument(kOp,
                               "kv, gate, ape and states must be aligned to 16 bytes, and job " +
                                   std::to_string(i) + "'s are not");
      }
    }
    if (!IsAligned(job.code, 0, 4) || !IsAligned(job.rope, 0, 8)) {
      return InvalidArgument(
          kOp, "pools must be aligned to 8 bytes, and job " + std::to_string(i) + "'s is not");
    }
  }
  return ffi::Error::Success();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, int32_t ratio, int32_t form0, int32_t form1,
                   float eps, ffi::AnyBuffer start, ffi::AnyBuffer count,
                   ffi::AnyBuffer frequencies, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  CompressorParams params{};
  Copies copies;
  DSV4_RETURN_IF_ERROR(
      Fill({abi, ratio, form0, form1, eps}, start, count, frequencies, args, rets, params, copies));
  for (int i = 0; i < copies.n; ++i) {
    ParallelFor(pool, copies.bytes[i], kGrainBytes, [&](int64_t begin, int64_t end) {
      std::memcpy(static_cast<char*>(copies.to[i]) + begin,
                  static_cast<const char*>(copies.from[i]) + begin, end - begin);
    });
  }
  CompressorCpu(params, [&](int64_t n, int64_t grain, const auto& body) {
    ParallelFor(pool, n, grain, body);
  });
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, int32_t ratio, int32_t form0, int32_t form1,
                    float eps, ffi::AnyBuffer start, ffi::AnyBuffer count,
                    ffi::AnyBuffer frequencies, ffi::RemainingArgs args, ffi::RemainingRets rets) {
  CompressorParams params{};
  Copies copies;
  DSV4_RETURN_IF_ERROR(
      Fill({abi, ratio, form0, form1, eps}, start, count, frequencies, args, rets, params, copies));
  DSV4_RETURN_IF_ERROR(CheckAligned(params));
  if (copies.n == 0 && params.b * params.t == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts, [&](cudaStream_t on) {
    for (int i = 0; i < copies.n; ++i) {
      const cudaError_t error = cudaMemcpyAsync(copies.to[i], copies.from[i], copies.bytes[i],
                                                cudaMemcpyDeviceToDevice, on);
      if (error != cudaSuccess) return error;
    }
    return CompressorCuda(params, on);
  });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<int32_t>("ratio")
      .Attr<int32_t>("form0")
      .Attr<int32_t>("form1")
      .Attr<float>("eps")
      .Arg<ffi::AnyBuffer>()  // start [b]
      .Arg<ffi::AnyBuffer>()  // count [b]
      .Arg<ffi::AnyBuffer>()  // frequencies [rotary / 2]
      .RemainingArgs()        // of every job: kv, gate, ape, norm, states, pool
      .RemainingRets();       // of every job: states, pool
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<int32_t>("ratio")
                           .Attr<int32_t>("form0")
                           .Attr<int32_t>("form1")
                           .Attr<float>("eps")
                           .Arg<ffi::AnyBuffer>()  // start [b]
                           .Arg<ffi::AnyBuffer>()  // count [b]
                           .Arg<ffi::AnyBuffer>()  // frequencies [rotary / 2]
                           .RemainingArgs()    // of every job: kv, gate, ape, norm, states, pool
                           .RemainingRets());  // of every job: states, pool
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target CompressorTarget() { return {"dsv4.compressor", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
