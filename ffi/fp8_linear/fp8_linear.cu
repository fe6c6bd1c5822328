#include "common/cuda.h"
#include "common/tile_gemm.h"
#include "fp8_linear/fp8_linear.h"

namespace dsv4 {

cudaError_t Fp8LinearCuda(const LinearParams& params, cudaStream_t stream) {
#ifdef DSV4_SM90
  const bool prefill = params.regime == Regime::kPrefill ||
                       (params.regime == Regime::kAuto && Fp8PrefillPays(params));
  if (params.act == ActForm::kFp8 && prefill && Fp8PrefillTakes(params) && OnHopper()) {
    return Fp8PrefillSm90(params, stream);
  }
#endif
  return LinearTiles(WeightForm::kFp8, params, stream);
}

}  // namespace dsv4
