"""A model that gives answers it was told: the chat tests."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tests.support.fake_model import FakeModel


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class ScriptedCache:
    """All tokens so far, and the fields that generation reads."""

    tokens: jax.Array
    lengths: jax.Array
    overflow: jax.Array
    max_len: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class ScriptedModel(FakeModel):
    """The answer after the n-th assistant token (and the think token behind it) is the n-th script.

    Attributes:
        scripts: token ids of the answers; EOS follows.
        assistant: id of the assistant token.
        vocab: number of logits.
        poison: logits are NaN in this answer.
    """

    scripts: tuple[tuple[int, ...], ...] = ()
    assistant: int = 3
    vocab: int = 270
    poison: int = -1

    @property
    def config(self) -> Any:
        config = super().config
        config.vocab_size = self.vocab
        return config

    def init_cache(self, *, batch_size: int, max_len: int) -> Any:
        return ScriptedCache(
            tokens=jnp.full((batch_size, max_len), -1, jnp.int32),
            lengths=jnp.zeros(batch_size, jnp.int32),
            overflow=jnp.zeros(batch_size, jnp.bool_),
            max_len=max_len,
        )

    def apply(
        self,
        variables: Any,
        tokens: jax.Array,
        cache: Any,
        *,
        num_tokens: jax.Array,
        logits: str,
    ) -> tuple[jax.Array, Any]:
        """Appends tokens of every row, and there are some of each."""
        self.traces.append(tokens.shape)
        at = jnp.arange(cache.max_len)[None, :] - cache.lengths[:, None]
        new = jnp.take_along_axis(tokens, jnp.clip(at, 0, tokens.shape[1] - 1), axis=1)
        held = jnp.where((at >= 0) & (at < num_tokens[:, None]), new, cache.tokens)
        lengths = cache.lengths + num_tokens
        asked = held == self.assistant
        turn = asked.sum(axis=1) - 1
        last = jnp.where(asked, jnp.arange(cache.max_len), -1).max(axis=1)
        size = max(map(len, self.scripts)) + 1
        script = jnp.asarray([[*s, *[self.eos_token_id] * (size - len(s))] for s in self.scripts])
        step = jnp.clip(lengths - last - 2, 0, size - 1)
        wanted = script[jnp.clip(turn, 0, len(self.scripts) - 1), step]
        scores = jax.nn.one_hot(wanted, self.vocab) * variables["params"]["scale"]
        scores = jnp.where((turn == self.poison)[:, None], jnp.nan, scores)
        return scores, ScriptedCache(held, lengths, cache.overflow, cache.max_len)
