// Handlers of dsv4.router. Operands: logits, then the bias or, with the attribute `given`, the ids
// and, if they are a table, the tokens; results: expert_idx, expert_weight.
#include <cstdint>
#include <string>

#include "common/handler.h"
#include "common/parallel.h"
#include "router/router.h"

namespace dsv4 {
namespace {

constexpr char kOp[] = "router";
constexpr int64_t kGrainScores = 1 << 12;

LaunchCounts counts;

using Out = ffi::Result<ffi::AnyBuffer>;

// With a table of given ids.
ffi::Error FillTokens(const ffi::RemainingArgs& rest, Dims table, int64_t t, int64_t k,
                      RouterParams& params) {
  if (table.size() != 2 || table[0] < 1 || table[0] > int64_t{1} << 31) {
    return InvalidArgument(
        kOp, "given ids must be [v, k] with v 1..2^31 for tokens, got " + ToString(table));
  }
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "given ids", table, {table[0], k}));
  auto tokens = rest.get<ffi::AnyBuffer>(0);
  if (!tokens) return InvalidArgument(kOp, "tokens must be a buffer");
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "tokens", tokens->element_type(), {ffi::DataType::S32}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "tokens", tokens->dimensions(), {t}));
  params.tokens = static_cast<const int32_t*>(tokens->untyped_data());
  params.rows = table[0];
  return ffi::Error::Success();
}

ffi::Error Fill(int32_t abi, int32_t given, float scale, const ffi::AnyBuffer& logits,
                const ffi::AnyBuffer& selector, const ffi::RemainingArgs& rest, Out expert_idx,
                Out expert_weight, RouterParams& params) {
  DSV4_RETURN_IF_ERROR(CheckAbi(kOp, abi));
  if (given != 0 && given != 1) {
    return InvalidArgument(kOp, "given must be 0 or 1, got " + std::to_string(given));
  }
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, "logits", logits.element_type(), {ffi::DataType::F32}));
  const std::string selector_name = given ? "given ids" : "bias";
  DSV4_RETURN_IF_ERROR(CheckDtype(kOp, selector_name, selector.element_type(),
                                  {given ? ffi::DataType::S32 : ffi::DataType::F32}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "expert_idx", expert_idx->element_type(), {ffi::DataType::S32}));
  DSV4_RETURN_IF_ERROR(
      CheckDtype(kOp, "expert_weight", expert_weight->element_type(), {ffi::DataType::F32}));
  const Dims dims = logits.dimensions(), idx_dims = expert_idx->dimensions();
  if (dims.size() != 2 || dims[1] < 1 || dims[1] > kRouterMaxExperts) {
    return InvalidArgument(kOp, "logits must be [t, experts] of 1.." +
                                    std::to_string(kRouterMaxExperts) + " experts, got " +
                                    ToString(dims));
  }
  const int64_t t = dims[0], experts = dims[1];
  const int64_t most = std::min(experts, kRouterMaxPicks);
  if (idx_dims.size() != 2 || idx_dims[1] < 1 || idx_dims[1] > most) {
    return InvalidArgument(kOp, "expert_idx must be [t, k] with k 1.." + std::to_string(most) +
                                    " of " + std::to_string(experts) + " experts, got " +
                                    ToString(idx_dims));
  }
  const int64_t k = idx_dims[1];
  if (rest.size() > (given ? 1 : 0)) {
    return InvalidArgument(kOp, "must have 2 operands, or 3 with tokens of given ids, got " +
                                    std::to_string(2 + rest.size()));
  }
  if (rest.size() == 1) {
    DSV4_RETURN_IF_ERROR(FillTokens(rest, selector.dimensions(), t, k, params));
  } else if (given) {
    DSV4_RETURN_IF_ERROR(CheckShape(kOp, selector_name, selector.dimensions(), {t, k}));
  } else {
    DSV4_RETURN_IF_ERROR(CheckShape(kOp, selector_name, selector.dimensions(), {experts}));
  }
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "expert_idx", idx_dims, {t, k}));
  DSV4_RETURN_IF_ERROR(CheckShape(kOp, "expert_weight", expert_weight->dimensions(), {t, k}));
  params.logits = static_cast<const float*>(logits.untyped_data());
  params.bias = given ? nullptr : static_cast<const float*>(selector.untyped_data());
  params.given_idx = given ? static_cast<const int32_t*>(selector.untyped_data()) : nullptr;
  params.expert_idx = static_cast<int32_t*>(expert_idx->untyped_data());
  params.expert_weight = static_cast<float*>(expert_weight->untyped_data());
  params.t = t;
  params.experts = experts;
  params.k = k;
  params.scale = scale;
  return ffi::Error::Success();
}

ffi::Error CpuImpl(ffi::ThreadPool pool, int32_t abi, int32_t given, float scale,
                   ffi::AnyBuffer logits, ffi::AnyBuffer selector, ffi::RemainingArgs rest,
                   Out expert_idx, Out expert_weight) {
  RouterParams params{};
  DSV4_RETURN_IF_ERROR(
      Fill(abi, given, scale, logits, selector, rest, expert_idx, expert_weight, params));
  ParallelFor(pool, params.t, kGrainScores / params.experts + 1,
              [&](int64_t begin, int64_t end) { RouterCpu(params, begin, end); });
  return ffi::Error::Success();
}

ffi::Error CudaImpl(CudaStream stream, int32_t abi, int32_t given, float scale,
                    ffi::AnyBuffer logits, ffi::AnyBuffer selector, ffi::RemainingArgs rest,
                    Out expert_idx, Out expert_weight) {
  RouterParams params{};
  DSV4_RETURN_IF_ERROR(
      Fill(abi, given, scale, logits, selector, rest, expert_idx, expert_weight, params));
  if (params.t == 0) return ffi::Error::Success();
  return LaunchCuda(kOp, stream, counts, [&](cudaStream_t on) { return RouterCuda(params, on); });
}

auto CudaBinding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<CudaStream>>()
      .Attr<int32_t>("abi")
      .Attr<int32_t>("given")
      .Attr<float>("scale")
      .Arg<ffi::AnyBuffer>()   // logits [t, e]
      .Arg<ffi::AnyBuffer>()   // bias [e], or the given ids [t or v, k]
      .RemainingArgs()         // tokens [t]
      .Ret<ffi::AnyBuffer>()   // expert_idx [t, k]
      .Ret<ffi::AnyBuffer>();  // expert_weight [t, k]
}

XLA_FFI_DEFINE_HANDLER(kCpu, CpuImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Attr<int32_t>("abi")
                           .Attr<int32_t>("given")
                           .Attr<float>("scale")
                           .Arg<ffi::AnyBuffer>()    // logits [t, e]
                           .Arg<ffi::AnyBuffer>()    // bias [e], or the given ids [t or v, k]
                           .RemainingArgs()          // tokens [t]
                           .Ret<ffi::AnyBuffer>()    // expert_idx [t, k]
                           .Ret<ffi::AnyBuffer>());  // expert_weight [t, k]
XLA_FFI_DEFINE_HANDLER(kCuda, CudaImpl, CudaBinding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER(kCudaDebug, CudaImpl, CudaBinding());

}  // namespace

Target RouterTarget() { return {"dsv4.router", kCpu, kCuda, kCudaDebug, &counts}; }

}  // namespace dsv4
