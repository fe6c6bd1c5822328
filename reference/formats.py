"""Number formats written out: E4M3, E2M1, UE8M0, quantise-dequantise recipes, Hadamard.

The recipes `q8`, `q4`, `nvfp4` and `weight_q8` are differentiable straight through: their
derivative is that of the identity, as if nothing had been rounded.

No float8 or float4 cast of XLA is used: their saturation differs between backends, and nearest-even
is easy to spell. Rounders take and return FP32 of any shape; block recipes work along the last
axis.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def _straight_through(recipe: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`recipe(x, ...)` with the derivative of `x`; further arguments get none.

    Further arguments annotated as integers are static.
    """
    static = tuple(
        i
        for i, parameter in enumerate(inspect.signature(recipe).parameters.values())
        if parameter.annotation is int
    )
    through = jax.custom_jvp(recipe, nondiff_argnums=static)

    def derivative(*arguments: Any) -> tuple[jax.Array, jax.Array]:
        *fixed, primals, tangents = arguments
        return through(*primals, *fixed), tangents[0]

    through.defjvp(derivative)
    return through


def decode_e4m3(codes: np.ndarray) -> np.ndarray:
    """FP32 values of E4M3 "fn" bytes (section 4.5): bias 7, no infinity, 0x7F and 0xFF are NaN."""
    codes = np.asarray(codes, np.uint8).astype(np.int32)
    sign = np.where(codes & 0x80, np.float32(-1), np.float32(1))
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    value = np.where(
        exponent == 0,
        np.ldexp(mantissa.astype(np.float32), -9),
        np.ldexp((8 + mantissa).astype(np.float32), exponent - 10),
    )
    return np.where(codes & 0x7F == 0x7F, np.float32(np.nan), value).astype(np.float32) * sign


def decode_ue8m0(codes: np.ndarray) -> np.ndarray:
    """FP32 values `2^(byte - 127)` of UE8M0 bytes; 0xFF is NaN (section 7.1)."""
    codes = np.asarray(codes, np.uint8).astype(np.int32)
    value = np.ldexp(np.float32(1), np.minimum(codes, 254) - 127)
    return np.where(codes == 255, np.float32(np.nan), value).astype(np.float32)


def decode_e2m1_packed(packed: np.ndarray) -> np.ndarray:
    """FP32 values of E2M1 pairs, element `2j` in the low nibble of byte `j` (section 7.1).

    `[..., bytes]` -> `[..., 2 * bytes]`.
    """
    packed = np.asarray(packed, np.uint8)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    return E2M1_VALUES[codes & 7] * np.where(codes & 8, np.float32(-1), np.float32(1))


def _exponent(x: jax.Array) -> jax.Array:
    """`floor(log2 |x|)` from the bits; -127 for zero and FP32 subnormals."""
    return ((lax.bitcast_convert_type(x, jnp.int32) >> 23) & 255) - 127


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """`2^exponent` for exponents of normal numbers, exact."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def pow2ceil(x: jax.Array) -> jax.Array:
    """Smallest power of two >= positive normal `x`, from the float's bits (section 4.5)."""
    mantissa = lax.bitcast_convert_type(x, jnp.int32) & 0x7FFFFF
    return _power_of_two(_exponent(x) + (mantissa != 0))


def round_e4m3(x: jax.Array) -> jax.Array:
    """Nearest E4M3 value, ties to even, saturating at 448; subnormals are multiples of 2^-9."""
    x = jnp.clip(x, -E4M3_MAX, E4M3_MAX)
    quantum = _power_of_two(jnp.maximum(_exponent(x), -6) - 3)
    return lax.round(x / quantum, lax.RoundingMethod.TO_NEAREST_EVEN) * quantum


