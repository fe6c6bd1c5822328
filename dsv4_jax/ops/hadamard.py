"""Orthonormal Hadamard transform in Sylvester order, for the indexer (model.md 3.5)."""

import jax
import jax.numpy as jnp

from dsv4_jax.ops._check import FLOATS, check_operand
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import row_tiled
from dsv4_jax.typing import Array, Float

__all__ = ["hadamard"]


@jax.jit
def hadamard(x: Float[Array, "*lead n"]) -> Float[Array, "*lead n"]:
    """``H x / sqrt(n)`` over the last axis by butterflies in FP32, rounded once to ``x``'s dtype.

    Raises:
        TypeError: ``x`` is neither BF16 nor FP32.
        ValueError: the last axis is not a power of two.
    """
    check_operand("hadamard", "x", x, "*lead n", FLOATS)
    n = x.shape[-1]
    if n < 1 or n & (n - 1):
        raise ValueError(f"hadamard: the last axis must be a power of two, got {n}")

    def rows(x: Array) -> Array:
        y = x.astype(jnp.float32)
        half = 1
        while half < n:
            pairs = y.reshape(-1, n // (2 * half), 2, half)
            low, high = pairs[..., 0, :], pairs[..., 1, :]
            y = jnp.stack([low + high, low - high], axis=-2).reshape(x.shape)
            half *= 2
        return round_to(y * jnp.float32(n**-0.5), x.dtype)

    return row_tiled(rows, x.reshape(-1, n)).reshape(x.shape)
