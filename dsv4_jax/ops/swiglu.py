"""Clamped SwiGLU (model.md 5.2)."""

import functools

import jax
import jax.numpy as jnp

from dsv4_jax.ops._check import FLOATS, check_operand
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import row_tiled
from dsv4_jax.typing import Array, Float, Float32

__all__ = ["clamped_swiglu", "swiglu"]


def clamped_swiglu(
    gate: Float[Array, "*t i"], up: Float[Array, "*t i"], limit: float
) -> Float32[Array, "*t i"]:
    """``silu(min(gate, limit)) * clip(up, -limit, limit)`` in FP32."""
    gate = jnp.minimum(gate.astype(jnp.float32), limit)
    return jax.nn.silu(gate) * jnp.clip(up.astype(jnp.float32), -limit, limit)


@functools.partial(jax.jit, static_argnames=("limit",))
def swiglu(
    gate: Float[Array, "t i"], up: Float[Array, "t i"], *, limit: float
) -> Float[Array, "t i"]:
    """`clamped_swiglu` rounded once to ``gate``'s dtype.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: the shapes differ.
    """
    check_operand("swiglu", "gate", gate, "t i", FLOATS)
    check_operand("swiglu", "up", up, "t i", FLOATS)
    if gate.shape != up.shape:
        raise ValueError(
            f"swiglu: gate and up must agree, got {list(gate.shape)} and {list(up.shape)}"
        )

    def rows(gate: Array, up: Array) -> Array:
        return round_to(clamped_swiglu(gate, up, limit), gate.dtype)

    return row_tiled(rows, gate, up)
