"""From a query's projection to attention (model.md sections 3.1, 3.3)."""

import jax

from reference import rmsnorm, rope
from reference.rounding import Rounding


def query_finish(
    q: jax.Array, positions: jax.Array, frequencies: jax.Array, eps: float, *, rounding: str
) -> jax.Array:
    """`bf(rope(bf(head_norm(q))))` of `q [b, t, h, d]` at `positions [b, t]`.

    `rounding="bfloat16"`: the norm in BF16 steps, as the official code has it.
    """
    points = Rounding(bf16=True, bf16_q_norm=rounding == "bfloat16")
    normed = rmsnorm.head_norm(q, eps, points)
    return rope.rope_tail(normed, positions[..., None], frequencies, rounding=points)
