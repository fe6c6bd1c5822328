"""From an indexer query's projection to the scores (model.md section 3.5)."""

import jax

from reference import indexer, rope
from reference.rounding import Rounding


def index_query_finish(
    q: jax.Array, positions: jax.Array, frequencies: jax.Array, *, form: str
) -> jax.Array:
    """`bf(hadamard(bf(rope(q))))` of `q [b, t, h, d]` at `positions [b, t]`.

    `form="mxfp4"`: through `q4`, blocks of 32.
    """
    points = Rounding(bf16=True, index_fp4=form == "mxfp4")
    turned = rope.rope_tail(q, positions[..., None], frequencies, rounding=points)
    return indexer.index_quant(turned, points)
