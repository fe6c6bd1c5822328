"""Linear with E4M3 weights scaled by UE8M0 per 128x128 tile (model.md 4.6)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from dsv4_jax.ops._act import quantized_act
from dsv4_jax.ops._check import FLOATS, check_choice, check_operand
from dsv4_jax.ops._rows import row_dot
from dsv4_jax.precision import ActFormat
from dsv4_jax.quant import fp8
from dsv4_jax.typing import E4M3, UE8M0, Array, Float, Float8e4m3fn, Float8e8m0fnu, Float32

__all__ = ["fp8_linear"]


@functools.partial(jax.jit, static_argnames=("act",))
def fp8_linear(
    x: Float[Array, "t *g k"],
    weight: Float8e4m3fn[Array, "n k"],
    scale: Float8e8m0fnu[Array, "tn tk"],
    *,
    act: Literal["fp8", "bfloat16"] = "fp8",
) -> Float32[Array, "t *g m"]:
    """``y = act(x) . (weight * scale)^T``, FP32 sums, not rounded.

    With a group axis in ``x`` the rows of ``weight`` are split evenly over the groups.

    Args:
        x: activations, BF16 or FP32.
        act: ``fp8`` quantises ``x`` per token and 128 inputs (``w8a8``); ``bfloat16`` keeps it
            (``w8a16``).

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: ``act`` is unknown, or shapes of ``x``, ``weight`` and ``scale`` disagree.
    """
    check_operand("fp8_linear", "x", x, "t g? k", FLOATS)
    check_operand("fp8_linear", "weight", weight, "n k", (E4M3,))
    check_operand("fp8_linear", "scale", scale, "tn tk", (UE8M0,))
    check_choice("fp8_linear", "act", act, ("fp8", "bfloat16"))
    n, k = weight.shape
    expected = (-(-n // fp8.WEIGHT_BLOCK), -(-k // fp8.WEIGHT_BLOCK))
    if x.shape[-1] != k:
        raise ValueError(f"fp8_linear: x must end in weight's {k} inputs, got {list(x.shape)}")
    if scale.shape != expected:
        raise ValueError(
            f"fp8_linear: scale must be {list(expected)} for weight {[n, k]}, "
            f"got {list(scale.shape)}"
        )
    if x.ndim == 3 and n % x.shape[1]:
        raise ValueError(
            f"fp8_linear: weight must split evenly over x's {x.shape[1]} groups, got {[n, k]}"
        )
    wide = fp8.dequantize_weight(fp8.Fp8(weight, scale)).astype(jnp.bfloat16)
    if x.ndim == 3:
        wide = wide.reshape(x.shape[1], n // x.shape[1], k)
    activation: ActFormat = act
    return row_dot(quantized_act(x, activation).value, wide)
