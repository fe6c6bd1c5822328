"""Linear with NVFP4 weights: E2M1, E4M3 per 16 inputs, one FP32 global scale (model.md 9)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsv4_jax.ops._check import check_choice, check_operand
from dsv4_jax.ops._linear import (
    check_count,
    check_gated,
    check_linear,
    check_scalar,
    dtypes_of,
    linear_call,
)
from dsv4_jax.precision import ActFormat, Regime
from dsv4_jax.quant import nvfp4
from dsv4_jax.typing import E2M1, E4M3, Array, Float, Float4e2m1fn, Float8e4m3fn, Float32

__all__ = ["nvfp4_linear", "nvfp4_linears"]


@functools.partial(jax.jit, static_argnames=("limit", "act", "dtype", "regime"))
def nvfp4_linear(
    x: Float[Array, "t *g k"],
    weight: Float4e2m1fn[Array, "n k"],
    block_scale: Float8e4m3fn[Array, "n kb"],
    global_scale: Float32[Array, ""],
    act_scale: Float32[Array, ""] | None = None,
    *,
    up: Float[Array, "t *g k"] | None = None,
    limit: float | None = None,
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
        up: makes ``x`` its gate, both BF16 and of one shape, for ``nvfp4``: what is quantised is
            ``swiglu(x, up, limit=limit)``, its BF16 rounded from other FP32 roundings than XLA's.
        limit: of `swiglu`; comes with ``up``.
        act: ``nvfp4`` (``w4a4``), ``fp8`` per token and 128 inputs (``w4a8``) or ``bfloat16``
            (``w4a16``).
        dtype: of the result, ``float32`` or ``bfloat16``.
        regime: of the kernel on a GPU (`Precision`); ``None``: by the number of
            tokens. A row has the same bits in every call of one regime. Without effect on the CPU,
            where it has them in every call.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: ``act`` or ``regime`` is unknown, ``act_scale`` or ``up`` is given with another
            ``act``, ``up`` without ``limit`` or the other way round, or shapes of ``x``, ``up``,
            ``weight`` and the scales disagree.
    """
    op = "nvfp4_linear"
    _check(op, x, weight, block_scale, global_scale, act, dtype, regime)
    more = _check_act_scale(op, act_scale, act)
    if up is not None or limit is not None:
        more += (check_gated(op, x, up, limit, act, "nvfp4"),)
    (y,) = linear_call(
        op,
        x,
        (weight,),
        (block_scale, global_scale),
        act=act,
        dtypes=(dtype,),
        regime=regime,
        more=more,
        limit=np.float32(0 if limit is None else limit),
    )
    return y


@functools.partial(jax.jit, static_argnames=("act", "dtype", "regime"))
def nvfp4_linears(
    x: Float[Array, "t *g k"],
    weights: Sequence[Float4e2m1fn[Array, "_ k"]],
    block_scales: Sequence[Float8e4m3fn[Array, "_ kb"]],
    global_scales: Sequence[Float32[Array, ""]],
    act_scale: Float32[Array, ""] | None = None,
    *,
    act: ActFormat = "nvfp4",
    dtype: DTypeLike | tuple[DTypeLike, ...] = jnp.float32,
    regime: Regime | None = None,
) -> tuple[Float[Array, "t *g _"], ...]:
    """``nvfp4_linear`` of ``x`` and each of several weights, the same bits, in one call.

    Args:
        x: activations, as in `nvfp4_linear`; with a group axis every weight's rows are split evenly
            over the groups.
        weights: 1 to 8, each with one row per output.
        block_scales: of the weights.
        global_scales: of the weights.
        act_scale: as in `nvfp4_linear`, of the one ``x``.
        act: as in `nvfp4_linear`.
        dtype: of the results: one for all or one each.
        regime: as in `nvfp4_linear`.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: there are no weights or more than 8, or another number of scales of either kind
            or of dtypes; or as in `nvfp4_linear`.
    """
    op = "nvfp4_linears"
    check_count(op, weights)
    for name, given in (("block_scales", block_scales), ("global_scales", global_scales)):
        if len(given) != len(weights):
            raise ValueError(
                f"{op}: {name} must be as many as weights, {len(weights)}, got {len(given)}"
            )
    dtypes = dtypes_of(op, dtype, len(weights))
    for i, leaves in enumerate(zip(weights, block_scales, global_scales, strict=True)):
        _check(op, x, *leaves, act, dtypes[i], regime, f"s[{i}]")
    more = _check_act_scale(op, act_scale, act)
    scales = (*block_scales, *global_scales)
    settings: dict[str, Any] = {"act": act, "dtypes": dtypes, "regime": regime, "more": more}
    return tuple(linear_call("nvfp4_linear", x, weights, scales, limit=np.float32(0), **settings))


def _check(
    op: str,
    x: Array,
    weight: Array,
    block_scale: Array,
    global_scale: Array,
    act: str,
    dtype: DTypeLike,
    regime: Regime | None,
    index: str = "",
) -> None:
    """Of one weight; ``index`` follows its name in messages."""
    check_linear(op, x, weight, E2M1, dtype, regime, f"weight{index}")
    check_operand(op, f"block_scale{index}", block_scale, "n kb", (E4M3,))
    check_scalar(op, f"global_scale{index}", global_scale)
    check_choice(op, "act", act, ("nvfp4", "fp8", "bfloat16"))
    n, k = weight.shape
    if k % nvfp4.BLOCK or block_scale.shape != (n, k // nvfp4.BLOCK):
        raise ValueError(
            f"{op}: block_scale{index} must be [{n}, {k} / {nvfp4.BLOCK}] for weight{index} "
            f"{[n, k]}, got {list(block_scale.shape)}"
        )


def _check_act_scale(op: str, act_scale: Array | None, act: str) -> tuple[Array, ...]:
    """As the operands that it is."""
    if act_scale is None:
        return ()
    check_scalar(op, "act_scale", act_scale)
    if act != "nvfp4":
        raise ValueError(f"{op}: act_scale must be None unless act is 'nvfp4', got act {act!r}")
    return (act_scale,)
