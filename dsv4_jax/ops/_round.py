"""The one way an FP32 value becomes an activation."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsv4_jax.typing import Array

__all__ = ["round_to"]


def round_to(x: Array, dtype: DTypeLike) -> Array:
    """Rounds FP32 to ``dtype`` (BF16: nearest even) so that XLA cannot undo it in a fusion."""
    if dtype == jnp.bfloat16:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)
