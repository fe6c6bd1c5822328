"""The cache as a value: shapes, donation, overflow, rewinding, use under the user's own jit."""

import dataclasses
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.cache import CompressorState
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.quant.bits import from_byte_view
from dsv4_jax.quant.kv import IndexRows, KvRows
from tests.support.models import (
    append,
    assert_same_bytes,
    golden_ids,
    golden_model,
    live_state,
    run_in_chunks,
    three_layers,
)

E4M3, E2M1, UE8M0 = jnp.float8_e4m3fn, jnp.float4_e2m1fn, jnp.float8_e8m0fnu


def _ones(cache: dsv4_jax.Cache) -> jax.Array:
    return jnp.ones(cache.batch_size, jnp.int32)


def _cache_with_tokens(model, params, n: int, **kwargs):
    return run_in_chunks(model, params, golden_ids(n), 4, model.init_cache(2, 288, **kwargs))[1]


def test_typed_storage():
    """Shapes and dtypes of every kind of layer, as model.md 4.1 and 4.4 give them."""
    model, _ = golden_model()
    cache = model.init_cache(3, 1024, draft_tokens=2)
    window = cache.layers[0].window
    assert (window.nope.shape, window.nope.dtype) == ((3, 130, 448), E4M3)
    assert (window.scale.shape, window.scale.dtype) == ((3, 130, 7), UE8M0)
    assert (window.rope.shape, window.rope.dtype) == ((3, 130, 64), jnp.bfloat16)
    assert cache.layers[0].pool is None
    hca, csa = cache.layers[1], cache.layers[2]
    assert hca.state.kv.shape == (3, 130, 512) and hca.index is None
    assert csa.pool.nope.shape == (3, 256, 448)
    assert csa.state.gate.shape == (3, 10, 1024) and csa.state.gate.dtype == jnp.float32
    assert (csa.index.key.shape, csa.index.key.dtype) == ((3, 256, 128), E2M1)
    assert (csa.index.scale.shape, csa.index.scale.dtype) == ((3, 256, 4), UE8M0)
    assert csa.index_state.kv.shape == (3, 10, 256)
    assert cache.mtp.window.nope.shape == (3, 130, 448)


def test_float32_and_fp8_index_storage():
    model, _ = three_layers("float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.init_cache(1, 64).layers)} == {
        jnp.dtype(jnp.float32)
    }
    model, _ = three_layers("official", index_keys="fp8")
    index = model.init_cache(1, 64).layers[2].index
    assert index.key.dtype == E4M3 and index.scale.shape == (1, 128, 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        pytest.param({"batch_size": -1, "max_len": 8}, "batch_size must be >= 0", id="batch"),
        pytest.param({"batch_size": 1, "max_len": 0}, "max_len must be 1..1048576", id="zero"),
        pytest.param({"batch_size": 1, "max_len": 2**20 + 1}, "max_len must be", id="too-long"),
        pytest.param(
            {"batch_size": 1, "max_len": 8, "draft_tokens": -1}, "draft_tokens", id="drafts"
        ),
    ],
)
def test_init_cache_rejects(kwargs, message):
    model, _ = three_layers()
    with pytest.raises(ValueError, match=message):
        model.init_cache(**kwargs)


def test_overflow_drops_the_write_and_flags_the_row():
    """B1 on the device: the full row keeps its cache and its neighbours do not notice."""
    model, params = three_layers()
    ids = golden_ids(12)
    cache = model.init_cache(2, 8)
    _, cache = append(model, params, jnp.asarray(ids[:, :8]), cache, jnp.array([7, 3]))
    before = cache
    logits, cache = append(model, params, jnp.asarray(ids[:, 8:]), cache, jnp.array([4, 4]))
    np.testing.assert_array_equal(np.asarray(cache.lengths), [8, 7])
    np.testing.assert_array_equal(np.asarray(cache.overflow), [True, False])
    solo = run_in_chunks(
        model,
        params,
        np.concatenate([ids[1:, :3], ids[1:, 8:]], axis=1),
        4,
        model.init_cache(1, 8),
    )[0]
    np.testing.assert_array_equal(np.asarray(logits)[1], solo[0, 3:])
    assert not np.asarray(logits)[0, 1:].any(), "dropped tokens have no logits"
    full = cache
    _, cache = append(model, params, jnp.asarray(ids[:, 8:]), cache, jnp.array([4, 0]))
    assert_same_bytes(dataclasses.replace(cache, overflow=full.overflow), full)
    assert int(before.lengths[0]) == 7