def round_e2m1(x: jax.Array) -> jax.Array:
    """Nearest E2M1 value, saturating at 6; a tie goes to the even code (section 4.5).

    .25 -> 0, .75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4.
    """
    a = jnp.abs(x)
    steps = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0)
    code = sum(step.astype(jnp.int32) for step in steps)
    return jnp.sign(x) * jnp.asarray(E2M1_VALUES)[code]


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """`[..., n]` -> `[..., ceil(n / block), block]`, padded with zeros."""
    n = x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -n % block)])
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def _divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x / y`, rounded once, `y` broadcast.

    The barrier hides the broadcast from XLA, which would multiply with the rounded `1 / y` instead
    and so break ties of E2M1 and E4M3 the wrong way.
    """
    return x / lax.optimization_barrier(jnp.broadcast_to(y, x.shape))


def _unblock(blocks: jax.Array, n: int) -> jax.Array:
    count, block = blocks.shape[-2:]
    return blocks.reshape(*blocks.shape[:-2], count * block)[..., :n]


@_straight_through
def q8(x: jax.Array, block: int) -> jax.Array:
    """FP8 quantise-dequantise with power-of-two scales (section 4.5).

    `a = max(max|x|, 1e-4)`, `s = pow2ceil(a * (1/448))`, result `E4M3(x / s) * s` per block of the
    last axis.
    """
    b = _blocks(x, block)
    a = jnp.maximum(jnp.max(jnp.abs(b), axis=-1, keepdims=True), np.float32(1e-4))
    s = pow2ceil(a * np.float32(1 / 448))
    return _unblock(round_e4m3(b / s) * s, x.shape[-1])


@_straight_through
def q4(x: jax.Array, block: int = 32) -> jax.Array:
    """FP4 quantise-dequantise with power-of-two scales (section 4.5).

    `a = max(max|x|, 6 * 2^-126)`, `s = pow2ceil(a * (1/6))`, result `E2M1(x / s) * s` per block of
    the last axis.
    """
    b = _blocks(x, block)
    a = jnp.maximum(jnp.max(jnp.abs(b), axis=-1, keepdims=True), np.float32(6 * 2.0**-126))
    s = pow2ceil(a * np.float32(1 / 6))
    return _unblock(round_e2m1(b / s) * s, x.shape[-1])


def nvfp4_quantize(x: jax.Array, global_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """NVFP4 elements and block scales for a given global scale (section 9.2).

    `s_b = E4M3(clamp(max|x_b| / (6 * s2), 2^-9, 448))`, 1 for a zero block; `q = E2M1(x / (s_b *
    s2))`.

    Args:
        x: `[..., n]`, `n` a multiple of 16.
        global_scale: `s2`, broadcastable against `[..., 1]`.

    Returns:
        `q [..., n]` (E2M1 values) and `s_b [..., n / 16]` (E4M3 values).
    """
    b = _blocks(x, 16)
    s2 = jnp.asarray(global_scale)[..., None]
    a = jnp.max(jnp.abs(b), axis=-1, keepdims=True)
    s_b = jnp.where(a == 0, 1.0, round_e4m3(jnp.clip(_divide(a, 6 * s2), 2.0**-9, E4M3_MAX)))
    q = round_e2m1(_divide(b, s_b * s2))
    return _unblock(q, x.shape[-1]), s_b[..., 0]


@_straight_through
def weight_q8(w: jax.Array) -> jax.Array:
    """FP8 weights as the release stores them: `q8` with one scale per 128x128 (section 7.1).

    `w [..., out, in]`, both multiples of 128.
    """
    *lead, rows, cols = w.shape
    tiles = w.reshape(*lead, rows // 128, 128, cols // 128, 128)
    a = jnp.max(jnp.abs(tiles), axis=(-3, -1), keepdims=True)
    s = pow2ceil(jnp.maximum(a, np.float32(1e-4)) * np.float32(1 / 448))
    return (round_e4m3(tiles / s) * s).reshape(w.shape)


@_straight_through
def nvfp4(x: jax.Array, global_scale: jax.Array) -> jax.Array:
    """NVFP4 quantise-dequantise `q * s_b * s2`; arguments as `nvfp4_quantize`."""
    q, s_b = nvfp4_quantize(x, global_scale)
    return _unblock(_blocks(q, 16) * s_b[..., None], x.shape[-1]) * global_scale


def nvfp4_weight_scale(*weights: jax.Array) -> jax.Array:
    """Global scale `amax / (6 * 448)` of one tensor, or jointly of `w1` and `w3` (section 9.2).

    1 if all are zero. Written as the product with `1 / (6 * 448)`, as XLA computes it either way.
    """
    amax = jnp.max(jnp.stack([jnp.max(jnp.abs(w)) for w in weights]))
    return jnp.where(amax == 0, 1.0, amax * np.float32(1 / (6 * 448)))


def nvfp4_token_scale(x: jax.Array) -> jax.Array:
    """Global scale `[..., 1]` of activations, `amax / (6 * 448)` per token; 1 for a zero token."""
    amax = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return jnp.where(amax == 0, 1.0, amax * np.float32(1 / (6 * 448)))


def hadamard_matrix(n: int) -> np.ndarray:
    """Sylvester's matrix of order `n` times `n^(-1/2)`: symmetric and orthonormal (section 3.5)."""
    h = np.ones((1, 1), np.float32)
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return (h * np.float32(n**-0.5)).astype(np.float32)


def hadamard(x: jax.Array) -> jax.Array:
    """Hadamard transform of the last axis, FP32, unrounded (section 3.5)."""
    return jnp.matmul(x, hadamard_matrix(x.shape[-1]), precision=lax.Precision.HIGHEST)
