"""Ragged rows into a ring or pool, in place."""

from typing import TypeVar

import jax
import jax.numpy as jnp

from dsv4_jax import library
from dsv4_jax.ops._check import INTEGERS, check_operand
from dsv4_jax.typing import E2M1, E4M3, UE8M0, Array, Int32

__all__ = ["cache_write"]

STORED = tuple(map(jnp.dtype, (jnp.bfloat16, jnp.float32, E4M3, UE8M0, E2M1)))
MAX_PARTS = 8

Store = TypeVar("Store")


@jax.jit
def cache_write(cache: Store, rows: Store, slots: Int32[Array, "b t"]) -> Store:
    """``cache[i, slots[i, j]] = rows[i, j]``; a slot outside the cache drops its row.

    One launch for all arrays of a store, in place: a cache that is donated to the enclosing jit
    keeps its buffer, and nothing but the rows is touched; otherwise XLA copies the cache first.
    Bytes are moved, never converted. Slots of one sequence must be distinct where they are in
    range: rows that share a slot leave a mixture of their bytes there. Under `jax.vmap` still one
    launch. No gradient. Arrays on several devices are gathered unless the call is inside
    `jax.shard_map`.

    Args:
        cache: a store: one array ``[b, s, d]`` or a pytree of up to 8 with the same ``b`` and
            ``s``, each BF16, FP32, E4M3, UE8M0 or E2M1 (``d`` then even).
        rows: the same structure of ``[b, t, d]`` in the same dtypes.
        slots: ``[b, t]``; -1 or ``s`` for a row that is not to be written.

    Raises:
        TypeError: a dtype is not one of those, differs between cache and rows, or ``slots`` are
            not integers.
        ValueError: structures or shapes disagree, or packed rows have an odd length.
    """
    caches, structure = jax.tree.flatten(cache)
    new, new_structure = jax.tree.flatten(rows)
    if new_structure != structure:
        raise ValueError(
            f"cache_write: rows must have the structure of cache, {structure}, got {new_structure}"
        )
    if not 1 <= len(caches) <= MAX_PARTS:
        raise ValueError(f"cache_write: cache must hold 1..{MAX_PARTS} arrays, got {len(caches)}")
    check_operand("cache_write", "slots", slots, "b t", INTEGERS)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(cache)]
    for path, part, part_rows in zip(paths, caches, new, strict=True):
        _check_part(path, part, part_rows, slots, caches[0])
    if slots.dtype != jnp.int32:  # saturate instead of wrapping round into the cache
        slots = jnp.clip(slots, -1, caches[0].shape[1]).astype(jnp.int32)
    written = library.call(
        "cache_write",
        [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in caches],
        slots,
        *caches,
        *new,
        aliases={1 + i: i for i in range(len(caches))},
        vmap="broadcast_all",
    )
    return jax.tree.unflatten(structure, written)


def _check_part(path: str, cache: Array, rows: Array, slots: Array, first: Array) -> None:
    name, rows_name = f"cache{path}", f"rows{path}"
    check_operand("cache_write", name, cache, "b s d", STORED)
    if cache.dtype != rows.dtype:
        raise TypeError(
            f"cache_write: {rows_name} must be {cache.dtype} like {name}, got {rows.dtype}"
        )
    check_operand("cache_write", rows_name, rows, "b t d", STORED)
    if cache.dtype == E2M1 and cache.shape[2] % 2:
        raise ValueError(
            f"cache_write: {name} must have an even last axis (two codes a byte), "
            f"got {list(cache.shape)}"
        )
    if cache.shape[:2] != first.shape[:2]:
        raise ValueError(
            f"cache_write: {name} must be [{first.shape[0]}, {first.shape[1]}, d] like the store's "
            f"first array, got {list(cache.shape)}"
        )
    want = (cache.shape[0], rows.shape[1], cache.shape[2])
    if rows.shape != want or slots.shape != want[:2]:
        raise ValueError(
            f"cache_write: {rows_name} and slots must be {list(want)} and {list(want[:2])} for "
            f"{name} {list(cache.shape)}, got {list(rows.shape)} and {list(slots.shape)}"
        )
