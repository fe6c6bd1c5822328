"""A conversation: one row of a cache that stays between its turns.

A cache of rings and closed windows cannot be taken back to an earlier length in general
(`dsv4_jax.cache`). So a prompt that continues the tokens in the cache costs its new tokens only,
and any other one is computed from its beginning.
"""

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from dsv4_jax.cache import Cache
from dsv4_jax.generate import Model, TokenEvent, check_lengths, decode_step, default_chunk, prefill
from dsv4_jax.loop import Settings, sample_next, stepwise
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.typing import Array, Params

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Session"]


class Session:
    """Generates answers to prompts that mostly continue each other.

    Tokens are those that `generate` makes of the same prompt and settings (on a GPU: within one
    kernel regime). What was generated may be cut short at any time, also by an exception: `tokens`
    says what the cache holds, and a cache that was lost on the way is made anew by the next call.

    Args:
        model: the Flax module.
        params: its parameters.
        max_len: positions of the cache.

    Attributes:
        reused: tokens of the last prompt that the cache held already.
    """

    def __init__(self, model: Model, params: Params, *, max_len: int) -> None:
        limit = model.config.max_position_embeddings
        if not 1 <= max_len <= limit:
            raise ValueError(
                f"Session: max_len must be 1..{limit} (max_position_embeddings), got {max_len}"
            )
        self._model = model
        self._params = params
        self._cache: Cache | None = None
        self._tokens: list[int] = []
        self._turn = 0
        self.max_len = max_len
        self.reused = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that the cache holds."""
        return tuple(self._tokens) if self._cache is not None else ()

    def encode(self, tokenizer: "Tokenizer", text: str) -> list[int]:
        """Token ids of a prompt, those in the cache first where their text is its beginning.

        The model's own tokens are kept so: a text can be cut into tokens in more than one way, and
        the tokenizer need not cut an answer as the model did.
        """
        # Here alone: without text nothing in the package needs `tokenizers`.
        from dsv4_jax.text import IncrementalDetokenizer, encode

        detokenizer = IncrementalDetokenizer(tokenizer)
        held = detokenizer.push(*self.tokens) + detokenizer.flush()
        if held and text.startswith(held):
            return [*self.tokens, *encode(tokenizer, text[len(held) :])]
        return encode(tokenizer, text)

    def stream(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generator[TokenEvent]:
        """Continues a prompt, as `dsv4_jax.stream` does for one; ``reused`` is set at once.

        The model runs as the iterator is read. Closing it, or ``cancelled``, ends the work between
        two steps, and what the cache holds by then can be continued. Reading it after another call
        of `stream` is an error.

        Args:
            prompt: all tokens of the conversation.
            max_new_tokens: most new tokens.
            temperature: 0 is greedy; see ``SamplingParams``.
            top_p: see ``SamplingParams``.
            top_k: see ``SamplingParams``.
            seed: in [0, 2**32).
            cancelled: looked at between the chunks of the prompt and before every step; when it
                is true the iterator ends without a further event.

        Raises:
            ValueError: as `generate`; before anything runs, and the cache is as it was.
        """
        ids = np.asarray(prompt)
        config = self._model.config
        if ids.ndim != 1 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise ValueError(f"Session: prompt must be a list of token ids, got {prompt!r:.80}")
        bad = ids[(ids < 0) | (ids >= config.vocab_size)]
        if bad.size:
            raise ValueError(
                f"Session: token ids must be in [0, {config.vocab_size}), got {bad[0]}"
            )
        if not 0 <= seed < 2**32:
            raise ValueError(f"Session: seed must be in [0, 2**32), got {seed}")
        check_lengths([ids.size], max_new_tokens, self.max_len)
        checked = SamplingParams(temperature, top_p, top_k)
        settings = Settings.of(checked, np.array([seed], np.uint32))
        held = len(self.tokens)
        if held >= ids.size or ids[:held].tolist() != self._tokens:
            held = 0
        if held == 0:
            self._cache, self._tokens = None, []
        self.reused = held
        self._turn = turn = self._turn + 1

        def append(part: np.ndarray) -> Array:
            if turn != self._turn:
                raise RuntimeError("Session: an iterator must not be read after a further stream")
            return self._append(part)

        def events() -> Generator[TokenEvent]:
            eos = int(config.eos_token_id)
            parts = self._parts(ids[held:])
            for part in parts[:-1]:
                if cancelled():
                    return
                append(part)
            part = parts[-1]
            for count in range(max_new_tokens):
                if cancelled():
                    return
                logits = append(part)
                position = np.array([len(self._tokens)], np.int32)
                tokens, valid = jax.device_get(sample_next(logits, position, settings))
                if not valid[0]:
                    why = f"the logits for position {len(self._tokens)} hold NaN or +Inf, or are"
                    yield TokenEvent(0, None, "invalid_logits", f"Session: {why} all -Inf")
                    return
                token = int(tokens[0])
                if token == eos:
                    yield TokenEvent(0, None, "eos")
                    return
                yield TokenEvent(0, token, "length" if count + 1 == max_new_tokens else None)
                part = np.array([token])

        return events()

    @staticmethod
    def _parts(ids: np.ndarray) -> list[np.ndarray]:
        """How a prompt is fed, with a look at ``cancelled`` before each part: token by token, or in
        `prefill`'s own chunks."""
        size = 1 if stepwise(ids.size) else default_chunk(1)
        return [ids[start : start + size] for start in range(0, ids.size, size)]

    def _append(self, ids: np.ndarray) -> Array:
        """Feeds tokens; the logits after the last one.

        Until it returns the cache counts as lost: it is donated.
        """
        cache, self._cache = self._cache, None
        if cache is None:
            self._tokens = []
            cache = self._model.init_cache(batch_size=1, max_len=self.max_len)
        if ids.size == 1:
            logits, cache = decode_step(self._model, self._params, ids, cache)
        else:
            logits, cache = prefill(self._model, self._params, ids[None], cache)
        self._tokens += ids.tolist()
        self._cache = cache
        return logits
