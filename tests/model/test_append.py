"""However a text is cut into calls, the same logits and the same cache bytes, on the CPU bitwise.

Promises P2-P4 and rows B6-B9 of the acceptance list.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.quant import bits
from tests.support.models import (
    append,
    assert_same_bytes,
    golden_ids,
    run_in_chunks,
    three_layers,
)

# Past the second HCA window (255 -> 256) and two wraps of the window ring.
LENGTH = 270
MAX_LEN = 288
PRESETS = [
    pytest.param("official", {}, id="official"),
    pytest.param("nvfp4", {"index_keys": "fp8"}, id="nvfp4-fp8-index"),
    pytest.param("float32", {}, id="float32"),
    pytest.param("bfloat16", {}, id="bfloat16"),
]


@pytest.fixture(scope="module")
def whole() -> dict[str, tuple[np.ndarray, dsv4_jax.Cache]]:
    """Logits and cache of one call over the whole text, computed once per preset."""
    return {}


def _whole(store: dict, preset: str, overrides: dict) -> tuple[np.ndarray, dsv4_jax.Cache]:
    if preset not in store:
        model, params = three_layers(preset, **overrides)
        cache = model.init_cache(2, MAX_LEN)
        store[preset] = run_in_chunks(model, params, golden_ids(LENGTH), LENGTH, cache)
    return store[preset]


@pytest.mark.parametrize(("preset", "overrides"), PRESETS)
def test_decode_equals_prefill(whole, preset, overrides):
    """Token by token across 3-4, 127-129, 255-257 and the ring's wrap."""
    model, params = three_layers(preset, **overrides)
    ids = golden_ids(LENGTH)
    logits, cache = run_in_chunks(model, params, ids, 1, model.init_cache(2, MAX_LEN))
    expected, expected_cache = _whole(whole, preset, overrides)
    np.testing.assert_array_equal(logits, expected)
    assert_same_bytes(cache, expected_cache)


# 4 and 128 are the compression ratios, the others sit just beside them.
@pytest.mark.parametrize("chunk", [3, 4, 127, 128, 129])
def test_chunked_equals_whole(whole, chunk):
    model, params = three_layers()
    ids = golden_ids(LENGTH)
    logits, cache = run_in_chunks(model, params, ids, chunk, model.init_cache(2, MAX_LEN))
    expected, expected_cache = _whole(whole, "official", {})
    np.testing.assert_array_equal(logits, expected)
    assert_same_bytes(cache, expected_cache)


@pytest.mark.parametrize(("preset", "overrides"), PRESETS[:2])
def test_ragged_equals_solo(whole, preset, overrides):
    """Rows of unequal length, one of them empty, each as if it were alone (B8)."""
    model, params = three_layers(preset, **overrides)
    ids = golden_ids(LENGTH)
    expected, _ = _whole(whole, preset, overrides)
    counts = np.array([[128, 5, 0, 66], [1, 128, 0, 3], [71, 128, 7, 128]])
    source = [0, 1, 1, 0]
    cache = model.init_cache(4, MAX_LEN)
    done = np.zeros(4, int)
    for count in counts:
        # Padding of one row is real text of another: it must not matter.
        tokens = np.stack([np.resize(ids[s, d:], 128) for s, d in zip(source, done, strict=True)])
        logits, cache = append(
            model, params, jnp.asarray(tokens), cache, jnp.asarray(count, jnp.int32)
        )
        for row in range(4):
            got = np.asarray(logits)[row, : count[row]]
            want = expected[source[row], done[row] : done[row] + count[row]]
            np.testing.assert_array_equal(got, want, err_msg=f"row {row}")
            assert not np.asarray(logits)[row, count[row] :].any()
        done += count
    np.testing.assert_array_equal(np.asarray(cache.lengths), done)


def test_longer_max_len_changes_nothing(whole):
    """Sums run over fixed blocks of keys, so empty blocks behind the last key are exact zeros."""
    model, params = three_layers()
    expected, _ = _whole(whole, "official", {})
    longer = model.init_cache(2, 4 * MAX_LEN)
    logits, _ = run_in_chunks(model, params, golden_ids(LENGTH), 129, longer)
    np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize(("preset", "overrides"), PRESETS[:2])
def test_draft_rewind_redo_equals_straight(whole, preset, overrides):
    """Steps of one certain token and three wrong drafts, rewound to zero, one or two of them."""
    model, params = three_layers(preset, **overrides)
    ids = golden_ids(LENGTH)
    expected, _ = _whole(whole, preset, overrides)
    cache = model.init_cache(2, MAX_LEN, draft_tokens=3)
    count = jnp.full(2, 4, jnp.int32)
    position = 0
    while position + 4 <= 264:
        accepted = 1 + position % 3  # of the four tokens, these are right
        tokens = ids[:, position : position + 4].copy()
        tokens[:, accepted:] = 255 - tokens[:, accepted:]
        logits, cache = append(model, params, jnp.asarray(tokens), cache, count)
        np.testing.assert_array_equal(
            np.asarray(logits)[:, :accepted],
            expected[:, position : position + accepted],
            err_msg=f"position {position}",
        )
        position += accepted
        cache = dsv4_jax.rewind(cache, [position, position])


def _poisoned(leaf: jax.Array) -> jax.Array:
    """NaN in every dtype that has one; the largest code in E2M1, which has none."""
    if leaf.dtype == jnp.float4_e2m1fn:
        return bits.pack_e2m1(jnp.full(leaf.shape, 15, jnp.uint8))
    if leaf.dtype.itemsize == 1:
        return jax.lax.bitcast_convert_type(jnp.full(leaf.shape, 0xFF, jnp.uint8), leaf.dtype)
    return jnp.full_like(leaf, jnp.nan)


def test_reused_slot_ignores_old_content(whole):
    """B9: every array of the cache poisoned (NaN where the dtype has one), lengths back at 0."""
    model, params = three_layers()
    cache = model.init_cache(2, MAX_LEN)
    cache = dataclasses.replace(cache, layers=jax.tree.map(_poisoned, cache.layers))
    logits, _ = run_in_chunks(model, params, golden_ids(LENGTH), 3, cache)
    np.testing.assert_array_equal(logits, _whole(whole, "official", {})[0])
