"""index_topk against a full sort in NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.index_topk import index_scores, index_topk
from dsv4_jax.quant.kv import IndexRows, index_dequant, index_quant
from reference import indexer as reference
from reference.rounding import OFFICIAL
from tests.support.numerics import assert_near, assert_same_bits, f64
from tests.support.op_cases import normal

B, T, HEADS, DIM, SLOTS = 2, 3, 4, 32, 256
# Sums over 32 channels and 4 heads in FP32, relative to the sum of magnitudes.
REL = 1e-6

FORMS = ["mxfp4", "fp8", "bfloat16", "float32"]


def inputs(form: Any) -> tuple[jax.Array, jax.Array, IndexRows]:
    return (
        normal(0, B, T, HEADS, DIM),
        normal(1, B, T, HEADS),
        index_quant(normal(2, B, SLOTS, DIM), form),
    )


def sorted_best(scores: np.ndarray, n_visible: np.ndarray, k: int) -> np.ndarray:
    """Ascending ids of the best ``min(k, n)`` of the first ``n``, then -1; ties to the lower."""
    out = np.full((*n_visible.shape, k), -1, np.int32)
    for at in np.ndindex(*n_visible.shape):
        n = int(np.clip(n_visible[at], 0, scores.shape[-1]))
        best = np.sort(np.argsort(-scores[at][:n], kind="stable")[:k])
        out[at][: len(best)] = best
    return out


@pytest.mark.parametrize("form", FORMS)
def test_scores_against_fp64(form: str) -> None:
    q, weight, keys = inputs(form)
    n_visible = jnp.full((B, T), SLOTS, jnp.int32)
    dot = np.einsum("bthd,bsd->bths", f64(q), f64(index_dequant(keys)))
    size = np.einsum("bthd,bsd->bths", np.abs(f64(q)), np.abs(f64(index_dequant(keys))))
    want = np.einsum("bths,bth->bts", np.maximum(dot, 0), f64(weight))
    bound = np.einsum("bths,bth->bts", size, np.abs(f64(weight)))
    assert_near(index_scores(q, weight, keys, n_visible), want, REL * bound)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("topk", [1, 24, 256, 1000])
def test_selection_is_a_full_sort(form: str, topk: int) -> None:
    """B5: with fewer visible entries than ``topk`` all of them, then -1."""
    q, weight, keys = inputs(form)
    n_visible = np.array([[0, 1, 23], [24, 129, 256]], np.int32)
    scores = index_scores(q, weight, keys, jnp.asarray(n_visible))
    got = index_topk(q, weight, keys, jnp.asarray(n_visible), topk=topk)
    assert got.dtype == jnp.int32
    want = sorted_best(np.asarray(scores), n_visible, min(topk, SLOTS))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("ties", ["all-zero", "two-of-each"])
def test_ties_go_to_the_lower_id(ties: str) -> None:
    """B14: ReLU makes zeros common."""
    q, weight, _ = inputs("float32")
    key = normal(2, B, SLOTS // 2, DIM)
    key = jnp.concatenate([key, key], axis=1) * (0 if ties == "all-zero" else 1)
    keys = index_quant(key, "float32")
    n_visible = np.full((B, T), SLOTS, np.int32)
    got = index_topk(q, weight, keys, jnp.asarray(n_visible), topk=25)
    scores = np.asarray(index_scores(q, weight, keys, jnp.asarray(n_visible)))
    if ties == "all-zero":
        np.testing.assert_array_equal(got, np.tile(np.arange(25), (B, T, 1)))
    assert_same_bits(scores[..., : SLOTS // 2], scores[..., SLOTS // 2 :], "the ties are real")
    np.testing.assert_array_equal(got, sorted_best(scores, n_visible, 25))


def test_bf16_rounding_points_are_the_reference() -> None:
    """Up to a sum that crosses a rounding boundary: at most 1 % of the scores, by one ulp each."""
    q, weight, keys = inputs("mxfp4")
    q = index_dequant(index_quant(q, "mxfp4"))
    weight = weight.astype(jnp.bfloat16).astype(jnp.float32)
    n_visible = jnp.full((B, T), SLOTS, jnp.int32)
    got = f64(index_scores(q, weight, keys, n_visible, rounding="bfloat16"))
    wide = index_dequant(keys)
    want = np.stack([f64(reference.indexer(q[i], wide[i], weight[i], OFFICIAL)) for i in range(B)])
    assert np.mean(got != want) < 0.01
    # BF16 has 8 significant bits; the terms of the sum are a few times larger than it.
    assert np.abs(got - want).max() <= 2.0**-6 * np.abs(want).max()


def test_stored_bytes_beyond_the_visible_do_not_matter() -> None:
    """B9: NaN bytes there change no id."""
    q, weight, keys = inputs("mxfp4")
    n_visible = np.array([[0, 1, 23], [24, 129, 200]], np.int32)
    clean = index_topk(q, weight, keys, jnp.asarray(n_visible), topk=24)
    assert keys.scale is not None
    hidden = np.arange(SLOTS)[None] >= n_visible.max(axis=1, keepdims=True)
    byte = jax.lax.bitcast_convert_type(keys.scale, jnp.uint8)
    byte = jnp.where(hidden[..., None], jnp.uint8(255), byte)
    poisoned = IndexRows(keys.key, jax.lax.bitcast_convert_type(byte, keys.scale.dtype))
    assert_same_bits(index_topk(q, weight, poisoned, jnp.asarray(n_visible), topk=24), clean)


def test_longer_pool_changes_nothing() -> None:
    q, weight, keys = inputs("float32")
    n_visible = jnp.asarray(np.array([[0, 1, 23], [24, 129, 256]], np.int32))
    longer = IndexRows(jnp.pad(keys.key, [(0, 0), (0, 256), (0, 0)]), None)
    clean = index_topk(q, weight, keys, n_visible, topk=24)
    assert_same_bits(index_topk(q, weight, longer, n_visible, topk=24), clean)


@pytest.mark.parametrize("n", [SLOTS + 1, 2**31 - 1])
def test_more_visible_than_stored(n: int) -> None:
    """Counted as all of them: a device value must not send the loop astray."""
    q, weight, keys = inputs("float32")
    every = index_topk(q, weight, keys, jnp.full((B, T), SLOTS, jnp.int32), topk=24)
    got = index_topk(q, weight, keys, jnp.full((B, T), n, jnp.int32), topk=24)
    assert_same_bits(got, every)
