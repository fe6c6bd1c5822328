"""router against FP64: scores, selection with bias, ties, hash routing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv4_jax.ops.router import router
from reference.router import router as reference_router
from tests.support.numerics import assert_near, assert_same_bits, f64
from tests.support.op_cases import normal

# FP32 product over 96 inputs, softplus, root, sum of k and quotient.
REL = 3e-6


def score(z: np.ndarray) -> np.ndarray:
    return np.sqrt(np.logaddexp(0, z))


@pytest.mark.parametrize("k", [1, 6, 32])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_score_routing(dtype: jnp.dtype, k: int) -> None:
    """The bias selects and has no part in the weights; ids ascend."""
    x, weight = normal(0, 9, 96, dtype=dtype), normal(1, 32, 96, scale=0.2, dtype=dtype)
    bias = normal(2, 32)
    idx, got = router(x, weight, bias, None, k=k, scale=1.5)
    s = score(f64(x) @ f64(weight).T)
    best = np.sort(np.argsort(-(s + f64(bias)), axis=-1, kind="stable")[:, :k], axis=-1)
    np.testing.assert_array_equal(idx, best)
    picked = np.take_along_axis(s, best, axis=-1)
    want = picked / picked.sum(axis=-1, keepdims=True) * 1.5
    assert idx.dtype == jnp.int32 and got.dtype == jnp.float32
    assert_near(got, want, REL * want)


def test_hash_routing() -> None:
    """The given ids, sorted, with the weights of their scores."""
    x, weight = normal(0, 9, 96), normal(1, 32, 96, scale=0.2)
    given = np.array([np.random.default_rng(i).permutation(32)[:6] for i in range(9)], np.int32)
    idx, got = router(x, weight, None, jnp.asarray(given), k=6, scale=2.0)
    np.testing.assert_array_equal(idx, np.sort(given, axis=-1))
    picked = np.take_along_axis(score(f64(x) @ f64(weight).T), np.sort(given, -1), axis=-1)
    want = picked / picked.sum(axis=-1, keepdims=True) * 2
    assert_near(got, want, REL * want)


def test_ties_go_to_the_lower_id() -> None:
    """B14: equal scores of all experts, and of pairs of them."""
    x = normal(0, 3, 96)
    idx, _ = router(x, jnp.zeros((32, 96)), jnp.zeros(32), None, k=6, scale=1.0)
    np.testing.assert_array_equal(idx, np.tile(np.arange(6), (3, 1)))
    weight = jnp.tile(normal(1, 16, 96, scale=0.2), (2, 1))  # expert e and e + 16 tie
    idx, _ = router(x, weight, jnp.zeros(32), None, k=5, scale=1.0)
    best = np.argsort(-score(f64(x) @ f64(weight).T).round(5), axis=-1, kind="stable")[:, :5]
    np.testing.assert_array_equal(idx, np.sort(best, axis=-1))


@pytest.mark.parametrize("bad", [-1, 32, 2**31 - 1])
def test_an_id_outside_the_experts_has_no_weight(bad: int) -> None:
    """B13: the other picks of the token keep theirs, other tokens every bit."""
    x, weight = normal(0, 9, 96), normal(1, 32, 96, scale=0.2)
    given = np.tile(np.array([3, 5, 9], np.int32), (9, 1))
    _, clean = router(x, weight, None, jnp.asarray(given), k=3, scale=1.0)
    given[4, 1] = bad
    idx, got = router(x, weight, None, jnp.asarray(given), k=3, scale=1.0)
    by_id = dict(zip(np.asarray(idx[4]).tolist(), np.asarray(got[4]).tolist(), strict=True))
    assert by_id[bad] == 0
    assert by_id[3] + by_id[9] == pytest.approx(1, abs=REL)
    assert_same_bits(np.delete(got, 4, axis=0), np.delete(clean, 4, axis=0))


def of_logits(logits: Any, bias: Any, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The op on one token of given logits ``[e]``, through weights of one input."""
    weight = jnp.asarray(logits, jnp.float32)[:, None]
    idx, got = router(jnp.ones((1, 1)), weight, jnp.asarray(bias), None, k=k, scale=1.0)
    return np.asarray(idx), np.asarray(got)


@pytest.mark.parametrize("nans", [[5], [5, 30], [0, 31, 7, 8, 9, 10, 11]])
def test_nan_is_picked_first(nans: list[int]) -> None:
    """As `lax.top_k` has it: NaN above Inf, the lower id of two; all weights are then NaN."""
    logits = np.asarray(normal(0, 32)).copy()
    logits[20] = np.inf
    logits[nans] = np.nan
    bias = normal(2, 32)
    idx, weight = of_logits(logits, bias, 6)
    score = jnp.sqrt(jax.nn.softplus(jnp.asarray(logits))) + bias
    np.testing.assert_array_equal(idx, np.sort(lax.top_k(score, 6)[1])[None])
    assert set(sorted(nans)[:6]) <= set(idx[0].tolist())
    assert np.isnan(weight).all()


