"""Bit-level building blocks shared by the formats.

XLA's own casts to FP8 and FP4 do not saturate alike and its FP4 casts are slow or wrong, so every
4-bit value goes through integers here; packing is two codes a byte, element 0 in the low nibble.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from dsv4_jax.typing import (
    E2M1,
    E4M3,
    UE8M0,
    Array,
    Float4e2m1fn,
    Float8e4m3fn,
    Float8e8m0fnu,
    Float32,
)

__all__ = [
    "bytes_to_e2m1",
    "decode_e2m1",
    "decode_e2m1_bytes",
    "decode_e4m3",
    "decode_ue8m0",
    "e2m1_to_bytes",
    "encode_e2m1",
    "encode_e4m3",
    "exact_divide",
    "pack_e2m1",
    "pow2_ceil_exponent",
    "round_bf16",
    "stored_bytes",
    "ue8m0_from_exponent",
]


def round_bf16(x: Float32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Rounds to BF16 (nearest even) and stays FP32; XLA cannot cancel it."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def exact_divide(x: Float32[Array, "*shape"], y: Float32[Array, "..."]) -> Float32[Array, "*shape"]:
    """``x / y`` with one rounding, ``y`` broadcast.

    XLA turns a division by a broadcast (or constant) operand into a product with its rounded
    reciprocal, which decides ties the wrong way; behind the barrier it cannot see either.
    """
    return x / lax.optimization_barrier(jnp.broadcast_to(y, x.shape))


def pow2_ceil_exponent(x: Float32[Array, "*shape"]) -> Array:
    """Biased exponent byte (uint8) of the smallest power of two >= ``x`` for ``x`` > 0.

    model.md 4.5: ``exponent + (mantissa != 0)``, read off the float's bits. NaN gives 255.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    exponent = (bits >> 23) & 0xFF
    carry = ((bits & 0x7FFFFF) != 0).astype(jnp.uint32)
    return jnp.minimum(exponent + carry, 255).astype(jnp.uint8)


def ue8m0_from_exponent(exponent: Array) -> Float8e8m0fnu[Array, "*shape"]:
    """uint8 biased exponents as the typed scale array."""
    return lax.bitcast_convert_type(exponent, UE8M0)


