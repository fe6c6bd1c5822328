"""Attention over window and compressed entries, one softmax with a sink (model.md 3.4)."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsv4_jax.ops._blocks import KEY_BLOCK, gather_rows, slice_rows, view_rows
from dsv4_jax.ops._check import FLOAT32, FLOATS, INTEGERS, check_operand
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import Tile, batched_dot, corner, query_tiled
from dsv4_jax.quant import fp8
from dsv4_jax.quant.kv import KvRows, kv_dequant
from dsv4_jax.typing import E4M3, Array, Float, Float32, Int32

__all__ = ["sparse_attention"]


@jax.jit
def sparse_attention(
    q: Float[Array, "b t h d"],
    keys: Float[Array, "b wt d"],
    positions: Int32[Array, "b t"],
    sink: Float32[Array, "h"],
    pool: KvRows | None = None,
    n_visible: Int32[Array, "b t"] | None = None,
    topk_idx: Int32[Array, "b t k"] | None = None,
) -> Float[Array, "b t h d"]:
    """``o = sum_u e_u key_u / (sum_u e_u + exp(sink - M))``, keys = values, FP32 softmax.

    ``a_u = d^(-1/2) q . key_u``, ``M`` the largest ``a_u`` or the sink, ``e_u = exp(a_u - M)``;
    ``e_u`` is rounded to ``q``'s dtype for the value product, the denominator sums the unrounded
    values. A query without any key gets zeros.

    Args:
        keys: the ``window - 1`` keys before the chunk, then the chunk's own ``t`` keys; query
            ``j`` sees slots ``j .. j + window - 1`` as far as their positions are >= 0.
        positions: absolute positions of the queries; negative ones have no keys.
        pool: compressed entries ``[b, s, ...]``, ``s`` a multiple of 128.
        n_visible: entries ``0 .. n - 1`` visible to each query.
        topk_idx: when given, only these entries (-1 and out-of-range ids are skipped).

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, or ``n_visible`` and ``pool`` are not given together.
    """
    check_operand("sparse_attention", "q", q, "b t h d", FLOATS)
    check_operand("sparse_attention", "keys", keys, "b wt d", FLOATS)
    check_operand("sparse_attention", "positions", positions, "b t", INTEGERS)
    check_operand("sparse_attention", "sink", sink, "h", FLOAT32)
    b, t, heads, dim = q.shape
    if positions.shape != (b, t):
        raise ValueError(
            f"sparse_attention: positions must be {[b, t]} for q {list(q.shape)}, "
            f"got {list(positions.shape)}"
        )
    if keys.shape[0] != b or keys.shape[2] != dim or keys.shape[1] < t:
        raise ValueError(
            f"sparse_attention: keys must be [{b}, window - 1 + {t}, {dim}] for q "
            f"{list(q.shape)}, got {list(keys.shape)}"
        )
    if sink.shape != (heads,):
        raise ValueError(f"sparse_attention: sink must be [{heads}], got {list(sink.shape)}")
    if (pool is None) != (n_visible is None) or (pool is None and topk_idx is not None):
        raise ValueError("sparse_attention: pool needs n_visible, and topk_idx needs pool")
    if pool is not None and pool.nope.shape[1] % KEY_BLOCK:
        raise ValueError(
            f"sparse_attention: pool must hold a multiple of {KEY_BLOCK} entries, "
            f"got {pool.nope.shape[1]}"
        )
    if pool is not None and n_visible is not None:
        _check_pool(pool, n_visible, topk_idx, q.shape)
        n_visible = jnp.clip(n_visible, 0, pool.nope.shape[1])
    else:
        n_visible = jnp.zeros((b, t), jnp.int32)
    window = keys.shape[1] - t + 1
    view = None if pool is None else view_rows(pool)

    def run(tile: Tile) -> Array:
        span = tile.cols + window - 1
        near = lax.dynamic_slice(keys, corner(tile.row, tile.col, 0), (tile.rows, span, dim))
        slot = jnp.arange(window, dtype=jnp.int32)
        near = near[:, jnp.arange(tile.cols, dtype=jnp.int32)[:, None] + slot]  # [b, t, window, d]
        position = tile.take(positions)[..., None]
        near_ok = (position - (window - 1) + slot >= 0) & (position >= 0)
        blocks: _Blocks | None = None
        if pool is not None and view is not None:
            idx = None if topk_idx is None else tile.take(topk_idx)
            blocks = _Blocks(pool, view, tile, tile.take(n_visible), idx, q.dtype)
        return _attend(tile.take(q), near, near_ok, sink, blocks)

    return query_tiled(run, b, t)


def _check_pool(
    pool: KvRows, n_visible: Array, topk_idx: Array | None, q_shape: tuple[int, ...]
) -> None:
    b, t, _, dim = q_shape
    check_operand("sparse_attention", "n_visible", n_visible, "b t", INTEGERS)
    check_operand("sparse_attention", "pool", pool.nope, "b s d", (*FLOATS, E4M3))
    check_operand("sparse_attention", "pool", pool.rope, "b s d", FLOATS)
    slots, nope = pool.nope.shape[1:]
    if pool.nope.shape[0] != b or pool.rope.shape != (b, slots, dim - nope):
        raise ValueError(
            f"sparse_attention: pool must be [{b}, s, ...] with {dim} channels for q "
            f"{list(q_shape)}, got {list(pool.nope.shape)} and {list(pool.rope.shape)}"
        )
    blocks = (b, slots, -(-nope // fp8.KV_BLOCK))
    if pool.scale is not None and pool.scale.shape != blocks:
        raise ValueError(
            f"sparse_attention: the pool's scale must be {list(blocks)} for {nope} channels, "
            f"got {list(pool.scale.shape)}"
        )
    if n_visible.shape != (b, t):
        raise ValueError(
            f"sparse_attention: n_visible must be {[b, t]} for q {list(q_shape)}, "
            f"got {list(n_visible.shape)}"
        )
    if topk_idx is None:
        return
    check_operand("sparse_attention", "topk_idx", topk_idx, "b t k", INTEGERS)
    if topk_idx.shape[:2] != (b, t):
        raise ValueError(
            f"sparse_attention: topk_idx must be [{b}, {t}, k] for q {list(q_shape)}, "
            f"got {list(topk_idx.shape)}"
        )


class _Blocks:
    """Compressed keys of one query tile, ``KEY_BLOCK`` slots at a time."""

    def __init__(
        self,
        pool: KvRows,
        view: KvRows,
        tile: Tile,
        n_visible: Array,
        topk_idx: Array | None,
        dtype: DTypeLike,
    ) -> None:
        self.pool, self.view, self.tile = pool, view, tile
        self.n_visible, self.dtype = n_visible, dtype
        self.idx = topk_idx
        if topk_idx is None:
            self.capacity = pool.nope.shape[1]
            used = jnp.max(n_visible, initial=0)
        else:
            k = topk_idx.shape[-1]
            ok = (topk_idx >= 0) & (topk_idx < n_visible[..., None])
            used = jnp.max(jnp.where(ok, jnp.arange(1, k + 1, dtype=jnp.int32), 0), initial=0)
            self.idx = jnp.pad(topk_idx, [(0, 0), (0, 0), (0, -k % KEY_BLOCK)], constant_values=-1)
            self.capacity = self.idx.shape[-1]
        self.count = (used + KEY_BLOCK - 1) // KEY_BLOCK

    def load(self, i: Array) -> tuple[Array, Array]:
        """Keys ``[b, t, KEY_BLOCK, d]`` of block ``i`` (zeros where unused) and their mask."""
        start = i * KEY_BLOCK
        if self.idx is None:
            rows = slice_rows(self.view, self.pool, self.tile, start, KEY_BLOCK)
            keys = kv_dequant(rows, self.dtype)[:, None]  # [b, 1, KEY_BLOCK, d]
            ok = start + jnp.arange(KEY_BLOCK, dtype=jnp.int32) < self.n_visible[..., None]
            keys = jnp.broadcast_to(keys, (*ok.shape, keys.shape[-1]))
        else:
            idx = lax.dynamic_slice_in_dim(self.idx, start, KEY_BLOCK, axis=2)
            rows = gather_rows(self.view, self.pool, idx, self.tile.row)
            keys = kv_dequant(rows, self.dtype)
            ok = (idx >= 0) & (idx < self.n_visible[..., None])
        return jnp.where(ok[..., None], keys, 0), ok


def _attend(q: Array, near: Array, near_ok: Array, sink: Array, blocks: _Blocks | None) -> Array:
    """One query tile: scores of every block, one maximum, then values block after block."""
    scale = jnp.float32(q.shape[-1] ** -0.5)
    near = jnp.where(near_ok[..., None], near, 0).astype(q.dtype)

    def score(keys: Array, ok: Array) -> Array:
        a = batched_dot(q, keys, (-1, -1)) * scale  # [b, t, h, s]
        return jnp.where(ok[:, :, None], a, -jnp.inf)

    near_score = score(near, near_ok)
    top = jnp.maximum(jnp.max(near_score, axis=-1, keepdims=True), sink[:, None])
    far_score = jnp.zeros((*near_score.shape[:-1], 0), jnp.float32)
    if blocks is not None:
        load = blocks.load

        def fill(i: Array, scores: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(scores, score(*load(i)), i * KEY_BLOCK, axis=3)

        shape = (*near_score.shape[:-1], blocks.capacity)
        far_score = lax.fori_loop(0, blocks.count, fill, jnp.full(shape, -jnp.inf, jnp.float32))
        top = jnp.maximum(top, jnp.max(far_score, axis=-1, keepdims=True))

    top = jnp.where(top == -jnp.inf, 0, top)  # no key at all and a sink of -inf

    def accumulate(keys: Array, scores: Array) -> tuple[Array, Array]:
        e = jnp.exp(scores - top)
        return batched_dot(round_to(e, q.dtype), keys, (-1, -2)), jnp.sum(e, -1, keepdims=True)

    total, norm = accumulate(near, near_score)
    if blocks is not None:
        load = blocks.load

        def add(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            scores = lax.dynamic_slice_in_dim(far_score, i * KEY_BLOCK, KEY_BLOCK, axis=3)
            part, e = accumulate(load(i)[0], scores)
            return carry[0] + part, carry[1] + e

        total, norm = lax.fori_loop(0, blocks.count, add, (total, norm))
    norm = norm + jnp.exp(sink[:, None] - top)
    return round_to(total / jnp.where(norm == 0, 1, norm), q.dtype)
