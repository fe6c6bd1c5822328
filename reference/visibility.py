"""What a query may attend to (model.md section 3.4)."""

import jax
import jax.numpy as jnp


def window(t: int, width: int) -> jax.Array:
    """`[t, t]`: query `i` sees raw keys `max(0, i - width + 1) ... i`, itself included."""
    query, key = jnp.arange(t)[:, None], jnp.arange(t)[None, :]
    return (key <= query) & (key > query - width)


def entries(t: int, n: int, m: int) -> jax.Array:
    """`[t, n]`: query `i` sees entries `w < floor((i + 1) / m)`.

    An entry is visible from the very token that completes its window.
    """
    return jnp.arange(n)[None, :] < (jnp.arange(t)[:, None] + 1) // m
