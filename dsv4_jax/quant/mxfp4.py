"""MXFP4: E2M1 codes with one power-of-two scale per 32 inputs (model.md 4.5 ``q4``, 9.1)."""

from typing import NamedTuple

import jax.numpy as jnp

from dsv4_jax.quant.bits import (
    decode_e2m1,
    decode_ue8m0,
    encode_e2m1,
    pack_e2m1,
    pow2_ceil_exponent,
    ue8m0_from_exponent,
)
from dsv4_jax.typing import Array, Float4e2m1fn, Float8e8m0fnu, Float32

__all__ = ["BLOCK", "Mxfp4", "dequantize", "quantize"]

BLOCK = 32
E2M1_MAX = 6.0
_AMAX_FLOOR = 6.0 * 2.0**-126
_FLOAT32_MAX = 3.4028235e38


class Mxfp4(NamedTuple):
    """E2M1 codes ``[..., n]`` and UE8M0 scales ``[..., n/32]``; value = code * scale."""

    code: Float4e2m1fn[Array, "..."]
    scale: Float8e8m0fnu[Array, "..."]


def quantize(x: Float32[Array, "*lead n"]) -> Mxfp4:
    """``q4`` along the last axis (a multiple of 32). +-Inf saturates; NaN makes its block NaN."""
    grouped = x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    amax = jnp.max(jnp.abs(grouped), axis=-1)
    amax = jnp.minimum(jnp.maximum(amax, _AMAX_FLOOR), _FLOAT32_MAX)
    scale = ue8m0_from_exponent(pow2_ceil_exponent(amax * jnp.float32(1.0 / E2M1_MAX)))
    code = encode_e2m1(grouped / decode_ue8m0(scale)[..., None])
    return Mxfp4(pack_e2m1(code.reshape(x.shape)), scale)


def dequantize(q: Mxfp4) -> Float32[Array, "*lead n"]:
    """``code * scale`` in FP32; exactly representable in BF16."""
    return decode_e2m1(q.code) * jnp.repeat(decode_ue8m0(q.scale), BLOCK, axis=-1)
