"""Linear with MXFP4 weights (model.md sections 4.6 and 9.1), summed in FP64."""

from typing import Literal

import numpy as np
from jax.typing import DTypeLike

from reference.formats import decode_e2m1_packed, decode_ue8m0
from reference.linear import activations, exact_product


def decode(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """FP64 values of packed E2M1 bytes `[n, k / 2]` with UE8M0 bytes `[n, k / 32]`."""
    blocks = np.repeat(decode_ue8m0(scale).astype(np.float64), 32, axis=-1)
    return decode_e2m1_packed(weight).astype(np.float64) * blocks


def mxfp4_linear(
    x: np.ndarray,
    weight: np.ndarray,
    scale: np.ndarray,
    *,
    act: Literal["fp8", "bfloat16"] = "fp8",
    dtype: DTypeLike = np.float64,
    regime: None = None,
) -> np.ndarray:
    """`act(x) (weight * scale)^T`: `x [t, k]` or `[t, g, k]`, FP32.

    FP64 unless `dtype` says to round; `regime` means nothing here.
    """
    return exact_product(activations(x, act), decode(weight, scale), dtype)
