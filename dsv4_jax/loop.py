"""Decode steps in one program: the model, the sampler and the stop conditions, on the device.

The host reads the tokens of `STEPS` steps at once. So it costs a fraction of a step to start the
next one, and nothing is waited for between two steps of a call, nor between two calls: what the
next one begins with is on the device.
"""

import functools
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv4_jax.cache import Cache
from dsv4_jax.program import fused
from dsv4_jax.sampling import Sampled, SamplingParams, choose, step_keys
from dsv4_jax.typing import Array, Bool, Int32, Params

__all__ = [
    "STEPS",
    "Feed",
    "Made",
    "Settings",
    "decode_steps",
    "sample_next",
    "step_model",
    "stepwise",
    "stop_ids",
]

STEPS: Final = 8
"""Of a call, whose tokens appear together: about 50 ms of V4-Flash at 6 ms a step, and of the model
in the package on two cores. On a GPU the steps behind the end of all sequences run empty."""

_NO_STOP: Final = -2  # no token, and not that of invalid logits


class Settings(NamedTuple):
    """What tokens are drawn with, traced: changing a number does not compile anew.

    On a GPU, what is off is None, and its program another: a branch that a number takes would make
    the device wait for the host in every step. On the CPU one program serves all.
    """

    seeds: Array
    temperature: np.float32 | None
    top_p: np.float32 | None
    top_k: np.int32 | None

    @classmethod
    def of(cls, params: SamplingParams, seeds: Any) -> "Settings":
        """From checked settings, for the default backend."""
        all_in_one = jax.default_backend() == "cpu"
        draws = all_in_one or params.temperature > 0
        filters = all_in_one or (draws and (params.top_p < 1 or params.top_k > 0))
        return cls(
            seeds,
            np.float32(params.temperature) if draws else None,
            np.float32(params.top_p) if filters else None,
            np.int32(params.top_k) if filters else None,
        )


class Feed(NamedTuple):
    """What a call of `decode_steps` begins with, from the host or from the call before.

    Attributes:
        tokens: to be fed first; behind them, and where -1, what was sampled. Column i is step i's.
        idle: steps that a row takes no part in before it begins.
        silent: steps whose samples are not kept: all but the last of a prompt.
        active: rows that take part.
        left: new tokens that a row may still make.
    """

    tokens: Int32[np.ndarray, "b k"] | Int32[Array, "b k"]
    idle: Int32[np.ndarray, "b"] | Int32[Array, "b"]
    silent: np.int32 | Int32[Array, ""]
    active: Bool[np.ndarray, "b"] | Bool[Array, "b"]
    left: Int32[np.ndarray, "b"] | Int32[Array, "b"]

    @classmethod
    def of(
        cls,
        rows: Sequence[Any],
        active: Bool[np.ndarray, "b"],
        left: Int32[np.ndarray, "b"],
    ) -> "Feed":
        """One to `STEPS` tokens a row; shorter rows begin later, all end with the same step."""
        longest = max(map(len, rows))
        tokens = np.full((len(rows), STEPS), -1, np.int32)
        idle = np.array([longest - len(row) for row in rows], np.int32)
        for i, row in enumerate(rows):
            tokens[i, idle[i] : longest] = row
        # Copies: dispatch is asynchronous.
        return cls(tokens, idle, np.int32(longest - 1), active.copy(), left.copy())


class Made(NamedTuple):
    """What a call gave, step by step: ``kept`` where a row made a token, ``valid`` as `Sampled`."""

    tokens: Int32[Array, "k b"]
    valid: Bool[Array, "k b"]
    kept: Bool[Array, "k b"]


@jax.jit
def sample_next(logits: Array, lengths: Array, settings: Settings) -> Sampled:
    """A token for every row, which takes the position ``lengths``."""
    seeds, temperature, top_p, top_k = cast(Any, settings)
    keys = step_keys(seeds, lengths)
    return choose(logits, keys, temperature=temperature, top_p=top_p, top_k=top_k)


