"""Linear with FP8 weights (model.md sections 4.6 and 7.1), summed in FP64."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from reference.formats import decode_e4m3, decode_ue8m0
from reference.linear import activations, exact_product
from reference.moe import swiglu
from reference.rounding import bf


def decode(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """FP64 values of E4M3 bytes `[n, k]` with UE8M0 bytes per 128x128."""
    n, k = weight.shape
    tiles = np.repeat(np.repeat(decode_ue8m0(scale).astype(np.float64), 128, 0), 128, 1)
    return decode_e4m3(weight).astype(np.float64) * tiles[:n, :k]


def fp8_linear(
    x: np.ndarray,
    weight: np.ndarray,
    scale: np.ndarray,
    *,
    up: np.ndarray | None = None,
    limit: float | None = None,
    act: Literal["fp8", "bfloat16"] = "fp8",
    dtype: DTypeLike = np.float64,
    regime: None = None,
) -> np.ndarray:
    """`act(x) (weight * scale)^T`: `x [t, k]` or `[t, g, k]`, FP32.

    With `up` and `limit`, `x` is the gate of a SwiGLU, whose BF16 rounding takes its place (section
    5.2). FP64 unless `dtype` says to round; `regime` means nothing here.
    """
    if up is not None and limit is not None:
        x = np.asarray(bf(swiglu(jnp.asarray(x), jnp.asarray(up), limit)))
    return exact_product(activations(x, act), decode(weight, scale), dtype)
