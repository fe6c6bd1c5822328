"""Lightning indexer: scores of compressed entries and the exact set of the best (model.md 3.5)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.ops._blocks import KEY_BLOCK, slice_rows, view_rows
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import Tile, batched_dot, query_tiled
from dsv4_jax.quant.kv import IndexRows, index_dequant
from dsv4_jax.typing import Array, Float, Float32, Int32

__all__ = ["index_scores", "index_topk"]


@functools.partial(jax.jit, static_argnames=("topk", "rounding"))
def index_topk(
    q: Float32[Array, "b t h d"],
    weight: Float[Array, "b t h"],
    keys: IndexRows,
    n_visible: Int32[Array, "b t"],
    *,
    topk: int,
    rounding: Literal["float32", "bfloat16"] = "float32",
) -> Int32[Array, "b t k"]:
    """Ids of the ``min(topk, n_visible)`` largest scores, ascending, then -1; ties to the lower id.

    ``score_w = sum_h weight_h * relu(q_h . key_w)``. The last axis is ``min(topk, capacity)``.

    Args:
        q: values of the (quantised) indexer queries.
        keys: stored indexer keys ``[b, s, ...]``, ``s`` a multiple of 128.
        rounding: ``bfloat16`` rounds the product, each head's term and the sum as the official
            code does; for comparison with it only.

    Raises:
        ValueError: shapes disagree.
    """
    scores = index_scores(q, weight, keys, n_visible, rounding=rounding)
    k = min(topk, scores.shape[-1])
    best, idx = lax.top_k(scores, k)
    idx = jnp.sort(jnp.where(best > -jnp.inf, idx, scores.shape[-1]), axis=-1)
    return jnp.where(idx < scores.shape[-1], idx, -1).astype(jnp.int32)


def index_scores(
    q: Float32[Array, "b t h d"],
    weight: Float[Array, "b t h"],
    keys: IndexRows,
    n_visible: Int32[Array, "b t"],
    *,
    rounding: Literal["float32", "bfloat16"] = "float32",
) -> Float32[Array, "b t s"]:
    """Scores of every stored entry, -inf where it is not visible. See `index_topk`."""
    b, t, heads, _ = q.shape
    capacity = keys.key.shape[1]
    if weight.shape != (b, t, heads) or n_visible.shape != (b, t):
        raise ValueError(
            f"index_topk: weight and n_visible must be {[b, t, heads]} and {[b, t]} for q "
            f"{list(q.shape)}, got {list(weight.shape)} and {list(n_visible.shape)}"
        )
    if capacity % KEY_BLOCK:
        raise ValueError(
            f"index_topk: keys must hold a multiple of {KEY_BLOCK} entries, got {capacity}"
        )
    view = view_rows(keys)
    bf16 = rounding == "bfloat16"

    def bf(x: Array) -> Array:
        return round_to(x, jnp.dtype(jnp.bfloat16)).astype(jnp.float32) if bf16 else x

    def run(tile: Tile) -> Array:
        q_tile, n_tile = tile.take(q), tile.take(n_visible)
        w_tile = tile.take(weight).astype(jnp.float32)

        def fill(j: Array, scores: Array) -> Array:
            start = j * KEY_BLOCK
            key = index_dequant(slice_rows(view, keys, tile, start, KEY_BLOCK))
            ok = start + jnp.arange(KEY_BLOCK) < n_tile[..., None]
            key = jnp.where(ok[..., None], key[:, None], 0)  # [b, t, KEY_BLOCK, d]
            dot = bf(batched_dot(q_tile, key, (-1, -1)))  # [b, t, h, KEY_BLOCK]
            part = bf(jnp.sum(bf(jnp.maximum(dot, 0) * w_tile[..., None]), axis=2))
            part = jnp.where(ok, part, -jnp.inf)
            return lax.dynamic_update_slice_in_dim(scores, part, start, axis=2)

        blocks = (jnp.max(n_tile) + KEY_BLOCK - 1) // KEY_BLOCK
        empty = jnp.full((tile.rows, tile.cols, capacity), -jnp.inf, jnp.float32)
        return lax.fori_loop(0, blocks, fill, empty)

    return query_tiled(run, b, t)
