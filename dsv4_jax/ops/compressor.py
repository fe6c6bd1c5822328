"""Compressor: windows of tokens pooled into one entry each, as they close (model.md 3.5, 4.2)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.ops._check import FLOAT32, INTEGERS, check_operand
from dsv4_jax.ops._rows import row_tiled
from dsv4_jax.typing import Array, Bool, Float32, Int32

__all__ = ["Closed", "compressor"]


class Closed(NamedTuple):
    """Windows that close inside a chunk, per row; ``entry`` is arbitrary where not ``closed``."""

    entry: Float32[Array, "b n d"]
    window: Int32[Array, "b n"]
    closed: Bool[Array, "b n"]


@functools.partial(jax.jit, static_argnames=("ratio",))
def compressor(
    kv: Float32[Array, "b t cd"],
    gate: Float32[Array, "b t cd"],
    kv_state: Float32[Array, "b r cd"],
    gate_state: Float32[Array, "b r cd"],
    start: Int32[Array, "b"],
    count: Int32[Array, "b"],
    *,
    ratio: int,
) -> Closed:
    """``c_w = sum_s softmax_s(gate_s) * kv_s`` per channel over the slots of window ``w``, FP32.

    Ratio 4 (CSA, two halves of channels): slots are the previous window's first-half channels and
    the window's own second-half channels. Otherwise (HCA): the window's own positions. Slots come
    from the chunk or, for positions before ``start``, from the position-indexed state ring.

    Args:
        kv, gate: the chunk's projections; ``gate`` includes ``ape``.
        kv_state, gate_state: rings of earlier positions, row ``position % r``.
        start: length of each row before the chunk.
        count: real tokens of each row in the chunk.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, ``ratio`` < 1, or the ring is shorter than a window's slots.
    """
    named = {"kv": kv, "gate": gate, "kv_state": kv_state, "gate_state": gate_state}
    for name, x in named.items():
        check_operand("compressor", name, x, "b t cd", FLOAT32)
    for name, x in {"start": start, "count": count}.items():
        check_operand("compressor", name, x, "b", INTEGERS)
        if x.shape != kv.shape[:1]:
            raise ValueError(
                f"compressor: {name} must be [{kv.shape[0]}] for kv {list(kv.shape)}, "
                f"got {list(x.shape)}"
            )
    if ratio < 1:
        raise ValueError(f"compressor: ratio must be at least 1, got {ratio}")
    b, t, width = kv.shape
    overlap = 2 if ratio == 4 else 1
    ring = kv_state.shape[1]
    state = (b, ring, width)
    if gate.shape != kv.shape or kv_state.shape != state or gate_state.shape != state:
        raise ValueError(
            f"compressor: kv, gate and the states must agree, got {list(kv.shape)}, "
            f"{list(gate.shape)}, {list(kv_state.shape)}, {list(gate_state.shape)}"
        )
    if width % overlap:
        raise ValueError(f"compressor: kv must have an even last axis for ratio 4, got {width}")
    if ring < overlap * ratio:
        raise ValueError(
            f"compressor: the state must hold at least {overlap * ratio} rows for ratio {ratio}, "
            f"got {ring}"
        )
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
