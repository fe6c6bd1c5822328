"""What every op asks of its operands before it touches them: dtype and rank, by name."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from dsv4_jax.typing import Array

__all__ = ["BOOL", "FLOAT32", "FLOATS", "INTEGERS", "as_int32", "check_choice", "check_operand"]

FLOATS = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
FLOAT32 = (jnp.dtype(jnp.float32),)
INTEGERS = (jnp.dtype(jnp.int32), jnp.dtype(jnp.int64))
BOOL = (jnp.dtype(jnp.bool_),)


def check_operand(op: str, name: str, x: Array, axes: str, dtypes: Sequence[DTypeLike]) -> None:
    """``axes`` names the axes; ``*lead`` stands for any number of them, ``g?`` for one or none.

    Raises:
        TypeError: the dtype is not one of ``dtypes``.
        ValueError: the rank does not fit ``axes``.
    """
    if x.dtype not in dtypes:
        accepted = " or ".join(jnp.dtype(d).name for d in dtypes)
        raise TypeError(f"{op}: {name} must be {accepted}, got {x.dtype}")
    names = axes.split()
    least = sum(not (a.startswith("*") or a.endswith("?")) for a in names)
    unbounded = any(a.startswith("*") for a in names)
    if x.ndim < least or (x.ndim > len(names) and not unbounded):
        raise ValueError(f"{op}: {name} must be [{', '.join(names)}], got {list(x.shape)}")


def check_choice(op: str, name: str, value: object, choices: Sequence[object]) -> None:
    """Raises `ValueError` when a static argument is not one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {list(choices)}, got {value!r}")


def as_int32(x: Array) -> Array:
    """Integers as a handler takes them: saturated, not wrapped round onto another position."""
    if x.dtype == jnp.int32:
        return x
    limits = jnp.iinfo(jnp.int32)
    return jnp.clip(x, limits.min, limits.max).astype(jnp.int32)