def test_decode_keeps_pointers_and_compiles_once():
    model, params = three_layers()
    cache = _cache_with_tokens(model, params, 4)
    tokens = jnp.zeros(2, jnp.int32)
    logits, cache = dsv4_jax.decode_step(model, params, tokens, cache)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)]
    with jax.log_compiles():
        from dsv4_jax.generate import _decode

        before = _decode._cache_size()
        for _ in range(6):
            logits, cache = dsv4_jax.decode_step(model, params, jnp.argmax(logits, -1), cache)
        assert _decode._cache_size() == before
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)] == pointers


def test_inactive_row_is_untouched():
    model, params = three_layers()
    cache = _cache_with_tokens(model, params, 8)
    before = live_state(cache)
    _, cache = dsv4_jax.decode_step(
        model, params, jnp.array([7, 9]), cache, active=jnp.array([False, True])
    )
    np.testing.assert_array_equal(np.asarray(cache.lengths), [8, 9])
    for (name, old), (_, new) in zip(before, live_state(cache), strict=True):
        if old.ndim > 1:
            np.testing.assert_array_equal(new[0], old[0], err_msg=name)


def test_inside_the_users_scan_with_donation():
    """Decode in `lax.scan` under the caller's jit equals step by step, bitwise."""
    model, params = three_layers()
    ids = golden_ids(12)
    expected, expected_cache = run_in_chunks(model, params, ids, 1, model.init_cache(2, 288))

    def scanned(params, cache, tokens):
        def step(cache, token):
            logits, cache = model.apply({"params": params}, token[:, None], cache, logits="last")
            return cache, logits

        return jax.lax.scan(step, cache, tokens.T)

    run = jax.jit(scanned, donate_argnums=1)
    cache = jax.tree.map(jnp.copy, model.init_cache(2, 288))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)]
    cache, logits = run(params, cache, jnp.asarray(ids))
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)] == pointers
    np.testing.assert_array_equal(np.moveaxis(np.asarray(logits), 0, 1), expected)
    assert_same_bytes(cache, expected_cache)


def test_inside_a_while_loop():
    model, params = three_layers()

    def greedy(params, cache, token, stop):
        def step(carry):
            token, cache = carry
            logits, cache = model.apply({"params": params}, token[:, None], cache, logits="last")
            return jnp.argmax(logits, -1).astype(jnp.int32), cache

        return jax.lax.while_loop(lambda c: c[1].lengths[0] < stop, step, (token, cache))

    token = jnp.array([3, 5], jnp.int32)
    _, cache = jax.jit(greedy)(params, model.init_cache(2, 288), token, 5)
    np.testing.assert_array_equal(np.asarray(cache.lengths), [5, 5])


def test_layer_method_writes_one_layer_only():
    model, params = three_layers()
    ids = jnp.asarray(golden_ids(8))
    cache = model.init_cache(2, 288)
    streams = jnp.ones((2, 8, 4, 128), jnp.bfloat16)
    _, after = model.apply({"params": params}, streams, ids, cache, layer=1, method="layer")
    np.testing.assert_array_equal(np.asarray(after.lengths), [0, 0])
    for i in (0, 2):
        for old, new in zip(
            jax.tree.leaves(cache.layers[i]), jax.tree.leaves(after.layers[i]), strict=True
        ):
            assert old is new
    assert np.asarray(after.layers[1].window.nope).view(np.uint8).any()


def test_layers_composed_equal_streams_and_intermediates():
    """`layer` by layer = `streams` = what `capture_intermediates` shows."""
    model, params = three_layers()
    ids = jnp.asarray(golden_ids(8))
    cache = model.init_cache(2, 288)

    @jax.jit
    def all_three(params, ids, cache):
        variables = {"params": params}
        streams = jnp.repeat(params["embed"]["weight"][ids][:, :, None], 4, axis=2)
        by_layer = []
        for i in range(3):
            streams, cache = model.apply(variables, streams, ids, cache, layer=i, method="layer")
            by_layer.append(streams)
        last, advanced = model.apply(variables, ids, cache, method="streams")
        (_, _), captured = model.apply(
            variables, ids, cache, capture_intermediates=True, mutable=["intermediates"]
        )
        return by_layer, last, advanced.lengths, captured["intermediates"]

    by_layer, last, lengths, captured = all_three(params, ids, cache)
    np.testing.assert_array_equal(np.asarray(lengths), [8, 8])
    for i, streams in enumerate(by_layer):
        np.testing.assert_array_equal(captured[f"streams_{i}"][0], streams)
        np.testing.assert_array_equal(captured[f"layers_{i}"]["__call__"][0][0], streams)
    np.testing.assert_array_equal(last, by_layer[-1])


