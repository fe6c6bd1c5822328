"""A CSA and an HCA layer over caches of 2^20 positions, decoded at 4 k, 32 k, 128 k and the last.

Every byte of a cache is random, so that each row has all of its entries without a prefill. What
attention, indexer and compressors are given inside a layer's step is seen here and held to FP64
and to the reference over the cache that the step returns; of the rest of the cache not a byte may
change. `tests/bench/bench_long_context.py` has time and bytes.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import Cache, DeepseekV4, ModelConfig, Precision
from dsv4_jax.bench.weights import any_leaf, any_leaves
from dsv4_jax.cache import LayerCache
from dsv4_jax.checkpoint.names import expected_tree
from dsv4_jax.config import LayerKind
from dsv4_jax.model import attention, indexer
from dsv4_jax.ops.rope import rope_frequencies
from dsv4_jax.quant import bits
from reference.compressor import compressor as reference_compressor
from tests.support.numerics import assert_near, assert_same_bits, raw
from tests.support.stored import (
    assert_best,
    exact_attention,
    exact_scores,
    stored_entry,
)

MAX_LEN = 1 << 20
LENGTHS = (4095, 32767, 131071, MAX_LEN - 1)
"""Before the first step, in which windows of both kinds close."""
STEPS = 2
"""The last row takes no second token."""
KINDS = (LayerKind.CSA, LayerKind.HCA)
FLASH = dataclasses.replace(
    ModelConfig.flash(),
    num_hidden_layers=2,
    num_hash_layers=0,
    compress_ratios=tuple(kind.value for kind in KINDS),
    num_nextn_predict_layers=0,
    n_routed_experts=32,  # they do not see the cache
)
SMALL = dataclasses.replace(
    FLASH,
    hidden_size=128,
    num_attention_heads=4,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=32,
    index_n_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
)
"""The cache of Flash, with smaller weights."""
PRECISION = Precision.preset("official")

SCORE_REL = 2e-4
"""Of sum_h |weight_h| |q_h| |key|, for FP8 tensor cores."""
O_ABS, O_REL = 2.0**-8, 2.0**-8
"""Of values up to 2: probabilities are rounded to 2^-9, rotary channels twice to BF16."""
MOST_TURNED = 3
"""Bytes of all entries of a run: values within an FP32 sum's error of a rounding boundary."""


def filled(model: DeepseekV4, lengths: np.ndarray) -> Cache:
    """A cache of random bytes whose rows are as long as that."""
    cache = jax.eval_shape(lambda: model.init_cache(len(lengths), MAX_LEN))
    return dataclasses.replace(
        cache,
        layers=any_leaves(cache.layers),
        lengths=jnp.asarray(lengths, jnp.int32),
        overflow=jnp.zeros(len(lengths), bool),
    )


