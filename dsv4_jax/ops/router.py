"""Expert selection and weights (model.md 5.1)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.ops._check import FLOAT32, FLOATS, INTEGERS, check_operand
from dsv4_jax.ops._rows import row_tiled
from dsv4_jax.ops.dense_linear import dense_linear
from dsv4_jax.typing import Array, Float, Float32, Int32

__all__ = ["router"]


@functools.partial(jax.jit, static_argnames=("k", "scale"))
def router(
    x: Float[Array, "t d"],
    weight: Float[Array, "e d"],
    bias: Float32[Array, "e"] | None,
    expert_idx: Int32[Array, "t k"] | None,
    *,
    k: int,
    scale: float,
) -> tuple[Int32[Array, "t k"], Float32[Array, "t k"]]:
    """Expert ids in ascending order and their weights.

    ``score = sqrt(softplus(weight . x))``; the ``k`` largest ``score + bias`` are taken, ties to
    the lower id, or ``expert_idx`` when the layer routes by token id;
    ``expert_weight = score / sum(score over the picks) * scale``.

    An id outside the experts has weight 0 and no part in the sum.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: neither or both of ``bias`` and ``expert_idx`` are given, a shape disagrees, or
            ``k`` exceeds the experts.
    """
    if (bias is None) == (expert_idx is None):
        raise ValueError("router: give exactly one of bias and expert_idx")
    check_operand("router", "x", x, "t d", FLOATS)
    check_operand("router", "weight", weight, "e d", FLOATS)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"router: x and weight must agree on the last axis, got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    t, experts = x.shape[0], weight.shape[0]
    if not 1 <= k <= experts:
        raise ValueError(f"router: k must be 1..{experts} (experts), got {k}")
    if bias is not None:
        check_operand("router", "bias", bias, "e", FLOAT32)
    if expert_idx is not None:
        check_operand("router", "expert_idx", expert_idx, "t k", INTEGERS)
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"router: bias must be [{experts}], got {list(bias.shape)}")
    if expert_idx is not None and expert_idx.shape != (t, k):
        raise ValueError(f"router: expert_idx must be {[t, k]}, got {list(expert_idx.shape)}")
    score = row_tiled(_sqrt_softplus, dense_linear(x, weight))
    if expert_idx is None:
        _, expert_idx = lax.top_k(score + bias, k)
    expert_idx = jnp.sort(expert_idx, axis=-1)
    inside = (expert_idx >= 0) & (expert_idx < experts)
    picked = jnp.take_along_axis(score, jnp.where(inside, expert_idx, 0), axis=-1)
    picked = jnp.where(inside, picked, 0)
    total = picked[:, 0]
    for i in range(1, k):
        total = total + picked[:, i]
    return expert_idx, picked / total[:, None] * jnp.float32(scale)


def _sqrt_softplus(z: Array) -> Array:
    """``exp(z / 2)`` below -20, where softplus is ``exp(z)`` to FP32 and would soon underflow."""
    return jnp.where(z < -20, jnp.exp(0.5 * z), jnp.sqrt(jax.nn.softplus(jnp.maximum(z, -20))))
