#include <algorithm>

#include "cache_write/cache_write.h"

namespace dsv4 {

void CacheWriteCpu(const CacheWriteParams& params, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const int64_t slot = params.slots[row];
    if (slot < 0 || slot >= params.s) continue;
    const int64_t target = row / params.t * params.s + slot;
    for (int p = 0; p < params.n_parts; ++p) {
      const CacheWritePart& part = params.parts[p];
      // Not memcpy: rows of no bytes may be at a null pointer.
      std::copy_n(part.rows + row * part.row_bytes, part.row_bytes,
                  part.cache + target * part.row_bytes);
    }
  }
}

}  // namespace dsv4
