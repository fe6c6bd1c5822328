"""NVFP4: E2M1 codes, one E4M3 scale per 16 inputs, one FP32 global scale (model.md 9).

Convention: **multiply**; ``value = code * block_scale * global_scale``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.quant.bits import (
    byte_view,
    decode_e2m1,
    decode_e4m3,
    encode_e2m1,
    encode_e4m3,
    exact_divide,
    pack_e2m1,
)
from dsv4_jax.typing import Array, Bool, Float4e2m1fn, Float8e4m3fn, Float32

__all__ = [
    "BLOCK",
    "Nvfp4",
    "dequantize",
    "dequantize_blocks",
    "power_of_two_scales",
    "quantize",
    "scales_are_powers_of_two",
    "static_global_scale",
    "token_global_scale",
]

BLOCK = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
_MIN_BLOCK_SCALE = 2.0**-9
_MIN_GLOBAL_SCALE = 2.0**-100
_MAX_GLOBAL_SCALE = 2.0**100
_FLOAT32_MAX = 3.4028235e38


class Nvfp4(NamedTuple):
    """Codes ``[..., n]``, block scales ``[..., n/16]``, global scale broadcastable to ``[...]``."""

    code: Float4e2m1fn[Array, "..."]
    block_scale: Float8e4m3fn[Array, "..."]
    global_scale: Float32[Array, "..."]


def _global_scale(amax: Array) -> Array:
    """``amax * (1 / (6 * 448))``, kept positive and finite; 1 for an all-zero tensor.

    By the rounded reciprocal, into which XLA turns a division by a constant anyway.
    """
    amax = jnp.minimum(amax, _FLOAT32_MAX)
    scale = jnp.maximum(amax * jnp.float32(1 / (E2M1_MAX * E4M3_MAX)), _MIN_GLOBAL_SCALE)
    return jnp.where(amax == 0, jnp.float32(1.0), scale)


def token_global_scale(x: Float32[Array, "*lead n"]) -> Float32[Array, "*lead"]:
    """Dynamic global scale of each row on its own, so that no row depends on its neighbours."""
    return _global_scale(jnp.max(jnp.abs(x), axis=-1))


def static_global_scale(scale: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """A checkpoint's scale of activations as codes use it: where every step is a normal number."""
    return jnp.clip(scale, _MIN_GLOBAL_SCALE, _MAX_GLOBAL_SCALE)


def tensor_global_scale(*tensors: Float32[Array, "..."]) -> Float32[Array, ""]:
    """One global scale for tensors that share it (``w1`` and ``w3`` of an expert)."""
    return _global_scale(jnp.max(jnp.stack([jnp.max(jnp.abs(t)) for t in tensors])))


def quantize(x: Float32[Array, "*lead n"], global_scale: Float32[Array, "..."]) -> Nvfp4:
    """Block scales from each block's amax, codes with the *rounded* scale (model.md 9.2).

    ``global_scale`` broadcasts against ``x``'s leading axes. An all-zero block gets scale 1.
    +-Inf saturates at the largest finite value; NaN in a row must be carried by its global scale.
    """
    grouped = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    s2 = jnp.broadcast_to(global_scale, x.shape[:-1])[..., None]
    amax = jnp.minimum(jnp.max(jnp.abs(grouped), axis=-1), _FLOAT32_MAX)
    block = exact_divide(amax, jnp.float32(E2M1_MAX) * s2)
    block = jnp.clip(block, _MIN_BLOCK_SCALE, E4M3_MAX)
    block_scale = encode_e4m3(jnp.where(amax == 0, jnp.float32(1.0), block))
    step = decode_e4m3(block_scale) * s2
    code = encode_e2m1(exact_divide(grouped, step[..., None]))
    return Nvfp4(pack_e2m1(code.reshape(x.shape)), block_scale, global_scale)


def dequantize_blocks(q: Nvfp4) -> Float32[Array, "*lead n"]:
    """``code * block_scale`` without the global scale: at most 6 significant bits."""
    scale = jnp.repeat(decode_e4m3(q.block_scale), BLOCK, axis=-1)
    return decode_e2m1(q.code) * scale


def dequantize(q: Nvfp4) -> Float32[Array, "*lead n"]:
    """``code * block_scale * global_scale`` in FP32."""
    s2 = jnp.broadcast_to(q.global_scale, q.code.shape[:-1])[..., None]
    return dequantize_blocks(q) * s2


def power_of_two_scales(block_scale: Float8e4m3fn[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Which block scales are zero or a power of two (NaN and negative: not)."""
    byte = byte_view(block_scale)
    subnormal = (byte == 0) | (byte == 1) | (byte == 2) | (byte == 4)
    return subnormal | ((byte >= 8) & (byte < 0x7F) & (byte & 7 == 0))


@jax.jit
def scales_are_powers_of_two(block_scale: Float8e4m3fn[Array, "..."]) -> Bool[Array, ""]:
    """Whether `power_of_two_scales` holds of every block scale.

    So it does in weights that were cast from MXFP4 without loss (performance.md 1). The loader
    looks, see `Precision.experts_power_of_two`; `moe` takes the answer as ``power_of_two``.
    """
    return jnp.all(power_of_two_scales(block_scale))
