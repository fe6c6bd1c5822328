"""Router of the routed experts (model.md section 5.1)."""

import jax
import jax.numpy as jnp
from jax import lax

from reference import linear


def router(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    expert_idx: jax.Array | None,
    k: int,
    scale: float,
    regime: str | None = None,
    tokens: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Experts of each token and their weights.

    `score = sqrt(softplus(W x))` in FP32; the picks are the `k` largest `score + bias` (lowest
    index first on ties), or `expert_idx` in hash layers; `weight_i = score_i / sum_i score_i *
    scale`, from the scores without bias.

    Args:
        x: `[t, dim]`.
        weight: `[e, dim]`.
        bias: `[e]`, or None in hash layers.
        expert_idx: `tid2eid[tokens] [t, k]` in hash layers, else None; with `tokens` the table
            `tid2eid [v, k]` itself.
        k: Picks per token.
        scale: `routed_scaling_factor`.
        regime: Which kernel serves the product; here there is one.
        tokens: `[t]`, ids outside the table held to its ends.

    Returns:
        `expert_idx [t, k]` and `expert_weight [t, k]`.
    """
    if tokens is not None and expert_idx is not None:
        expert_idx = expert_idx[jnp.clip(tokens, 0, expert_idx.shape[0] - 1)]
    score = jnp.sqrt(jax.nn.softplus(linear.product(x, weight)))
    if expert_idx is None:
        _, expert_idx = lax.top_k(score if bias is None else score + bias, k)
    picked = jnp.take_along_axis(score, expert_idx, axis=-1)
    return expert_idx, picked / jnp.sum(picked, axis=-1, keepdims=True) * scale
