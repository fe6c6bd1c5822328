#include "common/tile_gemm.h"

namespace dsv4 {

cudaError_t Bf16LinearCuda(const LinearParams& params, cudaStream_t stream) {
  return LinearTiles(WeightForm::kBf16, params, stream);
}

}  // namespace dsv4