def stepwise(tokens: int) -> bool:
    """Whether so many tokens of a prompt go through decode steps rather than a prefill.

    On the CPU the bits of steps are those of a prefill, and a few of them cost less than another
    large program does: seconds to load, longer to compile.
    """
    return tokens <= STEPS and jax.default_backend() == "cpu"


def stop_ids(ids: frozenset[int], vocab: int) -> Int32[np.ndarray, "s"]:
    """The ids as `decode_steps` takes them; one at least, so that most calls have one shape."""
    return np.array(sorted(i for i in ids if 0 <= i < vocab) or [_NO_STOP], np.int32)


def step_model(
    model: Any, params: Params, tokens: Array, cache: Cache, takes: Array, programs: bool | None
) -> tuple[Array, Cache]:
    """The logits behind one token of every row that takes it, and the cache.

    ``programs``: whether the model's calls are fused (`dsv4_jax.program`); ``None``: on a GPU,
    where it saves the pauses between them.
    """

    def apply(params: Params, tokens: Array, cache: Cache, takes: Array) -> tuple[Array, Cache]:
        count = takes.astype(jnp.int32)
        return model.apply(
            {"params": params}, tokens[:, None], cache, num_tokens=count, logits="last"
        )

    if programs is None:
        programs = jax.default_backend() != "cpu"
    return (fused(apply) if programs else apply)(params, tokens, cache, takes)


@functools.partial(jax.jit, static_argnames=("model", "programs"), donate_argnames="cache")
def decode_steps(
    model: Any,
    params: Params,
    feed: Feed,
    cache: Cache,
    settings: Settings,
    stops: Int32[np.ndarray, "s"],
    programs: bool | None = None,
) -> tuple[Made, Cache, Feed]:
    """`STEPS` steps; a row ends at a stop token, at invalid logits and when nothing is ``left``.

    A row that has ended, or that is idle, changes neither its cache nor its neighbours. Kept tokens
    include the one that ended a row. On the CPU the call returns when all rows have ended. The
    `Feed` goes on where the call ends.

    Args:
        model: the Flax module.
        params: its parameters.
        feed: see `Feed`.
        cache: donated.
        settings: see `Settings`.
        stops: see `stop_ids`.
        programs: see `step_model`.
    """
    fed, idle, silent, rows, most = map(jnp.asarray, feed)
    b = rows.shape[0]
    early = jax.default_backend() == "cpu"  # else the device would wait for the host every step

    def unfinished(state: Any) -> Any:
        i, active = state[0], state[2]
        return (i < STEPS) & jnp.any(active) if early else i < STEPS

    def step(state: Any) -> Any:
        i, tokens, active, left, cache, made = state
        given = lax.dynamic_index_in_dim(fed, i, 1, keepdims=False)
        tokens = jnp.where(given >= 0, given, tokens)
        takes = active & (i >= idle)
        logits, cache = step_model(model, params, tokens, cache, takes, programs)
        drawn = sample_next(logits, cache.lengths, settings)
        kept = takes & (i >= silent)
        left = left - kept.astype(jnp.int32)
        ends = (drawn.tokens[:, None] == stops).any(axis=1) | ~drawn.valid | (left <= 0)
        made = Made(
            *(
                lax.dynamic_update_index_in_dim(whole, row, i, 0)
                for whole, row in zip(made, (*drawn, kept), strict=True)
            )
        )
        tokens = jnp.where(kept, drawn.tokens, tokens)
        return i + 1, tokens, active & ~(kept & ends), left, cache, made

    nothing = jnp.zeros((STEPS, b), jnp.bool_)
    state = (
        jnp.int32(0),
        jnp.zeros(b, jnp.int32),
        rows,
        most,
        cache,
        Made(jnp.full((STEPS, b), -1, jnp.int32), nothing, nothing),
    )
    _, tokens, active, left, cache, made = lax.while_loop(unfinished, step, state)
    fed = jnp.full_like(fed, -1).at[:, 0].set(tokens)
    # The cache before the feed: donated arrays become the first results of their shape.
    return made, cache, Feed(fed, jnp.zeros_like(idle), jnp.zeros_like(silent), active, left)