def decode_ue8m0(scale: Float8e8m0fnu[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """``2^(byte - 127)``; byte 0 is 2^-127 (an FP32 subnormal), byte 255 is NaN."""
    byte = lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.uint32)
    bits = jnp.where(byte == 0, jnp.uint32(0x00400000), byte << 23)
    bits = jnp.where(byte == 255, jnp.uint32(0x7FC00000), bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


def encode_e2m1(x: Float32[Array, "*shape"]) -> Array:
    """Nearest-even E2M1 codes (uint8, 0..15) of ``x``, saturating at 6; the sign of zero is kept.

    Ties go to the even mantissa: .25 -> 0, .75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4,
    5 -> 4 (model.md 4.5). NaN has no code: it becomes +-6, so a caller lets the scale carry it.
    """
    a = jnp.abs(x)
    code = (
        (a > 0.25).astype(jnp.uint8)
        + (a >= 0.75).astype(jnp.uint8)
        + (a > 1.25).astype(jnp.uint8)
        + (a >= 1.75).astype(jnp.uint8)
        + (a > 2.5).astype(jnp.uint8)
        + (a >= 3.5).astype(jnp.uint8)
        + (a > 5.0).astype(jnp.uint8)
    )
    code = jnp.where(jnp.isnan(x), jnp.uint8(7), code)
    sign = (lax.bitcast_convert_type(x, jnp.uint32) >> 31).astype(jnp.uint8)
    return code | (sign << 3)


def encode_e4m3(x: Float32[Array, "*shape"]) -> Float8e4m3fn[Array, "*shape"]:
    """Nearest-even E4M3, saturating at +-448; NaN stays NaN, the sign of zero is kept.

    Integers throughout: a pair of XLA casts to FP8 and back is removed inside a fusion on the GPU
    (`xla_allow_excess_precision`), and with it the rounding.
    """
    a = jnp.minimum(jnp.abs(x), jnp.float32(448.0))
    word = lax.bitcast_convert_type(a, jnp.uint32)
    # 20 mantissa bits go, nearest even; 2^-6 (word 0x3C800000) becomes code 8.
    normal = ((word + 0x7FFFF + ((word >> 20) & 1)) >> 20) - jnp.uint32((127 - 7) << 3)
    subnormal = jnp.round(a * 512).astype(jnp.uint32)  # steps of 2^-9, ties to even
    code = jnp.where(a < 2.0**-6, subnormal, normal)
    code = jnp.where(jnp.isnan(x), jnp.uint32(0x7F), code)
    sign = (lax.bitcast_convert_type(x, jnp.uint32) >> 31) << 7
    return lax.bitcast_convert_type((code | sign).astype(jnp.uint8), E4M3)


def decode_e4m3(x: Float8e4m3fn[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Values of the codes, exactly; 0x7F and 0xFF are NaN."""
    code = lax.bitcast_convert_type(x, jnp.uint8).astype(jnp.int32)
    magnitude = code & 0x7F
    exponent, mantissa = magnitude >> 3, magnitude & 7
    steps = jnp.where(exponent == 0, mantissa, (8 + mantissa) << jnp.maximum(exponent - 1, 0))
    value = steps.astype(jnp.float32) * jnp.float32(2.0**-9)
    value = jnp.where(magnitude == 0x7F, jnp.nan, value)
    return jnp.where(code >= 0x80, -value, value)


def pack_e2m1(code: Array) -> Float4e2m1fn[Array, "*shape"]:
    """uint8 codes ``[..., n]`` (n even) -> ``float4_e2m1fn`` ``[..., n]``."""
    pairs = code.reshape(*code.shape[:-1], code.shape[-1] // 2, 2)
    packed = pairs[..., 0] | (pairs[..., 1] << 4)
    return bytes_to_e2m1(packed)


def bytes_to_e2m1(packed: Array) -> Float4e2m1fn[Array, "*shape"]:
    """uint8 bytes ``[..., n/2]`` -> ``float4_e2m1fn`` ``[..., n]``; moves no bits.

    The barriers here and in `e2m1_to_bytes` keep the width-changing bitcast out of fusions: fused
    with a slice, XLA's CPU backend (JAX 0.12) emits invalid LLVM IR for it.
    """
    pairs = lax.bitcast_convert_type(lax.optimization_barrier(packed), E2M1)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def e2m1_to_bytes(x: Float4e2m1fn[Array, "*shape"]) -> Array:
    """``float4_e2m1fn`` ``[..., n]`` -> uint8 bytes ``[..., n/2]``; moves no bits."""
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    return lax.optimization_barrier(lax.bitcast_convert_type(pairs, jnp.uint8))


def decode_e2m1(x: Float4e2m1fn[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Values of the codes, exactly; code 8 is -0."""
    return decode_e2m1_bytes(e2m1_to_bytes(x))


def decode_e2m1_bytes(packed: Array) -> Float32[Array, "*shape"]:
    """uint8 bytes ``[..., n/2]`` -> the ``n`` values they hold, element 0 in the low nibble."""
    pairs = jnp.stack([packed & 0xF, packed >> 4], axis=-1)
    code = pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1]).astype(jnp.int32)
    magnitude = code & 7
    exponent = magnitude >> 1
    doubled = jnp.where(exponent == 0, magnitude, (2 + (magnitude & 1)) << (exponent - 1))
    value = doubled.astype(jnp.float32) * 0.5
    return jnp.where(code >= 8, -value, value)


def stored_bytes(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Bytes of an array on a device: two E2M1 codes take one, whatever ``nbytes`` says."""
    size = math.prod(shape)
    return size // 2 if dtype == E2M1 else size * np.dtype(dtype).itemsize


def byte_view(x: Array) -> Array:
    """1-byte and 4-bit floats as uint8 (4-bit: last axis halved), BF16 as uint16, FP32 unchanged.

    Slices, gathers and scatters go through this view: on narrower floats XLA's CPU backend widens
    the whole operand to move a few rows of it, and NaN bytes do not survive that.
    """
    if x.dtype == E2M1:
        return e2m1_to_bytes(x)
    if x.dtype.itemsize == 1:
        return lax.bitcast_convert_type(x, jnp.uint8)
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16)
    return x


def from_byte_view(view: Array, dtype: DTypeLike) -> Array:
    """Inverse of `byte_view`."""
    if view.dtype == dtype:
        return view
    if dtype == E2M1:
        return bytes_to_e2m1(view)
    return lax.bitcast_convert_type(view, dtype)
