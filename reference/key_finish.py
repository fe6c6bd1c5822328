"""From a key's projection to where attention reads it (model.md section 3.2)."""

import jax
import jax.numpy as jnp

from reference import attention, rmsnorm, rmsnorm_fp8, rope
from reference.rounding import Rounding


def key_finish(
    kv: jax.Array,
    weight: jax.Array,
    start: jax.Array,
    frequencies: jax.Array,
    eps: float,
    *,
    form: str,
    ring: jax.Array | None = None,
    count: jax.Array | None = None,
    query: tuple[jax.Array, jax.Array] | None = None,
    query_form: str = "fp8",
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """`bf(rope(bf(RMSNorm(kv))))` of `kv [b, t, d]`, token `j` of row `i` at `start[i] + j`.

    `form="fp8"`: the channels before the rotary ones through `q8`, blocks of 64. `query`: low-rank
    queries `[n, r]` and the weight `[r]` of `rmsnorm_fp8`, or of `bf(RMSNorm)` by `query_form`.

    Returns:
        The values `[b, t, d]` that codes and scales stand for, and the ring `[b, s, d]` after the
        first `count[i]` tokens of every row have gone to their slots `position % s`; and the values
        of the query's norm.
    """
    points = Rounding(bf16=True, kv_fp8=form == "fp8")
    positions = start[:, None] + jnp.arange(kv.shape[1])
    y = rmsnorm.rmsnorm(kv, weight, eps, points)
    y = rope.rope_tail(y, positions, frequencies, rounding=points)
    rows = jnp.stack([attention.key_quant(row, 2 * len(frequencies), points) for row in y])
    normed = None
    if query is not None and query_form == "fp8":
        normed = rmsnorm_fp8.rmsnorm_fp8(*query, eps)
    elif query is not None:
        normed = rmsnorm.rmsnorm(*query, eps, points)
    if ring is None or count is None:
        return rows, ring, normed
    for i in range(ring.shape[0]):
        for j in range(int(count[i])):
            ring = ring.at[i, (int(start[i]) + j) % ring.shape[1]].set(rows[i, j])
    return rows, ring, normed
