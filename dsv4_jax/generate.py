"""Prefill, decode step and generation on top of ``model.apply``.

The jitted functions take the model as a static argument and the cache donated: a cache that was
passed in is gone afterwards (JAX raises ``Array has been deleted`` on use), take the returned one.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache import Cache
from dsv4_jax.loop import (
    STEPS,
    Feed,
    Made,
    Settings,
    decode_steps,
    sample_next,
    step_model,
    stepwise,
    stop_ids,
)
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.typing import Array, Float32, Params

__all__ = [
    "Completion",
    "FinishReason",
    "TokenEvent",
    "check_lengths",
    "check_request",
    "decode_step",
    "default_chunk",
    "generate",
    "prefill",
    "prefill_chunk",
    "stream",
]

FinishReason = Literal["eos", "length", "stop", "invalid_logits"]
"""``eos``: the end token; ``length``: max_new_tokens reached; ``stop``: another stop token, or
``on_token`` asked for it; ``invalid_logits``: NaN, +Inf or only -Inf."""

OnToken = Callable[[int, int], object]

_SMALLEST_BUCKET = 8
_CPU_CHUNK = 256  # and the smallest of a GPU
_CALL_TOKENS = 4096


class Model(Protocol):
    """What generation needs of a model; hashable, as a static argument of ``jax.jit``.

    With ``logits="last"`` its ``apply`` gives zeros to a row that takes no tokens.
    """

    @property
    def config(self) -> Any: ...
    def init_cache(self, *, batch_size: int, max_len: int) -> Any: ...
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...


_LONG_CALL_TOKENS = 1024
"""Of a call that is not captured on a GPU: the device needs longer for its launches than the host,
and would be captured anew with every cache."""


def _chunk(
    model: Model, params: Params, tokens: Array, cache: Cache, num_tokens: Array
) -> tuple[Array, Cache]:
    """One call of a prefill: logits of each row's last real token, zeros of rows without."""
    return model.apply({"params": params}, tokens, cache, num_tokens=num_tokens, logits="last")


_jit = functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
prefill_chunk = _jit(_chunk)
_long_prefill_chunk = _jit(_chunk, compiler_options={"xla_gpu_enable_command_buffer": ""})


@functools.partial(jax.jit, donate_argnames="last")
def _latest(logits: Array, num_tokens: Array, last: Array) -> Array:
    """Logits of a further call, or ``last`` of rows without tokens in it."""
    return jnp.where((num_tokens > 0)[:, None], logits, last)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _decode(
    model: Model, params: Params, tokens: Array, cache: Cache, active: Array
) -> tuple[Array, Cache]:
    return step_model(model, params, tokens, cache, active, None)


def _check_ids(where: str, ids: np.ndarray, vocab: int) -> None:
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{where}: token ids must be integers, got dtype {ids.dtype}")
    bad = ids[(ids < 0) | (ids >= vocab)]
    if bad.size:
        raise ValueError(f"{where}: token ids must be in [0, {vocab}), got {bad.flat[0]}")


def _check_room(where: str, lengths: np.ndarray, counts: np.ndarray, max_len: int) -> None:
    over = np.flatnonzero((lengths + counts > max_len) & (counts > 0))
    if over.size:
        row = over[0]
        raise ValueError(
            f"{where}: row {row} holds {lengths[row]} tokens and would take {counts[row]} more, "
            f"{lengths[row] + counts[row]} in all, but the cache has max_len {max_len}"
        )


