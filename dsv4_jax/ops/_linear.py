"""What the linears share: checks of operands and the call; see ffi/common/linear.h."""

from collections.abc import Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsv4_jax import library
from dsv4_jax.ops._check import FLOAT32, FLOATS, check_choice, check_operand
from dsv4_jax.precision import Regime
from dsv4_jax.typing import Array

__all__ = [
    "ACTS",
    "MAX_WEIGHTS",
    "REGIMES",
    "check_count",
    "check_gated",
    "check_linear",
    "check_result",
    "check_scalar",
    "dtypes_of",
    "linear_call",
    "scratch_bytes",
]

ACTS: Final = {"bfloat16": np.int32(0), "fp8": np.int32(1), "nvfp4": np.int32(2)}
MAX_WEIGHTS: Final = 8
"""Of one call; ``kMaxLinearParts``."""
REGIMES: Final = {None: 0, "decode": 1, "prefill": 2, "exact": 3}


def check_linear(
    op: str,
    x: Array,
    weight: Array,
    stored: DTypeLike,
    dtype: DTypeLike,
    regime: Regime | None,
    name: str = "weight",
    accepted: Sequence[DTypeLike] = FLOATS,
) -> None:
    """What holds for every form of weights; ``accepted``: dtypes of ``x``.

    Raises:
        TypeError: ``x``, ``weight`` or the result has a dtype that is not accepted.
        ValueError: ranks, inner sizes or groups disagree, or ``regime`` is unknown.
    """
    check_operand(op, "x", x, "t g? k", accepted)
    check_operand(op, name, weight, "n k", (jnp.dtype(stored),))
    check_result(op, dtype, regime)
    k = weight.shape[1]
    if x.shape[-1] != k or k == 0:
        rule = f"x must end in {name}'s {k} inputs" if k else f"{name} must have inputs"
        raise ValueError(f"{op}: {rule}, got {list((x if k else weight).shape)}")
    check_groups(op, x, name, weight)


def check_count(op: str, weights: Sequence[Array]) -> None:
    """Raises `ValueError` unless one call can take all weights."""
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise ValueError(f"{op}: weights must hold 1..{MAX_WEIGHTS} arrays, got {len(weights)}")


def dtypes_of(
    op: str, dtype: DTypeLike | tuple[DTypeLike, ...], count: int
) -> tuple[DTypeLike, ...]:
    """Of ``count`` results: one for all, or one each."""
    if not isinstance(dtype, tuple):
        return (dtype,) * count
    if len(dtype) != count:
        raise ValueError(
            f"{op}: dtype must be one or {count}, as many as weights, got {len(dtype)}"
        )
    return dtype


def check_result(op: str, dtype: DTypeLike, regime: Regime | None) -> None:
    """The two settings that every linear takes."""
    if jnp.dtype(dtype) not in FLOATS:
        raise TypeError(f"{op}: dtype must be bfloat16 or float32, got {jnp.dtype(dtype)}")
    check_choice(op, "regime", regime, tuple(REGIMES))


def check_gated(
    op: str, x: Array, up: Array | None, limit: float | None, act: str, quantising: str
) -> Array:
    """``up``, which ``x`` is the gate of; an op takes it with the ``act`` that is ``quantising``.

    Raises:
        TypeError: ``x`` or ``up`` is not BF16.
        ValueError: ``up`` and ``limit`` do not come together or with another ``act``, or the shape
            of ``up`` is not that of ``x``.
    """
    if up is None or limit is None:
        given = "limit" if up is None else "up"
        raise ValueError(f"{op}: up and limit must come together, got {given} alone")
    bfloat16 = (jnp.dtype(jnp.bfloat16),)
    check_operand(op, "x with up", x, "t g? k", bfloat16)
    check_operand(op, "up", up, "t g? k", bfloat16)
    if up.shape != x.shape:
        raise ValueError(f"{op}: up must be {list(x.shape)} as x, got {list(up.shape)}")
    if act != quantising:
        raise ValueError(f"{op}: act must be {quantising!r} for x with up, got {act!r}")
    return up


def check_groups(op: str, x: Array, name: str, weight: Array) -> None:
    """Raises `ValueError` when the groups of ``x`` do not share the weight's rows evenly."""
    if x.ndim == 3 and (x.shape[1] == 0 or weight.shape[0] % x.shape[1]):
        raise ValueError(
            f"{op}: {name} must split evenly over x's {x.shape[1]} groups, got {list(weight.shape)}"
        )


def check_scalar(op: str, name: str, x: Array) -> None:
    """A global scale: FP32 without axes."""
    check_operand(op, name, x, "*lead", FLOAT32)
    if x.shape != ():
        raise ValueError(f"{op}: {name} must be a scalar, got {list(x.shape)}")


def scratch_bytes(t: int, groups: int, k: int) -> int:
    """``LinearScratchBytes`` of ffi/common/linear.h."""
    tokens, inputs = -(-t // 128) * 128, -(-k // 128) * 128
    return tokens * groups * (inputs * 2 + 4) + 256


def linear_call(
    op: str,
    x: Array,
    weights: Sequence[Array],
    scales: Sequence[Array],
    *,
    act: str | None,
    dtypes: Sequence[DTypeLike],
    regime: Regime | None,
    more: Sequence[Array] = (),
    **attributes: np.generic,
) -> list[Array]:
    """Calls ``dsv4.<op>`` with checked operands: ``y [t, n]`` or ``[t, g, n / g]`` per weight.

    ``more``: operands behind the scales.
    """
    t, k = x.shape[0], x.shape[-1]
    groups = x.shape[1] if x.ndim == 3 else 1
    shapes = [(*x.shape[:-1], weight.shape[0] // groups) for weight in weights]
    settings: dict[str, Any] = dict(attributes)
    if act is not None:
        settings["act"] = ACTS[act]
    *results, _ = library.call(
        op,
        [
            *map(jax.ShapeDtypeStruct, shapes, dtypes),
            jax.ShapeDtypeStruct((scratch_bytes(t, groups, k),), jnp.uint8),
        ],
        x,
        *weights,
        *scales,
        *more,
        **settings,
        regime=np.int32(REGIMES[regime]),
    )
    return results
