// Handlers of dsv4.cache_write. Operands: slots, then n caches, then n row arrays; results: the n
// caches, aliased to the operands. Leading axes before [s, d] are batch.
#include <cstdint>
#include <cstring>
#include <string>

#include "cache_write/cache_write.h"
#include "common/bytes.h"
#include "common/handler.h"
#include "common/parallel.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "cache_write";
constexpr int64_t kGrainBytes = 1 << 18;

LaunchCounts counts;

// A cache whose operand and result are not one buffer (the caller did not donate it).
struct Copy {
  void* to[kMaxCacheWriteParts];
  const void* from[kMaxCacheWriteParts];
  int64_t bytes[kMaxCacheWriteParts];
  int n = 0;
};

ffi::Error FillPart(int p, const ffi::AnyBuffer& cache, const ffi::AnyBuffer& rows,
                    const ffi::AnyBuffer& out, CacheWriteParams& params, Copy& copy) {
  const std::string cache_name = "cache[" + std::to_string(p) + "]";
  const std::string rows_name = "rows[" + std::to_string(p) + "]";
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, cache_name, cache.element_type(),
                                  {ffi::DataType::BF16, ffi::DataType::F32, ffi::DataType::F8E4M3FN,
                                   ffi::DataType::F8E8M0FNU, ffi::DataType::F4E2M1FN}));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, rows_name, rows.element_type(), {cache.element_type()}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "result " + cache_name, out.element_type(), {cache.element_type()}));
  const Dims dims = cache.dimensions();
  const size_t rank = dims.size();
  if (rank < 2) {
    return InvalidArgument(kOp, cache_name + " must be [..., s, d], got " + ToString(dims));
  }
  const int64_t d = dims[rank - 1];
  if (cache.element_type() == ffi::DataType::F4E2M1FN && d % 2 != 0) {
    return InvalidArgument(
        kOp, cache_name + " must have an even last axis (two codes a byte), got " + ToString(dims));
  }
  int64_t b = 1;
  for (size_t i = 0; i + 2 < rank; ++i) b *= dims[i];
  if (p == 0) {
    params.b = b;
    params.s = dims[rank - 2];
  }
  const Dims row_dims = rows.dimensions();
  const bool rows_fit = row_dims.size() == rank && row_dims[rank - 2] == params.t &&
                        row_dims[rank - 1] == d &&
                        std::equal(dims.begin(), dims.begin() + (rank - 2), row_dims.begin());
  if (b != params.b || dims[rank - 2] != params.s || !rows_fit) {
    return InvalidArgument(
        kOp, cache_name + " and " + rows_name +
                 " must be [..., s, d] and [..., t, d] with the batch and s of cache[0] and t = " +
                 std::to_string(params.t) + ", got " + ToString(dims) + " and " +
                 ToString(row_dims));
  }
  const Dims out_dims = out.dimensions();
  if (!std::equal(dims.begin(), dims.end(), out_dims.begin(), out_dims.end())) {
    return InvalidArgument(
        kOp, "result " + cache_name + " must be " + ToString(dims) + ", got " + ToString(out_dims));
  }
  const int64_t row_bytes = PackedBytes(cache.element_type(), d);
  params.parts[p] = {static_cast<uint8_t*>(out.untyped_data()),
                     static_cast<const uint8_t*>(rows.untyped_data()), row_bytes};
  if (out.untyped_data() != cache.untyped_data() && params.b * params.s * row_bytes > 0) {
    copy.to[copy.n] = out.untyped_data();
    copy.from[copy.n] = cache.untyped_data();
    copy.bytes[copy.n++] = params.b * params.s * row_bytes;
  }
  return ffi::Error::Success();
}

ffi::Error Fill(int32_t abi, const ffi::AnyBuffer& slots, const ffi::RemainingArgs& args,
                const ffi::RemainingRets& rets, CacheWriteParams& params, Copy& copy) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "slots", slots.element_type(), {ffi::DataType::S32}));
  const int64_t n = rets.size();
  if (n < 1 || n > kMaxCacheWriteParts || static_cast<int64_t>(args.size()) != 2 * n) {
    return InvalidArgument(
        kOp, "must have slots, n caches and n row arrays for n results, n = 1.." +
                 std::to_string(kMaxCacheWriteParts) + ", got " + std::to_string(args.size()) +
                 " arrays and " + std::to_string(n) + " results");
  }
  const Dims slot_dims = slots.dimensions();
  if (slot_dims.size() < 1) {
    return InvalidArgument(kOp, "slots must be [..., t], got " + ToString(slot_dims));
  }
  params.t = slot_dims[slot_dims.size() - 1];
  params.slots = static_cast<const int32_t*>(slots.untyped_data());
  params.n_parts = static_cast<int>(n);
  for (int64_t p = 0; p < n; ++p) {
    auto cache = args.get<ffi::AnyBuffer>(p);
    auto rows = args.get<ffi::AnyBuffer>(n + p);
    auto out = rets.get<ffi::AnyBuffer>(p);
    if (!cache || !rows || !out) return InvalidArgument(kOp, "operands must be buffers");
    DSV4_RETURN_IF_ERROR(FillPart(static_cast<int>(p), *cache, *rows, **out, params, copy));
  }
  int64_t slot_rows = 1;
  for (size_t i = 0; i + 1 < slot_dims.size(); ++i) slot_rows *= slot_dims[i];
  if (slot_rows != params.b) {
    return InvalidArgument(kOp, "slots must be [" + std::to_string(params.b) +
                                    ", t] like the caches' batch, got " + ToString(slot_dims));
  }
  return ffi::Error::Success();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, ffi::AnyBuffer slots, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  CacheWriteParams params{};
  Copy copy;
  DSV4_RETURN_IF_ERROR(Fill(abi, slots, args, rets, params, copy));
  for (int i = 0; i < copy.n; ++i) {
    ParallelFor(pool, copy.bytes[i], kGrainBytes, [&](int64_t begin, int64_t end) {
      std::memcpy(static_cast<char*>(copy.to[i]) + begin,
                  static_cast<const char*>(copy.from[i]) + begin, end - begin);
    });
  }
  int64_t bytes = 1;
  for (int p = 0; p < params.n_parts; ++p) bytes += params.parts[p].row_bytes;
  ParallelFor(pool, params.b * params.t, kGrainBytes / bytes + 1,
              [&](int64_t begin, int64_t end) { CacheWriteCpu(params, begin, end); });
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, ffi::AnyBuffer slots, ffi::RemainingArgs args,
                    ffi::RemainingRets rets) {
  CacheWriteParams params{};
  Copy copy;
  DSV4_RETURN_IF_ERROR(Fill(abi, slots, args, rets, params, copy));
  if (copy.n == 0 && (params.b * params.t == 0 || params.s == 0)) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts, [&](cudaStream_t on) {
    for (int i = 0; i < copy.n; ++i) {
      const cudaError_t error =
          cudaMemcpyAsync(copy.to[i], copy.from[i], copy.bytes[i], cudaMemcpyDeviceToDevice, on);
      if (error != cudaSuccess) return error;
    }
    return CacheWriteCuda(params, on);
  });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Arg<ffi::AnyBuffer>()  // slots
      .RemainingArgs()        // caches, rows
      .RemainingRets();       // caches
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Arg<ffi::AnyBuffer>()  // slots
                           .RemainingArgs()        // caches, rows
                           .RemainingRets());      // caches
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target CacheWriteTarget() { return {"dsv4.cache_write", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