def seeds(tree: Any) -> Any:
    """Of each leaf."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(range(1, len(leaves) + 1)))


@jax.jit
def changed(part: jax.Array, seed: int) -> jax.Array:
    """``[b, s]``: where a part is not what `filled` made it."""
    views = bits.byte_view(part), bits.byte_view(any_leaf(seed, part.shape, part.dtype))
    return jnp.any(views[0] != views[1], axis=-1)


@contextlib.contextmanager
def seen_calls() -> Generator[dict[str, tuple[Any, ...]]]:
    """Operands, settings and results of the ops that read or make entries."""
    calls: dict[str, tuple[Any, ...]] = {}

    def spied(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*operands: Any, **settings: Any) -> Any:
            result = op(*operands, **settings)
            calls[name] = operands, settings, result
            return result

        return call

    with contextlib.ExitStack() as stack:
        for module, name in (
            *((attention, "attention"), (attention, "compressor")),
            (indexer, "index_topk"),
        ):
            patch = mock.patch.object(module, name, spied(name, getattr(module, name)))
            stack.enter_context(patch)
        yield calls


@functools.partial(jax.jit, static_argnames=("model", "layer"), donate_argnames="cache")
def step(
    model: DeepseekV4, layer: int, params: Any, streams: jax.Array, ids: jax.Array, cache: Cache
) -> Any:
    """One token of every row through one layer; and what its ops saw besides the pools."""
    with seen_calls() as calls:
        variables = {"params": params}
        new: Any = model.apply(variables, streams, ids, cache, layer=layer, method="layer")
    (q, ring, positions, sink), near, o = calls["attention"]
    seen: dict[str, Any] = {
        "attention": (q, ring, positions, sink, near["chunk"], near["start"]),
        "n_visible": near["n_visible"],
        "topk_idx": near["topk_idx"],
        "o": o,
    }
    (jobs, start, count, _), _, _ = calls["compressor"]
    seen["compressor"] = [job._replace(pool=None) for job in jobs], (start, count)
    if "index_topk" in calls:
        (q, weight, _, n_visible), _, idx = calls["index_topk"]
        seen["index_topk"] = q, weight, n_visible, idx
    return *new, seen


def check_choice(seen: Any, state: LayerCache, row: int, position: int) -> None:
    """The indexer's choice is exact, and it is what attention gets."""
    q, weight, n_visible, idx = seen["index_topk"]
    n = (position + 1) // LayerKind.CSA.value
    assert int(n_visible[row, 0]) == n
    scores, sizes = exact_scores(q, weight, state.index, (row, 0), n)
    topk = FLASH.index_topk
    assert_best(idx[row, 0], scores, SCORE_REL * sizes, topk, f"row {row} at {position}")
    assert_same_bits(seen["topk_idx"], idx)


def check_attention(seen: Any, state: LayerCache, kind: LayerKind, row: int, position: int) -> None:
    """Over the window and the entries, the one that has just closed among them."""
    operands: tuple[Any, ...] = (
        *seen["attention"],
        state.pool,
        seen["n_visible"],
        seen["topk_idx"],
    )
    assert int(operands[2][row, 0]) == position
    assert int(seen["n_visible"][row, 0]) == (position + 1) // kind.value
    frequencies = rope_frequencies(FLASH, kind)
    want = exact_attention(operands, (row, 0), FLASH.sliding_window, frequencies)
    bound = O_ABS + O_REL * np.abs(want)
    assert_near(np.asarray(seen["o"][row, 0]), want, bound, f"row {row} at {position}")


def check_entries(seen: Any, state: LayerCache, kind: LayerKind, row: int, position: int) -> int:
    """States to the bit; how many bytes of new entries differ."""
    jobs, lengths = seen["compressor"]
    at = slice(row, row + 1)
    taken = ("kv", "gate", "kv_state", "gate_state")
    one = [job._replace(**{name: getattr(job, name)[at] for name in taken}) for job in jobs]
    start, count = (np.asarray(x)[at] for x in lengths)
    assert (int(start[0]), int(count[0])) == (position, 1)
    want = reference_compressor(
        one, start, count, rope_frequencies(FLASH, kind), ratio=kind.value, eps=FLASH.rms_norm_eps
    )
    states = [(state.state, state.pool), (state.index_state, state.index)][: len(jobs)]
    turned, closed = 0, False
    for (rings, pool), (kv, gate, entries) in zip(states, want, strict=True):
        assert_same_bits(rings.kv[row], kv[0], f"kv state of row {row}")
        assert_same_bits(rings.gate[row], gate[0], f"gate state of row {row}")
        for (_, w), values in entries.items():
            closed = True
            fresh = stored_entry(values, pool, FLASH.qk_rope_head_dim)
            for mine, theirs in zip(pool, fresh, strict=True):
                pair = (bits.byte_view(mine)[row, w], bits.byte_view(theirs)[0, 0])
                turned += int((np.asarray(pair[0]) != np.asarray(pair[1])).sum())
    assert closed == ((position + 1) % kind.value == 0)
    return turned


