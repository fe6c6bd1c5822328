"""`attention` in `jax.numpy`: for keys without scales, FP32 queries and sizes without a kernel."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsv4_jax.ops._blocks import KEY_BLOCK, gather_rows, slice_rows, view_rows
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import Tile, batched_dot, query_tiled
from dsv4_jax.ops.rope import rope
from dsv4_jax.quant.kv import KvRows, kv_dequant
from dsv4_jax.typing import Array

__all__ = ["attention_jax"]


def attention_jax(
    q: Array,
    ring: KvRows,
    positions: Array,
    sink: Array,
    *,
    window: int,
    chunk: KvRows | None,
    start: Array | None,
    pool: KvRows | None,
    n_visible: Array | None,
    topk_idx: Array | None,
    frequencies: Array | None,
) -> tuple[Array, Array]:
    """`attention` on checked operands: the output and its log-sum-exp."""
    b, t = positions.shape
    near = _Window(ring, chunk, start, window, q.dtype)
    far = None
    if pool is not None and n_visible is not None and pool.nope.shape[1]:
        far = _Pool(pool, n_visible, topk_idx, q.dtype)

    def run(tile: Tile) -> Array:
        blocks = None if far is None else far.of(tile)
        keys, ok = near.load(tile, tile.take(positions))
        # One array for `query_tiled`: the log-sum-exp is a channel more, in FP32.
        return jnp.concatenate(_attend(tile.take(q), keys, ok, sink, blocks), axis=-1)

    both = query_tiled(run, b, t)
    o, lse = round_to(both[..., :-1], q.dtype), both[..., -1]
    if frequencies is not None:
        o = rope(o, positions, frequencies, inverse=True)
    return o, lse


class _Window:
    """Keys of the positions up to a query's own: of the ring, or of the chunk from its start on."""

    def __init__(
        self,
        ring: KvRows,
        chunk: KvRows | None,
        start: Array | None,
        window: int,
        dtype: DTypeLike,
    ) -> None:
        self.ring, self.chunk, self.start = ring, chunk, start
        self.window, self.dtype = window, dtype
        self.ring_view = view_rows(ring)
        self.chunk_view = None if chunk is None else view_rows(chunk)

    def load(self, tile: Tile, positions: Array) -> tuple[Array, Array]:
        """Keys ``[b, t, window, d]`` of a tile, zeros where there is none, and their mask."""
        slot = jnp.arange(self.window, dtype=jnp.int32)
        position = positions[..., None] - (self.window - 1) + slot
        ok = (position >= 0) & (positions[..., None] >= 0)
        slots = self.ring.nope.shape[1]
        if slots == 0:
            dim = self.ring.nope.shape[2] + self.ring.rope.shape[2]
            keys = jnp.zeros((*position.shape, dim), self.dtype)
            in_ring = jnp.zeros_like(ok)
        else:
            rows = gather_rows(self.ring_view, self.ring, position % slots, tile.row)
            keys, in_ring = kv_dequant(rows, self.dtype), ok
        if self.chunk is None or self.chunk_view is None or self.start is None:
            return jnp.where(in_ring[..., None], keys, 0), in_ring
        start = lax.dynamic_slice_in_dim(self.start, tile.row, tile.rows)[:, None, None]
        old = position < start
        in_chunk = ok & ~old & (position - start < self.chunk.nope.shape[1])
        if self.chunk.nope.shape[1]:
            row = jnp.where(in_chunk, position - start, 0)
            new = kv_dequant(gather_rows(self.chunk_view, self.chunk, row, tile.row), self.dtype)
            keys = jnp.where(old[..., None], keys, new)
        ok = jnp.where(old, in_ring, in_chunk)
        return jnp.where(ok[..., None], keys, 0), ok


@runtime_checkable  # beartype looks at instances
class _Load(Protocol):
    def __call__(self, i: Array) -> tuple[Array, Array]: ...


class _Blocks:
    """Entries of one tile, ``KEY_BLOCK`` places at a time: how many places, how many blocks."""

    def __init__(self, load: _Load, capacity: int, used: Array) -> None:
        self.load, self.capacity = load, capacity
        self.count = (used + KEY_BLOCK - 1) // KEY_BLOCK


class _Pool:
    """Compressed keys."""

    def __init__(
        self, pool: KvRows, n_visible: Array, topk_idx: Array | None, dtype: DTypeLike
    ) -> None:
        self.pool, self.view, self.dtype = pool, view_rows(pool), dtype
        self.n_visible = jnp.clip(n_visible, 0, pool.nope.shape[1])
        self.topk_idx = topk_idx

    def of(self, tile: Tile) -> _Blocks:
        """The blocks of a tile; ``load`` gives keys ``[b, t, KEY_BLOCK, d]`` and their mask."""
        n_visible = tile.take(self.n_visible)[..., None]
        if self.topk_idx is None:

            def load_slice(i: Array) -> tuple[Array, Array]:
                start = i * KEY_BLOCK
                rows = slice_rows(self.view, self.pool, tile, start, KEY_BLOCK)
                keys = kv_dequant(rows, self.dtype)[:, None]  # [b, 1, KEY_BLOCK, d]
                ok = start + jnp.arange(KEY_BLOCK, dtype=jnp.int32) < n_visible
                keys = jnp.broadcast_to(keys, (*ok.shape, keys.shape[-1]))
                return jnp.where(ok[..., None], keys, 0), ok

            return _Blocks(load_slice, self.pool.nope.shape[1], jnp.max(n_visible, initial=0))

        chosen = tile.take(self.topk_idx)
        k = chosen.shape[-1]
        ok = (chosen >= 0) & (chosen < n_visible)
        used = jnp.max(jnp.where(ok, jnp.arange(1, k + 1, dtype=jnp.int32), 0), initial=0)
        padded = jnp.pad(chosen, [(0, 0), (0, 0), (0, -k % KEY_BLOCK)], constant_values=-1)

        def load_chosen(i: Array) -> tuple[Array, Array]:
            idx = lax.dynamic_slice_in_dim(padded, i * KEY_BLOCK, KEY_BLOCK, axis=2)
            keys = kv_dequant(gather_rows(self.view, self.pool, idx, tile.row), self.dtype)
            ok = (idx >= 0) & (idx < n_visible)
            return jnp.where(ok[..., None], keys, 0), ok

        return _Blocks(load_chosen, padded.shape[-1], used)


def _attend(
    q: Array, near: Array, near_ok: Array, sink: Array, blocks: _Blocks | None
) -> tuple[Array, Array]:
    """One query tile: scores of every block, one maximum, then values block after block.

    Returns ``o [b, t, h, d]`` and ``lse [b, t, h, 1]`` in FP32.
    """
    scale = jnp.float32(q.shape[-1] ** -0.5)

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
    return total / jnp.where(norm == 0, 1, norm), top + jnp.log(norm)