@pytest.mark.parametrize("preset", ["official", "float32"])
def test_ways_to_the_logits(preset):
    """The last write-back by itself, after every layer, or in the head's read: the same bits."""
    model, params = three_layers(preset)
    ids = jnp.asarray(golden_ids(8))
    cache = model.init_cache(2, 288)

    @jax.jit
    def every_way(params, ids, cache, count):
        variables, options = {"params": params}, {"num_tokens": count}
        every, _ = model.apply(variables, ids, cache, **options)
        last, _ = model.apply(variables, ids, cache, logits="last", **options)
        streams, _ = model.apply(variables, ids, cache, method="streams", **options)
        apart = model.apply(variables, streams, method="head_logits")
        (kept, _), _ = model.apply(variables, ids, cache, mutable=["intermediates"], **options)
        return every, last, apart, kept

    for count in ([8, 5], [0, 1]):
        every, last, apart, kept = map(np.asarray, every_way(params, ids, cache, jnp.array(count)))
        np.testing.assert_array_equal(kept, every)
        for row, n in enumerate(count):
            np.testing.assert_array_equal(apart[row, :n], every[row, :n])
            np.testing.assert_array_equal(last[row], every[row, n - 1] if n else 0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param({"tokens": jnp.zeros((3, 1), jnp.int32)}, ValueError, "batch 2", id="batch"),
        pytest.param({"tokens": jnp.zeros(2, jnp.int32)}, ValueError, r"\[2\]", id="rank"),
        pytest.param({"tokens": jnp.zeros((2, 1))}, TypeError, "float32", id="float-tokens"),
        pytest.param({"num_tokens": jnp.array([1])}, ValueError, "num_tokens", id="counts"),
        pytest.param({"num_tokens": jnp.ones(2)}, TypeError, "num_tokens", id="float-counts"),
        pytest.param({"logits": "first"}, ValueError, "'first'", id="logits"),
    ],
)
def test_apply_rejects(call, error, message):
    model, params = three_layers()
    arguments = {"tokens": jnp.zeros((2, 1), jnp.int32), "cache": model.init_cache(2, 8), **call}
    with pytest.raises(error, match=message):
        model.apply({"params": params}, **arguments)


def test_empty_call_changes_nothing():
    """A6: no tokens, and no rows."""
    model, params = three_layers()
    cache = model.init_cache(2, 8)
    logits, after = model.apply({"params": params}, jnp.zeros((2, 0), jnp.int32), cache)
    assert logits.shape == (2, 0, 256)
    assert_same_bytes(after, cache)
    nobody = model.init_cache(0, 8)
    logits, _ = model.apply({"params": params}, jnp.zeros((0, 3), jnp.int32), nobody)
    assert logits.shape == (0, 3, 256)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        pytest.param([8], r"lengths must be \[2\]", id="shape"),
        pytest.param([9, 8], "row 0 holds 8", id="grows"),
        pytest.param([8, 5], "row 1 holds 8 tokens and can go back to 6..8 or 0", id="too-far"),
        pytest.param([-1, 8], "row 0", id="negative"),
    ],
)
def test_rewind_rejects(lengths, message):
    model, params = three_layers()
    cache = _cache_with_tokens(model, params, 8, draft_tokens=2)
    with pytest.raises(ValueError, match=message):
        dsv4_jax.rewind(cache, lengths)


def test_rewind_under_jit_and_to_zero():
    model, params = three_layers()
    cache = _cache_with_tokens(model, params, 8, draft_tokens=2)
    back = jax.jit(dsv4_jax.rewind)(cache, jnp.array([7, 100]))
    np.testing.assert_array_equal(np.asarray(back.lengths), [7, 8])
    flagged = dataclasses.replace(cache, overflow=jnp.array([True, True]))
    fresh = dsv4_jax.rewind(flagged, [0, 8])
    np.testing.assert_array_equal(np.asarray(fresh.lengths), [0, 8])
    np.testing.assert_array_equal(np.asarray(fresh.overflow), [False, True])


