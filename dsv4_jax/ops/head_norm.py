"""Per-head RMS normalisation of the queries, without a weight (model.md 3.1)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.ops._check import FLOATS, check_choice, check_operand
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import row_tiled
from dsv4_jax.typing import Array, Float

__all__ = ["head_norm"]


@functools.partial(jax.jit, static_argnames=("eps", "rounding"))
def head_norm(
    q: Float[Array, "*lead h d"], eps: float, *, rounding: Literal["float32", "bfloat16"]
) -> Float[Array, "*lead h d"]:
    """``q_h * rsqrt(mean(q_h^2) + eps)`` over the whole head.

    Args:
        rounding: ``bfloat16`` rounds the square, the mean, the sum with ``eps``, the root and the
            product as the official code does (the mean itself is an FP32 sum); ``float32`` rounds
            once, to ``q``'s dtype.

    Raises:
        TypeError: ``q`` is neither BF16 nor FP32.
        ValueError: ``q`` has no head axis, or ``rounding`` is not one of the two.
    """
    check_operand("head_norm", "q", q, "*lead h d", FLOATS)
    check_choice("head_norm", "rounding", rounding, ("float32", "bfloat16"))
    steps = jnp.dtype(rounding)

    def step(x: Array) -> Array:
        return round_to(x, steps).astype(jnp.float32)

    def rows(q: Array) -> Array:
        wide = q.astype(jnp.float32)
        mean = step(jnp.mean(step(wide * wide), axis=-1, keepdims=True))
        return round_to(wide * step(lax.rsqrt(step(mean + jnp.float32(eps)))), q.dtype)

    return row_tiled(rows, q.reshape(-1, *q.shape[-2:])).reshape(q.shape)
