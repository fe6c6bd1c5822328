"""Linear with unquantised weights (compressor projections, router, head)."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsv4_jax.ops._check import FLOATS, check_operand
from dsv4_jax.ops._linear import check_count, check_groups, check_result, dtypes_of, linear_call
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import row_dot
from dsv4_jax.precision import Regime
from dsv4_jax.typing import Array, Float

__all__ = ["dense_linear", "dense_linears"]


@functools.partial(jax.jit, static_argnames=("dtype", "regime"))
def dense_linear(
    x: Float[Array, "t *g k"],
    weight: Float[Array, "n k"],
    *,
    dtype: DTypeLike = jnp.float32,
    regime: Regime | None = None,
) -> Float[Array, "t *g m"]:
    """``y = x . weight^T`` with FP32 sums, rounded once to ``dtype``.

    Both operands BF16: every product is exact, and the op is a foreign call, without a gradient,
    under `jax.vmap` one call per element. With an FP32 operand both are taken to FP32 and XLA
    multiplies: there is no kernel for that. With a group axis in ``x`` the rows of ``weight`` are
    split evenly over the groups.

    Args:
        x: activations.
        weight: one row per output.
        dtype: of the result, ``float32`` or ``bfloat16``.
        regime: of the kernel on a GPU (`Precision`); ``None``: by the number of
            tokens. A row has the same bits in every call of one regime. Without effect on the CPU,
            where it has them in every call, and on FP32 operands.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: ``regime`` is unknown, the inner sizes disagree or are 0, or the groups do not
            divide ``weight``'s rows.
    """
    (y,) = _products("dense_linear", x, {"weight": weight}, (dtype,), regime)
    return y


@functools.partial(jax.jit, static_argnames=("dtype", "regime"))
def dense_linears(
    x: Float[Array, "t *g k"],
    weights: Sequence[Float[Array, "_ k"]],
    *,
    dtype: DTypeLike | tuple[DTypeLike, ...] = jnp.float32,
    regime: Regime | None = None,
) -> tuple[Float[Array, "t *g _"], ...]:
    """``dense_linear(x, weight)`` for each of several weights, the same bits, in one foreign call.

    With FP32 operands, under `jax.vmap` and in its lack of a gradient as `dense_linear`.

    Args:
        x: activations; with a group axis every weight's rows are split evenly over the groups.
        weights: 1 to 8 of one dtype, each with one row per output.
        dtype: of the results, as in `dense_linear`: one for all or one each.
        regime: as in `dense_linear`.

    Raises:
        TypeError: a dtype is not accepted, or a weight's is not that of the first.
        ValueError: there are no weights or more than 8, ``dtype`` holds another number of dtypes,
            ``regime`` is unknown, the inner sizes disagree or are 0, or the groups do not divide a
            weight's rows.
    """
    check_count("dense_linears", weights)
    dtypes = dtypes_of("dense_linears", dtype, len(weights))
    named = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    return tuple(_products("dense_linears", x, named, dtypes, regime))


def _products(
    op: str,
    x: Array,
    weights: Mapping[str, Array],
    dtypes: Sequence[DTypeLike],
    regime: Regime | None,
) -> list[Array]:
    """Of ``x`` with weights of one dtype, which errors call by their names."""
    check_operand(op, "x", x, "t g? k", FLOATS)
    for dtype in dtypes:
        check_result(op, dtype, regime)
    accepted = FLOATS
    for name, weight in weights.items():
        check_operand(op, name, weight, "n k", accepted)
        accepted = (weight.dtype,)
        k = weight.shape[1]
        if x.shape[-1] != k or k == 0:
            raise ValueError(
                f"{op}: x and {name} must agree on the last axis, at least 1, got x "
                f"{list(x.shape)} and {name} {list(weight.shape)}"
            )
        check_groups(op, x, name, weight)
    stored = tuple(weights.values())
    if x.dtype == stored[0].dtype == jnp.bfloat16:
        return linear_call("dense_linear", x, stored, (), act=None, dtypes=dtypes, regime=regime)
    return list(map(functools.partial(_product_in_fp32, x), stored, dtypes))


def _product_in_fp32(x: Array, weight: Array, dtype: DTypeLike) -> Array:
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    if x.ndim == 3:
        weight = weight.reshape(x.shape[1], weight.shape[0] // x.shape[1], weight.shape[1])
    return round_to(row_dot(x, weight), dtype)
