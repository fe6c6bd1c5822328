"""Rows of typed stores (`KvRows`, `IndexRows`) taken block by block, through byte views."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.ops._rows import Tile, corner
from dsv4_jax.quant import bits
from dsv4_jax.typing import Array, Int32

__all__ = ["KEY_BLOCK", "gather_rows", "slice_rows", "view_rows"]

KEY_BLOCK = 128
"""Keys are summed in blocks of this many slots, block after block, so that trailing empty blocks
(a longer ``max_len``, fewer selected entries) change nothing, bitwise."""

Rows = TypeVar("Rows")


def view_rows(rows: Rows) -> Rows:
    """The same store with byte views for parts."""
    return jax.tree.map(bits.byte_view, rows)


def slice_rows(view: Rows, like: Rows, tile: Tile, start: Array, size: int) -> Rows:
    """Slots ``start .. start + size`` of the tile's rows of a view, in the dtypes of ``like``."""

    def take(part: Array, typed: Array) -> Array:
        size_3d = (tile.rows, size, part.shape[2])
        return bits.from_byte_view(
            lax.dynamic_slice(part, corner(tile.row, start, 0), size_3d), typed.dtype
        )

    return jax.tree.map(take, view, like)


def gather_rows(view: Rows, like: Rows, idx: Int32[Array, "b t k"], row: Array | int = 0) -> Rows:
    """Slots ``idx[i]`` of row ``row + i`` of every part: ``[b, t, k, ...]``; clipped."""

    def take(part: Array, typed: Array) -> Array:
        batch = row + jnp.arange(idx.shape[0], dtype=jnp.int32)[:, None, None]
        slots = jnp.clip(idx, 0, part.shape[1] - 1)
        return bits.from_byte_view(part[batch, slots], typed.dtype)

    return jax.tree.map(take, view, like)
