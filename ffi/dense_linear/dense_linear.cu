#include "common/tile_gemm.h"
#include "dense_linear/dense_linear.h"

namespace dsv4 {

// Two neighbours of one shape share a launch.
cudaError_t DenseLinearCuda(const DenseLinearParams& params, cudaStream_t stream) {
  for (int p = 0; p < params.n_parts;) {
    const LinearParams& part = params.parts[p++];
    const bool two = p < params.n_parts && params.parts[p].n == part.n;
    const LinearParams* const other = two ? &params.parts[p++] : nullptr;
    const cudaError_t error = LinearTiles(WeightForm::kBf16, part, stream, other);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace dsv4
