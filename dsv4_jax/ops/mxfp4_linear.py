"""Linear with MXFP4 weights: E2M1 with UE8M0 per 32 inputs (model.md 4.6 ``lin4``)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from dsv4_jax.ops._act import quantized_act
from dsv4_jax.ops._check import FLOATS, check_choice, check_operand
from dsv4_jax.ops._rows import row_dot
from dsv4_jax.quant import mxfp4
from dsv4_jax.typing import E2M1, UE8M0, Array, Float, Float4e2m1fn, Float8e8m0fnu, Float32

__all__ = ["mxfp4_linear"]


@functools.partial(jax.jit, static_argnames=("act",))
def mxfp4_linear(
    x: Float[Array, "t *g k"],
    weight: Float4e2m1fn[Array, "n k"],
    scale: Float8e8m0fnu[Array, "n kb"],
    *,
    act: Literal["fp8", "bfloat16"] = "fp8",
) -> Float32[Array, "t *g m"]:
    """``y = act(x) . (weight * scale)^T``, FP32 sums, not rounded.

    Args:
        x: activations, BF16 or FP32; a group axis splits the rows of ``weight`` evenly.
        act: ``fp8`` per token and 128 inputs (``w4a8``, official) or ``bfloat16`` (``w4a16``).

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: ``act`` is unknown, or shapes of ``x``, ``weight`` and ``scale`` disagree.
    """
    check_operand("mxfp4_linear", "x", x, "t g? k", FLOATS)
    check_operand("mxfp4_linear", "weight", weight, "n k", (E2M1,))
    check_operand("mxfp4_linear", "scale", scale, "n kb", (UE8M0,))
    check_choice("mxfp4_linear", "act", act, ("fp8", "bfloat16"))
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"mxfp4_linear: x must end in weight's {k} inputs, got {list(x.shape)}")
    if k % mxfp4.BLOCK or scale.shape != (n, k // mxfp4.BLOCK):
        raise ValueError(
            f"mxfp4_linear: scale must be [{n}, {k} / {mxfp4.BLOCK}] for weight {[n, k]}, "
            f"got {list(scale.shape)}"
        )
    if x.ndim == 3 and n % x.shape[1]:
        raise ValueError(
            f"mxfp4_linear: weight must split evenly over x's {x.shape[1]} groups, got {[n, k]}"
        )
    wide = mxfp4.dequantize(mxfp4.Mxfp4(weight, scale)).astype(jnp.bfloat16)
    if x.ndim == 3:
        wide = wide.reshape(x.shape[1], n // x.shape[1], k)
    return row_dot(quantized_act(x, act).value, wide)
