"""Rotary position embedding of the last channels, interleaved pairs (model.md 3.3)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.ops._check import FLOATS, INTEGERS, check_operand
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import row_tiled
from dsv4_jax.typing import Array, Float, Float32, Int32

__all__ = ["rope", "rope_frequencies"]


def rope_frequencies(config: ModelConfig, kind: LayerKind) -> np.ndarray:
    """FP32 ``[qk_rope_head_dim / 2]`` frequencies of a layer of this kind.

    SWA (and MTP): ``rope_theta^(-2i/d)``. CSA and HCA: ``compress_rope_theta`` with YaRN's
    ramp between interpolated and original frequencies, at every length.
    """
    dim = config.qk_rope_head_dim
    exponent = np.arange(0, dim, 2, dtype=np.float64) / dim
    if kind is LayerKind.SWA:
        return (config.rope_theta**-exponent).astype(np.float32)
    base, length = config.compress_rope_theta, config.rope_original_max_position_embeddings

    def correction(rotations: float) -> float:
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(correction(config.rope_beta_fast)), 0)
    high = min(math.ceil(correction(config.rope_beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2) - low) / width, 0, 1)
    freq = base**-exponent
    return (freq * (1 - ramp) + freq / config.rope_factor * ramp).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("inverse",))
def rope(
    x: Float[Array, "b t *h d"],
    positions: Int32[Array, "b t"],
    frequencies: Float32[Array, "f"] | np.ndarray,
    *,
    inverse: bool = False,
) -> Float[Array, "b t *h d"]:
    """Rotates the last ``2 * len(frequencies)`` channels by ``position * frequency``.

    ``(a, b) -> (a cos - b sin, a sin + b cos)`` on pairs ``(2i, 2i + 1)``; the angle is the FP32
    product. FP32 inside, the rotated channels rounded once to ``x``'s dtype.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: ``x`` has fewer channels than the rotation, or ``positions`` do not match.
    """
    check_operand("rope", "x", x, "b t *h d", FLOATS)
    check_operand("rope", "positions", positions, "b t", INTEGERS)
    rotary = 2 * frequencies.shape[0]
    if x.shape[-1] < rotary:
        raise ValueError(f"rope: x must have at least {rotary} channels, got {x.shape[-1]}")
    if positions.shape != x.shape[:2]:
        raise ValueError(
            f"rope: positions must be {list(x.shape[:2])} for x {list(x.shape)}, "
            f"got {list(positions.shape)}"
        )

    def rows(x: Array, position: Array) -> Array:
        angle = position.astype(jnp.float32)[:, None] * jnp.asarray(frequencies)  # [n, d/2]
        angle = angle.reshape(angle.shape[0], *(1,) * (x.ndim - 2), angle.shape[-1])
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        if inverse:
            sin = -sin
        pairs = x[..., -rotary:].astype(jnp.float32).reshape(*x.shape[:-1], rotary // 2, 2)
        even, odd = pairs[..., 0], pairs[..., 1]
        rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        rotated = round_to(rotated.reshape(*x.shape[:-1], rotary), x.dtype)
        return jnp.concatenate([x[..., :-rotary], rotated], axis=-1)

    return row_tiled(rows, x.reshape(-1, *x.shape[2:]), positions.reshape(-1)).reshape(x.shape)
