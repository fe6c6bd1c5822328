"""Compressed entries of a whole sequence (model.md section 3.5)."""

from typing import Any

import jax
import jax.numpy as jnp

from reference import linear, rmsnorm, rope
from reference.rounding import FP32, Rounding


def compressor(
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
    entries = jnp.sum(jax.nn.softmax(g, axis=1) * z, axis=1)
    entries = rmsnorm.rmsnorm(rounding.bf(entries), params["norm"], eps, rounding)
    return rope.rope_tail(entries, m * jnp.arange(n), freqs, rounding=rounding)


def overlap(windows: jax.Array, width: int, fill: float) -> jax.Array:
    """First halves of the previous window, then second halves of the own.

    `[n, m, 2 * width]` -> `[n, 2 * m, width]`; `fill` stands before the first window.
    """
    previous = jnp.pad(windows[:-1, :, :width], ((1, 0), (0, 0), (0, 0)), constant_values=fill)[
        : len(windows)
    ]
    return jnp.concatenate([previous, windows[:, :, width:]], axis=1)
