"""dense_linear against FP64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.dense_linear import dense_linear
from tests.support.numerics import assert_near, assert_same_bits, f64
from tests.support.op_cases import normal

# FP32 sums over 96 exact (BF16) or once rounded (FP32) products, relative to the sum of
# magnitudes; the rigorous bound is 96 * 6e-8.
REL = 1e-6

DTYPES = [
    pytest.param(jnp.bfloat16, jnp.bfloat16, id="bf16"),
    pytest.param(jnp.float32, jnp.float32, id="fp32"),
    pytest.param(jnp.bfloat16, jnp.float32, id="mixed"),
    pytest.param(jnp.float32, jnp.bfloat16, id="mixed-weight"),
]


@pytest.mark.parametrize("t", [1, 3, 9])
@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPES)
def test_against_fp64(x_dtype: jnp.dtype, w_dtype: jnp.dtype, t: int) -> None:
    x, w = normal(0, t, 96, dtype=x_dtype), normal(1, 40, 96, dtype=w_dtype)
    got = dense_linear(x, w)
    assert got.dtype == jnp.float32
    assert_near(got, f64(x) @ f64(w).T, REL * (np.abs(f64(x)) @ np.abs(f64(w)).T))


def test_groups() -> None:
    """Group ``g`` of ``x`` meets rows ``g * n/G ..`` of the weight."""
    x, w = normal(0, 5, 4, 96), normal(1, 40, 96)
    split = f64(w).reshape(4, 10, 96)
    want = np.einsum("tgk,gnk->tgn", f64(x), split)
    size = np.einsum("tgk,gnk->tgn", np.abs(f64(x)), np.abs(split))
    assert_near(dense_linear(x, w), want, REL * size)


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("t", [1, 8, 9])
def test_the_way_the_weight_arrives_changes_no_bit(t: int, groups: int) -> None:
    """A constant or a transpose inside the caller's `jax.jit` must not be folded into the sums."""
    x = normal(0, *((t, groups, 96) if groups else (t, 96)), dtype=jnp.bfloat16)
    w = normal(1, 40, 96, dtype=jnp.bfloat16)
    eager = dense_linear(x, w)
    assert_same_bits(jax.jit(lambda x: dense_linear(x, w))(x), eager, "constant")
    transposed = jnp.asarray(np.ascontiguousarray(np.asarray(w).T))
    assert_same_bits(jax.jit(lambda x, w: dense_linear(x, w.T))(x, transposed), eager, "transpose")
