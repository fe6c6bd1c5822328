"""RMS norm straight into FP8 activations (model.md 2.3 and 4.5)."""

import functools

import jax
import numpy as np

from dsv4_jax import library
from dsv4_jax.ops._check import check_operand
from dsv4_jax.ops.rmsnorm_nvfp4 import BFLOAT16, MAX_DIM
from dsv4_jax.quant import fp8
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.typing import E4M3, UE8M0, Array, BFloat16

__all__ = ["rmsnorm_fp8", "rmsnorm_fp8_takes"]

CHANNELS = 16
"""``kNormBlock`` of ffi/common/rmsnorm.h: what a thread takes."""


def rmsnorm_fp8_takes(d: int) -> bool:
    """Whether ``d`` channels are a multiple of 16 up to `MAX_DIM`."""
    return d % CHANNELS == 0 and CHANNELS <= d <= MAX_DIM


@functools.partial(jax.jit, static_argnames=("eps",))
def rmsnorm_fp8(x: BFloat16[Array, "*lead d"], weight: BFloat16[Array, "d"], eps: float) -> Fp8:
    """``q8(bf(weight * x * rsqrt(mean(x^2) + eps)), 128)`` in one launch; ``bf`` rounds to BF16.

    A token depends on no other. The norm's sum runs in an order of its own (that of
    `rmsnorm_nvfp4`, the same on CPU and GPU), so that against `rmsnorm` a value on a rounding tie
    may fall the other way. NaN in ``x`` makes its token NaN; ``+-Inf`` becomes NaN and the rest of
    its token 0, as the norm defines it; a norm that overflows BF16 saturates at the largest code
    and scale. NaN is carried by the scales. Under `jax.vmap` a launch per element. No gradient.
    Arrays on several devices are gathered unless the call is inside `jax.shard_map`.

    Args:
        x: activations.
        weight: of the norm.
        eps: added to the mean square; >= 0.

    Returns:
        Codes ``[*lead, d]`` and scales ``[*lead, ceil(d / 128)]``.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: ``d`` is not a multiple of 16 in 16..16384, or shapes disagree.
    """
    check_operand("rmsnorm_fp8", "x", x, "*lead d", BFLOAT16)
    check_operand("rmsnorm_fp8", "weight", weight, "d", BFLOAT16)
    d = x.shape[-1] if x.ndim else 0
    if not rmsnorm_fp8_takes(d):
        raise ValueError(
            f"rmsnorm_fp8: x must have a multiple of {CHANNELS} channels, {CHANNELS}..{MAX_DIM}, "
            f"got {list(x.shape)}"
        )
    if weight.shape != (d,):
        raise ValueError(
            f"rmsnorm_fp8: weight must be [{d}] for x {list(x.shape)}, got {list(weight.shape)}"
        )
    lead, blocks = x.shape[:-1], -(-d // fp8.ACT_BLOCK)
    flat = x.reshape(-1, d)  # [t, d]
    code, scale = library.call(
        "rmsnorm_fp8",
        [
            jax.ShapeDtypeStruct(flat.shape, E4M3),
            jax.ShapeDtypeStruct((flat.shape[0], blocks), UE8M0),
        ],
        flat,
        weight,
        eps=np.float32(eps),
    )
    return Fp8(code.reshape(x.shape), scale.reshape(*lead, blocks))
