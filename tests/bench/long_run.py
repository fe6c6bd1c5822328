"""Thousands of tokens through the loop of `generate`, twice, and what must not change meanwhile.

``python -m tests.bench.long_run --tokens 20000`` prints one JSON line, on any backend. A model of
one layer of each kind with random weights, Flash's but for few experts and tokens (on the CPU the
weights are smaller, the caches Flash's), continues two prompts of different lengths, sampled on the
device from fixed seeds. Nothing may be compiled behind the first call, no array of the cache may
move, no memory may be added, and the second run must make the tokens of the first.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import jax
import numpy as np

import dsv4_jax
from dsv4_jax import DeepseekV4, ModelConfig, Precision
from dsv4_jax.bench.floor import cut
from dsv4_jax.bench.measure import WARM_CALLS
from dsv4_jax.bench.weights import random_params
from dsv4_jax.config import LayerKind
from dsv4_jax.loop import STEPS, Feed, Settings, decode_steps, stop_ids
from dsv4_jax.sampling import SamplingParams

__all__ = ["SIZES", "run"]

FLASH: Final = dataclasses.replace(
    cut(ModelConfig.flash(), (1, 3, 4)),  # SWA (hash-routed), HCA, CSA
    n_routed_experts=16,
    vocab_size=4096,
)
SMALL: Final = dataclasses.replace(
    FLASH,
    hidden_size=128,
    num_attention_heads=4,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=64,
    index_n_heads=4,
    index_topk=64,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    vocab_size=512,
)
SIZES: Final = {"flash": FLASH, "small": SMALL}
PROMPTS: Final = ([3, 1, 4, 1, 5, 9, 2], [6, 5])
"""Of one call's steps at most: the loop feeds them, and windows close at different steps."""
COMPILED: Final = "/jax/core/compile/backend_compile_duration"


class Memory(NamedTuple):
    """In bytes: the device's by its allocator (None where it keeps no count), the process's, and
    all arrays that JAX holds."""

    device: int | None
    rss: int
    arrays: int

    @classmethod
    def now(cls) -> "Memory":
        """Of the first device."""
        stats = jax.local_devices()[0].memory_stats() or {}
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        arrays = sum(x.nbytes for x in jax.live_arrays())
        return cls(stats.get("bytes_in_use"), pages * os.sysconf("SC_PAGE_SIZE"), arrays)


@contextmanager
def compilations() -> Generator[Callable[[], int]]:
    """How many programs were compiled since.

    Raises:
        ValueError: this JAX does not say.
    """
    count = 0

    def listen(event: str, duration: float, **_: Any) -> None:
        nonlocal count
        count += event == COMPILED

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(jax.jit(lambda x: x + 1)(np.float32(0)))
        if not count:
            raise ValueError(f"a compilation must be an event {COMPILED}, got none")
        count = 0
        yield lambda: count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def final_lengths(tokens: int) -> np.ndarray:
    """Of the rows: the last new token is never fed back."""
    return np.array([len(prompt) + tokens - 1 for prompt in PROMPTS])


def decoded(model: Any, params: Any, tokens: int) -> Generator[np.ndarray]:
    """New ids ``[n, rows]``, call by call.

    Raises:
        ValueError: logits were not finite, a token was lost, or an array of the cache moved.
    """
    rows, lengths = len(PROMPTS), final_lengths(tokens)
    cache = model.init_cache(batch_size=rows, max_len=int(lengths.max()))
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
    seeds = jax.device_put(np.arange(rows, dtype=np.uint32))
    fixed: dict[str, Any] = {
        "model": model,
        "params": params,
        "settings": Settings.of(SamplingParams(temperature=1.0), seeds),
        "stops": stop_ids(frozenset(), model.config.vocab_size),
    }
    active, left = np.ones(rows, np.bool_), np.full(rows, tokens, np.int32)
    feed = Feed.of(PROMPTS, active, left)
    while left.any():
        at = f"behind {tokens - left[0]} tokens"
        made, cache, feed = decode_steps(cache=cache, feed=feed, **fixed)
        made = jax.device_get(made)
        kept = made.kept.all(axis=1)
        if not kept.any() or (made.kept != kept[:, None]).any():
            raise ValueError(f"{at}: every row must make tokens, got {made.kept.tolist()}")
        if not made.valid[kept].all():
            raise ValueError(f"{at}: logits must be finite, got NaN or Inf")
        if [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)] != places:
            raise ValueError(f"{at}: the cache must stay where it is, an array of it moved")
        new = made.tokens[kept]
        left -= len(new)
        yield new
    if (np.asarray(cache.lengths) != lengths).any() or np.asarray(cache.overflow).any():
        raise ValueError(f"rows must hold {lengths.tolist()}, got {cache.lengths.tolist()}")


def run(tokens: int, size: str | None = None, preset: str = "official") -> dict[str, Any]:
    """Both runs; ``tokens`` are new ones of every row, ``seconds`` those of the second run.

    Memory is as it was behind the first run's `WARM_CALLS` and behind the second's last call.

    Raises:
        ValueError: as `decoded`; or ``tokens`` is too small, or there is no such preset.
    """
    least = STEPS * (WARM_CALLS + 1)
    if tokens < least:
        raise ValueError(f"tokens must be >= {least}, got {tokens}")
    if size is None:
        size = "flash" if jax.default_backend() == "gpu" else "small"
    config = SIZES[size]
    model = DeepseekV4(config, Precision.preset(preset))
    params = jax.block_until_ready(random_params(config, model.precision))
    ids = np.empty((2, tokens, len(PROMPTS)), np.int32)
    compiled: list[int] = []
    memory: list[Memory] = []
    seconds = 0.0
    with compilations() as count:
        for made in ids:
            done, begin = 0, time.perf_counter()
            for new in decoded(model, params, tokens):
                made[done : done + len(new)] = new
                done += len(new)
                compiled.append(count())
                if len(compiled) == WARM_CALLS or done == tokens:
                    memory.append(Memory.now())
            seconds = time.perf_counter() - begin
    before, after = memory[0], memory[-1]
    lengths = final_lengths(tokens)
    return {
        "device": jax.local_devices()[0].device_kind,
        "jax": jax.__version__,
        "dsv4_jax": dsv4_jax.__version__,
        "size": size,
        "precision": preset,
        "prompts": [len(prompt) for prompt in PROMPTS],
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(ids[1].size / seconds, 1),
        "compiled_by_first_call": compiled[0],
        "compiled_later": compiled[-1] - compiled[0],
        "identical": bool((ids[0] == ids[1]).all()),
        "distinct_tokens": len(np.unique(ids)),
        "ring_wraps": (lengths // config.sliding_window).tolist(),
        "closed": {
            kind.name: (lengths // kind.value).tolist() for kind in (LayerKind.CSA, LayerKind.HCA)
        },
        "device_bytes": [before.device, after.device],
        "rss_bytes": [before.rss, after.rss],
        "array_bytes": [before.arrays, after.arrays],
    }


def main(arguments: Sequence[str] | None = None) -> str | None:
    """Prints the JSON line; returns what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=20000, help="new ones of every row")
    parser.add_argument("--size", choices=sorted(SIZES), help="flash on a GPU, else small")
    parser.add_argument("--precision", default="official")
    given = parser.parse_args(arguments)
    try:
        result = run(given.tokens, given.size, given.precision)
    except ValueError as error:
        return f"long_run: {error}"
    print(json.dumps(result))
    if result["compiled_later"]:
        return "long_run: something was compiled behind the first call"
    return None if result["identical"] else "long_run: the second run made other tokens"


if __name__ == "__main__":
    sys.exit(main())
