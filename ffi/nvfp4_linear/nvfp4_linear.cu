#include "common/tile_gemm.h"

namespace dsv4 {

cudaError_t Nvfp4LinearCuda(const LinearParams& params, cudaStream_t stream) {
  return LinearTiles(WeightForm::kNvfp4, &params, 1, stream);
}

}  // namespace dsv4
