"""Bias-free linear layers `y = x W^T`, `W [out, in]` (model.md sections 0 and 4.6).

Weights are dequantised FP32. All official scales are powers of two, so multiplying after
dequantisation differs from the kernels' block-scaled sums only in the order of summation.
"""

import jax
import jax.numpy as jnp
from jax import lax

from reference import formats
from reference.rounding import FP32, Rounding


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """`x W^T` in FP32 without rounding: `x [..., in]` -> `[..., out]`."""
    return jnp.matmul(x, weight.T, precision=lax.Precision.HIGHEST)


def linear(x: jax.Array, weight: jax.Array, rounding: Rounding = FP32) -> jax.Array:
    """BF16 linear: `bf(x W^T)`."""
    return rounding.bf(product(x, weight))


def lin8(x: jax.Array, weight: jax.Array, rounding: Rounding = FP32) -> jax.Array:
    """FP8 linear: `bf(q8(x, 128) W^T)`."""
    return linear(formats.q8(x, 128) if rounding.act_fp8 else x, weight, rounding)


def lin4(x: jax.Array, weight: jax.Array, rounding: Rounding = FP32) -> jax.Array:
    """FP4-weight linear: activations as in `lin8`.

    With `expert_nvfp4` they are NVFP4 with a global scale per token instead (section 9.2).
    """
    if rounding.expert_nvfp4:
        return linear(formats.nvfp4(x, formats.nvfp4_token_scale(x)), weight, rounding)
    return lin8(x, weight, rounding)
