"""A model with the surface of ``DeepseekV4`` and arithmetic one can follow: the generation tests.

The logits after a token depend on the row's whole history through an integer hash that the cache
keeps, and on nothing else; so ragged, chunked and solo runs must agree bitwise.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

VOCAB = 97


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class FakeCache:
    """The history hash, and the fields that generation reads."""

    history: jax.Array
    lengths: jax.Array
    overflow: jax.Array
    max_len: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class FakeModel:
    """Hashable by its fields.

    Attributes:
        eos_token_id: in the configuration.
        poison_at: logits are NaN where a row that starts with token ``poison_row`` has this length.
        poison_row: see ``poison_at``.
        follow: logits point at the successor of the last token instead of at a hash.
    """

    eos_token_id: int = 1
    poison_at: int = -1
    poison_row: int = -1
    follow: bool = False
    traces: Any = dataclasses.field(default_factory=list, compare=False)

    @property
    def config(self) -> Any:
        return SimpleNamespace(
            max_position_embeddings=4096,
            vocab_size=VOCAB,
            eos_token_id=self.eos_token_id,
            bos_token_id=0,
        )

    def init_cache(self, *, batch_size: int, max_len: int) -> FakeCache:
        return FakeCache(
            history=jnp.zeros((batch_size, 2), jnp.uint32),
            lengths=jnp.zeros(batch_size, jnp.int32),
            overflow=jnp.zeros(batch_size, jnp.bool_),
            max_len=max_len,
        )

    def apply(
        self,
        variables: Any,
        tokens: jax.Array,
        cache: FakeCache,
        *,
        num_tokens: jax.Array,
        logits: str,
    ) -> tuple[jax.Array, FakeCache]:
        """Appends tokens; logits of padding mean nothing, those of a row without are zeros."""
        self.traces.append(tokens.shape)  # runs once per compilation

        def append(state: tuple[jax.Array, ...], column: tuple[jax.Array, jax.Array]):
            history, lengths, overflow, at = state
            token, index = column
            wanted = index < num_tokens
            real = wanted & (lengths < cache.max_len)
            first = jnp.where(lengths == 0, token.astype(jnp.uint32), history[:, 1])
            mixed = history[:, 0] * jnp.uint32(1664525) + token.astype(jnp.uint32) + jnp.uint32(7)
            history = jnp.where(real[:, None], jnp.stack([mixed, first], axis=1), history)
            at = jnp.where(real, token, at)
            state = (history, lengths + real.astype(jnp.int32), overflow | (wanted & ~real), at)
            return state, (state if logits == "all" else None)

        start = (cache.history, cache.lengths, cache.overflow, tokens[:, 0])
        columns = (tokens.T, jnp.arange(tokens.shape[1], dtype=jnp.int32))
        (history, lengths, overflow, at), steps = jax.lax.scan(append, start, columns)
        scale = variables["params"]["scale"]
        if steps is not None:
            scores = jnp.swapaxes(self._scores(steps[0], steps[1], steps[3], scale), 0, 1)
        else:
            scores = self._scores(history, lengths, at, scale)
            scores = jnp.where((num_tokens > 0)[:, None], scores, 0)
        return scores, FakeCache(history, lengths, overflow, cache.max_len)

    def _scores(self, history: Any, lengths: Any, at: Any, scale: Any) -> jax.Array:
        """Logits ``[..., vocab]`` of states ``[...]``."""
        vocab = jnp.arange(VOCAB, dtype=jnp.uint32)
        mixed = (history[..., :1] + vocab) * jnp.uint32(2654435761)
        scores = (mixed >> jnp.uint32(8)).astype(jnp.float32) * jnp.float32(4 / 2**24)
        if self.follow:
            scores = (vocab == (at[..., None] + 1).astype(jnp.uint32)).astype(jnp.float32)
        scores = scores * scale
        poisoned = (history[..., 1] == jnp.uint32(self.poison_row % 2**32)) & (
            lengths == self.poison_at
        )
        return jnp.where(poisoned[..., None], jnp.nan, scores)


def fake_config(vocab_size: int = 1000) -> Any:
    """For commands that read the configuration before they load; any tokenizer fits it."""
    return SimpleNamespace(**vars(FakeModel().config) | {"vocab_size": vocab_size})


def fake_params() -> Any:
    """The parameters of ``FakeModel``."""
    return {"scale": jnp.ones((), jnp.float32)}
