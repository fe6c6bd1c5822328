"""Linear with unquantised weights and FP32 result (compressor projections, router, head, mHC)."""

import jax
import jax.numpy as jnp

from dsv4_jax.ops._check import FLOATS, check_operand
from dsv4_jax.ops._rows import row_dot
from dsv4_jax.typing import Array, Float, Float32

__all__ = ["dense_linear"]


@jax.jit
def dense_linear(
    x: Float[Array, "t *g k"], weight: Float[Array, "n k"]
) -> Float32[Array, "t *g m"]:
    """``y = x . weight^T`` with FP32 sums, not rounded.

    Both operands BF16: every product is exact. Otherwise both are taken to FP32. With a group axis
    in ``x`` the rows of ``weight`` are split evenly over the groups.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: the inner sizes disagree, or the groups do not divide ``weight``'s rows.
    """
    check_operand("dense_linear", "x", x, "t g? k", FLOATS)
    check_operand("dense_linear", "weight", weight, "n k", FLOATS)
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"dense_linear: x and weight must agree on the last axis, got x {list(x.shape)} and "
            f"weight {list(weight.shape)}"
        )
    if x.ndim == 3 and weight.shape[0] % x.shape[1]:
        raise ValueError(
            f"dense_linear: weight must split evenly over x's {x.shape[1]} groups, "
            f"got {list(weight.shape)}"
        )
    if x.dtype != jnp.bfloat16 or weight.dtype != jnp.bfloat16:
        x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    if x.ndim == 3:
        weight = weight.reshape(x.shape[1], weight.shape[0] // x.shape[1], weight.shape[1])
    return row_dot(x, weight)
