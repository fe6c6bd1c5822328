"""From an indexer query's projection to the scores (model.md section 3.5)."""

import jax

from reference import indexer, query_finish, rope
from reference.rounding import Rounding


def index_query_finish(
    q: jax.Array,
    positions: jax.Array,
    frequencies: jax.Array,
    *,
    form: str,
    heads: jax.Array | None = None,
    eps: float = 0.0,
    rounding: str = "float32",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`bf(hadamard(bf(rope(q))))` of `q [b, t, h, d]` at `positions [b, t]`.

    `form="mxfp4"`: through `q4`, blocks of 32. With `heads [b, t, n, c]` also `query_finish` of
    them, which takes `eps` and `rounding`.
    """
    points = Rounding(bf16=True, index_fp4=form == "mxfp4")
    turned = rope.rope_tail(q, positions[..., None], frequencies, rounding=points)
    rows = indexer.index_quant(turned, points)
    if heads is None:
        return rows
    return rows, query_finish.query_finish(heads, positions, frequencies, eps, rounding=rounding)
