"""What a step must move and compute: bytes and operations of the weights and caches it touches.

A floor counts what is read. Weights count once a call, routed experts as many as uniform picks of
so many tokens are expected to choose (a skewed router reads less). What a step writes, and
activations, are left out: they are small.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np

from dsv4_jax.checkpoint.names import (
    Parameter,
    leaves,
    parameters,
    tree_bytes,
)
from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.precision import LINEAR_FORMATS, Precision, act_format

__all__ = [
    "GROUPS",
    "OUTSIDE",
    "Work",
    "cache_bytes",
    "cut",
    "decode_bytes",
    "expected_experts",
    "prefill_work",
    "weight_bytes",
]

GROUPS: Final[tuple[str, ...]] = (
    "hyper-connections",
    "attention linears",
    "compressors",
    "indexer",
    "attention",
    "router",
    "shared expert",
    "experts",
    "rest",
)
"""Parts of a layer. Norms belong to what they are computed with: those before the branches to the
hyper-connections, the others to the linears. ``compressors`` has all products of the call that
computes their projections."""
OUTSIDE: Final = "embedding, head, sampling"
"""What a step does outside of its layers."""


def cut(config: ModelConfig, layers: Sequence[int], *, score_routed: bool = False) -> ModelConfig:
    """A model of some layers (in ascending order), with embedding and head, without MTP.

    Args:
        score_routed: whether even hash-routed layers become score-routed ones.

    Raises:
        ValueError: no such layer.
    """
    for layer in layers:
        if not 0 <= layer < config.num_hidden_layers:
            raise ValueError(f"cut: layers must be 0..{config.num_hidden_layers - 1}, got {layer}")
    return dataclasses.replace(
        config,
        num_hidden_layers=len(layers),
        num_hash_layers=0 if score_routed else sum(map(config.is_hash_layer, layers)),
        compress_ratios=tuple(config.compress_ratios[layer] for layer in layers),
        num_nextn_predict_layers=0,
    )


def expected_experts(config: ModelConfig, tokens: int) -> float:
    """Distinct experts that uniform picks of so many tokens choose."""
    e, k = config.n_routed_experts, config.num_experts_per_tok
    return e * (1 - (1 - k / e) ** tokens)


def _group(parameter: Parameter) -> str:
    kind = parameter.kind
    if kind.startswith(("hc_", "attn_norm", "ffn_norm")):
        return "hyper-connections"
    if "compressor" in kind or kind == "attn.indexer.weights_proj":
        return "compressors"
    if kind.startswith("attn."):
        return "attention" if kind == "attn.attn_sink" else "attention linears"
    parts = {"ffn.gate": "router", "ffn.shared_experts": "shared expert", "ffn.experts": "experts"}
    return next(group for start, group in parts.items() if kind.startswith(start))


def _alike(config: ModelConfig) -> Counter[int]:
    """Layers that have the parameters of no layer before them, and how many each stands for."""
    first: dict[tuple[LayerKind, bool], int] = {}
    layers = range(config.num_hidden_layers)
    return Counter(
        first.setdefault((config.layer_kind(i), config.is_hash_layer(i)), i) for i in layers
    )


def _layer(config: ModelConfig, layer: int) -> list[Parameter]:
    one = parameters(cut(config, [layer]), False)
    return [parameter for parameter in one if parameter.module == "layers.0"]


def _read(config: ModelConfig, precision: Precision, parameter: Parameter, tokens: int) -> float:
    """Bytes of a parameter that a call over so many tokens reads."""
    whole = tree_bytes({"/".join(k): v for k, v in leaves(parameter, precision).items()})
    if parameter.experts:
        return whole * expected_experts(config, tokens) / parameter.experts
    if parameter.name == "embed.weight" or parameter.kind == "ffn.gate.tid2eid":
        return whole * min(tokens / parameter.shape[0], 1)  # a row per token
    return whole


def weight_bytes(
    config: ModelConfig, precision: Precision, layer: int, tokens: int
) -> dict[str, float]:
    """Weights of a layer that a call over so many tokens reads, by `GROUPS`."""
    found: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
    for parameter in _layer(config, layer):
        found[_group(parameter)] += _read(config, precision, parameter, tokens)
    return found


def cache_bytes(
    config: ModelConfig, precision: Precision, kind: LayerKind, position: int, rows: int
) -> dict[str, float]:
    """Of a layer's cache, read by a step that appends a token at ``position`` to each row."""
    c = config
    wide = {"fp8": 1 + 1 / 64, "bfloat16": 2.0, "float32": 4.0}[precision.kv]
    key = c.nope_dim * wide + c.qk_rope_head_dim * max(2, int(wide))
    window = rows * key * min(position + 1, c.sliding_window)
    if kind is LayerKind.SWA:
        return {"index keys": 0.0, "entries": 0.0, "window": window, "states": 0.0}
    ratio, csa = kind.value, kind is LayerKind.CSA
    entries = (position + 1) // ratio
    chosen = min(c.index_topk, entries) if csa else entries
    index = {"mxfp4": 0.5 + 1 / 32, "fp8": 1 + 1 / c.index_head_dim, "bfloat16": 2.0}
    index_key = c.index_head_dim * index.get(precision.index_keys, 4.0)
    # With no more entries than are chosen the indexer chooses all and reads none.
    read = entries if csa and entries > c.index_topk else 0
    width = 2 * (c.head_dim + c.index_head_dim) if csa else c.head_dim
    # A window that closes reads its slots: of positions that follow each other one in `ratio`.
    slots = (2 if csa else 1) * ratio * width * 8 / ratio
    return {
        "index keys": rows * index_key * read,
        "entries": rows * key * chosen,
        "window": window,
        "states": rows * slots,
    }


