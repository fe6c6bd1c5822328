"""Reading the hyper-connection streams (model.md section 2.2)."""

import jax
import jax.numpy as jnp
from jax import lax

from reference.rounding import FP32, Rounding


def mhc_mix(streams: jax.Array, fn: jax.Array, rms_eps: float) -> jax.Array:
    """`(fn . flat) * rsqrt(mean(flat^2) + eps)`, `flat` the streams one after the other.

    `streams [t, hc, dim]`, `fn [out, hc * dim]` -> `[t, out]`.
    """
    flat = streams.reshape(streams.shape[0], -1)
    r = lax.rsqrt(jnp.mean(flat * flat, axis=-1, keepdims=True) + rms_eps)
    return jnp.matmul(flat, fn.T, precision=lax.Precision.HIGHEST) * r


def sinkhorn(logits: jax.Array, iters: int, eps: float) -> jax.Array:
    """Nearly doubly stochastic matrices `[..., j, k]`.

    Softmax over `k`, plus eps; columns; then `iters - 1` times rows, columns.
    """
    c = jax.nn.softmax(logits, axis=-1) + eps
    c = c / (jnp.sum(c, axis=-2, keepdims=True) + eps)
    for _ in range(iters - 1):
        c = c / (jnp.sum(c, axis=-1, keepdims=True) + eps)
        c = c / (jnp.sum(c, axis=-2, keepdims=True) + eps)
    return c


def mhc_pre(
    streams: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    *,
    iters: int,
    hc_eps: float,
    rms_eps: float,
    rounding: Rounding = FP32,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Branch input and write-back weights.

    `pre = sigmoid(mix[:hc] * scale[0] + base) + hc_eps`, `post = 2 * sigmoid(mix[hc:2hc] * scale[1]
    + base)`, `comb = sinkhorn(mix[2hc:] * scale[2] + base)` row-major, `y = bf(sum_j pre_j * S_j)`.

    Args:
        streams: `[t, hc, dim]`.
        fn: `[2 * hc + hc * hc, hc * dim]`.
        base: `[2 * hc + hc * hc]`.
        scale: `[3]`.
        iters: Column normalisations in total (`hc_sinkhorn_iters`).
        hc_eps: Added to `pre` and inside the normalisations.
        rms_eps: Added to the mean square.
        rounding: Rounds `y` only; `post` and `comb` stay FP32.

    Returns:
        `y [t, dim]`, `post [t, hc]`, `comb [t, hc, hc]`.
    """
    t, hc, _ = streams.shape
    mix = mhc_mix(streams, fn, rms_eps)
    pre = jax.nn.sigmoid(mix[:, :hc] * scale[0] + base[:hc]) + hc_eps
    post = 2 * jax.nn.sigmoid(mix[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
    comb = sinkhorn(
        (mix[:, 2 * hc :] * scale[2] + base[2 * hc :]).reshape(t, hc, hc), iters, hc_eps
    )
    return rounding.bf(jnp.sum(pre[:, :, None] * streams, axis=1)), post, comb
