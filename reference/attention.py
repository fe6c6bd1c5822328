"""Attention over one shared key = value head with a sink per query head (sections 3.2, 3.4)."""

import jax
import jax.numpy as jnp

from reference import formats
from reference.rounding import FP32, Rounding, bf


def key_quant(keys: jax.Array, rope_dim: int, rounding: Rounding = FP32) -> jax.Array:
    """`q8` in blocks of 64 on the channels before the rotary part of `keys [s, d]`."""
    if not rounding.kv_fp8:
        return keys
    split = keys.shape[-1] - rope_dim
    return jnp.concatenate([formats.q8(keys[:, :split], 64), keys[:, split:]], axis=-1)


def attention(
    q: jax.Array, keys: jax.Array, sink: jax.Array, mask: jax.Array, rounding: Rounding = FP32
) -> jax.Array:
    """Softmax attention with a sink that enters the denominator only.

    `a_u = d^(-1/2) q_h . key_u`, `M = max_u a_u`, `e_u = exp(a_u - M)`,
    `o_h = sum_u e_u key_u / (sum_u e_u + exp(sink_h - M))`. With `bf16_probs` the numerator uses
    `bf(e_u)` and the denominator the unrounded `e_u`. Every query must see at least one key.

    Args:
        q: `[t, h, d]`.
        keys: `[s, d]`, keys and values.
        sink: `[h]`.
        mask: `[t, s]`, True where the query sees the key.
        rounding: Rounding points.

    Returns:
        `[t, h, d]`, before the inverse RoPE.
    """
    a = rounding.einsum("thd,sd->ths", q, keys) * q.shape[-1] ** -0.5
    a = jnp.where(mask[:, None, :], a, -jnp.inf)
    top = jnp.max(a, axis=-1, keepdims=True)
    e = jnp.exp(a - top)
    denominator = jnp.sum(e, axis=-1, keepdims=True) + jnp.exp(sink[:, None] - top)
    e = bf(e) if rounding.bf16_probs else e
    return rounding.bf(rounding.einsum("ths,sd->thd", e, keys) / denominator)
