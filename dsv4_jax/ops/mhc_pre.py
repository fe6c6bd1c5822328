"""mHC read: four residual streams to one branch input and the write-back weights (model.md 2.2)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.ops._check import FLOAT32, FLOATS, check_operand
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import row_tiled, tile_dot
from dsv4_jax.typing import Array, Float, Float32

__all__ = ["check_shapes", "mhc_mix", "mhc_pre", "stream_sum"]


def mhc_mix(
    streams: Float[Array, "t hc d"], fn: Float32[Array, "m hcd"], rms_eps: float
) -> Float32[Array, "t m"]:
    """``(fn . flat) * rsqrt(mean(flat^2) + eps)`` of a row tile, stream-major, all FP32."""
    t, hc, dim = streams.shape
    flat = streams.reshape(t, hc * dim).astype(jnp.float32)
    r = lax.rsqrt(jnp.mean(flat * flat, axis=-1, keepdims=True) + jnp.float32(rms_eps))
    return tile_dot(flat, fn) * r


def stream_sum(weight: Float32[Array, "t hc"], streams: Float[Array, "t hc d"]) -> Array:
    """``sum_j weight[t, j] * streams[t, j, :]`` in FP32, streams in ascending order."""
    total = weight[:, 0, None] * streams[:, 0].astype(jnp.float32)
    for j in range(1, streams.shape[1]):
        total = total + weight[:, j, None] * streams[:, j].astype(jnp.float32)
    return total


@functools.partial(jax.jit, static_argnames=("iters", "hc_eps", "rms_eps"))
def mhc_pre(
    streams: Float[Array, "t hc d"],
    fn: Float32[Array, "m hcd"],
    base: Float32[Array, "m"],
    scale: Float32[Array, "3"],
    *,
    iters: int,
    hc_eps: float,
    rms_eps: float,
) -> tuple[Float[Array, "t d"], Float32[Array, "t hc"], Float32[Array, "t hc hc"]]:
    """Branch input ``y = sum_j pre_j S_j`` (rounded to the streams' dtype), ``post`` and ``comb``.

    ``comb`` is a row softmax followed by ``iters`` column and ``iters - 1`` row normalisations
    (Sinkhorn), ending with columns. Order of the parts in ``fn`` and ``base``: pre, post, comb.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: a shape disagrees with ``streams``.
    """
    check_operand("mhc_pre", "streams", streams, "t hc d", FLOATS)
    _, hc, dim = streams.shape
    mixes = 2 * hc + hc * hc
    check_shapes(
        "mhc_pre", streams, fn=(fn, (mixes, hc * dim)), base=(base, (mixes,)), scale=(scale, (3,))
    )

    def rows(streams: Array) -> tuple[Array, Array, Array]:
        mix = mhc_mix(streams, fn, rms_eps)
        pre = jax.nn.sigmoid(mix[:, :hc] * scale[0] + base[:hc]) + jnp.float32(hc_eps)
        post = 2 * jax.nn.sigmoid(mix[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
        logits = mix[:, 2 * hc :] * scale[2] + base[2 * hc :]
        comb = _sinkhorn(logits.reshape(-1, hc, hc), iters, hc_eps)
        return round_to(stream_sum(pre, streams), streams.dtype), post, comb

    return row_tiled(rows, streams)


def check_shapes(op: str, streams: Array, **operands: tuple[Array, tuple[int, ...]]) -> None:
    """Raises naming the first operand that is not FP32 or whose shape does not fit ``streams``.

    A ``branch`` may have either activation dtype.
    """
    for name, (array, want) in operands.items():
        dtypes = FLOATS if name == "branch" else FLOAT32
        check_operand(op, name, array, "*lead", dtypes)
        if array.shape != want:
            raise ValueError(
                f"{op}: {name} must be {list(want)} for streams {list(streams.shape)}, "
                f"got {list(array.shape)}"
            )


def _sinkhorn(logits: Array, iters: int, eps: float) -> Array:
    """Axes ``[t, j, k]``; the softmax over ``k`` stands for the first row normalisation."""
    c = jnp.exp(logits - jnp.max(logits, axis=2, keepdims=True))
    c = c / jnp.sum(c, axis=2, keepdims=True) + jnp.float32(eps)
    c = c / (jnp.sum(c, axis=1, keepdims=True) + jnp.float32(eps))

    def normalise(_: Array, c: Array) -> Array:
        c = c / (jnp.sum(c, axis=2, keepdims=True) + jnp.float32(eps))
        return c / (jnp.sum(c, axis=1, keepdims=True) + jnp.float32(eps))

    return lax.fori_loop(0, iters - 1, normalise, c)