def decode_bytes(
    config: ModelConfig, precision: Precision, context: int, rows: int
) -> tuple[list[dict[str, float]], float]:
    """Bytes that a step over ``context`` tokens a row reads: by layer and group, and outside."""
    weights = {
        (config.layer_kind(i), config.is_hash_layer(i)): weight_bytes(config, precision, i, rows)
        for i in _alike(config)
    }
    layers: list[dict[str, float]] = []
    for layer in range(config.num_hidden_layers):
        kind = config.layer_kind(layer)
        found = dict(weights[kind, config.is_hash_layer(layer)])
        cache = cache_bytes(config, precision, kind, context, rows)
        found["attention"] += cache["entries"] + cache["window"]
        found["indexer"] += cache["index keys"]
        found["compressors"] += cache["states"]
        layers.append(found)
    return layers, _outside(config, precision, rows)


def _outside(config: ModelConfig, precision: Precision, tokens: int) -> float:
    head = parameters(cut(config, []), False)
    return sum(_read(config, precision, parameter, tokens) for parameter in head)


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes read, and operations by the format in which they can be multiplied."""

    bytes: float
    fp8_flops: float
    bf16_flops: float


def prefill_work(
    config: ModelConfig, precision: Precision, rows: int, tokens: int, chunk: int
) -> Work:
    """Of ``tokens`` tokens a row from an empty cache, ``chunk`` at a time, logits of the last.

    Every chunk reads the weights and the head. The caches, which a chunk need read only once, are
    left out of the bytes. Products of FP8 activations count as FP8, all others as BF16.
    """
    c = config
    sizes = Counter(min(chunk, tokens - start) for start in range(0, tokens, chunk))
    alike = _alike(c)
    read = 0.0
    for size, times in sizes.items():
        one = _outside(c, precision, rows * size)
        for layer, count in alike.items():
            one += count * sum(weight_bytes(c, precision, layer, rows * size).values())
        read += times * one
    head = 2.0 * rows * sizes.total() * c.vocab_size * c.hidden_size
    flops = {"fp8": 0.0, "bf16": head}
    position = np.arange(tokens, dtype=np.float64)
    for layer, count in alike.items():
        for parameter in _layer(c, layer):
            if len(parameter.shape) < 2 or parameter.kind.endswith(("ape", "tid2eid")):
                continue
            form = cast(Any, getattr(precision, parameter.rule, "bfloat16"))
            fp8 = form in LINEAR_FORMATS and act_format(form) == "fp8"
            used = c.num_experts_per_tok if parameter.experts else 1
            products = 2.0 * count * rows * tokens * used * math.prod(parameter.shape)
            flops["fp8" if fp8 else "bf16"] += products
        kind = c.layer_kind(layer)
        keys = np.minimum(position + 1, c.sliding_window)
        if kind is not LayerKind.SWA:
            entries = (position + 1) // kind.value
            csa = kind is LayerKind.CSA
            keys = keys + (np.minimum(entries, c.index_topk) if csa else entries)
            if csa:
                scored = float(np.where(entries > c.index_topk, entries, 0).sum())
                flops["fp8"] += 2.0 * count * rows * c.index_n_heads * c.index_head_dim * scored
        each = 4.0 * count * rows * c.num_attention_heads * c.head_dim
        flops["bf16"] += each * float(keys.sum())
    return Work(read, flops["fp8"], flops["bf16"])
