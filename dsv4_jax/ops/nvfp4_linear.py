"""Linear with NVFP4 weights: E2M1, E4M3 per 16 inputs, one FP32 global scale (model.md 9)."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsv4_jax.ops._check import check_choice, check_operand
from dsv4_jax.ops._linear import check_linear, check_scalar, linear_call
from dsv4_jax.precision import ActFormat, Regime
from dsv4_jax.quant import nvfp4
from dsv4_jax.typing import E2M1, E4M3, Array, Float, Float4e2m1fn, Float8e4m3fn, Float32

__all__ = ["nvfp4_linear"]


@functools.partial(jax.jit, static_argnames=("act", "dtype", "regime"))
def nvfp4_linear(
    x: Float[Array, "t *g k"],
    weight: Float4e2m1fn[Array, "n k"],
    block_scale: Float8e4m3fn[Array, "n kb"],
    global_scale: Float32[Array, ""],
    act_scale: Float32[Array, ""] | None = None,
    *,
    act: ActFormat = "nvfp4",
    dtype: DTypeLike = jnp.float32,
    regime: Regime | None = None,
) -> Float[Array, "t *g m"]:
    """``y = global_scale * act(x) . (weight * block_scale)^T`` with FP32 sums.

    The FP32 result is rounded once to ``dtype``. With a group axis in ``x`` the rows of ``weight``
    are split evenly over the groups. With ``nvfp4`` the products are those of codes and block
    scales, exact; the two global scales are multiplied with each other, then with the sum. A token
    depends on no other. NaN in ``x`` makes its row NaN, an infinite value counts as the largest
    finite number. Under `jax.vmap` a call per element. No gradient. Arrays on several devices
    are gathered unless the call is inside `jax.shard_map`.

    Args:
        x: activations, BF16 or FP32.
        weight: codes.
        block_scale: one per 16 inputs.
        global_scale: of the whole weight.
        act_scale: with ``act="nvfp4"``, the checkpoint's static activation scale, clamped to
            2^-100..2^100; each token (of each group) takes ``max|x| / (6 * 448)`` of its own when
            ``None``.
        act: ``nvfp4`` (``w4a4``), ``fp8`` per token and 128 inputs (``w4a8``) or ``bfloat16``
            (``w4a16``).
        dtype: of the result, ``float32`` or ``bfloat16``.
        regime: of the kernel on a GPU (`Precision`); ``None``: by the number of
            tokens. A row has the same bits in every call of one regime. Without effect on the CPU,
            where it has them in every call.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: ``act`` or ``regime`` is unknown, ``act_scale`` is given with another ``act``,
            or shapes of ``x``, ``weight`` and the scales disagree.
    """
    check_linear("nvfp4_linear", x, weight, E2M1, dtype, regime)
    check_operand("nvfp4_linear", "block_scale", block_scale, "n kb", (E4M3,))
    check_scalar("nvfp4_linear", "global_scale", global_scale)
    check_choice("nvfp4_linear", "act", act, ("nvfp4", "fp8", "bfloat16"))
    n, k = weight.shape
    if k % nvfp4.BLOCK or block_scale.shape != (n, k // nvfp4.BLOCK):
        raise ValueError(
            f"nvfp4_linear: block_scale must be [{n}, {k} / {nvfp4.BLOCK}] for weight {[n, k]}, "
            f"got {list(block_scale.shape)}"
        )
    scales = (block_scale, global_scale)
    if act_scale is not None:
        check_scalar("nvfp4_linear", "act_scale", act_scale)
        if act != "nvfp4":
            raise ValueError(
                f"nvfp4_linear: act_scale must be None unless act is 'nvfp4', got act {act!r}"
            )
        scales = (*scales, act_scale)
    (y,) = linear_call(
        "nvfp4_linear", x, (weight,), scales, act=act, dtypes=(dtype,), regime=regime
    )
    return y
