"""hadamard against the matrix in FP64."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.hadamard import hadamard
from reference import formats
from tests.support.numerics import assert_near, f64
from tests.support.op_cases import normal

# log2(n) FP32 sums of values that grow by at most 2 each, relative to the sum of magnitudes.
REL = 5e-7


@pytest.mark.parametrize("n", [1, 2, 32, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_against_fp64(dtype: jnp.dtype, n: int) -> None:
    x = normal(0, 3, 5, n, dtype=dtype)
    sign = np.sign(formats.hadamard_matrix(n)).astype(np.float64)
    size = np.abs(f64(x)).sum(axis=-1, keepdims=True) * n**-0.5
    assert_near(hadamard(x), f64(x) @ sign * n**-0.5, REL * size)


def test_twice_is_the_identity() -> None:
    x = normal(0, 5, 128)
    assert_near(hadamard(hadamard(x)), f64(x), 2 * REL * np.abs(f64(x)).sum(-1, keepdims=True))


def test_one_hot_gives_a_row_of_the_matrix() -> None:
    got = f64(hadamard(jnp.eye(128)))
    np.testing.assert_array_equal(got, f64(formats.hadamard_matrix(128)))
