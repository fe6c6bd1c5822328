"""rmsnorm against FP64."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.rmsnorm import rmsnorm
from tests.support.numerics import assert_near, f64
from tests.support.op_cases import normal

EPS = 1e-6
# A few FP32 roundings: the mean (a sum of squares, no cancellation), the root, two products.
REL = 4e-7


def exact(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("weight_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("scale", [1e-5, 1.0, 1e15])
def test_against_fp64(dtype: jnp.dtype, weight_dtype: jnp.dtype, scale: float) -> None:
    """One rounding at the end: the weight is multiplied in FP32."""
    x = normal(0, 3, 7, 96, scale=scale, dtype=dtype)
    weight = normal(1, 96, dtype=weight_dtype)
    want = exact(f64(x), f64(weight))
    got = rmsnorm(x, weight, EPS)
    assert got.dtype == dtype
    assert_near(got, want, REL * np.abs(want))


def test_zeros() -> None:
    got = rmsnorm(jnp.zeros((2, 32), jnp.bfloat16), jnp.ones(32), EPS)
    assert (f64(got) == 0).all()
