"""Lightning indexer of the ratio-4 layers (model.md section 3.5)."""

import jax
import jax.numpy as jnp
from jax import lax

from reference import formats
from reference.rounding import FP32, Rounding, bf


def index_quant(x: jax.Array, rounding: Rounding = FP32) -> jax.Array:
    """`q4(bf(hadamard(x)), 32)` over the last axis, for queries and entries alike, after RoPE."""
    x = rounding.bf(formats.hadamard(x))
    return formats.q4(x, 32) if rounding.index_fp4 else x


def indexer(
    q: jax.Array, entries: jax.Array, weight: jax.Array, rounding: Rounding = FP32
) -> jax.Array:
    """Index scores `score[t, w] = sum_h weight[t, h] * ReLU(q[t, h] . entries[w])`.

    With `bf16_scores` the product, the weighted product and the sum are each rounded to BF16.

    Args:
        q: `[t, h, d]`, after `index_quant`.
        entries: `[n, d]`, after `index_quant`.
        weight: `[t, h]`, may be negative.
        rounding: Rounding points.

    Returns:
        `[t, n]`, visible or not.
    """
    rnd = bf if rounding.bf16_scores else lambda x: x
    score = rnd(rounding.einsum("thd,nd->thn", q, entries))
    return rnd(jnp.sum(rnd(jax.nn.relu(score) * weight[:, :, None]), axis=1))


def topk_visible(scores: jax.Array, visible: jax.Array, k: int) -> jax.Array:
    """The `k` best visible entries of each query, or all of them when fewer: `[t, n]` bool.

    Ties go to the lowest index.
    """
    t, n = scores.shape
    if n <= k:
        return visible
    _, idx = lax.top_k(jnp.where(visible, scores, -jnp.inf), k)
    return jnp.zeros((t, n), bool).at[jnp.arange(t)[:, None], idx].set(True) & visible
