"""Writing a branch back into the hyper-connection streams (model.md section 2.3)."""

import jax
import jax.numpy as jnp
from jax import lax

from reference.rounding import FP32, Rounding


def mhc_post(
    branch: jax.Array,
    streams: jax.Array,
    post: jax.Array,
    comb: jax.Array,
    rounding: Rounding = FP32,
) -> jax.Array:
    """`S'_k = bf(post_k * f + sum_j comb[j, k] * S_j)`: the sum is over the FIRST index of `comb`.

    `branch [t, dim]`, `streams [t, hc, dim]`, `post [t, hc]`, `comb [t, hc, hc]` -> `[t, hc, dim]`.
    """
    mixed = jnp.einsum("tjk,tjd->tkd", comb, streams, precision=lax.Precision.HIGHEST)
    return rounding.bf(post[:, :, None] * branch[:, None, :] + mixed)
