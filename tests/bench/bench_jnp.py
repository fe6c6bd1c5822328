"""The model in the package with its foreign calls, and with plain `jax.numpy` in their place.

``python -m tests.bench.bench_jnp`` prints one JSON line: tokens per second of both on this machine,
in one process, through the same loop, from the same weights, and how many greedy ids they share.

Plain are the ops' own forms for what has no kernel (`_attention_jax` and so on, `mhc_pre` and its
kin, `rmsnorm`, `rope`), and for the calls that have no such form those below: products of the
weights dequantised, a scatter, a top-k. XLA gets them in one program and may do with them what it
likes. `moe`'s form works on tiles of rows, which is of no use to one token: it is timed with tiles
of one row too, and the faster one counts.
"""

import argparse
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import dsv4_jax
from dsv4_jax import bundled_checkpoint, library
from dsv4_jax.loop import Feed, Settings, decode_steps, stop_ids
from dsv4_jax.model import attention, hc
from dsv4_jax.ops import _moe_jax
from dsv4_jax.ops._act import quantized_act
from dsv4_jax.ops._linear import ACTS
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import Tile, tile_dot
from dsv4_jax.ops.swiglu import clamped_swiglu
from dsv4_jax.quant import bits, fp8
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.text import encode, load_tokenizer
from dsv4_jax.typing import Array

__all__ = ["foreign_calls", "plain_ops", "run"]

PROMPT: Final = "def "
TOKENS: Final = 128
RUNS: Final = 3

# What keeps an op from its call: module of `dsv4_jax.ops`, name, value.
_WITHOUT: Final[tuple[tuple[str, str, Any], ...]] = (
    ("attention", "MAX_WIDTH", 0),
    ("compressor", "MAX_RATIO", 0),
    ("index_query_finish", "WIDTHS", ()),
    ("index_topk", "MAX_WIDTH", 0),
    ("key_finish", "MAX_WIDTH", 0),
    ("moe", "KERNEL_FORMATS", ()),
    ("query_finish", "MAX_WIDTH", 0),
)


def _linear(
    stored: str, results: Sequence[Any], operands: Sequence[Array], act: str, limit: float
) -> list[Array]:
    *results, scratch = results
    count = len(results)
    x, weights = operands[0], operands[1 : 1 + count]
    scales, up = operands[1 + count : 1 + 2 * count], operands[1 + 2 * count :]
    if up:
        x = round_to(clamped_swiglu(x, up[0], limit), x.dtype)
    rows = quantized_act(x, "fp8" if act == "fp8" else "bfloat16").value
    made: list[Array] = []
    for i, (weight, result) in enumerate(zip(weights, results, strict=True)):
        if stored == "fp8":
            weight = fp8.dequantize_weight(fp8.Fp8(weight, scales[i])).astype(jnp.bfloat16)
        if x.ndim == 3:
            weight = weight.reshape(x.shape[1], -1, weight.shape[1])
        made.append(tile_dot(rows, weight).astype(result.dtype))
    return [*made, jnp.zeros(scratch.shape, scratch.dtype)]


def _router(operands: Sequence[Array], results: Sequence[Any], given: int, scale: float) -> Any:
    logits, selector, *tokens = operands
    if tokens:
        selector = jnp.take(selector, tokens[0], axis=0, mode="clip")
    score = jnp.sqrt(jax.nn.softplus(logits))
    idx = selector if given else lax.top_k(score + selector, results[0].shape[1])[1]
    idx = jnp.sort(idx.astype(jnp.int32), axis=-1)
    picked = jnp.take_along_axis(score, idx, axis=-1)
    return [idx, picked / jnp.sum(picked, axis=-1, keepdims=True) * scale]


def _cache_write(operands: Sequence[Array]) -> list[Array]:
    slots, *parts = operands
    half = len(parts) // 2
    batch = jnp.arange(slots.shape[0], dtype=jnp.int32)[:, None]

    def write(cache: Array, rows: Array) -> Array:
        view = bits.byte_view(cache)
        at = jnp.where(slots < 0, cache.shape[1], slots)
        new = view.at[batch, at].set(bits.byte_view(rows), mode="drop", unique_indices=True)
        return bits.from_byte_view(new, cache.dtype)

    return list(map(write, parts[:half], parts[half:]))


def _call(op: str, results: Sequence[Any], *operands: Array, **settings: Any) -> list[Array]:
    """In the place of `library.call`."""
    if op in ("dense_linear", "fp8_linear"):
        act = next((name for name, n in ACTS.items() if n == settings.get("act")), "bfloat16")
        limit = float(settings.get("limit", 0))
        return _linear(op.removesuffix("_linear"), results, operands, act, limit)
    if op == "router":
        return _router(operands, results, int(settings["given"]), float(settings["scale"]))
    if op == "cache_write":
        return _cache_write(operands)
    raise ValueError(f"bench_jnp: {op} has no plain form here")


