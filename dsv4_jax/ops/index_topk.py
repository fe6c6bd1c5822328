"""Lightning indexer: scores of compressed entries and the exact set of the best (model.md 3.5)."""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.ops._blocks import KEY_BLOCK, slice_rows, view_rows
from dsv4_jax.ops._check import FLOAT32, FLOATS, INTEGERS, check_choice, check_operand
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import Tile, batched_dot, query_tiled
from dsv4_jax.quant import mxfp4
from dsv4_jax.quant.kv import IndexRows, index_dequant
from dsv4_jax.typing import E2M1, E4M3, Array, Float, Float32, Int32

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
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, or ``topk`` < 1.
    """
    if topk < 1:
        raise ValueError(f"index_topk: topk must be at least 1, got {topk}")
    k = min(topk, keys.key.shape[1])

    def select(scores: Array) -> Array:
        best, idx = lax.top_k(scores, k)
        none = scores.shape[-1]
        idx = jnp.sort(jnp.where(best > -jnp.inf, idx.astype(jnp.int32), none), axis=-1)
        return jnp.where(idx < none, idx, -1)

    return _map_scores(select, q, weight, keys, n_visible, rounding)


def index_scores(
    q: Float32[Array, "b t h d"],
    weight: Float[Array, "b t h"],
    keys: IndexRows,
    n_visible: Int32[Array, "b t"],
    *,
    rounding: Literal["float32", "bfloat16"] = "float32",
) -> Float32[Array, "b t s"]:
    """Scores of every stored entry, -inf where it is not visible. See `index_topk`."""
    return _map_scores(lambda scores: scores, q, weight, keys, n_visible, rounding)


def _map_scores(
    finish: Callable[[Array], Array],
    q: Array,
    weight: Array,
    keys: IndexRows,
    n_visible: Array,
    rounding: str,
) -> Array:
    """``finish`` of the scores ``[b, t, s]`` of one tile of queries at a time."""
    check_operand("index_topk", "q", q, "b t h d", FLOAT32)
    check_operand("index_topk", "weight", weight, "b t h", FLOATS)
    check_operand("index_topk", "n_visible", n_visible, "b t", INTEGERS)
    check_operand("index_topk", "keys", keys.key, "b s d", (*FLOATS, E4M3, E2M1))
    check_choice("index_topk", "rounding", rounding, ("float32", "bfloat16"))
    b, t, heads, dim = q.shape
    capacity = keys.key.shape[1]
    if keys.key.shape != (b, capacity, dim):
        raise ValueError(
            f"index_topk: keys must be [{b}, s, {dim}] for q {list(q.shape)}, "
            f"got {list(keys.key.shape)}"
        )
    if keys.scale is not None:
        block = mxfp4.BLOCK if keys.key.dtype == E2M1 else dim
        want = (b, capacity, dim // block)
        if keys.scale.shape != want:
            raise ValueError(
                f"index_topk: the keys' scale must be {list(want)} for keys "
                f"{list(keys.key.shape)}, got {list(keys.scale.shape)}"
            )
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
    n_visible = jnp.clip(n_visible, 0, capacity)
    bf16 = rounding == "bfloat16"

    def bf(x: Array) -> Array:
        return round_to(x, jnp.dtype(jnp.bfloat16)).astype(jnp.float32) if bf16 else x

    def run(tile: Tile) -> Array:
        q_tile, n_tile = tile.take(q), tile.take(n_visible)
        w_tile = tile.take(weight).astype(jnp.float32)
        q_rows = q_tile.reshape(tile.rows, tile.cols * heads, dim)

        def fill(j: Array, scores: Array) -> Array:
            start = j * KEY_BLOCK
            key = index_dequant(slice_rows(view, keys, tile, start, KEY_BLOCK))
            ok = start + jnp.arange(KEY_BLOCK, dtype=jnp.int32) < n_tile[..., None]
            dot = bf(batched_dot(q_rows, key, (-1, -1)))  # [b, t * h, KEY_BLOCK]
            dot = dot.reshape(*q_tile.shape[:3], KEY_BLOCK)
            part = bf(jnp.sum(bf(jnp.maximum(dot, 0) * w_tile[..., None]), axis=2))
            part = jnp.where(ok, part, -jnp.inf)
            return lax.dynamic_update_slice_in_dim(scores, part, start, axis=2)

        blocks = (jnp.max(n_tile, initial=0) + KEY_BLOCK - 1) // KEY_BLOCK
        empty = jnp.full((tile.rows, tile.cols, capacity), -jnp.inf, jnp.float32)
        return finish(lax.fori_loop(0, blocks, fill, empty))

    return query_tiled(run, b, t)
