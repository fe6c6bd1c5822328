"""Where two models of one architecture part: per layer, per op, per token, in bits per byte.

Meant for one checkpoint in two precision presets, ``a`` the reference. Three ways of running:

- *free*: each model on its own streams; differences of earlier layers add up.
- *equal inputs*: every layer of ``b`` on the streams that ``a`` feeds the same layer, with a cache
  of its own that only ever saw those; so a difference belongs to that layer.
- *alone*: ``a`` everywhere but for one part (the embedding, one layer, the head), which ``b``
  computes; the bits per byte say what that part costs.

Layers of one kind are compiled once, whatever their number: `Block` runs on its own parameters.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.cache import LayerCache
from dsv4_jax.compare.measure import Sum, differences
from dsv4_jax.compare.outputs import Outputs, Recorder
from dsv4_jax.compare.results import (
    Closeness,
    Comparison,
    Layer,
    Operation,
    Part,
    Token,
    size,
)
from dsv4_jax.evaluate import Progress, log_softmax
from dsv4_jax.model import DeepseekV4
from dsv4_jax.model.block import Block
from dsv4_jax.model.step import make_step
from dsv4_jax.typing import Array, Float, Float32, Int32, Params

__all__ = [
    "Closeness",
    "Comparison",
    "Layer",
    "Operation",
    "Part",
    "Token",
    "cache_copies",
    "cache_positions",
    "compare",
]

_CHUNK = 256


@functools.partial(jax.jit, static_argnames=("block", "max_len"), donate_argnames="cache")
def _run_layer(
    block: Block,
    params: Params,
    streams: Float[Array, "1 t hc d"],
    cache: LayerCache,
    tokens: Int32[Array, "1 t"],
    start: Int32[Array, "1"],
    count: Int32[Array, "1"],
    *,
    max_len: int,
) -> tuple[Float[Array, "1 t hc d"], LayerCache, Outputs]:
    """One layer of one sequence, and what its modules gave."""
    step, _ = make_step(tokens, start, count, max_len)
    recorder = Recorder(block.config.n_routed_experts)
    (streams, cache), kept = block.apply(
        {"params": params},
        streams,
        cache,
        step,
        capture_intermediates=recorder.keep,
        mutable=["intermediates"],
    )
    return streams, cache, recorder.outputs(kept["intermediates"], step.valid[0])


@functools.partial(jax.jit, static_argnames="model")
def _embed(model: DeepseekV4, params: Params, tokens: Int32[Array, "1 t"]) -> Array:
    out: Any = model.apply({"params": params}, tokens, method="embed_tokens")
    return out


@functools.partial(jax.jit, static_argnames="model")
def _run_head(
    model: DeepseekV4, params: Params, streams: Float[Array, "1 t hc d"], count: Int32[Array, "1"]
) -> tuple[Float32[Array, "t v"], Outputs]:
    recorder = Recorder(0)
    logits, kept = model.apply(
        {"params": params},
        streams,
        method="head_logits",
        capture_intermediates=recorder.keep,
        mutable=["intermediates"],
    )
    valid = jnp.arange(streams.shape[1]) < count
    outputs = recorder.outputs(kept["intermediates"], valid)
    return logits[0], Outputs(
        (*outputs.names, "logits"), (*outputs.values, logits[0]), (*outputs.rows, valid)
    )


@jax.jit
def _log2_of(logits: Float32[Array, "t v"], targets: Int32[Array, "t"]) -> Float32[Array, "t"]:
    return jnp.take_along_axis(log_softmax(logits), targets[:, None], axis=-1)[:, 0] / math.log(2)


@jax.jit
def _divergence(
    a: Float32[Array, "t v"], b: Float32[Array, "t v"]
) -> tuple[Float32[Array, "t"], Int32[Array, "t"], Int32[Array, "t"]]:
    """``KL(a || b)`` in bits and both most likely tokens."""
    log_a, log_b = log_softmax(a), log_softmax(b)
    terms = jnp.where(log_a == log_b, 0, jnp.exp(log_a) * (log_a - log_b))
    return jnp.sum(terms, axis=-1) / math.log(2), jnp.argmax(a, -1), jnp.argmax(b, -1)


class _Operations:
    """The outputs of the modules of one layer, from all chunks."""

    def __init__(self) -> None:
        self._sums: dict[str, Sum] = {}

    def add(self, a: Outputs, b: Outputs) -> None:
        found = jax.device_get((differences(a.values, b.values), a.rows))
        for name, rows, real in zip(a.names, *found, strict=True):
            self._sums.setdefault(name, Sum()).add(rows[real])

    def result(self) -> tuple[Operation, ...]:
        found = (total.operation(name) for name, total in self._sums.items())
        return tuple(operation for operation in found if operation is not None)


class _Stack:
    """One model, layer by layer, on one sequence; a cache per use of a layer."""

    def __init__(self, model: DeepseekV4, params: Params, max_len: int) -> None:
        c, p = model.config, model.precision
        self.model, self.params, self.max_len = model, params, max_len
        self.blocks = [
            Block(c, p, c.layer_kind(i), c.is_hash_layer(i), p.experts)
            for i in range(c.num_hidden_layers)
        ]
        names = ("embed", "hc_head", "norm", "head")
        self._ends: Params = {name: params[name] for name in names}

    def caches(self, first: int = 0) -> dict[int, LayerCache]:
        """Empty caches of the layers from ``first`` on."""
        layers = self.model.init_cache(batch_size=1, max_len=self.max_len).layers
        return {i: layers[i] for i in range(first, len(layers))}

    def cast(self, streams: Array) -> Array:
        """Streams of the other model in this one's format."""
        return streams.astype(jnp.dtype(self.model.precision.streams))

    def embed(self, tokens: np.ndarray) -> Array:
        return _embed(model=self.model, params=self._ends, tokens=tokens)

    def layer(
        self, i: int, streams: Array, caches: dict[int, LayerCache], chunk: Mapping[str, np.ndarray]
    ) -> tuple[Array, Outputs]:
        out, caches[i], outputs = _run_layer(
            block=self.blocks[i],
            params=self.params[f"layers_{i}"],
            streams=streams,
            cache=caches[i],
            max_len=self.max_len,
            **chunk,
        )
        return out, outputs

    def head(self, streams: Array, count: np.ndarray) -> tuple[Array, Outputs]:
        return _run_head(model=self.model, params=self._ends, streams=streams, count=count)


