"""Bias-free linear layers `y = x W^T`, `W [out, in]` (model.md sections 0 and 4.6).

Weights are dequantised FP32. All official scales are powers of two, so multiplying after
dequantisation differs from the kernels' block-scaled sums only in the order of summation.
"""

import dataclasses

import jax

from reference import formats
from reference.rounding import FP32, Rounding


def product(x: jax.Array, weight: jax.Array, rounding: Rounding = FP32) -> jax.Array:
    """`x W^T` without rounding: `x [..., in]` -> `[..., out]`."""
    lead = x.shape[:-1]
    y = rounding.einsum("ti,oi->to", x.reshape(-1, x.shape[-1]), weight)
    return y.reshape(*lead, len(weight))


def linear(x: jax.Array, weight: jax.Array, rounding: Rounding = FP32) -> jax.Array:
    """BF16 linear: `bf(x W^T)`."""
    return rounding.bf(product(x, weight, rounding))


def lin8(x: jax.Array, weight: jax.Array, rounding: Rounding = FP32) -> jax.Array:
    """FP8 linear: `bf(q8(x, 128) W^T)`.

    With `linear_nvfp4` the activations are NVFP4 with a global scale per token instead.
    """
    if rounding.linear_nvfp4:
        return linear(formats.nvfp4(x, formats.nvfp4_token_scale(x)), weight, rounding)
    return linear(formats.q8(x, 128) if rounding.act_fp8 else x, weight, rounding)


def lin4(x: jax.Array, weight: jax.Array, rounding: Rounding = FP32) -> jax.Array:
    """FP4-weight linear: activations as in `lin8`.

    With `expert_nvfp4` they are NVFP4 with a global scale per token instead (section 9.2).
    """
    return lin8(x, weight, dataclasses.replace(rounding, linear_nvfp4=rounding.expert_nvfp4))
