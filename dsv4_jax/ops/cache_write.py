"""Ragged rows into a ring or pool."""

import jax
import jax.numpy as jnp

from dsv4_jax.quant import bits
from dsv4_jax.typing import Array, Float, Int32

__all__ = ["cache_write"]


@jax.jit
def cache_write(
    cache: Float[Array, "b s d"], rows: Float[Array, "b t d"], slots: Int32[Array, "b t"]
) -> Float[Array, "b s d"]:
    """``cache[i, slots[i, j]] = rows[i, j]``; a slot outside the cache drops its row.

    The dtypes must be equal; bytes are moved, never converted. Slots of one call are distinct.

    Raises:
        TypeError: the dtypes differ.
        ValueError: shapes disagree.
    """
    if cache.dtype != rows.dtype:
        raise TypeError(f"cache_write: rows must be {cache.dtype} like cache, got {rows.dtype}")
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
    batch = jnp.arange(cache.shape[0])[:, None]
    return cache.at[batch, slots].set(rows, mode="drop", unique_indices=True)
