"""`index_topk` in `jax.numpy`: for unscaled keys, official roundings and sizes without a kernel."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from dsv4_jax.ops._blocks import KEY_BLOCK, slice_rows, view_rows
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import Tile, batched_dot, query_tiled
from dsv4_jax.quant.kv import IndexRows, index_dequant
from dsv4_jax.typing import Array

__all__ = ["index_scores_jax", "index_topk_jax"]


def index_topk_jax(
    q: IndexRows, weight: Array, keys: IndexRows, n_visible: Array, *, topk: int, rounding: str
) -> Array:
    """`index_topk` on checked operands: the ids."""

    def select(scores: Array, n: Array) -> Array:
        slots = jnp.arange(scores.shape[-1], dtype=jnp.int32)
        order = jnp.where(slots < n[..., None], _order(scores), jnp.iinfo(jnp.int32).min)
        _, idx = lax.top_k(order, topk)  # equal ones by ascending id
        chosen = jnp.arange(topk, dtype=jnp.int32) < n[..., None]
        idx = jnp.sort(jnp.where(chosen, idx.astype(jnp.int32), scores.shape[-1]), axis=-1)
        return jnp.where(idx < scores.shape[-1], idx, -1)

    return _map_scores(select, q, weight, keys, n_visible, rounding)


def index_scores_jax(
    q: IndexRows, weight: Array, keys: IndexRows, n_visible: Array, *, rounding: str
) -> Array:
    """Scores of every stored entry, -inf where it is not visible."""
    return _map_scores(lambda scores, n: scores, q, weight, keys, n_visible, rounding)


def _order(scores: Array) -> Array:
    """Integers that compare as scores do, NaN below -inf and above the least of all."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    signed = jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(magnitude > 0x7F800000, -0x7FFFFFFF, signed)


def _map_scores(
    finish: Callable[[Array, Array], Array],
    q: IndexRows,
    weight: Array,
    keys: IndexRows,
    n_visible: Array,
    rounding: str,
) -> Array:
    """``finish`` of the scores ``[b, t, s]`` and counts ``[b, t]`` of one tile at a time."""
    b, t, heads, dim = q.key.shape
    capacity = keys.key.shape[1]
    values = index_dequant(q)
    view = view_rows(keys)
    n_visible = jnp.clip(n_visible, 0, capacity)
    bf16 = rounding == "bfloat16"

    def bf(x: Array) -> Array:
        return round_to(x, jnp.dtype(jnp.bfloat16)).astype(jnp.float32) if bf16 else x

    def run(tile: Tile) -> Array:
        q_tile, n_tile = tile.take(values), tile.take(n_visible)
        w_tile = tile.take(weight)
        q_rows = q_tile.reshape(tile.rows, tile.cols * heads, dim)

        def fill(j: Array, scores: Array) -> Array:
            start = j * KEY_BLOCK
            key = index_dequant(slice_rows(view, keys, tile, start, KEY_BLOCK))
            ok = start + jnp.arange(KEY_BLOCK, dtype=jnp.int32) < n_tile[..., None]
            dot = bf(batched_dot(q_rows, key, (-1, -1)))  # [b, t * h, KEY_BLOCK]
            dot = dot.reshape(*q_tile.shape[:3], KEY_BLOCK)
            positive = jnp.where(dot < 0, 0, dot)  # a maximum of XLA's CPU backend may drop NaN
            part = bf(jnp.sum(bf(positive * w_tile[..., None]), axis=2))
            part = jnp.where(ok, part, -jnp.inf)
            return lax.dynamic_update_slice_in_dim(scores, part, start, axis=2)

        blocks = (jnp.max(n_tile, initial=0) + KEY_BLOCK - 1) // KEY_BLOCK
        empty = jnp.full((tile.rows, tile.cols, capacity), -jnp.inf, jnp.float32)
        return finish(lax.fori_loop(0, blocks, fill, empty), n_tile)

    return query_tiled(run, b, t)
