"""RMS norm straight into NVFP4 (model.md 2.3 and 9.2)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import library
from dsv4_jax.ops._check import FLOAT32, check_operand
from dsv4_jax.quant import nvfp4
from dsv4_jax.quant.nvfp4 import Nvfp4
from dsv4_jax.typing import E2M1, E4M3, Array, BFloat16, Float32

__all__ = ["MAX_DIM", "rmsnorm_nvfp4"]

BFLOAT16 = (jnp.dtype(jnp.bfloat16),)
MAX_DIM = 16384
"""Most channels of a token: a thread block of the kernel takes 16 for each of 1024 threads."""


@functools.partial(jax.jit, static_argnames=("eps",))
def rmsnorm_nvfp4(
    x: BFloat16[Array, "*lead d"],
    weight: BFloat16[Array, "d"],
    eps: float,
    global_scale: Float32[Array, ""] | None = None,
) -> Nvfp4:
    """``nvfp4(bf(weight * x * rsqrt(mean(x^2) + eps)))`` in one launch; ``bf`` rounds to BF16.

    A token depends on no other. The norm's sum runs in an order of its own (the same on CPU and
    GPU), so that against `rmsnorm` a value on a rounding tie may fall the other way. NaN in ``x``
    makes its token NaN; ``+-Inf`` becomes NaN and the rest of its token 0, as the norm defines it;
    a norm that overflows BF16 saturates at the largest code and scale. NaN is carried by the
    scales: the block's and, unless it is static, the token's. Under `jax.vmap` a launch per
    element. No gradient. Arrays on several devices are gathered unless the call is inside
    `jax.shard_map`.

    Args:
        x: activations.
        weight: of the norm.
        eps: added to the mean square; >= 0.
        global_scale: the checkpoint's static activation scale, clamped to 2^-100..2^100; each token
            takes ``max|y| / (6 * 448)`` of its own when ``None``.

    Returns:
        Codes ``[*lead, d]``, block scales ``[*lead, d / 16]``, and one FP32 scale per token
        ``[*lead]`` (the static one repeated).

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: ``d`` is not a multiple of 16 in 16..16384, or shapes disagree.
    """
    check_operand("rmsnorm_nvfp4", "x", x, "*lead d", BFLOAT16)
    check_operand("rmsnorm_nvfp4", "weight", weight, "d", BFLOAT16)
    d = x.shape[-1] if x.ndim else 0
    if d % nvfp4.BLOCK or not nvfp4.BLOCK <= d <= MAX_DIM:
        raise ValueError(
            f"rmsnorm_nvfp4: x must have a multiple of {nvfp4.BLOCK} channels, "
            f"{nvfp4.BLOCK}..{MAX_DIM}, got {list(x.shape)}"
        )
    if weight.shape != (d,):
        raise ValueError(
            f"rmsnorm_nvfp4: weight must be [{d}] for x {list(x.shape)}, got {list(weight.shape)}"
        )
    scales = () if global_scale is None else (global_scale,)
    for scale in scales:
        check_operand("rmsnorm_nvfp4", "global_scale", scale, "*lead", FLOAT32)
        if scale.shape != ():
            raise ValueError(
                f"rmsnorm_nvfp4: global_scale must be a scalar, got {list(scale.shape)}"
            )
    lead = x.shape[:-1]
    flat = x.reshape(-1, d)  # [t, d]
    tokens = flat.shape[0]
    code, block_scale, token_scale = library.call(
        "rmsnorm_nvfp4",
        [
            jax.ShapeDtypeStruct((tokens, d), E2M1),
            jax.ShapeDtypeStruct((tokens, d // nvfp4.BLOCK), E4M3),
            jax.ShapeDtypeStruct((tokens,), jnp.float32),
        ],
        flat,
        weight,
        *scales,
        eps=np.float32(eps),
    )
    return Nvfp4(
        code.reshape(*lead, d),
        block_scale.reshape(*lead, d // nvfp4.BLOCK),
        token_scale.reshape(lead),
    )
