"""Linear with NVFP4 weights: E2M1, E4M3 per 16 inputs, one FP32 global scale (model.md 9)."""

import functools

import jax
import jax.numpy as jnp

from dsv4_jax.ops._act import quantized_act
from dsv4_jax.ops._check import FLOAT32, FLOATS, check_choice, check_operand
from dsv4_jax.ops._rows import row_dot
from dsv4_jax.precision import ActFormat
from dsv4_jax.quant import nvfp4
from dsv4_jax.typing import E2M1, E4M3, Array, Float, Float4e2m1fn, Float8e4m3fn, Float32

__all__ = ["nvfp4_linear"]


@functools.partial(jax.jit, static_argnames=("act",))
def nvfp4_linear(
    x: Float[Array, "t *g k"],
    weight: Float4e2m1fn[Array, "n k"],
    block_scale: Float8e4m3fn[Array, "n kb"],
    global_scale: Float32[Array, ""],
    *,
    act: ActFormat = "nvfp4",
) -> Float32[Array, "t *g m"]:
    """``y = global_scale * act(x) . (weight * block_scale)^T``, FP32 sums, not rounded.

    Args:
        x: activations, BF16 or FP32; a group axis splits the rows of ``weight`` evenly.
        act: ``nvfp4`` (``w4a4``: exact NVFP4 x NVFP4 products, one FP32 scale per row, folded
            into the epilogue), ``fp8`` (``w4a8``) or ``bfloat16`` (``w4a16``).

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: ``act`` is unknown, or shapes of ``x``, ``weight``, ``block_scale`` and
            ``global_scale`` disagree.
    """
    check_operand("nvfp4_linear", "x", x, "t g? k", FLOATS)
    check_operand("nvfp4_linear", "weight", weight, "n k", (E2M1,))
    check_operand("nvfp4_linear", "block_scale", block_scale, "n kb", (E4M3,))
    check_operand("nvfp4_linear", "global_scale", global_scale, "*lead", FLOAT32)
    check_choice("nvfp4_linear", "act", act, ("nvfp4", "fp8", "bfloat16"))
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"nvfp4_linear: x must end in weight's {k} inputs, got {list(x.shape)}")
    if k % nvfp4.BLOCK or block_scale.shape != (n, k // nvfp4.BLOCK):
        raise ValueError(
            f"nvfp4_linear: block_scale must be [{n}, {k} / {nvfp4.BLOCK}] for weight {[n, k]}, "
            f"got {list(block_scale.shape)}"
        )
    if global_scale.shape != ():
        raise ValueError(
            f"nvfp4_linear: global_scale must be a scalar, got {list(global_scale.shape)}"
        )
    if x.ndim == 3 and n % x.shape[1]:
        raise ValueError(
            f"nvfp4_linear: weight must split evenly over x's {x.shape[1]} groups, got {[n, k]}"
        )
    wide = nvfp4.dequantize_blocks(nvfp4.Nvfp4(weight, block_scale, global_scale))
    wide = wide.astype(jnp.bfloat16)
    if x.ndim == 3:
        wide = wide.reshape(x.shape[1], n // x.shape[1], k)
    q = quantized_act(x, act)
    y = row_dot(q.value, wide)
    alpha = global_scale if q.global_scale is None else q.global_scale[..., None] * global_scale
    return y * alpha
