"""Collapsing the streams before the output head (model.md section 2.4)."""

import jax
import jax.numpy as jnp

from reference import mhc_pre
from reference.rounding import FP32, Rounding


def mhc_head(
    streams: jax.Array,
    fn: jax.Array,
    base: jax.Array,
    scale: jax.Array,
    *,
    hc_eps: float,
    rms_eps: float,
    rounding: Rounding = FP32,
) -> jax.Array:
    """`bf(sum_j (sigmoid(mix_j * scale[0] + base_j) + hc_eps) * S_j)`.

    `streams [t, hc, dim]`, `fn [hc, hc * dim]`, `base [hc]`, `scale [1]` -> `[t, dim]`.
    """
    pre = jax.nn.sigmoid(mhc_pre.mhc_mix(streams, fn, rms_eps) * scale[0] + base) + hc_eps
    return rounding.bf(jnp.sum(pre[:, :, None] * streams, axis=1))
