"""Bias-free linear layers `y = x W^T`, `W [out, in]` (model.md sections 0 and 4.6).

Weights are dequantised FP32. All official scales are powers of two, so multiplying after
dequantisation differs from the kernels' block-scaled sums only in the order of summation.

`activations` and `exact_product` serve the linears on stored bytes (`fp8_linear` and so on), which
work in FP64 and do not round the result.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from reference import formats
from reference.rounding import FP32, Rounding, bf


def product(x: jax.Array, weight: jax.Array, rounding: Rounding = FP32) -> jax.Array:
    """`x W^T` without rounding: `x [..., in]` -> `[..., out]`."""
    lead = x.shape[:-1]
    y = rounding.einsum("ti,oi->to", x.reshape(-1, x.shape[-1]), weight)
    return y.reshape(*lead, len(weight))


def linear(x: jax.Array, weight: jax.Array, rounding: Rounding = FP32) -> jax.Array:
    """BF16 linear: `bf(x W^T)`."""
    return rounding.bf(product(x, weight, rounding))


def lin8(
    x: jax.Array,
    weight: jax.Array,
    rounding: Rounding = FP32,
    act_scale: jax.Array | None = None,
) -> jax.Array:
    """FP8 linear: `bf(q8(x, 128) W^T)`.

    With `linear_nvfp4` the activations are NVFP4 with a global scale per token instead, or with the
    static one.
    """
    if rounding.linear_nvfp4:
        return linear(formats.nvfp4(x, global_scale(x, act_scale)), weight, rounding)
    return linear(formats.q8(x, 128) if rounding.act_fp8 else x, weight, rounding)


def lin4(
    x: jax.Array,
    weight: jax.Array,
    rounding: Rounding = FP32,
    act_scale: jax.Array | None = None,
) -> jax.Array:
    """FP4-weight linear: activations as in `lin8`.

    With `expert_nvfp4` they are NVFP4 with a global scale per token instead (section 9.2), or with
    the static one.
    """
    rounding = dataclasses.replace(rounding, linear_nvfp4=rounding.expert_nvfp4)
    return lin8(x, weight, rounding, act_scale)


def global_scale(x: jax.Array, act_scale: jax.Array | None) -> jax.Array:
    """Of the rows of `x [..., k]` in NVFP4: their own, or the static one in 2^-100..2^100."""
    if act_scale is None:
        return formats.nvfp4_token_scale(x)
    return jnp.broadcast_to(jnp.clip(act_scale, 2.0**-100, 2.0**100), (*x.shape[:-1], 1))


def activations(
    x: np.ndarray, act: Literal["bfloat16", "fp8", "nvfp4"], act_scale: float | None = None
) -> np.ndarray:
    """`x [..., k]` (FP32) as a product reads it, in FP64.

    Rounded to BF16; `q8` with blocks of 128; or NVFP4 with a global scale per row, or with a static
    one, clamped to 2^-100..2^100.
    """
    values, *scales = (np.asarray(part).astype(np.float64) for part in _parts(x, act, act_scale))
    if not scales:
        return values
    block_scale, global_scale = scales
    return values * np.repeat(block_scale, 16, axis=-1) * global_scale


@functools.partial(jax.jit, static_argnames="act")
def _parts(x: jax.Array, act: str, act_scale: jax.Array | None) -> tuple[jax.Array, ...]:
    """Factors of `activations`."""
    if act == "bfloat16":
        return (bf(x),)
    if act == "fp8":
        return (formats.q8(x, 128),)
    s2 = global_scale(x, act_scale)
    return (*formats.nvfp4_quantize(x, s2), s2)


def exact_product(x: np.ndarray, weight: np.ndarray, dtype: DTypeLike = np.float64) -> np.ndarray:
    """`x W^T` in FP64: `x [t, k]` -> `[t, n]`, or `[t, g, k]` -> `[t, g, n / g]`.

    Of `g` groups each meets its own `n / g` rows of `weight [n, k]`. The result is rounded to
    FP32, then to `dtype`, unless that is FP64.
    """
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    if x.ndim == 2:
        y = x @ weight.T
    else:
        y = np.einsum("tgk,gnk->tgn", x, weight.reshape(x.shape[1], -1, weight.shape[1]))
    return y if dtype == np.float64 else y.astype(np.float32).astype(dtype)
