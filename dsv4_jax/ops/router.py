"""Expert selection and weights (model.md 5.1)."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

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

    Raises:
        ValueError: neither or both of ``bias`` and ``expert_idx`` are given, or a shape disagrees.
    """
    if (bias is None) == (expert_idx is None):
        raise ValueError("router: give exactly one of bias and expert_idx")
    t, experts = x.shape[0], weight.shape[0]
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"router: bias must be [{experts}], got {list(bias.shape)}")
    if expert_idx is not None and expert_idx.shape != (t, k):
        raise ValueError(f"router: expert_idx must be {[t, k]}, got {list(expert_idx.shape)}")
    score = row_tiled(lambda z: jnp.sqrt(jax.nn.softplus(z)), dense_linear(x, weight))
    if expert_idx is None:
        _, expert_idx = lax.top_k(score + bias, k)
    expert_idx = jnp.sort(expert_idx, axis=-1)
    picked = jnp.take_along_axis(score, expert_idx, axis=-1)
    total = picked[:, 0]
    for i in range(1, k):
        total = total + picked[:, i]
    return expert_idx, picked / total[:, None] * jnp.float32(scale)
