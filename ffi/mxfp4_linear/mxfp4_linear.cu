#include "common/tile_gemm.h"

namespace dsv4 {

cudaError_t Mxfp4LinearCuda(const LinearParams& params, cudaStream_t stream) {
  return LinearTiles(WeightForm::kMxfp4, &params, 1, stream);
}

}  // namespace dsv4
