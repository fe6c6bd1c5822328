"""What the device at hand can do: bytes read and copied, matrix products; by XLA, in this run."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["Ceilings", "Rate", "measured_ceilings"]

Rate = Literal["read", "copy", "bf16", "fp8"]
READ_BYTES: Final = 2 << 30
SIZE: Final = 8192


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a GPU can do: bytes/s read, and read and written; FLOP/s of 8192^3 on random data."""

    read: float
    copy: float
    bf16: float
    fp8: float

    def us(self, amount: float, rate: Rate) -> float:
        """Of so many bytes or operations."""
        return amount / getattr(self, rate) * 1e6


def _best_seconds(step: Callable[[Any], Any], state: Any, calls: int = 5) -> float:
    """Of one call of ``step(state) -> state``, whose results feed the next; the state is donated.

    Calls are queued one after the other, so that the host's part of them is hidden.
    """
    run = jax.jit(step, donate_argnums=0)
    state = jax.block_until_ready(run(run(state)))
    best = math.inf
    for _ in range(3):
        begin = time.perf_counter()
        for _ in range(calls):
            state = run(state)
        jax.block_until_ready(state)
        best = min(best, (time.perf_counter() - begin) / calls)
    return best


def measured_ceilings(size: int = SIZE, read_bytes: int = READ_BYTES) -> Ceilings:
    """What XLA reaches on this device: a sum, a copy with one bit changed, two matrix products."""
    words = jnp.arange(read_bytes // 4, dtype=jnp.uint32)

    def read(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        words, mark = state
        return words, jnp.max(words ^ mark)

    read_s = _best_seconds(read, (jnp.copy(words), jnp.uint32(1)))
    copy_s = _best_seconds(lambda words: words ^ 1, words)
    del words
    rates: dict[str, float] = {}
    for name, dtype in (("bf16", jnp.bfloat16), ("fp8", jnp.float8_e4m3fn)):
        a, b = (
            jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16).astype(dtype)
            for i in range(2)
        )

        def multiply(
            state: tuple[jax.Array, jax.Array, jax.Array],
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            a, b, _ = state
            dims = (((1,), (1,)), ((), ()))
            y = lax.dot_general(a, b, dims, preferred_element_type=jnp.bfloat16)
            return a, b, y

        seconds = _best_seconds(multiply, (a, b, jnp.zeros((size, size), jnp.bfloat16)))
        rates[name] = 2 * size**3 / seconds
    return Ceilings(read_bytes / read_s, 2 * read_bytes / copy_s, **rates)
