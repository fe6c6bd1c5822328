"""swiglu against FP64, on both sides of every clamp."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.swiglu import swiglu
from tests.support.numerics import assert_near, f64
from tests.support.op_cases import normal

# exp, a quotient and two products in FP32.
REL = 1e-6
LIMIT = 10.0


def exact(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    gate = np.minimum(gate, LIMIT)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * np.clip(up, -LIMIT, LIMIT)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_against_fp64(dtype: jnp.dtype) -> None:
    gate, up = normal(0, 9, 48, scale=8, dtype=dtype), normal(1, 9, 48, scale=8, dtype=dtype)
    want = exact(f64(gate), f64(up))
    got = swiglu(gate, up, limit=LIMIT)
    assert got.dtype == dtype
    assert_near(got, want, REL * np.abs(want))


def test_clamps() -> None:
    """The gate only from above, ``up`` on both sides; huge values stay finite."""
    edge = np.array([-3e38, -200, -20, -10, -0.0, 0, 10, 11, 3e38], np.float32)
    gate, up = np.meshgrid(edge, edge)
    got = f64(swiglu(jnp.asarray(gate), jnp.asarray(up), limit=LIMIT))
    want = exact(gate.astype(np.float64), up.astype(np.float64))
    assert_near(got, want, REL * np.abs(want) + 1e-37)
    assert np.isfinite(got).all()
