"""Cosine, relative L2 and equal picks: per row on the device, summed in FP64 on the host."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.compare.results import Closeness, Operation
from dsv4_jax.typing import Array, Float32

__all__ = ["Sum", "differences", "numbers", "picks"]


def numbers(a: Array, b: Array) -> Float32[Array, "rows 3"]:
    """Per row: ``1 - cosine``, ``||a - b||^2`` and ``||a||^2``, FP32.

    ``1 - cosine = |a/||a|| - b/||b|| |^2 / 2`` keeps its digits where the cosine is near 1.
    """

    def unit(x: Array) -> tuple[Array, Array]:
        top = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        x = x / jnp.where(top > 0, top, 1)
        norm = jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True))
        return x / jnp.where(norm > 0, norm, 1), top[:, 0] == 0

    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    (unit_a, zero_a), (unit_b, zero_b) = unit(a), unit(b)
    apart = jnp.sum((unit_a - unit_b) ** 2, axis=-1) / 2
    apart = jnp.where(zero_a == zero_b, apart, 1)
    apart = jnp.where((a == b).all(axis=-1), 0, apart)  # XLA may sum the two norms differently
    return jnp.stack([apart, jnp.sum((a - b) ** 2, axis=-1), jnp.sum(a * a, axis=-1)], axis=-1)


def picks(a: Array, b: Array) -> Float32[Array, "rows 2"]:
    """Per row: how many of ``a``'s picks ``b`` has too, and how many there are (-1: none)."""
    real = a >= 0
    shared = real & (a[:, :, None] == b[:, None, :]).any(axis=-1)
    return jnp.stack([shared.sum(axis=-1), real.sum(axis=-1)], axis=-1).astype(jnp.float32)


@jax.jit
def differences(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(
        (picks if jnp.issubdtype(x.dtype, jnp.integer) else numbers)(x, y)
        for x, y in zip(a, b, strict=True)
    )


class Sum:
    """Rows of `numbers` or `picks` from all chunks, summed in FP64."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []

    def add(self, rows: np.ndarray) -> None:
        self._rows.append(rows.astype(np.float64))

    def closeness(self) -> Closeness:
        apart, difference, reference = np.concatenate(self._rows).T
        lost, size = float(difference.sum()), float(reference.sum())
        relative = math.sqrt(lost / size) if size > 0 else (0.0 if lost == 0 else math.inf)
        return Closeness(1 - float(apart.mean()), 1 - float(apart.max()), relative)

    def operation(self, path: str) -> Operation | None:
        """``None`` when there was not one row, or no pick."""
        rows = np.concatenate(self._rows)
        if rows.shape[1] == 3:
            return Operation(path, self.closeness(), None) if len(rows) else None
        shared, real = rows.sum(axis=0)
        return Operation(path, None, float(shared / real)) if real else None
