"""Caches as they are stored: random ones of any size, a few of their rows in FP64, exact results.

What is taken of an array on a device is taken there: stores of a million positions stay where they
are.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv4_jax.ops.hadamard import hadamard
from dsv4_jax.quant import bits
from dsv4_jax.quant.kv import IndexRows, KvRows, index_quant, kv_quant
from dsv4_jax.typing import E2M1, E4M3
from tests.support.numerics import f64

__all__ = [
    "assert_best",
    "exact_attention",
    "exact_scores",
    "index_values",
    "key_values",
    "stored_entry",
]

STRETCH = 1 << 15
"""Keys at a time, on the host."""


@functools.partial(jax.jit, static_argnames="count")
def _stretch(rows: Any, i: int, start: int, count: int) -> list[jax.Array]:
    """Bytes of ``count`` rows of every part ``[b, s, ...]``."""

    def take(part: jax.Array) -> jax.Array:
        view = bits.byte_view(part)
        at = (i, start, *(0,) * (view.ndim - 2))
        return lax.dynamic_slice(view, at, (1, count, *view.shape[2:]))[0]

    return [take(part) for part in rows if part is not None]


@jax.jit
def _picked(rows: Any, i: int, ids: jax.Array) -> list[jax.Array]:
    return [bits.byte_view(part)[i, ids] for part in rows if part is not None]


def _scales(byte: np.ndarray, channels: int) -> np.ndarray:
    wide = np.ldexp(1.0, byte.astype(int) - 127)
    return np.repeat(wide, channels // byte.shape[-1], axis=-1)


def index_values(rows: IndexRows, i: int, start: int, count: int) -> np.ndarray:
    """Queries or keys ``start .. start + count - 1`` of row ``i``."""
    code, scale = (np.asarray(x) for x in _stretch(rows, i, start, count))
    if rows.key.dtype == E4M3:
        wide = f64(code.view(np.dtype(E4M3)))
    else:
        nibbles = np.stack([code & 15, code >> 4], axis=-1).reshape(*code.shape[:-1], -1)
        wide = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[nibbles & 7] * np.where(nibbles & 8, -1, 1)
    return wide * _scales(scale, wide.shape[-1])


def key_values(rows: KvRows, i: int, ids: np.ndarray) -> np.ndarray:
    """Some keys of row ``i``."""
    code, scale, rope = (np.asarray(x) for x in _picked(rows, i, jnp.asarray(ids)))
    nope = f64(code.view(np.dtype(E4M3)))
    return np.concatenate(
        [nope * _scales(scale, nope.shape[-1]), f64(rope.view(np.dtype(jnp.bfloat16)))], axis=-1
    )


def exact_scores(
    q: IndexRows, weight: Any, keys: IndexRows, at: tuple[int, int], n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of the query ``at``, for its first ``n`` entries, and ``sum_h |weight_h| |q_h| |key|``."""
    query, factor = index_values(q, *at, 1)[0], f64(weight[at])
    size = np.sum(np.abs(factor) * np.linalg.norm(query, axis=-1))
    scores, sizes = [np.empty(0)], [np.empty(0)]
    for start in range(0, n, STRETCH):
        some = index_values(keys, at[0], start, min(STRETCH, n - start))
        scores.append(factor @ np.maximum(query @ some.T, 0))
        sizes.append(size * np.linalg.norm(some, axis=-1))
    return np.concatenate(scores), np.concatenate(sizes)


def assert_best(idx: Any, scores: np.ndarray, bound: np.ndarray, topk: int, what: str = "") -> None:
    """Ids ascend, then -1; who is clearly among the best is chosen, who is not is not."""
    ids, n = np.asarray(idx), len(scores)
    count = min(topk, n)
    assert (ids[count:] == -1).all(), f"{what}: more ids than visible entries"
    ids = ids[:count]
    if not count:
        return
    assert (np.diff(ids) > 0).all() and ids[0] >= 0, f"{what}: ids do not ascend"
    assert ids[-1] < n, f"{what}: ids beyond the entries"
    kth = np.sort(scores)[-count]
    chosen = np.zeros(n, bool)
    chosen[ids] = True
    missing = ~chosen & (scores > kth + 2 * bound)
    wrong = chosen & (scores < kth - 2 * bound)
    assert not missing.any(), f"{what}: {missing.sum()} of the best are missing"
    assert not wrong.any(), f"{what}: {wrong.sum()} are not among the best"


def exact_attention(
    operands: tuple[Any, ...], at: tuple[int, int], window: int, frequencies: np.ndarray
) -> np.ndarray:
    """``[h, d]`` of ``q, ring, positions, sink, chunk, start, pool, n_visible, topk_idx``."""
    q, ring, positions, sink, chunk, start, pool, n, idx = operands
    i, position = at[0], int(positions[at])
    u = np.arange(max(position - window + 1, 0), position + 1)
    first, t = int(start[i]), q.shape[1]
    entries = np.arange(int(n[at])) if idx is None else np.asarray(idx[at])
    found = (
        key_values(ring, i, u % ring.nope.shape[1])[u < first],
        key_values(chunk, i, np.clip(u - first, 0, t - 1))[u >= first],
        key_values(pool, i, entries[entries >= 0]),
    )
    k = np.concatenate(found)
    a = f64(q[at]) @ k.T * q.shape[-1] ** -0.5
    top = np.maximum(a.max(axis=-1), f64(sink))[:, None]
    e = np.exp(a - top)
    o = e @ k / (e.sum(axis=-1, keepdims=True) + np.exp(f64(sink)[:, None] - top))
    angle = f64(np.float32(position) * frequencies)
    nope = q.shape[-1] - 2 * len(frequencies)
    even, odd = o[:, nope::2].copy(), o[:, nope + 1 :: 2].copy()
    o[:, nope::2] = even * np.cos(angle) + odd * np.sin(angle)
    o[:, nope + 1 :: 2] = odd * np.cos(angle) - even * np.sin(angle)
    return o


def stored_entry(entry: jax.Array, like: KvRows | IndexRows, rotary: int) -> Any:
    """One entry ``[d]`` of the reference's compressor in the pool's format, ``[1, 1, ...]``."""
    if isinstance(like, KvRows):
        return _stored_key(entry, rotary)
    return _stored_index_key(entry, "mxfp4" if like.key.dtype == E2M1 else "fp8")


@functools.partial(jax.jit, static_argnums=1)
def _stored_key(entry: jax.Array, rotary: int) -> KvRows:
    return kv_quant(entry.astype(jnp.bfloat16)[None, None], rotary, "fp8")


@functools.partial(jax.jit, static_argnums=1)
def _stored_index_key(entry: jax.Array, form: Any) -> IndexRows:
    return index_quant(hadamard(entry.astype(jnp.bfloat16)[None, None]), form)
