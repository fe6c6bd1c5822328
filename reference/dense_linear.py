"""Linear with unquantised weights (model.md section 0), summed in FP64."""

import numpy as np
from jax.typing import DTypeLike

from reference.linear import activations, exact_product


def dense_linear(
    x: np.ndarray, weight: np.ndarray, *, dtype: DTypeLike = np.float64, regime: None = None
) -> np.ndarray:
    """`x W^T`: `x [t, k]` or `[t, g, k]` and `weight [n, k]`, BF16 values.

    FP64 unless `dtype` says to round; `regime` means nothing here.
    """
    return exact_product(activations(x, "bfloat16"), weight, dtype)
