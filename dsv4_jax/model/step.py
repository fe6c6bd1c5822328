"""What one call appends to a batch of sequences."""

from typing import NamedTuple

import jax.numpy as jnp

from dsv4_jax.cache import Cache
from dsv4_jax.config import LayerKind
from dsv4_jax.typing import Array, Bool, Int32

__all__ = ["Step", "make_step", "n_closed"]


class Step(NamedTuple):
    """Per-row bookkeeping of a chunk, shared by all layers.

    Attributes:
        tokens: ``[b, t]`` ids, right-padded.
        start: tokens each row held before.
        taken: tokens each row really takes now.
        positions: ``start + 0 .. t - 1``.
        valid: which of the ``t`` are taken.
        closed: `n_closed` by ratio; here, so that a step computes it once and not in a layer.
    """

    tokens: Int32[Array, "b t"]
    start: Int32[Array, "b"]
    taken: Int32[Array, "b"]
    positions: Int32[Array, "b t"]
    valid: Bool[Array, "b t"]
    closed: dict[int, Int32[Array, "b t"]]

    def ring_slots(self, ring: int) -> Int32[Array, "b t"]:
        """Ring row of every token that must survive, an out-of-range slot for the others."""
        keep = self.valid & (self.positions >= (self.start + self.taken)[:, None] - ring)
        return jnp.where(keep, self.positions % ring, ring)

    def closing(self, ratio: int) -> Int32[Array, "b w"]:
        """Windows that close in the chunk, behind them -1."""
        t = self.tokens.shape[1]
        first, end = self.start // ratio, (self.start + self.taken) // ratio
        window = first[:, None] + jnp.arange(-(-t // ratio), dtype=jnp.int32)
        return jnp.where(window < end[:, None], window, -1)


def n_closed(
    positions: Int32[Array, "b t"], valid: Bool[Array, "b t"], ratio: int
) -> Int32[Array, "b t"]:
    """Windows closed up to and including each position; 0 for padding."""
    return jnp.where(valid, (positions + 1) // ratio, 0)


def make_step(
    tokens: Int32[Array, "b t"], start: Array, num_tokens: Array, max_len: int
) -> tuple[Step, Bool[Array, "b"]]:
    """The step and the rows whose tokens do not all fit; those lose what lies past ``max_len``."""
    wanted = jnp.clip(num_tokens, 0, tokens.shape[1])
    taken = jnp.clip(wanted, 0, max_len - start)
    offset = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    positions, valid = start[:, None] + offset, offset < taken[:, None]
    ratios = (LayerKind.CSA.value, LayerKind.HCA.value)
    step = Step(
        tokens=tokens,
        start=start,
        taken=taken,
        positions=positions,
        valid=valid,
        closed={ratio: n_closed(positions, valid, ratio) for ratio in ratios},
    )
    return step, wanted > taken


def check_tokens(tokens: Array, cache: Cache, num_tokens: Array | None) -> Array:
    """Validates the arguments of a call; returns ``num_tokens`` as an int32 array.

    Raises:
        ValueError: shapes disagree.
        TypeError: ``tokens`` or ``num_tokens`` are not integers.
    """
    if tokens.ndim != 2 or tokens.shape[0] != cache.batch_size:
        raise ValueError(
            f"tokens must be [batch {cache.batch_size}, t] like the cache, got {list(tokens.shape)}"
        )
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got {tokens.dtype}")
    if num_tokens is None:
        return jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    num_tokens = jnp.asarray(num_tokens)
    if num_tokens.shape != tokens.shape[:1]:
        raise ValueError(f"num_tokens must be [{tokens.shape[0]}], got {list(num_tokens.shape)}")
    if not jnp.issubdtype(num_tokens.dtype, jnp.integer) and num_tokens.dtype != jnp.bool_:
        raise TypeError(f"num_tokens must be integers, got {num_tokens.dtype}")
    return num_tokens.astype(jnp.int32)
