"""Ragged rows into a ring or pool."""

import jax
import jax.numpy as jnp

from dsv4_jax.ops._check import INTEGERS, check_operand
from dsv4_jax.quant import bits
from dsv4_jax.typing import E2M1, Array, Int32, StoredFloat

__all__ = ["cache_write"]


@jax.jit
def cache_write(
    cache: StoredFloat[Array, "b s d"],
    rows: StoredFloat[Array, "b t d"],
    slots: Int32[Array, "b t"],
) -> StoredFloat[Array, "b s d"]:
    """``cache[i, slots[i, j]] = rows[i, j]``; a slot outside the cache drops its row.

    The dtypes must be equal; bytes are moved, never converted. Slots of one call are distinct.

    Raises:
        TypeError: the dtypes differ, or ``slots`` are not integers.
        ValueError: shapes disagree, or packed rows have an odd length.
    """
    if cache.dtype != rows.dtype:
        raise TypeError(f"cache_write: rows must be {cache.dtype} like cache, got {rows.dtype}")
    check_operand("cache_write", "cache", cache, "b s d", (cache.dtype,))
    check_operand("cache_write", "rows", rows, "b t d", (cache.dtype,))
    check_operand("cache_write", "slots", slots, "b t", INTEGERS)
    if cache.dtype == E2M1 and cache.shape[2] % 2:
        raise ValueError(
            f"cache_write: cache must have an even last axis (two codes a byte), "
            f"got {list(cache.shape)}"
        )
    want = (cache.shape[0], rows.shape[1], cache.shape[2])
    if rows.shape != want or slots.shape != want[:2]:
        raise ValueError(
            f"cache_write: rows and slots must be {list(want)} and {list(want[:2])} for cache "
            f"{list(cache.shape)}, got {list(rows.shape)} and {list(slots.shape)}"
        )
    slots = jnp.where((slots < 0) | (slots >= cache.shape[1]), cache.shape[1], slots)
    written = _scatter(bits.byte_view(cache), bits.byte_view(rows), slots)
    return bits.from_byte_view(written, cache.dtype)


def _scatter(cache: Array, rows: Array, slots: Array) -> Array:
    batch = jnp.arange(cache.shape[0], dtype=jnp.int32)[:, None]
    return cache.at[batch, slots].set(rows, mode="drop", unique_indices=True)
