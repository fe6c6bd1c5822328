"""`compressor` in `jax.numpy`: pools without scales, FP32 streams and sizes without a kernel."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import row_tiled
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.hadamard import hadamard
from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.ops.rope import rope
from dsv4_jax.quant.kv import IndexRows, KvRows, index_quant, kv_quant
from dsv4_jax.typing import E2M1, Array

__all__ = ["closed_windows", "compressor_jax"]


class Closed(NamedTuple):
    """Windows that close inside a chunk, per row; ``entry`` is arbitrary where not ``closed``."""

    entry: Array
    window: Array
    closed: Array


def compressor_jax(
    kv: Array,
    gate: Array,
    ape: Array,
    norm: Array,
    states: tuple[Array, Array],
    pool: KvRows | IndexRows,
    start: Array,
    count: Array,
    frequencies: Array,
    *,
    ratio: int,
    eps: float,
    dtype: DTypeLike,
) -> tuple[tuple[Array, Array], KvRows | IndexRows]:
    """One job of `compressor` on checked operands: the new states and the new pool."""
    t, ring = kv.shape[1], states[0].shape[1]
    count = jnp.where(start < 0, 0, jnp.clip(count, 0, t))
    start = jnp.maximum(start, 0)
    position = start[:, None] + jnp.arange(t, dtype=jnp.int32)
    gate = gate + ape[position % ratio]
    entry, window, closed = closed_windows(kv, gate, *states, start, count, ratio=ratio)
    # Read the ring, then write it: without this edge XLA may copy the ring instead.
    entry, rows = lax.optimization_barrier((entry, (kv, gate)))
    end = (start + count)[:, None]
    kept = (position < end) & (position >= end - ring)
    states = cache_write(states, rows, jnp.where(kept, position % ring, ring))
    y = rope(rmsnorm(round_to(entry, dtype), norm, eps), window * ratio, frequencies)
    return states, cache_write(pool, _stored(y, pool), jnp.where(closed, window, -1))


def _stored(y: Array, pool: KvRows | IndexRows) -> KvRows | IndexRows:
    """Entries in the storage format; the Hadamard transform only serves its rounding."""
    if isinstance(pool, KvRows):
        plain = "float32" if pool.nope.dtype == jnp.float32 else "bfloat16"
        return kv_quant(y, pool.rope.shape[-1], "fp8" if pool.scale is not None else plain)
    if pool.scale is None:
        return IndexRows(y.astype(pool.key.dtype), None)
    return index_quant(hadamard(y), "mxfp4" if pool.key.dtype == E2M1 else "fp8")


def closed_windows(
    kv: Array,
    gate: Array,
    kv_state: Array,
    gate_state: Array,
    start: Array,
    count: Array,
    *,
    ratio: int,
) -> Closed:
    """``c_w = sum_s softmax_s(gate_s) * kv_s`` per channel over the slots of window ``w``, FP32.

    Slots come from the chunk or, for positions before ``start``, from the position-indexed state
    rings; ``gate`` includes ``ape``.
    """
    b, t, width = kv.shape
    overlap = 2 if ratio == 4 else 1
    ring = kv_state.shape[1]
    windows = (t + ratio - 1) // ratio
    window = start[:, None] // ratio + jnp.arange(windows, dtype=jnp.int32)  # [b, n]
    closed = (window + 1) * ratio <= (start + count)[:, None]
    offsets = jnp.arange(-(overlap - 1) * ratio, ratio, dtype=jnp.int32)
    position = window[..., None] * ratio + offsets  # [b, n, slots]
    from_chunk = position >= start[:, None, None]
    chunk_row = jnp.clip(position - start[:, None, None], 0, t - 1)
    row = jnp.where(from_chunk, ring + chunk_row, position % ring)
    exists = (position >= 0)[..., None]
    batch = jnp.arange(b, dtype=jnp.int32)[:, None, None]

    def slots(state: Array, chunk: Array) -> Array:
        rows = jnp.concatenate([state, chunk], axis=1)[batch, row]  # [b, n, slots, c*d]
        if overlap == 1:
            return rows
        half = width // 2
        return jnp.concatenate(
            [rows[:, :, :ratio, :half], rows[:, :, ratio:, half:]], axis=2
        )  # [b, n, slots, d]

    value = jnp.where(exists, slots(kv_state, kv), 0)
    logit = jnp.where(exists, slots(gate_state, gate), -jnp.inf)

    def pool(value: Array, logit: Array) -> Array:
        e = jnp.exp(logit - jnp.max(logit, axis=1, keepdims=True))
        return jnp.sum(e * value, axis=1) / jnp.sum(e, axis=1)

    flat = (x.reshape(-1, *x.shape[2:]) for x in (value, logit))
    entry = row_tiled(pool, *flat, tile=1).reshape(b, windows, width // overlap)
    return Closed(entry, window.astype(jnp.int32), closed)
