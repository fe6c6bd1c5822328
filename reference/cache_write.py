"""Rows of new entries into a ring or pool (model.md section 4.1)."""

from typing import Any

import jax
import jax.numpy as jnp


def cache_write(cache: Any, rows: Any, slots: jax.Array) -> Any:
    """`cache[i, slots[i, j]] = rows[i, j]`; a slot outside the cache drops its row.

    Trees of `cache [b, s, d]` and `rows [b, t, d]`, one `slots [b, t]` for all of them.
    """

    def write(cache: jax.Array, rows: jax.Array) -> jax.Array:
        s = cache.shape[1]
        kept = jnp.where((slots >= 0) & (slots < s), slots, s)
        return jax.vmap(lambda c, r, j: c.at[j].set(r, mode="drop"))(cache, rows, kept)

    return jax.tree.map(write, cache, rows)
