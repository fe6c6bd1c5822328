"""Linear with NVFP4 weights (model.md section 9), summed in FP64."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from reference.formats import decode_e2m1_packed, decode_e4m3
from reference.linear import activations, exact_product
from reference.moe import swiglu
from reference.rounding import bf


def decode(weight: np.ndarray, block_scale: np.ndarray, global_scale: float) -> np.ndarray:
    """FP64 values of packed E2M1 bytes `[n, k / 2]` with E4M3 bytes `[n, k / 16]`."""
    blocks = np.repeat(decode_e4m3(block_scale).astype(np.float64), 16, axis=-1)
    return decode_e2m1_packed(weight).astype(np.float64) * blocks * float(global_scale)


def nvfp4_linear(
    x: np.ndarray,
    weight: np.ndarray,
    block_scale: np.ndarray,
    global_scale: float,
    act_scale: float | None = None,
    *,
    up: np.ndarray | None = None,
    limit: float | None = None,
    act: Literal["nvfp4", "fp8", "bfloat16"] = "nvfp4",
    dtype: DTypeLike = np.float64,
    regime: None = None,
) -> np.ndarray:
    """`act(x) (weight * block_scale * global_scale)^T`: `x [t, k]` or `[t, g, k]`, FP32.

    With `up` and `limit`, `x` is the gate of a SwiGLU, whose BF16 rounding takes its place (section
    5.2). FP64 unless `dtype` says to round; `regime` means nothing here.
    """
    if up is not None and limit is not None:
        x = np.asarray(bf(swiglu(jnp.asarray(x), jnp.asarray(up), limit)))
    values = activations(x, act, act_scale)
    return exact_product(values, decode(weight, block_scale, global_scale), dtype)
