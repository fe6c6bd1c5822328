#include <algorithm>

#include "common/cuda.h"
#include "common/tile_gemm.h"
#include "fp8_linear/fp8_linear.h"

namespace dsv4 {

namespace {

bool IsPrefill(const LinearParams& params) {
#ifdef DSV4_SM90
  const bool prefill = params.regime == Regime::kPrefill ||
                       (params.regime == Regime::kAuto && Fp8PrefillPays(params));
  return params.act == ActForm::kFp8 && prefill && Fp8PrefillTakes(params) && OnHopper();
#else
  static_cast<void>(params);
  return false;
#endif
}

}  // namespace

cudaError_t Fp8LinearCuda(const LinearsParams& params, cudaStream_t stream) {
  LinearsParams linears = params;  // those of the prefill kernel last
  LinearParams* const end = linears.parts + linears.n_parts;
  LinearParams* const prefill =
      std::partition(linears.parts, end, [](const LinearParams& part) { return !IsPrefill(part); });
#ifdef DSV4_SM90
  if (prefill < end) {
    const cudaError_t error = Fp8PrefillSm90(prefill, static_cast<int>(end - prefill), stream);
    if (error != cudaSuccess) return error;
  }
#endif
  return LinearTiles(WeightForm::kFp8, linears.parts, static_cast<int>(prefill - linears.parts),
                     stream);
}

}  // namespace dsv4
