"""RMS norm into NVFP4 (model.md sections 2.3 and 9.2)."""

import jax
import jax.numpy as jnp

from reference.formats import nvfp4_quantize, nvfp4_token_scale
from reference.rmsnorm import rmsnorm
from reference.rounding import OFFICIAL


def rmsnorm_nvfp4(
    x: jax.Array, weight: jax.Array, eps: float, global_scale: jax.Array | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """E2M1 values `[..., d]`, E4M3 values `[..., d / 16]` and one scale per token `[...]`.

    `y = bf(w * x * rsqrt(mean(x^2) + eps))`, then `nvfp4_quantize` with `global_scale`, or with
    each token's own `max|y| / (6 * 448)`. `x [..., d]`, `weight [d]`, FP32.
    """
    y = rmsnorm(x, weight, eps, OFFICIAL)
    s2 = (
        nvfp4_token_scale(y)
        if global_scale is None
        else jnp.broadcast_to(global_scale, (*y.shape[:-1], 1))
    )
    q, s_b = nvfp4_quantize(y, s2)
    return q, s_b, s2[..., 0]