def check_rest(
    seen: Any, state: LayerCache, numbers: LayerCache, lengths: np.ndarray, kind: LayerKind
) -> None:
    """Rings have each row's token in its place and nothing else; pools what has closed so far.

    A row at its end takes none.
    """
    _, ring, _, _, chunk, _ = seen["attention"]
    jobs, _ = seen["compressor"]
    for old, new, rows in zip(ring, state.window, chunk, strict=True):
        want = raw(old).copy()
        for row in np.flatnonzero(lengths < MAX_LEN):
            want[row, lengths[row] % want.shape[1]] = raw(rows)[row, 0]
        np.testing.assert_array_equal(raw(new), want)
    for job, rings in zip(jobs, (state.state, state.index_state), strict=False):
        for old, new in zip(job[4:6], (rings.kv, rings.gate), strict=True):
            differs = (raw(old) != raw(new)).any(axis=-1)
            want = [(i, n % differs.shape[1]) for i, n in enumerate(lengths) if n < MAX_LEN]
            assert [tuple(x) for x in np.argwhere(differs)] == want
    wrote = {
        (row, w)
        for row, (first, n) in enumerate(
            zip(np.resize(LENGTHS, len(lengths)), lengths, strict=True)
        )
        for w in range(int(first) // kind.value, min(int(n) + 1, MAX_LEN) // kind.value)
    }
    for pool, seed in ((state.pool, numbers.pool), (state.index, numbers.index)):
        if pool is None:
            continue
        differs = np.logical_or.reduce([changed(x, s) for x, s in zip(pool, seed, strict=True)])
        assert {(int(i), int(w)) for i, w in np.argwhere(differs)} == wrote


def run(config: ModelConfig, batch: int, checked: tuple[int, ...]) -> None:
    """Three steps through both layers; ``checked`` rows against FP64."""
    model = DeepseekV4(config, PRECISION)
    lengths = np.resize(LENGTHS, batch)
    cache = filled(model, lengths)
    numbers = seeds(cache.layers)
    tree = expected_tree(config, PRECISION, False)
    names = [f"layers_{i}" for i in range(len(KINDS))]
    params = any_leaves({name: tree[name] for name in names})
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache.layers)]
    ids = jnp.zeros((batch, 1), jnp.int32)
    compiled: dict[int, Any] = {}
    turned = 0
    for number in range(STEPS):
        taken = (lengths < MAX_LEN).astype(np.int32)
        shape = batch, 1, config.hc_mult, config.hidden_size
        streams = jnp.asarray(np.random.default_rng(number).standard_normal(shape), jnp.bfloat16)
        for i, kind in enumerate(KINDS):
            operands = params, streams, ids, cache
            if number == 0:
                compiled[i] = step.lower(model, i, *operands).compile()
                memory = compiled[i].memory_analysis()
                print(f"{kind.name}: {memory.temp_size_in_bytes / 1e6:.1f} MB of temporaries")
                # Nothing is set aside for a copy of the smallest pool.
                pool = cache.layers[1].pool.nope
                assert memory.temp_size_in_bytes < max(pool.size // 2, 100e6)
            streams, cache, seen = compiled[i](*operands)
            assert np.isfinite(np.asarray(streams, np.float32)).all()
            seen["compressor"] = jax.device_get(seen["compressor"])
            state = cache.layers[i]
            for row in np.flatnonzero(taken):
                position = int(lengths[row])
                if row not in checked:
                    continue
                if kind is LayerKind.CSA:
                    check_choice(seen, state, row, position)
                check_attention(seen, state, kind, row, position)
                turned += check_entries(seen, state, kind, row, position)
            check_rest(seen, state, numbers[i], lengths, kind)
        lengths = lengths + taken
        cache = dataclasses.replace(cache, lengths=jnp.asarray(lengths, jnp.int32))
    print(f"{turned} bytes of entries turned by ties")
    assert turned <= MOST_TURNED
    assert lengths.max() == MAX_LEN
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache.layers)] == pointers


def test_a_million_positions() -> None:
    """Caches of the size of Flash's, 0.7 GB."""
    if jax.default_backend() == "gpu":
        pytest.skip("Flash itself is run")
    run(SMALL, 4, (0, 1, 2, 3))


@pytest.mark.gpu
def test_flash_at_a_million_positions() -> None:
    """Codes of the last of 24 rows lie beyond 2^31 bytes, 4.2 GB of cache."""
    assert 24 * (MAX_LEN // 4) * FLASH.nope_dim > 2**31
    run(FLASH, 24, (0, 3, 20, 21, 22, 23))