def test_nan_bias_is_picked_first() -> None:
    """Its score is a number, and so are the weights."""
    bias = normal(2, 32).at[jnp.array([30, 31])].set(jnp.nan)
    idx, weight = router(normal(0, 9, 96), normal(1, 32, 96), bias, None, k=3, scale=1.0)
    np.testing.assert_array_equal(np.asarray(idx)[:, 1:], np.tile([30, 31], (9, 1)))
    assert np.isfinite(f64(weight)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_token_stays_alone(bad: float) -> None:
    """A13, A14."""
    x, weight, bias = normal(0, 9, 96), normal(1, 32, 96, scale=0.2), normal(2, 32)
    clean = router(x, weight, bias, None, k=6, scale=1.0)
    got = router(x.at[4, 5].set(bad), weight, bias, None, k=6, scale=1.0)
    for part, want in zip(got, clean, strict=True):
        assert_same_bits(np.delete(part, 4, axis=0), np.delete(want, 4, axis=0))


def test_all_scores_zero() -> None:
    """Below 2^-126 a score is 0, and 0 / 0 NaN."""
    idx, weight = of_logits(np.full(8, -200.0), np.zeros(8, np.float32), 2)
    np.testing.assert_array_equal(idx, [[0, 1]])
    assert np.isnan(weight).all()


def test_duplicates_count_twice() -> None:
    given = jnp.asarray(np.tile([[7, 3, 7]], (9, 1)), jnp.int32)
    x, weight = normal(0, 9, 96), normal(1, 32, 96, scale=0.2)
    idx, got = router(x, weight, None, given, k=3, scale=1.0)
    np.testing.assert_array_equal(idx, np.tile([3, 7, 7], (9, 1)))
    s = score(f64(x) @ f64(weight).T)[:, [3, 7, 7]]
    want = s / s.sum(axis=-1, keepdims=True)
    assert_near(got, want, REL * want)


@pytest.mark.parametrize("experts", [1, 6, 256, 384, 1024])
def test_number_of_experts(experts: int) -> None:
    """A7: up to the limit of the kernel."""
    x, weight, bias = normal(0, 5, 32), normal(1, experts, 32, scale=0.3), normal(2, experts)
    k = min(experts, 6)
    idx, got = router(x, weight, bias, None, k=k, scale=2.5)
    s = score(f64(x) @ f64(weight).T)
    best = np.sort(np.argsort(-(s + f64(bias)), axis=-1, kind="stable")[:, :k], axis=-1)
    np.testing.assert_array_equal(idx, best)
    picked = np.take_along_axis(s, best, axis=-1)
    want = picked / picked.sum(axis=-1, keepdims=True) * 2.5
    assert_near(got, want, REL * want)


@pytest.mark.parametrize("hashed", [False, True])
def test_against_reference(hashed: bool) -> None:
    """By id: the reference keeps the order of the scores."""
    x, weight, bias = normal(0, 40, 96), normal(1, 32, 96, scale=0.2), normal(2, 32)
    given = jnp.asarray([np.random.default_rng(i).permutation(32)[:6] for i in range(40)])
    selector = (None, given.astype(jnp.int32)) if hashed else (bias, None)
    operands: list[Any] = [x, weight, *selector]
    idx, got = router(*operands, k=6, scale=1.5)
    want_idx, want = reference_router(*operands, k=6, scale=1.5)
    order = np.argsort(want_idx, axis=-1)
    np.testing.assert_array_equal(idx, np.take_along_axis(np.asarray(want_idx), order, axis=-1))
    want = np.take_along_axis(f64(want), order, axis=-1)
    assert_near(got, want, REL * want)


def test_ids_of_64_bits() -> None:
    """Ids beyond 32 bits stay outside; the result's are of 32 bits."""
    x, weight = normal(0, 2, 96), normal(1, 32, 96, scale=0.2)
    with jax.enable_x64(True):
        given = jnp.asarray([[3, 5 + 2**32, 5 - 2**32]] * 2, jnp.int64)
        idx, got = router(x, weight, None, given, k=3, scale=1.0)
    assert idx.dtype == jnp.int32
    np.testing.assert_array_equal(idx, [[-(2**31), 3, 2**31 - 1]] * 2)
    np.testing.assert_array_equal(got, [[0, 1, 0]] * 2)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.int64])
def test_rows_of_a_table(dtype: jnp.dtype) -> None:
    """As `jnp.take` with ``clip``: ids of tokens outside take the first row or the last."""
    x, weight = normal(0, 6, 96), normal(1, 32, 96, scale=0.2)
    table = jnp.asarray([np.random.default_rng(i).permutation(32)[:4] for i in range(11)])
    with jax.enable_x64(dtype == jnp.int64):
        tokens = jnp.asarray([10, 3, -1, 3, 11, 2**31 - 1 if dtype == jnp.int32 else 2**40], dtype)
        rows = jnp.take(table, tokens, axis=0, mode="clip")
        np.testing.assert_array_equal(rows, table[np.array([10, 3, 0, 3, 10, 10])])
        wide = reference_router(x, weight, None, table, k=4, scale=1.5, tokens=tokens)
        got = router(x, weight, None, table, k=4, scale=1.5, tokens=tokens)
        want = router(x, weight, None, rows, k=4, scale=1.5)
    for part, expected in zip(got, want, strict=True):
        assert_same_bits(part, expected)
    np.testing.assert_array_equal(got[0], np.sort(wide[0], axis=-1))


def test_wrong_variants_fail() -> None:
    """Weights from the score with its bias, or of a softplus without the root, are far off."""
    x, weight, bias = normal(0, 9, 96), normal(1, 32, 96, scale=0.2), normal(2, 32)
    idx, got = router(x, weight, bias, None, k=6, scale=1.0)
    s = score(f64(x) @ f64(weight).T)
    for wrong in (s + f64(bias), s * s):
        picked = np.take_along_axis(wrong, np.asarray(idx), axis=-1)
        want = picked / picked.sum(axis=-1, keepdims=True)
        assert np.abs(f64(got) - want).max() > 100 * REL
