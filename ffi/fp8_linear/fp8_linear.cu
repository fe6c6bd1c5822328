#include "common/tile_gemm.h"

namespace dsv4 {

cudaError_t Fp8LinearCuda(const LinearParams& params, cudaStream_t stream) {
  return LinearTiles(WeightForm::kFp8, params, stream);
}

}  // namespace dsv4
