"""RMS norm into FP8 (model.md sections 2.3 and 4.5)."""

import jax

from reference.formats import q8
from reference.rmsnorm import rmsnorm
from reference.rounding import OFFICIAL


def rmsnorm_fp8(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """`q8(bf(w * x * rsqrt(mean(x^2) + eps)), 128)`: the values that codes and scales stand for.

    `x [..., d]`, `weight [d]`, FP32.
    """
    return q8(rmsnorm(x, weight, eps, OFFICIAL), 128)
