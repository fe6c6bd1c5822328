"""mhc_pre against FP64 and the reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.mhc_pre import mhc_pre
from reference import mhc_pre as reference
from tests.support.numerics import assert_near, f64
from tests.support.op_cases import normal

EPS = 1e-6
# The product over hc * dim inputs in FP32 gives mix to about 1e-6; sigmoid and Sinkhorn keep it.
MIX_REL = 4e-6


def exact(
    streams: np.ndarray, fn: np.ndarray, base: np.ndarray, scale: np.ndarray, iters: int = 20
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """model.md 2.2 in FP64."""
    t, hc, _ = streams.shape
    flat = streams.reshape(t, -1)
    mix = flat @ fn.T / np.sqrt(np.mean(flat * flat, axis=-1, keepdims=True) + EPS)

    def sigmoid(z: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-z))

    pre = sigmoid(mix[:, :hc] * scale[0] + base[:hc]) + EPS
    post = 2 * sigmoid(mix[:, hc : 2 * hc] * scale[1] + base[hc : 2 * hc])
    c = (mix[:, 2 * hc :] * scale[2] + base[2 * hc :]).reshape(t, hc, hc)
    c = np.exp(c - c.max(axis=2, keepdims=True))
    c = c / c.sum(axis=2, keepdims=True) + EPS
    c = c / (c.sum(axis=1, keepdims=True) + EPS)
    for _ in range(iters - 1):
        c = c / (c.sum(axis=2, keepdims=True) + EPS)
        c = c / (c.sum(axis=1, keepdims=True) + EPS)
    return np.einsum("tj,tjd->td", pre, streams), post, c


def parameters(hc: int = 4, dim: int = 48) -> tuple[jnp.ndarray, ...]:
    mixes = 2 * hc + hc * hc
    return normal(1, mixes, hc * dim, scale=0.2), normal(2, mixes), jnp.array([0.7, 1.1, 0.9])


@pytest.mark.parametrize("hc", [4, 2, 1])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_against_fp64(dtype: jnp.dtype, hc: int) -> None:
    """A8: other stream counts work here."""
    streams = normal(0, 5, hc, 48, dtype=dtype)
    p = parameters(hc)
    y, post, comb = mhc_pre(streams, *p, iters=20, hc_eps=EPS, rms_eps=EPS)
    want = exact(f64(streams), *map(f64, p))
    size = np.sum(np.abs(f64(streams)), axis=1)
    assert y.dtype == dtype and post.dtype == comb.dtype == jnp.float32
    assert_near(y, want[0], MIX_REL * size, "y")
    assert_near(post, want[1], MIX_REL, "post")
    assert_near(comb, want[2], MIX_REL, "comb")


def test_against_the_reference() -> None:
    streams, p = normal(0, 5, 4, 48), parameters()
    settings = {"iters": 20, "hc_eps": EPS, "rms_eps": EPS}
    for got, want in zip(
        mhc_pre(streams, *p, **settings), reference.mhc_pre(streams, *p, **settings), strict=True
    ):
        assert_near(got, f64(want), 2 * MIX_REL * np.maximum(1, np.abs(f64(want))))


def test_columns_sum_to_one() -> None:
    """A column normalisation comes last; rows are only nearly normalised."""
    comb = f64(mhc_pre(normal(0, 5, 4, 48), *parameters(), iters=3, hc_eps=EPS, rms_eps=EPS)[2])
    # Each sum is divided by itself plus eps.
    np.testing.assert_allclose(comb.sum(axis=1), 1, atol=2 * EPS)
    assert np.abs(comb.sum(axis=2) - 1).max() > 10 * EPS


@pytest.mark.parametrize("iters", [1, 2])
def test_iterations_are_counted(iters: int) -> None:
    streams, p = normal(0, 5, 4, 48), parameters()
    comb = mhc_pre(streams, *p, iters=iters, hc_eps=EPS, rms_eps=EPS)[2]
    assert_near(comb, exact(f64(streams), *map(f64, p), iters=iters)[2], MIX_REL)