@contextmanager
def plain_ops(tiled: bool = True) -> Generator[None]:
    """Programs that are traced inside have no foreign calls. JAX's caches are dropped twice.

    ``tiled``: whether rows go in tiles, as in the package.
    """
    jax.clear_caches()
    with ExitStack() as stack:

        def put(module: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(module, name, value))

        for op, name, value in _WITHOUT:
            put(importlib.import_module(f"dsv4_jax.ops.{op}"), name, value)
        put(hc, "is_fused", lambda *_: False)
        put(attention, "rmsnorm_fp8_takes", lambda _: False)  # else it quantises for the linears
        put(library, "call", _call)
        if not tiled:
            put(_moe_jax, "ROW_TILE", 1)
            for name, module in list(sys.modules.items()):
                for function, whole in (("row_tiled", _all_rows), ("query_tiled", _all_queries)):
                    if name.startswith("dsv4_jax.") and hasattr(module, function):
                        put(module, function, whole)
        try:
            yield
        finally:
            jax.clear_caches()


def _all_rows(fn: Any, *rows: Array, tile: int = 0) -> Any:
    return fn(*rows)


def _all_queries(fn: Any, b: int, t: int) -> Array:
    return fn(Tile(jnp.int32(0), jnp.int32(0), b, t))


def foreign_calls(program: str) -> list[str]:
    """Targets of this package that a program calls, StableHLO or compiled."""
    return sorted(set(re.findall(r"dsv4\.\w+", program)))


class Greedy:
    """`decode_steps` of one sequence, lowered as things are patched now.

    Args:
        model: the Flax module.
        params: its parameters.
        prompt: ids, at most a call's steps.
        tokens: new ones of a run.
    """

    def __init__(self, model: Any, params: Any, prompt: Sequence[int], tokens: int) -> None:
        self.model, self.prompt, self.tokens = model, prompt, tokens
        self._fixed: dict[str, Any] = {
            "params": params,
            "settings": Settings.of(SamplingParams(), jax.device_put(np.zeros(1, np.uint32))),
            "stops": stop_ids(frozenset(), model.config.vocab_size),
        }
        cache, feed = jax.eval_shape(self._cache), self._feed(prompt, tokens)
        self.lowered = decode_steps.lower(model=model, cache=cache, feed=feed, **self._fixed)

    def compile(self) -> None:
        """Before the first run."""
        self.program = self.lowered.compile()

    def _cache(self) -> Any:
        return self.model.init_cache(batch_size=1, max_len=len(self.prompt) + self.tokens)

    def _feed(self, ids: Sequence[int], left: int) -> Feed:
        return Feed.of([ids], np.ones(1, np.bool_), np.full(1, left, np.int32))

    def run(self) -> tuple[list[int], float]:
        """New ids, and the seconds from the first call's tokens to the last's over their count.

        Raises:
            ValueError: logits were not finite.
        """
        cache, feed = self._cache(), self._feed(self.prompt, self.tokens)
        ids: list[int] = []
        first, begin = 0, 0.0
        while len(ids) < self.tokens:
            made, cache, feed = self.program(cache=cache, feed=feed, **self._fixed)
            made = jax.device_get(made)
            if not made.valid[made.kept].all():
                raise ValueError("bench_jnp: logits must be finite, got NaN or Inf")
            ids += made.tokens[made.kept].tolist()
            if not first:
                first, begin = len(ids), time.perf_counter()
        return ids, (time.perf_counter() - begin) / (len(ids) - first)


def run(tokens: int = TOKENS, runs: int = RUNS) -> dict[str, Any]:
    """Both, best of some runs that take turns.

    Raises:
        ValueError: a program has other calls than it should, or logits were not finite.
    """
    path = bundled_checkpoint()
    model, params = dsv4_jax.from_checkpoint(path, progress=False)
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise ValueError("bench_jnp: the model in the package has no tokenizer")
    prompt = encode(tokenizer, PROMPT)
    loops = {"foreign": Greedy(model, params, prompt, tokens)}
    for name, tiled in (("plain", True), ("plain, no tiles", False)):
        with plain_ops(tiled):
            loops[name] = Greedy(model, params, prompt, tokens)
    for name, loop in loops.items():
        loop.compile()
        calls = foreign_calls(loop.program.as_text() or "")
        if bool(calls) != (name == "foreign"):
            raise ValueError(f"bench_jnp: {name}: foreign calls are {calls}")
    ids: dict[str, list[int]] = {}
    best: dict[str, float] = {}
    for _ in range(runs):
        for name, loop in loops.items():
            ids[name], seconds = loop.run()
            best[name] = min(best.get(name, seconds), seconds)
    foreign, *plain = best.values()
    same = {name: _common(ids["foreign"], made) for name, made in ids.items()}
    return {
        "device": jax.local_devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "jax": jax.__version__,
        "dsv4_jax": dsv4_jax.__version__,
        "precision": "official",
        "tokens": tokens,
        "tokens_per_s": {name: round(1 / seconds, 1) for name, seconds in best.items()},
        "ratio": round(min(plain) / foreign, 2),
        "same_ids": same,
    }


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids are the same before the first that is not."""
    pairs = enumerate(zip(a, b, strict=True))
    return next((i for i, (x, y) in pairs if x != y), len(a))


def main(arguments: Sequence[str] | None = None) -> str | None:
    """Prints the JSON line; returns what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--runs", type=int, default=RUNS)
    given = parser.parse_args(arguments)
    try:
        print(json.dumps(run(given.tokens, given.runs)))
    except ValueError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
