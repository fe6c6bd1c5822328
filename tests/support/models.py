"""The golden checkpoint as models under test, and one jitted call shared by the tests."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import dsv4_jax
from dsv4_jax import Cache, DeepseekV4, Precision
from tests.support.official import TINY, tiny_golden

# Three layers, one of each kind (SWA with hash routing, HCA with hash routing, CSA score-routed):
# everything a longer stack has, at 3/5 of the compile time.
THREE = 3


@functools.cache
def golden_model(preset: str = "official", **overrides: Any) -> tuple[DeepseekV4, Any]:
    """The whole golden model, MTP included, in a preset with some fields replaced.

    In FP32 sums, on a GPU too.
    """
    precision = Precision.preset(preset)
    precision = dataclasses.replace(precision, **{"regime": "exact", **overrides})
    return dsv4_jax.from_checkpoint(TINY, precision=precision, mtp=True, progress=False)


@functools.cache
def three_layers(preset: str = "official", **overrides: Any) -> tuple[DeepseekV4, Any]:
    """The first three layers of the golden model with its head."""
    model, params = golden_model(preset, **overrides)
    config = dataclasses.replace(
        model.config,
        num_hidden_layers=THREE,
        compress_ratios=model.config.compress_ratios[:THREE],
        num_nextn_predict_layers=0,
    )
    dropped = {"mtp_0", *(f"layers_{i}" for i in range(THREE, model.config.num_hidden_layers))}
    kept = {name: leaf for name, leaf in params.items() if name not in dropped}
    return DeepseekV4(config, model.precision), kept


@functools.cache
def golden_layers(layers: tuple[int, ...], preset: str = "official") -> tuple[DeepseekV4, Any]:
    """Some layers of the golden model as a model of their own, with its MTP module."""
    model, params = golden_model(preset)
    c = model.config
    config = dataclasses.replace(
        c,
        num_hidden_layers=len(layers),
        num_hash_layers=sum(c.is_hash_layer(i) for i in layers),
        compress_ratios=(*(c.compress_ratios[i] for i in layers), c.compress_ratios[-1]),
    )
    kept = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
    kept |= {f"layers_{i}": params[f"layers_{layer}"] for i, layer in enumerate(layers)}
    return DeepseekV4(config, model.precision, mtp=True), kept


@functools.partial(jax.jit, static_argnames="model")
def append(
    model: DeepseekV4, params: Any, tokens: jax.Array, cache: Cache, num_tokens: jax.Array
) -> tuple[jax.Array, Cache]:
    """All logits of one call."""
    return model.apply({"params": params}, tokens, cache, num_tokens=num_tokens)


def golden_ids(length: int) -> np.ndarray:
    """Token ids ``[2, length]`` of the golden file."""
    return tiny_golden()["ids"][:, :length].astype(np.int32)


def run_in_chunks(
    model: DeepseekV4, params: Any, ids: np.ndarray, chunk: int, cache: Cache
) -> tuple[np.ndarray, Cache]:
    """Logits ``[b, n, vocab]`` of ``ids [b, n]`` taken ``chunk`` at a time, the last one padded."""
    parts = []
    for start in range(0, ids.shape[1], chunk):
        part = ids[:, start : start + chunk]
        taken = part.shape[1]
        padded = np.pad(part, ((0, 0), (0, chunk - taken)))
        count = jnp.full(len(ids), taken, jnp.int32)
        logits, cache = append(model, params, jnp.asarray(padded), cache, count)
        parts.append(np.asarray(logits)[:, :taken])
    return np.concatenate(parts, axis=1), cache


def live_state(cache: Cache) -> list[tuple[str, np.ndarray]]:
    """Bytes of every leaf of the cache, with its path."""
    leaves = jax.tree_util.tree_leaves_with_path(cache)
    return [(jax.tree_util.keystr(path), np.asarray(leaf).view(np.uint8)) for path, leaf in leaves]


def assert_same_bytes(a: Cache, b: Cache) -> None:
    """Two caches equal leaf by leaf, bitwise."""
    for (name, x), (_, y) in itertools.zip_longest(live_state(a), live_state(b)):
        np.testing.assert_array_equal(x, y, err_msg=name)
