"""head_norm against FP64 and, with BF16 steps, against the reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.head_norm import head_norm
from reference import rmsnorm as reference
from reference.rounding import OFFICIAL
from tests.support.numerics import assert_near, bf16_ulp, f64
from tests.support.op_cases import normal

EPS = 1e-6
# As rmsnorm, without a weight.
REL = 4e-7
# In BF16 steps a sum in another order can move the mean across a rounding boundary; then all of
# that head's elements move by up to two ulps. Measured: no head of 63 moves.
MOVED_HEADS = 0.05


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_one_rounding_against_fp64(dtype: jnp.dtype) -> None:
    q = normal(0, 7, 3, 64, dtype=dtype)
    wide = f64(q)
    want = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + EPS)
    assert_near(head_norm(q, EPS, rounding="float32"), want, REL * np.abs(want))


def test_bf16_steps_against_the_reference() -> None:
    q = normal(0, 21, 3, 64, dtype=jnp.bfloat16)
    want = f64(reference.head_norm(q.astype(jnp.float32), EPS, OFFICIAL))
    got = f64(head_norm(q, EPS, rounding="bfloat16"))
    assert (np.abs(got - want) <= 2 * bf16_ulp(want)).all()
    assert np.mean((got != want).any(axis=-1)) <= MOVED_HEADS


def test_the_two_roundings_differ() -> None:
    """Otherwise the option would not be tested."""
    q = normal(0, 7, 3, 64, dtype=jnp.bfloat16)
    a, b = (head_norm(q, EPS, rounding=r) for r in ("float32", "bfloat16"))
    assert (f64(a) != f64(b)).any()
