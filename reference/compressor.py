"""Compressed entries, of a whole sequence or as chunks arrive (model.md sections 3.5, 4.2)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from reference import linear, rmsnorm, rope
from reference.rounding import FP32, OFFICIAL, Rounding

State = tuple[jax.Array, jax.Array, dict[tuple[int, int], jax.Array]]


def entries(
    x: jax.Array,
    params: dict[str, Any],
    m: int,
    width: int,
    freqs: jax.Array,
    eps: float,
    rounding: Rounding = FP32,
) -> jax.Array:
    """One entry per complete window of `m` tokens, normalised and rotated but not yet quantised.

    `z_t = wkv x_t`, `g_t = wgate x_t + ape[t mod m]` in FP32. The slots of window `w` are its own
    positions, channels `width:2*width` for `m = 4`; before them the positions of window `w - 1`,
    channels `0:width` (absent for `w = 0`). For `m = 128` they are the own positions with all
    channels. Per channel, `c_w = sum_s softmax_s(g) * z`; then `rope(RMSNorm(bf(c_w)), position = w
    * m)`.

    Args:
        x: `[t, dim]`, positions `0 ... t - 1`.
        params: `wkv [c * width, dim]`, `wgate [c * width, dim]`, `ape [m, c * width]`, `norm
            [width]`; `c = 2` for `m = 4`, else 1.
        m: Compression ratio.
        width: Entry width.
        freqs: The "compress" table.
        eps: `rms_norm_eps`.
        rounding: Rounding points.

    Returns:
        `[t // m, width]`.
    """
    n, channels = x.shape[0] // m, (2 if m == 4 else 1) * width
    z = linear.product(x[: n * m], params["wkv"], rounding).reshape(n, m, channels)
    g = linear.product(x[: n * m], params["wgate"], rounding).reshape(n, m, channels)
    g = g + params["ape"]
    if m == 4:
        z, g = overlap(z, width, 0.0), overlap(g, width, -jnp.inf)
    return pooled(z, g, params["norm"], m * jnp.arange(n), freqs, eps, rounding)


def pooled(
    z: jax.Array,
    g: jax.Array,
    norm: jax.Array,
    positions: jax.Array,
    freqs: jax.Array,
    eps: float,
    rounding: Rounding = FP32,
) -> jax.Array:
    """Entries `[n, width]` of slots `z, g [n, slots, width]`; those with `g = -inf` are absent."""
    c = jnp.sum(jax.nn.softmax(g, axis=1) * z, axis=1)
    c = rmsnorm.rmsnorm(rounding.bf(c), norm.astype(jnp.float32), eps, rounding)
    return rope.rope_tail(c, positions, freqs, rounding=rounding)


_pooled = jax.jit(pooled, static_argnames=("eps", "rounding"))


def compressor(
    jobs: Sequence[Any],
    start: jax.Array,
    count: jax.Array,
    frequencies: jax.Array,
    *,
    ratio: int,
    eps: float,
    dtype: Any = jnp.bfloat16,
    rounding: Rounding = OFFICIAL,
) -> list[State]:
    """The chunk `kv, gate [b, t, c * d]` of every job, token by token.

    Position `p` goes to row `p % ring` of the states, `gate` with `ape[p % ratio]`, as soon as it
    comes; a window that closes with it is then read from there, the rows before it as well. Runs
    outside of `jax.jit`.

    Args:
        jobs: objects with `kv`, `gate`, `ape`, `norm`, `kv_state`, `gate_state`.
        start: `[b]`, tokens before the chunk.
        count: `[b]`, real tokens of the chunk.
        frequencies: `[rotary / 2]`.
        ratio: Positions of a window.
        eps: `rms_norm_eps`.
        dtype: FP32 switches the BF16 roundings off.
        rounding: Rounding points.

    Returns:
        Of every job the two states, and the entries by row and window, not yet quantised.
    """
    rounding = dataclasses.replace(rounding, bf16=rounding.bf16 and dtype != jnp.float32)
    return [
        _chunk(job, start, count, jnp.asarray(frequencies), ratio, eps, rounding) for job in jobs
    ]


def _chunk(
    job: Any,
    start: jax.Array,
    count: jax.Array,
    freqs: jax.Array,
    ratio: int,
    eps: float,
    rounding: Rounding,
) -> State:
    b, t, _ = job.kv.shape
    kv_state, gate_state = np.array(job.kv_state), np.array(job.gate_state)
    kv, gate, ape = np.asarray(job.kv), np.asarray(job.gate), np.asarray(job.ape)
    ring, width = kv_state.shape[1], job.norm.shape[0]
    closed: dict[tuple[int, int], jax.Array] = {}
    for i in range(b):
        for j in range(min(max(int(count[i]), 0), t) if int(start[i]) >= 0 else 0):
            p = int(start[i]) + j
            kv_state[i, p % ring] = kv[i, j]
            gate_state[i, p % ring] = gate[i, j] + ape[p % ratio]
            if (p + 1) % ratio:
                continue
            own = np.arange(p + 1 - ratio, p + 1)
            z, g = kv_state[i, own % ring], gate_state[i, own % ring]
            if ratio == 4:
                z, g = z[:, width:], g[:, width:]
                if p >= 2 * ratio - 1:
                    before = (own - ratio) % ring
                    z = np.concatenate([kv_state[i, before, :width], z])
                    g = np.concatenate([gate_state[i, before, :width], g])
            at = np.array([p + 1 - ratio])
            entry = _pooled(z[None], g[None], job.norm, at, freqs, eps, rounding)
            closed[i, p // ratio] = entry[0]
    return jnp.asarray(kv_state), jnp.asarray(gate_state), closed


def overlap(windows: jax.Array, width: int, fill: float) -> jax.Array:
    """First halves of the previous window, then second halves of the own.

    `[n, m, 2 * width]` -> `[n, 2 * m, width]`; `fill` stands before the first window.
    """
    previous = jnp.pad(windows[:-1, :, :width], ((1, 0), (0, 0), (0, 0)), constant_values=fill)[
        : len(windows)
    ]
    return jnp.concatenate([previous, windows[:, :, width:]], axis=1)