def test_mtp_appends_to_its_own_window():
    """Chunks of the MTP module equal one call, bitwise, and leave the main state alone."""
    model, params = golden_model()
    rng = np.random.default_rng(0)
    streams = jnp.asarray(rng.standard_normal((2, 12, 4, 128)), jnp.bfloat16)
    ids = jnp.asarray(golden_ids(12))
    draft = jax.jit(
        lambda p, s, t, c, n: model.apply({"params": p}, s, t, c, num_tokens=n, method="draft")
    )
    cache = model.init_cache(2, 64)
    whole, whole_streams, after = draft(params, streams, ids, cache, jnp.array([12, 12]))
    first, _, part = draft(params, streams, ids, cache, jnp.array([5, 5]))
    rest = jnp.roll(streams, -5, 1), jnp.roll(ids, -5, 1)
    second, second_streams, part = draft(params, *rest, part, jnp.array([7, 7]))
    np.testing.assert_array_equal(first[:, :5], whole[:, :5])
    np.testing.assert_array_equal(second[:, :7], whole[:, 5:])
    np.testing.assert_array_equal(second_streams[:, :7], whole_streams[:, 5:])
    assert_same_bytes(part, after)
    assert after.layers[0].window.nope is not None
    np.testing.assert_array_equal(np.asarray(after.lengths), [0, 0])
    np.testing.assert_array_equal(np.asarray(after.mtp.lengths), [12, 12])


def test_draft_needs_the_module():
    model, params = three_layers()
    streams = jnp.zeros((2, 1, 4, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="mtp=True"):
        model.apply(
            {"params": params},
            streams,
            jnp.zeros((2, 1), jnp.int32),
            model.init_cache(2, 8),
            method="draft",
        )


def test_64_bit_mode_changes_nothing():
    """E9: `JAX_ENABLE_X64` neither breaks an index nor widens a value."""
    model, params = three_layers()
    ids = golden_ids(8)
    expected, _ = run_in_chunks(model, params, ids, 4, model.init_cache(2, 288))
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        logits, cache = run_in_chunks(model, params, ids, 4, model.init_cache(2, 288))
    np.testing.assert_array_equal(logits, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)}.isdisjoint({jnp.int64, jnp.float64})


def test_updates_do_not_depend_on_max_len():
    """All of a step's cache updates: in place, no temporaries, as fast at 1M positions as at 4k."""
    model, _ = three_layers()
    config = dataclasses.replace(model.config, max_position_embeddings=1 << 20)
    model = dsv4_jax.DeepseekV4(config, model.precision)

    def is_store(x):
        return isinstance(x, (KvRows, IndexRows, CompressorState))

    def row(x):  # of 0xFF bytes, whatever they mean
        view = jnp.full((1, 1, x.shape[2]), 0xFF, jnp.uint8)
        if x.dtype == E2M1:
            return from_byte_view(view[..., ::2], x.dtype)
        return from_byte_view(view, x.dtype) if x.dtype.itemsize == 1 else view.astype(x.dtype)

    @functools.partial(jax.jit, donate_argnums=0)
    def update(stores, rows, slot):
        return [cache_write(s, r, slot) for s, r in zip(stores, rows, strict=True)]

    slot = jnp.full((1, 1), 3, jnp.int32)
    medians = {}
    for max_len in (1 << 12, 1 << 20):
        stores = jax.tree.leaves(model.init_cache(1, max_len).layers, is_leaf=is_store)
        stores, rows = jax.tree.map(jnp.copy, stores), jax.tree.map(row, stores)
        compiled = update.lower(stores, rows, slot).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20
        stores = update(stores, rows, slot)
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(stores)]
        times = []
        for _ in range(60):
            begin = time.perf_counter()
            stores = jax.block_until_ready(update(stores, rows, slot))
            times.append(time.perf_counter() - begin)
        assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(stores)] == pointers
        medians[max_len] = round(statistics.median(times) * 1e6)
    print(f"updates of three layers, us: {medians}")
    # A copy of the 170 MB that the longer cache holds would take a hundred times as long.
    assert medians[1 << 20] < 3 * medians[1 << 12]
