#include "common/tile_gemm.h"

namespace dsv4 {

cudaError_t Nvfp4LinearCuda(const LinearsParams& params, cudaStream_t stream) {
  return LinearTiles(WeightForm::kNvfp4, params.parts, params.n_parts, stream);
}

}  // namespace dsv4
