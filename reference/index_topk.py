"""Scores of stored entries and the best of them (section 3.5), every query against all entries."""

from typing import Any

import jax
import jax.numpy as jnp

from reference.indexer import indexer
from reference.rounding import FP32, Rounding


def stored_values(rows: Any) -> jax.Array:
    """Queries or keys `[..., d]` in FP32 of their parts `key` and `scale` (of equal blocks)."""
    key = rows.key.astype(jnp.float32)
    if rows.scale is None:
        return key
    blocks = rows.scale.shape[-1]
    return key * jnp.repeat(rows.scale.astype(jnp.float32), key.shape[-1] // blocks, axis=-1)


def index_topk(
    q: Any,
    weight: jax.Array,
    keys: Any,
    n_visible: jax.Array,
    *,
    topk: int,
    rounding: Rounding = FP32,
    return_scores: bool = False,
    weight_scale: float = 1.0,
) -> Any:
    """Ids of the `min(topk, n_visible)` best entries of each query, ascending, then -1.

    Equal scores: the lower id first; -0 equals 0, NaN is below every number.

    Args:
        q: Parts `key [b, t, h, d]` and `scale`, or None for it.
        weight: `[b, t, h]`.
        keys: Parts `key [b, s, d]` and `scale`.
        n_visible: `[b, t]`; entries `0 .. n - 1` of a query's row.
        topk: Picks; at most `s` are returned.
        rounding: Rounding points.
        return_scores: Also the scores `[b, t, s]`, -inf where an entry is not visible.
        weight_scale: Of the weights; the product is rounded to their dtype.
    """
    weight = (weight.astype(jnp.float32) * jnp.float32(weight_scale)).astype(weight.dtype)
    slots = keys.key.shape[1]
    scores = jax.vmap(lambda q, e, w: indexer(q, e, w, rounding))(
        stored_values(q), stored_values(keys), weight.astype(jnp.float32)
    )
    n = jnp.clip(n_visible, 0, slots)[..., None]
    visible = jnp.arange(slots) < n
    # Sorted by what comes first: visible, a number, larger, lower id.
    ids = jnp.broadcast_to(jnp.arange(slots), scores.shape)
    number = jnp.where(jnp.isnan(scores) | (scores == 0), 0, scores)
    order = jnp.lexsort((ids, -number, jnp.isnan(scores), ~visible), axis=-1)[..., :topk]
    chosen = jnp.arange(order.shape[-1]) < n
    idx = jnp.sort(jnp.where(chosen, order, slots), axis=-1)
    idx = jnp.where(idx < slots, idx, -1).astype(jnp.int32)
    return (idx, jnp.where(visible, scores, -jnp.inf)) if return_scores else idx
