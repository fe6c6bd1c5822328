#include "common/tile_gemm.h"
#include "dense_linear/dense_linear.h"

namespace dsv4 {

cudaError_t DenseLinearCuda(const DenseLinearParams& params, cudaStream_t stream) {
  for (int p = 0; p < params.n_parts; ++p) {
    const cudaError_t error = LinearTiles(WeightForm::kBf16, params.parts[p], stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace dsv4
