"""RMS normalisation with an FP32 weight product and a single rounding (model.md 2.3)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.ops._check import FLOATS, check_operand
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import row_tiled
from dsv4_jax.typing import Array, Float

__all__ = ["rmsnorm"]


@functools.partial(jax.jit, static_argnames=("eps",))
def rmsnorm(
    x: Float[Array, "*lead d"], weight: Float[Array, "d"], eps: float
) -> Float[Array, "*lead d"]:
    """``weight * x * rsqrt(mean(x^2) + eps)`` in FP32, rounded once to ``x``'s dtype.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: ``weight`` does not match the last axis of ``x``.
    """
    check_operand("rmsnorm", "x", x, "*lead d", FLOATS)
    check_operand("rmsnorm", "weight", weight, "d", FLOATS)
    if weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rmsnorm: weight must be {list(x.shape[-1:])} for x {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )

    def rows(x: Array) -> Array:
        wide = x.astype(jnp.float32)
        y = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + jnp.float32(eps))
        return round_to(weight.astype(jnp.float32) * y, x.dtype)

    return row_tiled(rows, x.reshape(-1, x.shape[-1])).reshape(x.shape)
