"""Collapse of the residual streams before the final norm (model.md 2.4)."""

import functools

import jax
import jax.numpy as jnp

from dsv4_jax.ops._check import FLOATS, check_operand
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import row_tiled
from dsv4_jax.ops.mhc_pre import check_shapes, mhc_mix, stream_sum
from dsv4_jax.typing import Array, Float, Float32

__all__ = ["mhc_head"]


@functools.partial(jax.jit, static_argnames=("hc_eps", "rms_eps"))
def mhc_head(
    streams: Float[Array, "t hc d"],
    fn: Float32[Array, "hc hcd"],
    base: Float32[Array, "hc"],
    scale: Float32[Array, "1"],
    *,
    hc_eps: float,
    rms_eps: float,
) -> Float[Array, "t d"]:
    """``h = sum_j (sigmoid(mix_j * scale + base_j) + hc_eps) * S_j`` in the streams' dtype.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: a shape disagrees with ``streams``.
    """
    check_operand("mhc_head", "streams", streams, "t hc d", FLOATS)
    _, hc, dim = streams.shape
    check_shapes(
        "mhc_head", streams, fn=(fn, (hc, hc * dim)), base=(base, (hc,)), scale=(scale, (1,))
    )

    def rows(streams: Array) -> Array:
        mix = mhc_mix(streams, fn, rms_eps)
        pre = jax.nn.sigmoid(mix * scale[0] + base) + jnp.float32(hc_eps)
        return round_to(stream_sum(pre, streams), streams.dtype)

    return row_tiled(rows, streams)
