"""Linear with unquantised weights (compressor projections, router, head)."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from dsv4_jax.ops._check import FLOATS, check_operand
from dsv4_jax.ops._linear import check_groups, check_result, linear_call
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import row_dot
from dsv4_jax.precision import Regime
from dsv4_jax.typing import Array, Float

__all__ = ["dense_linear"]


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
        regime: of the kernel on a GPU, ``decode`` or ``prefill``; ``None``: by the number of
            tokens. A row has the same bits in every call of one regime. Without effect on the CPU,
            where it has them in every call, and on FP32 operands.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: ``regime`` is unknown, the inner sizes disagree or are 0, or the groups do not
            divide ``weight``'s rows.
    """
    check_operand("dense_linear", "x", x, "t g? k", FLOATS)
    check_operand("dense_linear", "weight", weight, "n k", FLOATS)
    check_result("dense_linear", dtype, regime)
    n, k = weight.shape
    if x.shape[-1] != k or k == 0:
        raise ValueError(
            f"dense_linear: x and weight must agree on the last axis, at least 1, got x "
            f"{list(x.shape)} and weight {list(weight.shape)}"
        )
    check_groups("dense_linear", x, n, k)
    if x.dtype == weight.dtype == jnp.bfloat16:
        return linear_call("dense_linear", x, weight, (), act=None, dtype=dtype, regime=regime)
    x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    if x.ndim == 3:
        weight = weight.reshape(x.shape[1], n // x.shape[1], k)
    return round_to(row_dot(x, weight), dtype)
