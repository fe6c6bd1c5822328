"""router against FP64: scores, selection with bias, ties, hash routing."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.router import router
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