def _rows(streams: Array) -> Array:
    """Streams as one vector per token."""
    return streams.reshape(streams.shape[1], -1)


def _check(
    a: DeepseekV4, b: DeepseekV4, tokens: np.ndarray, num_bytes: int, chunk_size: int
) -> None:
    if a.config != b.config:
        raise ValueError("compare: both models must have the same config")
    vocab, limit = a.config.vocab_size, a.config.max_position_embeddings
    if tokens.ndim != 1 or tokens.size == 0 or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"compare: tokens must be integers [n], n >= 1, got {tokens.dtype} {list(tokens.shape)}"
        )
    bad = tokens[(tokens < 0) | (tokens >= vocab)]
    if bad.size:
        raise ValueError(f"compare: token ids must be in [0, {vocab}), got {bad[0]}")
    if tokens.size > limit:
        raise ValueError(
            f"compare: {tokens.size} tokens exceed the model's max_position_embeddings {limit}"
        )
    for name, value in (("num_bytes", num_bytes), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"compare: {name} must be >= 1, got {value}")


def cache_positions(num_tokens: int, limit: int, chunk_size: int = _CHUNK) -> int:
    """Positions of the caches that `compare` makes."""
    width = min(chunk_size, num_tokens)
    return min(-(-num_tokens // width) * width, limit)


def cache_copies(layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How often `compare` holds the cache of each layer, for ``a`` and for ``b``."""
    # ``a``: the reference, with another embedding, and with each layer before it or itself alone.
    return tuple(i + 2 for i in range(layers)), (2,) * layers


def compare(
    a: tuple[DeepseekV4, Params],
    b: tuple[DeepseekV4, Params],
    tokens: Sequence[int] | np.ndarray,
    *,
    num_bytes: int,
    worst: int = 20,
    chunk_size: int = _CHUNK,
    progress: Progress | None = None,
) -> Comparison:
    """Runs the same text through two models and says where they differ.

    Every token is predicted from BOS and all tokens before it, as in `evaluate`. Costs about
    ``layers / 2`` passes of ``a`` for the parts alone. Numbers that are not finite are reported,
    not refused. Streams are cast where they pass from one model to the other.

    Args:
        a: the reference: model and parameters.
        b: another with the same config: another preset, or changed parameters.
        tokens: int ``[n]``, without BOS.
        num_bytes: UTF-8 bytes that the tokens stand for.
        worst: how many tokens to list.
        chunk_size: tokens per call.
        progress: called with (chunks done, chunks in total).

    Raises:
        ValueError: the configs differ, there is no token, one is outside the vocabulary, there are
            more than ``max_position_embeddings``, or a size is below 1.
    """
    targets = np.asarray(tokens)
    _check(a[0], b[0], targets, num_bytes, chunk_size)
    config, n = a[0].config, targets.size
    width = min(chunk_size, n)
    chunks = -(-n // width)
    max_len = cache_positions(n, config.max_position_embeddings, chunk_size)
    one, two = _Stack(*a, max_len), _Stack(*b, max_len)
    layers = range(config.num_hidden_layers)
    padded = np.zeros((1, chunks * width), np.int32)
    padded[0, :n] = targets
    bos = np.full((1, 1), config.bos_token_id, np.int32)
    inputs = np.concatenate([bos, padded[:, :-1]], axis=1)

    caches_a, caches_b, caches_equal = one.caches(), two.caches(), two.caches()
    names = ["embed", *(f"layer {i}" for i in layers)]
    alone = {name: one.caches(first) for first, name in enumerate(names)}
    free, equal = [Sum() for _ in layers], [Sum() for _ in layers]
    operations = [_Operations() for _ in layers]
    head, final = _Operations(), Sum()
    log2: dict[str, list[np.ndarray]] = {name: [] for name in ("a", "b", *names, "head")}
    divergences: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    for index in range(chunks):
        here = slice(index * width, (index + 1) * width)
        real = min(width, n - index * width)
        count = np.array([real], np.int32)
        chunk = {
            "tokens": inputs[:, here],
            "start": np.array([index * width], np.int32),
            "count": count,
        }
        streams_a, streams_b = one.embed(inputs[:, here]), two.embed(inputs[:, here])
        parts = {"embed": one.cast(streams_b)}
        for i in layers:
            after_a, outputs_a = one.layer(i, streams_a, caches_a, chunk)
            after_equal, outputs_b = two.layer(i, two.cast(streams_a), caches_equal, chunk)
            operations[i].add(outputs_a, outputs_b)
            after_b, _ = two.layer(i, streams_b, caches_b, chunk)
            reference = _rows(after_a)
            pairs = ((reference, reference), (_rows(after_b), _rows(after_equal)))
            found_free, found_equal = jax.device_get(differences(*pairs))
            free[i].add(found_free[:real])
            equal[i].add(found_equal[:real])
            for name, streams in tuple(parts.items()):
                parts[name], _ = one.layer(i, streams, alone[name], chunk)
            parts[f"layer {i}"] = one.cast(after_equal)
            streams_a, streams_b = after_a, after_b

        logits_a, outputs_a = one.head(streams_a, count)
        logits_b, _ = two.head(streams_b, count)
        logits_head, outputs_b = two.head(two.cast(streams_a), count)
        head.add(outputs_a, outputs_b)
        (found,) = jax.device_get(differences((logits_a,), (logits_b,)))
        final.add(found[:real])
        kl, top_a, top_b = jax.device_get(_divergence(logits_a, logits_b))
        divergences.append((kl[:real], top_a[:real], top_b[:real]))
        all_logits = {"a": logits_a, "b": logits_b, "head": logits_head}
        for name in log2:
            logits = all_logits[name] if name in all_logits else one.head(parts[name], count)[0]
            log2[name].append(np.asarray(_log2_of(logits, padded[0, here]), np.float64)[:real])
        if progress is not None:
            progress(index + 1, chunks)

    per_token = {name: np.concatenate(found) for name, found in log2.items()}
    bits = {name: -math.fsum(found) for name, found in per_token.items()}
    kl, top_a, top_b = map(np.concatenate, zip(*divergences, strict=True))
    difference = per_token["b"] - per_token["a"]
    order = sorted(range(n), key=lambda i: (-size(float(difference[i])), i))[: max(worst, 0)]
    return Comparison(
        num_tokens=n,
        num_bytes=num_bytes,
        bits_a=bits["a"],
        bits_b=bits["b"],
        logits=final.closeness(),
        kl_bits=float(kl.astype(np.float64).mean()),
        top1_agreement=float((top_a == top_b).mean()),
        layers=tuple(
            Layer(
                i,
                config.layer_kind(i).name.lower(),
                free[i].closeness(),
                equal[i].closeness(),
                operations[i].result(),
            )
            for i in layers
        ),
        head=head.result(),
        parts=tuple(
            Part(name, bits[name] / num_bytes, (bits[name] - bits["a"]) / num_bytes)
            for name in (*names, "head")
        ),
        worst=tuple(
            Token(
                position=i,
                token=int(targets[i]),
                log2_a=float(per_token["a"][i]),
                log2_b=float(per_token["b"][i]),
                difference=float(difference[i]),
                top_a=int(top_a[i]),
                top_b=int(top_b[i]),
            )
            for i in order
        ),
    )
