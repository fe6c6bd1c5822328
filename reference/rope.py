"""Interleaved rotary embedding of the last 64 channels (model.md section 3.3)."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from reference.rounding import FP32, Rounding


def rope_frequencies(kind: str, config: dict[str, Any]) -> np.ndarray:
    """The FP32 frequency table `[dr / 2]` of one kind of layer.

    `"main"` (ratio 0, MTP): `theta^(-2i/dr)`. `"compress"` (ratio > 0): `g_i * (1 - ramp_i) + g_i /
    factor * ramp_i` with `g_i = compress_theta^(-2i/dr)` and the YaRN ramp between the channels
    that turn `beta_fast` and `beta_slow` times within the original length. There is no magnitude
    factor.
    """
    dim = config["qk_rope_head_dim"]
    theta = config["rope_theta"] if kind == "main" else config["compress_rope_theta"]
    i = np.arange(dim // 2, dtype=np.float32)
    freqs = np.float32(1) / np.float32(theta) ** (2 * i / np.float32(dim))
    if kind == "main":
        return freqs
    scaling = config["rope_scaling"]

    def correction(rotations: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction(scaling["beta_fast"])), 0)
    high = min(math.ceil(correction(scaling["beta_slow"])), dim - 1)
    ramp = np.clip((i - low) / np.float32(high - low), 0, 1).astype(np.float32)
    return freqs * (1 - ramp) + freqs / np.float32(scaling["factor"]) * ramp


def rope(
    x: jax.Array,
    positions: jax.Array,
    freqs: jax.Array,
    inverse: bool = False,
    rounding: Rounding = FP32,
) -> jax.Array:
    """Rotate channel pairs `(2i, 2i + 1)` by the FP32 product `position * f_i`, or back.

    `(a, b) -> (a cos - b sin, a sin + b cos)`, `bf()` after.

    Args:
        x: `[..., dr]`, the rotary channels only.
        positions: Broadcastable against `x.shape[:-1]`.
        freqs: `[dr / 2]`.
        inverse: Use the negative angle.
        rounding: Rounds the result.
    """
    angle = positions[..., None].astype(jnp.float32) * freqs
    cos, sin = jnp.cos(angle), jnp.sin(-angle if inverse else angle)
    a, b = x[..., 0::2], x[..., 1::2]
    return rounding.bf(jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape))


def rope_tail(
    x: jax.Array,
    positions: jax.Array,
    freqs: jax.Array,
    inverse: bool = False,
    rounding: Rounding = FP32,
) -> jax.Array:
    """`rope` on the last `2 * len(freqs)` channels of `x [..., d]`, the others unchanged."""
    split = x.shape[-1] - 2 * len(freqs)
    return jnp.concatenate(
        [x[..., :split], rope(x[..., split:], positions, freqs, inverse, rounding)], axis=-1
    )
