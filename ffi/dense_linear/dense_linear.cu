#include "common/tile_gemm.h"

namespace dsv4 {

cudaError_t DenseLinearCuda(const LinearsParams& params, cudaStream_t stream) {
  return LinearTiles(WeightForm::kBf16, params.parts, params.n_parts, stream);
}

}  // namespace dsv4
