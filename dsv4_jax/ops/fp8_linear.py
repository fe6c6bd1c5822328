"""Linear with E4M3 weights scaled by UE8M0 per 128x128 tile (model.md 4.6)."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsv4_jax.ops._check import FLOATS, check_choice, check_operand
from dsv4_jax.ops._linear import check_count, check_gated, check_linear, dtypes_of, linear_call
from dsv4_jax.precision import Regime
from dsv4_jax.quant import fp8
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.typing import E4M3, UE8M0, Array, Float, Float8e4m3fn, Float8e8m0fnu

__all__ = ["fp8_linear", "fp8_linears"]


@functools.partial(jax.jit, static_argnames=("limit", "act", "dtype", "regime"))
def fp8_linear(
    x: Float[Array, "t *g k"] | Fp8,
    weight: Float8e4m3fn[Array, "n k"],
    scale: Float8e8m0fnu[Array, "tn tk"],
    *,
    up: Float[Array, "t *g k"] | None = None,
    limit: float | None = None,
    act: Literal["fp8", "bfloat16"] = "fp8",
    dtype: DTypeLike = jnp.float32,
    regime: Regime | None = None,
) -> Float[Array, "t *g m"]:
    """``y = act(x) . (weight * scale)^T`` with FP32 sums, rounded once to ``dtype``.

    With a group axis in ``x`` the rows of ``weight`` are split evenly over the groups. A token
    depends on no other. NaN in ``x`` makes its row NaN; +-Inf stays infinite, with ``fp8`` too (448
    times the scale of the largest finite number is beyond FP32). Scale byte 0 is 2^-127, 255 is
    NaN; a weight is rounded to BF16, which changes none that is above 2^-126. Under `jax.vmap` a
    launch per element. No gradient. Arrays on several devices are gathered unless the call is
    inside `jax.shard_map`.

    Args:
        x: activations, BF16 or FP32; or quantised already, for ``fp8``, as `rmsnorm_fp8` and `mhc`
            return them: E4M3 codes ``[t, *g, k]`` with UE8M0 scales ``[t, *g, k / 128]``, ``k`` a
            multiple of 128. The result is bit for bit that of the array they are made of.
        weight: codes; both sizes may be any.
        scale: one per tile of 128x128, edge tiles included.
        up: makes ``x`` its gate, both BF16 and of one shape, for ``fp8``: what is quantised is
            ``swiglu(x, up, limit=limit)``, its BF16 rounded from other FP32 roundings than XLA's.
        limit: of `swiglu`; comes with ``up``.
        act: ``fp8`` quantises ``x`` per token and 128 inputs (``w8a8``); ``bfloat16`` rounds it
            (``w8a16``).
        dtype: of the result, ``float32`` or ``bfloat16``.
        regime: of the kernel on a GPU (`Precision`); ``None``: by the number of
            tokens. A row has the same bits in every call of one regime. Without effect on the CPU,
            where it has them in every call.

    Raises:
        TypeError: a dtype is not accepted, or ``x`` is quantised and has ``up``.
        ValueError: ``act`` or ``regime`` is unknown, ``x`` is quantised with another ``act`` or
            ``k``, ``up`` comes with another ``act`` or without ``limit`` or the other way round, or
            shapes of ``x``, ``up``, ``weight`` and ``scale`` disagree.
    """
    _check("fp8_linear", x, weight, scale, act, dtype, regime)
    if up is not None or limit is not None:
        if isinstance(x, Fp8) and up is not None and limit is not None:
            raise TypeError("fp8_linear: x that is quantised must not have up")
        gate = x.code if isinstance(x, Fp8) else x
        check_gated("fp8_linear", gate, up, limit, act, "fp8")
    (y,) = _call(
        x, (weight,), (scale,), act=act, dtypes=(dtype,), regime=regime, up=up, limit=limit
    )
    return y


@functools.partial(jax.jit, static_argnames=("act", "dtype", "regime"))
def fp8_linears(
    x: Float[Array, "t *g k"] | Fp8,
    weights: Sequence[Float8e4m3fn[Array, "_ k"]],
    scales: Sequence[Float8e8m0fnu[Array, "_ tk"]],
    *,
    act: Literal["fp8", "bfloat16"] = "fp8",
    dtype: DTypeLike | tuple[DTypeLike, ...] = jnp.float32,
    regime: Regime | None = None,
) -> tuple[Float[Array, "t *g _"], ...]:
    """``fp8_linear(x, weight, scale)`` for each of several weights, the same bits, in one call.

    Args:
        x: activations, as in `fp8_linear`; with a group axis every weight's rows are split evenly
            over the groups.
        weights: 1 to 8, each with one row per output.
        scales: of the weights.
        act: as in `fp8_linear`.
        dtype: of the results: one for all or one each.
        regime: as in `fp8_linear`.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: there are no weights or more than 8, or another number of scales or dtypes; or
            as in `fp8_linear`.
    """
    check_count("fp8_linears", weights)
    if len(scales) != len(weights):
        raise ValueError(
            f"fp8_linears: scales must be as many as weights, {len(weights)}, got {len(scales)}"
        )
    dtypes = dtypes_of("fp8_linears", dtype, len(weights))
    for i, (weight, scale) in enumerate(zip(weights, scales, strict=True)):
        _check("fp8_linears", x, weight, scale, act, dtypes[i], regime, f"s[{i}]")
    return tuple(_call(x, weights, scales, act=act, dtypes=dtypes, regime=regime))


def _call(
    x: Array | Fp8,
    weights: Sequence[Array],
    scales: Sequence[Array],
    *,
    up: Array | None = None,
    limit: float | None = None,
    **settings: Any,
) -> list[Array]:
    code, last = x if isinstance(x, Fp8) else (x, up)
    more = () if last is None else (last,)
    settings["limit"] = np.float32(0 if limit is None else limit)
    return linear_call("fp8_linear", code, weights, scales, more=more, **settings)


def _check(
    op: str,
    x: Array | Fp8,
    weight: Array,
    scale: Array,
    act: str,
    dtype: DTypeLike,
    regime: Regime | None,
    index: str = "",
) -> None:
    """Of one weight; ``index`` follows its name in messages."""
    code, accepted = (x.code, (jnp.dtype(E4M3),)) if isinstance(x, Fp8) else (x, FLOATS)
    check_linear(op, code, weight, E4M3, dtype, regime, f"weight{index}", accepted)
    check_operand(op, f"scale{index}", scale, "tn tk", (UE8M0,))
    check_choice(op, "act", act, ("fp8", "bfloat16"))
    if isinstance(x, Fp8):
        _check_quantised(op, x, act)
    n, k = weight.shape
    expected = (-(-n // fp8.WEIGHT_BLOCK), -(-k // fp8.WEIGHT_BLOCK))
    if scale.shape != expected:
        raise ValueError(
            f"{op}: scale{index} must be {list(expected)} for weight{index} {[n, k]}, "
            f"got {list(scale.shape)}"
        )


def _check_quantised(op: str, x: Fp8, act: str) -> None:
    """What ``x`` that is quantised already is held to, beside what its codes are."""
    *lead, k = x.code.shape
    check_operand(op, "scale of x", x.scale, "t g? k/128", (jnp.dtype(UE8M0),))
    if act != "fp8":
        raise ValueError(f"{op}: act must be 'fp8' for x that is quantised, got {act!r}")
    if k % fp8.ACT_BLOCK:
        raise ValueError(
            f"{op}: x that is quantised must have a multiple of {fp8.ACT_BLOCK} inputs, "
            f"got {[*lead, k]}"
        )
    expected = (*lead, k // fp8.ACT_BLOCK)
    if x.scale.shape != expected:
        raise ValueError(
            f"{op}: scale of x must be {list(expected)} for codes {[*lead, k]}, "
            f"got {list(x.scale.shape)}"
        )
