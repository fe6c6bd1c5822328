"""FP8 E4M3 with power-of-two scales: activations per token and block, weights per 128x128 tile.

Recipe ``q8`` of model.md 4.5, layout facts of 7.1.
"""

from typing import NamedTuple

import jax.numpy as jnp

from dsv4_jax.quant.bits import (
    decode_e4m3,
    decode_ue8m0,
    encode_e4m3,
    pow2_ceil_exponent,
    ue8m0_from_exponent,
)
from dsv4_jax.typing import Array, Float8e4m3fn, Float8e8m0fnu, Float32

__all__ = [
    "ACT_BLOCK",
    "AMAX_FLOOR",
    "KV_BLOCK",
    "WEIGHT_BLOCK",
    "Fp8",
    "dequantize_act",
    "dequantize_scaled_weight",
    "dequantize_weight",
    "quantize_act",
    "quantize_weight",
]

ACT_BLOCK = 128
KV_BLOCK = 64
WEIGHT_BLOCK = 128
E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
_FLOAT32_MAX = 3.4028235e38


class Fp8(NamedTuple):
    """E4M3 codes and their UE8M0 scales; value = code * scale."""

    code: Float8e4m3fn[Array, "..."]
    scale: Float8e8m0fnu[Array, "..."]


def _exponent(amax: Array) -> Array:
    """Biased exponent of ``pow2ceil(max(amax, 1e-4) / 448)``; an infinite amax saturates."""
    amax = jnp.minimum(jnp.maximum(amax, AMAX_FLOOR), _FLOAT32_MAX)
    return pow2_ceil_exponent(amax * jnp.float32(1.0 / E4M3_MAX))


def quantize_act(x: Float32[Array, "*lead n"], block: int) -> Fp8:
    """``q8`` along the last axis in blocks of ``block``; a shorter last block is allowed.

    Returns codes ``[..., n]`` and scales ``[..., ceil(n / block)]``. +-Inf saturates to
    +-448 * scale; NaN makes its block NaN.
    """
    n = x.shape[-1]
    blocks = -(-n // block)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * block - n)])
    grouped = padded.reshape(*x.shape[:-1], blocks, block)
    scale = ue8m0_from_exponent(_exponent(jnp.max(jnp.abs(grouped), axis=-1)))
    code = encode_e4m3(grouped / decode_ue8m0(scale)[..., None])
    return Fp8(code.reshape(padded.shape)[..., :n], scale)


def dequantize_act(q: Fp8, block: int) -> Float32[Array, "*lead n"]:
    """``code * scale`` in FP32; exactly representable in BF16."""
    n = q.code.shape[-1]
    scale = jnp.repeat(decode_ue8m0(q.scale), block, axis=-1)[..., :n]
    return decode_e4m3(q.code) * scale


def quantize_weight(w: Float32[Array, "*lead out in"]) -> Fp8:
    """128x128 tiles with one power-of-two scale each; edge tiles may be smaller."""
    rows, cols = w.shape[-2:]
    tr, tc = -(-rows // WEIGHT_BLOCK), -(-cols // WEIGHT_BLOCK)
    pad = [(0, 0)] * (w.ndim - 2) + [(0, tr * WEIGHT_BLOCK - rows), (0, tc * WEIGHT_BLOCK - cols)]
    tiles = jnp.pad(w, pad).reshape(*w.shape[:-2], tr, WEIGHT_BLOCK, tc, WEIGHT_BLOCK)
    scale = ue8m0_from_exponent(_exponent(jnp.max(jnp.abs(tiles), axis=(-3, -1))))
    code = encode_e4m3(w / _expand(scale, rows, cols))
    return Fp8(code, scale)


def dequantize_weight(q: Fp8) -> Float32[Array, "*lead out in"]:
    """``code * scale[out // 128, in // 128]`` in FP32; exactly representable in BF16."""
    rows, cols = q.code.shape[-2:]
    return decode_e4m3(q.code) * _expand(q.scale, rows, cols)


def dequantize_scaled_weight(
    code: Float8e4m3fn[Array, "*lead out in"], scale: Float32[Array, "*lead tr tc"]
) -> Float32[Array, "*lead out in"]:
    """The same for scales of any FP32 value, rounded once."""
    return decode_e4m3(code) * _tiles(scale, *code.shape[-2:])


def _expand(scale: Array, rows: int, cols: int) -> Array:
    return _tiles(decode_ue8m0(scale), rows, cols)


def _tiles(value: Array, rows: int, cols: int) -> Array:
    wide = jnp.repeat(value, WEIGHT_BLOCK, axis=-1)[..., :cols]
    return jnp.repeat(wide, WEIGHT_BLOCK, axis=-2)[..., :rows, :]
