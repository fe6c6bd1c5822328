"""Work done row by row in a fixed shape on the CPU, so that rows do not depend on each other.

XLA's CPU backend picks the blocking of a product, the fusions and with them the multiply-add
contractions from whole shapes, so the same row comes out differently in a larger call. On the CPU
every op therefore runs in a loop over tiles of a fixed number of rows, the last one padded; the
loop body is the same program whatever the call holds. The trip count is hidden from the compiler,
which would otherwise inline a loop of one tile and fuse it with its surroundings. On a GPU the
rows are left whole.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.typing import Array

__all__ = [
    "ROW_TILE",
    "Tile",
    "batched_dot",
    "corner",
    "hidden_trip_count",
    "query_tiled",
    "row_dot",
    "row_tiled",
    "tile_dot",
]

ROW_TILE = 8


_QUERY_COLUMNS = 16
"""Bounds the keys gathered at a time on a GPU to a few MB a row."""


def corner(*starts: Array | int) -> tuple[Array, ...]:
    """Start indices of a slice in one dtype, whatever ``jax_enable_x64`` makes of literals."""
    return tuple(jnp.asarray(start, jnp.int32) for start in starts)


class Tile(NamedTuple):
    """Queries ``[row : row + rows, col : col + cols]``; the corner is traced, the extent static."""

    row: Array
    col: Array
    rows: int
    cols: int

    def take(self, x: Array) -> Array:
        """The tile's part of ``x [b, t, ...]``."""
        at = corner(self.row, self.col, *(0,) * (x.ndim - 2))
        return lax.dynamic_slice(x, at, (self.rows, self.cols, *x.shape[2:]))


def hidden_trip_count(n: int | Array) -> Array:
    """``n`` as an int32 that no compiler pass sees through."""
    return lax.optimization_barrier(jnp.asarray(n, jnp.int32))


def row_tiled(fn: Callable[..., Any], *rows: Array, tile: int = ROW_TILE) -> Any:
    """``fn(*rows)`` for a function of arrays that treats their leading axis row by row.

    ``fn`` returns a pytree of arrays with the same leading axis. Invariants (weights) are closed
    over; what is expensive to derive from them belongs outside ``fn``.
    """
    count = rows[0].shape[0]
    result = jax.eval_shape(fn, *rows)
    if count == 0:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), result)

    def tiled(*rows: Array) -> Any:
        tiles = -(-count // tile)
        padded = [_pad(x, tiles * tile) for x in rows]
        out = jax.tree.map(lambda s: jnp.zeros((tiles * tile, *s.shape[1:]), s.dtype), result)

        def body(i: Array, out: Any) -> Any:
            part = fn(*(lax.dynamic_slice_in_dim(x, i * tile, tile) for x in padded))
            return jax.tree.map(
                lambda o, p: lax.dynamic_update_slice_in_dim(o, p, i * tile, axis=0), out, part
            )

        out = lax.fori_loop(0, hidden_trip_count(tiles), body, out)
        return jax.tree.map(lambda o: o[:count], out)

    return lax.platform_dependent(*rows, cpu=tiled, default=fn)


def query_tiled(fn: Callable[[Tile], Array], b: int, t: int) -> Array:
    """``fn`` over tiles of a ``[b, t]`` grid of queries: one at a time on the CPU, else 16 columns.

    ``fn`` maps a `Tile` to an array ``[tile.rows, tile.cols, ...]``; a tile may start anywhere.
    """
    result = jax.eval_shape(lambda: fn(Tile(jnp.int32(0), jnp.int32(0), b, t)))
    out = jnp.zeros(result.shape, result.dtype)
    if b == 0 or t == 0:
        return out

    def put(out: Array, tile: Tile) -> Array:
        return lax.dynamic_update_slice(
            out, fn(tile), corner(tile.row, tile.col, *(0,) * (out.ndim - 2))
        )

    def single(out: Array) -> Array:
        def body(i: Array, out: Array) -> Array:
            return put(out, Tile(i // t, i % t, 1, 1))

        return lax.fori_loop(0, hidden_trip_count(b * t), body, out)

    def columns(out: Array) -> Array:
        cols = min(t, _QUERY_COLUMNS)
        if cols == t:
            return fn(Tile(jnp.int32(0), jnp.int32(0), b, t))

        def body(i: Array, out: Array) -> Array:
            return put(out, Tile(jnp.int32(0), jnp.minimum(i * cols, t - cols), b, cols))

        return lax.fori_loop(0, -(-t // cols), body, out)

    return lax.platform_dependent(out, cpu=single, default=columns)


def _pad(x: Array, count: int) -> Array:
    extra = count - x.shape[0]
    return jnp.pad(x, [(0, extra)] + [(0, 0)] * (x.ndim - 1)) if extra else x


def row_dot(x: Array, w: Array) -> Array:
    """``x [t, k] . w [n, k]^T -> FP32 [t, n]``, or grouped ``[t, g, k] . [g, n, k] -> [t, g, n]``.

    Operands are both BF16 (every product exact in FP32) or both FP32; sums are FP32.

    Raises:
        TypeError: the operands are not both BF16 or both FP32.
    """
    _check_operands(x, w)
    return row_tiled(lambda rows: tile_dot(rows, w), x)


def tile_dot(x: Array, w: Array) -> Array:
    """`row_dot` of rows that already have a fixed shape (inside a tile)."""
    _check_operands(x, w)
    if x.ndim == 2:
        return _dot(x, w, (((1,), (1,)), ((), ())))
    return jnp.swapaxes(_dot(x, w, (((2,), (2,)), ((1,), (0,)))), 0, 1)  # [g, t, n] -> [t, g, n]


def batched_dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """One product per leading index: ``[*lead, m, .] x [*lead, ...] -> FP32 [*lead, m, n]``.

    ``contract`` names the contracted axis of each operand from the end (negative).
    """
    _check_operands(a, b)
    lead = tuple(range(a.ndim - 2))
    return _dot(a, b, (((a.ndim + contract[0],), (b.ndim + contract[1],)), (lead, lead)))


def _dot(a: Array, b: Array, dims: lax.DotDimensionNumbers) -> Array:
    def upcast(a: Array, b: Array) -> Array:
        # A weight that is a constant or a transpose would be folded into the product, whose sums
        # then run in another order.
        a, b = lax.optimization_barrier((a, b))
        wide = a.astype(jnp.float32), b.astype(jnp.float32)
        return lax.dot_general(*wide, dims, precision=lax.Precision.HIGHEST)

    def native(a: Array, b: Array) -> Array:
        precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
        return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)

    return lax.platform_dependent(a, b, cpu=upcast, default=native)


def _check_operands(a: Array, b: Array) -> None:
    if a.dtype != b.dtype or a.dtype not in (jnp.bfloat16, jnp.float32):
        raise TypeError(f"dot: operands must both be bfloat16 or float32, got {a.dtype}, {b.dtype}")
