"""Times the loop that generation uses, and its prefill, on random weights and caches."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from dsv4_jax.bench.profile import WITHOUT_GRAPHS, Launch, launches_of, op_names, traced
from dsv4_jax.bench.weights import random_cache
from dsv4_jax.generate import prefill, prefill_chunk
from dsv4_jax.loop import STEPS, Feed, Made, Settings, decode_steps, stop_ids
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.typing import Params

__all__ = [
    "WARM_CALLS",
    "Loop",
    "Times",
    "profiled",
    "profiled_prefill",
    "time_decode",
    "time_prefill",
]

WARM_CALLS = 3
"""The first call loads the program, the second may capture its launches, the third replays them."""
_NO_END = 2**30


class Times(NamedTuple):
    """Of calls: the median in us, and the distance of the quartiles over it."""

    us: float
    spread: float

    @classmethod
    def of(cls, seconds: list[float], parts: int = 1) -> "Times":
        """Of calls of ``parts`` equal parts, one of which is meant."""
        median = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [median] * 3
        return cls(median / parts * 1e6, (high - low) / median)


class Loop:
    """`decode_steps`, compiled for a model and called as `generate.stream` calls it.

    Tokens are sampled at temperature 1 and fed back; no sequence ends. The host reads the tokens of
    a call when it has begun the next one, as generation does, and waits for nothing else.

    Args:
        model: the Flax module.
        params: its parameters, as arrays or shapes.
        cache: donated by the first call.
        graphs: whether launches may be captured into graphs.
    """

    def __init__(self, model: Any, params: Params, cache: Any, *, graphs: bool = True) -> None:
        rows = cache.lengths.shape[0]
        seeds = jax.device_put(np.arange(rows, dtype=np.uint32))
        self._fixed: dict[str, Any] = {
            "params": params,
            "settings": Settings.of(SamplingParams(temperature=1.0), seeds),
            "stops": stop_ids(frozenset(), model.config.vocab_size),
        }
        # Of a profile each launch is to belong to the op that makes it.
        programs = None if graphs else False
        self._feed = Feed.of(
            [[0]] * rows, np.ones(rows, np.bool_), np.full(rows, _NO_END, np.int32)
        )
        self.cache = cache
        begin = time.perf_counter()
        lowered = decode_steps.lower(
            model=model, cache=cache, feed=self._feed, programs=programs, **self._fixed
        )
        self.compiled = lowered.compile(None if graphs else WITHOUT_GRAPHS)
        self.compile_s = time.perf_counter() - begin

    def _begin(self) -> Made:
        made, self.cache, self._feed = self.compiled(
            cache=self.cache, feed=self._feed, **self._fixed
        )
        return made

    def seconds(self, calls: int) -> list[float]:
        """Of every call, `STEPS` tokens of every row.

        Raises:
            ValueError: logits were not finite.
        """
        times: list[float] = []
        made = self._begin()
        for i in range(calls):
            begin = time.perf_counter()
            following = self._begin() if i + 1 < calls else made
            got = jax.device_get(made)
            times.append(time.perf_counter() - begin)
            if not (got.valid & got.kept).all():
                raise ValueError("bench: decode: logits must be finite, got NaN or Inf")
            made = following
        return times


def _loop(model: Any, params: Params, rows: int, context: int, calls: int, **how: bool) -> Loop:
    """Whose first call begins at ``context`` tokens a row."""
    return Loop(model, params, random_cache(model, rows, context + calls * STEPS, context), **how)


def time_decode(
    model: Any, params: Params, rows: int, context: int, calls: int
) -> tuple[Times, Loop]:
    """One step, of ``calls`` calls behind the first ones; sequences go on from ``context``."""
    loop = _loop(model, params, rows, context, WARM_CALLS + calls)
    loop.seconds(WARM_CALLS)
    return Times.of(loop.seconds(calls), STEPS), loop


def profiled(
    model: Any, params: Params, rows: int, context: int, calls: int
) -> tuple[list[Launch], int]:
    """The launches of some calls without graphs, and how many steps they were.

    Raises:
        ValueError: the profile holds no launches of a GPU, or none that belongs to a layer.
    """
    loop = _loop(model, params, rows, context, WARM_CALLS + calls, graphs=False)
    loop.seconds(WARM_CALLS)
    return _launches(model, loop.compiled, lambda: loop.seconds(calls)), calls * STEPS


def _launches(model: Any, compiled: Any, run: Callable[[], object]) -> list[Launch]:
    """Of ``run``, which calls the program."""
    launches = launches_of(traced(run), op_names(compiled.as_text() or ""))
    if model.config.num_hidden_layers and all(launch.layer is None for launch in launches):
        raise ValueError("bench: no launch of the profile could be traced to its layer")
    return launches


def time_prefill(
    model: Any, params: Params, rows: int, tokens: int, chunk: int, calls: int = 3
) -> tuple[Times, float]:
    """`generate.prefill` of a prompt into an empty cache, and the seconds of the first one.

    Raises:
        ValueError: logits were not finite.
    """
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (rows, tokens), np.int32)
    times: list[float] = []
    for _ in range(1 + calls):
        cache = jax.block_until_ready(model.init_cache(batch_size=rows, max_len=tokens))
        begin = time.perf_counter()
        logits, cache = prefill(model, params, ids, cache, chunk_size=chunk)
        jax.block_until_ready((logits, cache))
        times.append(time.perf_counter() - begin)
        if not np.isfinite(np.asarray(logits)).all():
            raise ValueError("bench: prefill: logits must be finite, got NaN or Inf")
        del cache
    return Times.of(times[1:]), times[0]


def profiled_prefill(model: Any, params: Params, rows: int, tokens: int) -> list[Launch]:
    """The launches of the one call, without graphs, that appends as many tokens to an empty cache.

    Raises:
        ValueError: the profile holds no launches of a GPU, or none that belongs to a layer.
    """
    rng = np.random.default_rng(0)
    fixed: dict[str, Any] = {
        "params": params,
        "tokens": rng.integers(0, model.config.vocab_size, (rows, tokens), np.int32),
        "num_tokens": np.full(rows, tokens, np.int32),
    }

    def fresh() -> Any:
        return model.init_cache(batch_size=rows, max_len=tokens)

    compiled = prefill_chunk.lower(model=model, cache=fresh(), **fixed).compile(WITHOUT_GRAPHS)
    for _ in range(WARM_CALLS):
        jax.block_until_ready(compiled(cache=fresh(), **fixed))
    cache = jax.block_until_ready(fresh())
    return _launches(model, compiled, lambda: jax.block_until_ready(compiled(cache=cache, **fixed)))