def default_chunk(rows: int) -> int:
    """Tokens of a row in one call of the model: 256 on the CPU.

    On a GPU as many as make 4,096 with those of all rows, a power of two, at least 256: a call
    reads nearly all experts however few its tokens are.
    """
    if jax.default_backend() == "cpu":
        return _CPU_CHUNK
    each = max(_CPU_CHUNK, _CALL_TOKENS // max(rows, 1))
    return 1 << (each.bit_length() - 1)


def _parts(
    ids: np.ndarray, counts: np.ndarray, chunk_size: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of every call of a prefill: its tokens, and how many of them each row takes."""
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    total = int(counts.max(initial=0))
    for start in range(0, total, chunk_size):
        rest = total - start
        width = min(chunk_size, max(_SMALLEST_BUCKET, 1 << (rest - 1).bit_length()))
        chunk = np.zeros((ids.shape[0], width), np.int32)
        part = ids[:, start : start + width]
        chunk[:, : part.shape[1]] = part
        parts.append((chunk, np.clip(counts - start, 0, width).astype(np.int32)))
    return parts


def prefill(
    model: Model,
    params: Params,
    tokens: Array | np.ndarray | Sequence[Sequence[int]],
    cache: Cache,
    *,
    num_tokens: Array | np.ndarray | Sequence[int] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float32[Array, "b v"], Cache]:
    """Appends a prompt, or more of one, to every row of the cache.

    Runs in chunks of ``chunk_size`` tokens; the rest is padded to a power of two, so that few
    shapes are ever compiled. Waits once for the lengths of the cache.

    Args:
        model: the Flax module.
        params: its parameters.
        tokens: int [b, t], rows padded on the right.
        cache: donated.
        num_tokens: real tokens of each row, int [b] in [0, t]; ``None``: all t.
        chunk_size: most tokens of a row per call of the model; ``None``: `default_chunk`.

    Returns:
        The logits of each row's last real token (zeros for a row without any), and the cache.

    Raises:
        ValueError: wrong shape, a token id outside the vocabulary, or a row that would pass
            ``max_len``. The cache is untouched then.
    """
    ids = np.asarray(tokens)
    b = cache.lengths.shape[0]
    if ids.ndim != 2 or ids.shape[0] != b:
        raise ValueError(f"prefill: tokens must be [{b}, t], as the cache, got {list(ids.shape)}")
    if chunk_size is None:
        chunk_size = default_chunk(b)
    if chunk_size < 1:
        raise ValueError(f"prefill: chunk_size must be >= 1, got {chunk_size}")
    cache.lengths.copy_to_host_async()  # they come while the host does what follows
    t = ids.shape[1]
    counts = np.full(b, t, np.int64) if num_tokens is None else np.asarray(num_tokens)
    if counts.shape != (b,) or counts.dtype.kind not in "iu":
        raise ValueError(
            f"prefill: num_tokens must be int [{b}], got {counts.dtype} {list(counts.shape)}"
        )
    counts = counts.astype(np.int64)
    if ((counts < 0) | (counts > t)).any():
        raise ValueError(f"prefill: num_tokens must be in [0, {t}], got {counts.tolist()}")
    real = np.arange(t)[None, :] < counts[:, None]
    if real.any():
        _check_ids("prefill", ids[real], model.config.vocab_size)
    parts = _parts(np.where(real, ids, 0), counts, chunk_size)
    _check_room("prefill", np.asarray(cache.lengths, np.int64), counts, cache.max_len)

    last: Array | None = None
    for chunk, here in parts:
        long = jax.default_backend() != "cpu" and chunk.size >= _LONG_CALL_TOKENS
        logits, cache = (_long_prefill_chunk if long else prefill_chunk)(
            model=model, params=params, tokens=chunk, cache=cache, num_tokens=here
        )
        last = logits if last is None else _latest(logits, here, last)
    if last is None:
        return jax.device_put(np.zeros((b, model.config.vocab_size), np.float32)), cache
    return last, cache


def decode_step(
    model: Model,
    params: Params,
    next_tokens: Array | np.ndarray | Sequence[int],
    cache: Cache,
    *,
    active: Array | np.ndarray | Sequence[bool] | None = None,
) -> tuple[Float32[Array, "b v"], Cache]:
    """Appends one token to every active row.

    Never waits for the device, so it does not know the lengths: a row that is full drops the
    token and sets ``cache.overflow``; ``generate`` checks before it starts.

    Args:
        model: the Flax module.
        params: its parameters.
        next_tokens: int [b]. Host values are checked against the vocabulary, device arrays not.
        cache: donated.
        active: bool [b]; other rows are left as they are and their logits mean nothing.

    Returns:
        The logits after the token, and the cache.

    Raises:
        ValueError: wrong shape, or a host token id of an active row outside the vocabulary.
    """
    b = cache.lengths.shape[0]
    if active is None:
        active = np.ones(b, np.bool_)
    elif not isinstance(active, jax.Array):
        active = np.array(active)  # a copy: dispatch is asynchronous
    if active.shape != (b,) or active.dtype != np.bool_:
        raise ValueError(
            f"decode_step: active must be bool [{b}], got {active.dtype} {list(active.shape)}"
        )
    if not isinstance(next_tokens, jax.Array):
        next_tokens = np.asarray(next_tokens)
        if next_tokens.shape == (b,) and isinstance(active, np.ndarray):
            _check_ids("decode_step", next_tokens[active], model.config.vocab_size)
    if next_tokens.shape != (b,):
        raise ValueError(
            f"decode_step: next_tokens must be [{b}], as the cache, got {list(next_tokens.shape)}"
        )
    if not jnp.issubdtype(next_tokens.dtype, jnp.integer):
        raise ValueError(f"decode_step: token ids must be integers, got {next_tokens.dtype}")
    return _decode(
        model=model,
        params=params,
        tokens=next_tokens.astype(np.int32),
        cache=cache,
        active=active,
    )


class Completion(list[int]):
    """The generated ids of one prompt, without prompt and stop token.

    Attributes:
        finish_reason: why it ended.
        error: what went wrong, for ``invalid_logits``; else ``None``.
    """

    def __init__(
        self, ids: Sequence[int], finish_reason: FinishReason, error: str | None = None
    ) -> None:
        super().__init__(ids)
        self.finish_reason: FinishReason = finish_reason
        self.error = error


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """One thing that happened to one sequence.

    Attributes:
        sequence: index of the prompt.
        token: the new id; ``None`` when the sequence ended without one.
        finish_reason: set on the last event of a sequence.
        error: as in ``Completion``.
    """

    sequence: int
    token: int | None
    finish_reason: FinishReason | None = None
    error: str | None = None


def check_lengths(lengths: Sequence[int], max_new_tokens: int, max_len: int | None) -> int:
    """The cache length for prompts of these lengths: ``max_len``, or the least that suffices.

    Raises:
        ValueError: max_new_tokens < 1, or a prompt and its completion do not fit ``max_len``.
    """
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be >= 1, got {max_new_tokens}")
    longest = max(lengths)
    if max_len is None:
        return longest + max_new_tokens - 1  # the last new token is never fed back
    if longest > max_len:
        raise ValueError(f"generate: a prompt has {longest} tokens, max_len is {max_len}")
    # The last new token is never fed back.
    if longest + max_new_tokens - 1 > max_len:
        raise ValueError(
            f"generate: a prompt of {longest} tokens and max_new_tokens {max_new_tokens} need "
            f"{longest + max_new_tokens - 1} positions, max_len is {max_len}"
        )
    return max_len


def _check_prompts(prompts: Sequence[Any], vocab: int) -> list[np.ndarray]:
    if len(prompts) == 0:
        raise ValueError("generate: prompts must not be an empty list")
    rows: list[np.ndarray] = []
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1:
            raise ValueError(
                f"generate: prompts must be a list of lists of token ids, prompt {i} is {prompt!r}"
            )
        if ids.size == 0:
            raise ValueError(f"generate: prompt {i} is empty")
        _check_ids(f"generate: prompt {i}", ids, vocab)
        rows.append(ids)
    return rows


def _check_seeds(seed: int | Sequence[int], b: int) -> np.ndarray:
    seeds = [seed] * b if isinstance(seed, int | np.integer) else list(seed)
    if len(seeds) != b:
        raise ValueError(f"generate: need one seed or one per prompt ({b}), got {len(seeds)}")
    for value in seeds:
        if not 0 <= value < 2**32:
            raise ValueError(f"generate: seed must be in [0, 2**32), got {value}")
    return np.array(seeds, np.uint32)


def check_request(
    config: Any,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int,
    seed: int | Sequence[int],
    max_len: int | None,
) -> tuple[list[np.ndarray], np.ndarray, int]:
    """Prompts, seeds and the cache length of a call of `generate`; needs no weights and no device.

    Raises:
        ValueError: as `generate`, but for the sampling settings.
    """
    rows = _check_prompts(prompts, config.vocab_size)
    seeds = _check_seeds(seed, len(rows))
    max_len = check_lengths([row.size for row in rows], max_new_tokens, max_len)
    if max_len > config.max_position_embeddings:
        raise ValueError(
            f"generate: max_len {max_len} exceeds the model's max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
    return rows, seeds, max_len


def stream(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | Sequence[int] = 0,
    max_len: int | None = None,
    stop_token_ids: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> Iterator[TokenEvent]:
    """Like ``generate``, as events while they happen.

    The arguments are checked in the call itself; the model runs as the iterator is read, `STEPS`
    decode steps at once (`dsv4_jax.loop`). Closing the iterator, or an exception in ``on_token``,
    ends the work; model and params are never touched and can be used again.

    Returns:
        An iterator; every sequence ends with exactly one event that has a ``finish_reason``.

    Raises:
        ValueError: as ``generate``.
    """
    config = model.config
    checked = SamplingParams(temperature, top_p, top_k)
    rows, seeds, max_len = check_request(
        config, prompts, max_new_tokens=max_new_tokens, seed=seed, max_len=max_len
    )
    settings = Settings.of(checked, jax.device_put(seeds))
    eos = int(config.eos_token_id)
    stops = frozenset((eos,) if stop_token_ids is None else map(int, stop_token_ids))

    def next_event(row: int, count: int, token: int, valid: bool) -> TokenEvent:
        """What becomes of a sampled token; ``count`` tokens of the row came before it."""
        if not valid:
            position = rows[row].size + count
            return TokenEvent(
                row,
                None,
                "invalid_logits",
                f"generate: the logits of sequence {row} for position {position} hold NaN or "
                "+Inf, or are all -Inf",
            )
        if token in stops:
            return TokenEvent(row, None, "eos" if token == eos else "stop")
        if on_token is not None and on_token(row, token):
            return TokenEvent(row, token, "stop")
        return TokenEvent(row, token, "length" if count + 1 == max_new_tokens else None)

    def events() -> Iterator[TokenEvent]:
        b = len(rows)
        longest = max(row.size for row in rows)
        cache = model.init_cache(batch_size=b, max_len=max_len)

        active, left = np.ones(b, np.bool_), np.full(b, max_new_tokens, np.int32)
        ends = stop_ids(stops, config.vocab_size)

        def made_by(step: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Iterator[TokenEvent]:
            """Events of a step's tokens, of those that are valid and of those that are kept."""
            tokens, valid, kept = step
            for row in np.flatnonzero(kept & active).tolist():
                count = max_new_tokens - int(left[row])
                event = next_event(row, count, int(tokens[row]), bool(valid[row]))
                left[row] -= 1
                active[row] = event.finish_reason is None
                yield event

        if stepwise(longest):
            feed = Feed.of(rows, active, left)
        else:
            padded = np.zeros((b, longest), np.int32)
            for i, row in enumerate(rows):
                padded[i, : row.size] = row
            sizes = np.array([row.size for row in rows])
            logits, cache = prefill(model, params, padded, cache, num_tokens=sizes)
            tokens, valid = jax.device_get(sample_next(logits, cache.lengths, settings))
            del logits
            yield from made_by((tokens, valid, active.copy()))
            feed = Feed.of(list(tokens[:, None]), active, left)

        def begin(feed: Feed, cache: Cache) -> tuple[Made, Cache, Feed]:
            return decode_steps(
                model=model,
                params=params,
                feed=feed,
                cache=cache,
                settings=settings,
                stops=ends,
            )

        made: Made | None = None
        while active.any():
            if made is None:
                made, cache, feed = begin(feed, cache)
            # The next call begins before this one's tokens are read, unless that ends every row.
            following = None
            if (left[active] > STEPS).any():
                following, cache, feed = begin(feed, cache)
            for step in zip(*jax.device_get(made), strict=True):
                yield from made_by(step)
            made = following

    return events()


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | Sequence[int] = 0,
    max_len: int | None = None,
    stop_token_ids: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> list[Completion]:
    """Continues every prompt; one jitted call per `STEPS` tokens of the batch (`dsv4_jax.loop`).

    A sequence's tokens depend on its prompt and its seed only, not on its neighbours or its
    place in the batch. Equal prompts with equal seeds give equal tokens: pass one seed per
    prompt for different ones.

    Args:
        model: the Flax module.
        params: its parameters.
        prompts: lists of token ids, of any lengths.
        max_new_tokens: most new tokens per prompt.
        temperature: 0 is greedy; see ``SamplingParams``.
        top_p: see ``SamplingParams``.
        top_k: see ``SamplingParams``.
        seed: one for all, or one per prompt, in [0, 2**32).
        max_len: positions of the cache; default: what the longest prompt needs.
        stop_token_ids: ids that end a sequence and are not part of it; default: the
            configuration's EOS. Empty: none.
        on_token: called with (index of the prompt, new id) for each new token; a true return
            value ends that sequence after this token.

    Returns:
        One ``Completion`` per prompt, in order.

    Raises:
        ValueError: no prompt, an empty one, an id outside the vocabulary, a sampling setting out
            of range, or a prompt that does not fit ``max_len``; before anything runs.
    """
    made: list[list[int]] = [[] for _ in prompts]
    ends: dict[int, TokenEvent] = {}
    for event in stream(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        max_len=max_len,
        stop_token_ids=stop_token_ids,
        on_token=on_token,
    ):
        if event.token is not None:
            made[event.sequence].append(event.token)
        if event.finish_reason is not None:
            ends[event.sequence] = event
    return [
        Completion(ids, cast(FinishReason, ends[i].finish_reason), ends[i].error)
        for i, ids in enumerate(made)
    ]
