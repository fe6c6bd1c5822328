"""Root-mean-square norms (model.md sections 2.3 and 3.1)."""

import jax
import jax.numpy as jnp
from jax import lax

from reference.rounding import FP32, Rounding, bf


def rmsnorm(x: jax.Array, weight: jax.Array, eps: float, rounding: Rounding = FP32) -> jax.Array:
    """`bf(w * (x * rsqrt(mean(x^2) + eps)))` over the last axis; `x [..., n]`, `weight [n]`."""
    return rounding.bf(weight * (x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)))


def head_norm(q: jax.Array, eps: float, rounding: Rounding = FP32) -> jax.Array:
    """Weightless norm of every query head, `q [t, h, d]` (section 3.1).

    `bf16_q_norm` rounds after the square, the mean, the sum with `eps`, the rsqrt and the product.
    """
    if not rounding.bf16_q_norm:
        return rounding.bf(q * lax.rsqrt(jnp.mean(q * q, axis=-1, keepdims=True) + eps))
    mean = bf(jnp.mean(bf(q * q), axis=-1, keepdims=True))
    return bf(q * bf(lax.rsqrt(bf(mean + eps))))
