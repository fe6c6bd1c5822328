"""Linear with MXFP4 weights: E2M1 with UE8M0 per 32 inputs (model.md 4.6 ``lin4``)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsv4_jax.ops._check import check_choice, check_operand
from dsv4_jax.ops._linear import check_linear, linear_call
from dsv4_jax.precision import Regime
from dsv4_jax.quant import mxfp4
from dsv4_jax.typing import E2M1, UE8M0, Array, Float, Float4e2m1fn, Float8e8m0fnu

__all__ = ["mxfp4_linear"]


@functools.partial(jax.jit, static_argnames=("act", "dtype", "regime"))
def mxfp4_linear(
    x: Float[Array, "t *g k"],
    weight: Float4e2m1fn[Array, "n k"],
    scale: Float8e8m0fnu[Array, "n kb"],
    *,
    act: Literal["fp8", "bfloat16"] = "fp8",
    dtype: DTypeLike = jnp.float32,
    regime: Regime | None = None,
) -> Float[Array, "t *g m"]:
    """``y = act(x) . (weight * scale)^T`` with FP32 sums, rounded once to ``dtype``.

    With a group axis in ``x`` the rows of ``weight`` are split evenly over the groups. What is said
    of rows, NaN, +-Inf, scale bytes 0 and 255, `jax.vmap`, gradients and several devices in
    `fp8_linear` holds here.

    Args:
        x: activations, BF16 or FP32.
        weight: codes.
        scale: one per 32 inputs.
        act: ``fp8`` per token and 128 inputs (``w4a8``, official) or ``bfloat16`` (``w4a16``).
        dtype: of the result, ``float32`` or ``bfloat16``.
        regime: of the kernel on a GPU (`Precision`); ``None``: by the number of
            tokens. Without effect on the CPU.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: ``act`` or ``regime`` is unknown, or shapes of ``x``, ``weight`` and ``scale``
            disagree.
    """
    check_linear("mxfp4_linear", x, weight, E2M1, dtype, regime)
    check_operand("mxfp4_linear", "scale", scale, "n kb", (UE8M0,))
    check_choice("mxfp4_linear", "act", act, ("fp8", "bfloat16"))
    n, k = weight.shape
    if k % mxfp4.BLOCK or scale.shape != (n, k // mxfp4.BLOCK):
        raise ValueError(
            f"mxfp4_linear: scale must be [{n}, {k} / {mxfp4.BLOCK}] for weight {[n, k]}, "
            f"got {list(scale.shape)}"
        )
    (y,) = linear_call(
        "mxfp4_linear", x, (weight,), (scale,), act=act, dtypes=(dtype,), regime=regime
    )
    return y
