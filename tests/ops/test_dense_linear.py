"""dense_linear against the reference in FP64; with FP32 operands, XLA's product, too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.dense_linear import dense_linear, dense_linears
from tests.support import linears
from tests.support.linears import SHAPES, assert_product, exact, operands
from tests.support.numerics import assert_near, assert_same_bits, f64
from tests.support.op_cases import normal
from tests.support.products import product_problems

OP = "dense_linear"
MORE = {"one-input": (3, 0, 1, 5), "odd": (5, 0, 37, 19), "odd-groups": (2, 3, 45, 21)}
# FP32 sums over 96 exact (BF16) or once rounded (FP32) products, relative to the sum of
# magnitudes; the rigorous bound is 96 * 6e-8.
REL = 1e-6

DTYPES = [
    pytest.param(jnp.float32, jnp.float32, id="fp32"),
    pytest.param(jnp.bfloat16, jnp.float32, id="mixed"),
    pytest.param(jnp.float32, jnp.bfloat16, id="mixed-weight"),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", (SHAPES | MORE).values(), ids=SHAPES | MORE)
def test_against_reference(shape: linears.Shape, dtype: Any) -> None:
    assert_product(OP, operands(OP, shape), dtype)


@pytest.mark.parametrize("t", [1, 3, 9])
@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPES)
def test_fp32_operands(x_dtype: jnp.dtype, w_dtype: jnp.dtype, t: int) -> None:
    """With one the product is XLA's, of FP32 numbers, and no foreign call."""
    x, w = normal(0, t, 96, dtype=x_dtype), normal(1, 40, 96, dtype=w_dtype)
    assert "dsv4." not in dense_linear.lower(x, w).as_text()
    for dtype in (jnp.float32, jnp.bfloat16):
        got = dense_linear(x, w, dtype=dtype, regime="prefill")
        assert got.dtype == dtype
        assert_near(got, f64(x) @ f64(w).T, REL * (np.abs(f64(x)) @ np.abs(f64(w)).T))


def test_groups_of_fp32() -> None:
    """Group ``g`` of ``x`` meets rows ``g * n/G ..`` of the weight."""
    x, w = normal(0, 5, 4, 96), normal(1, 40, 96)
    split = f64(w).reshape(4, 10, 96)
    want = np.einsum("tgk,gnk->tgn", f64(x), split)
    size = np.einsum("tgk,gnk->tgn", np.abs(f64(x)), np.abs(split))
    assert_near(dense_linear(x, w), want, REL * size)


ROWS = (40, 1, 19, 0, 130, 16, 7, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("t", "groups", "count"),
    [
        pytest.param(5, 0, 1, id="one"),
        pytest.param(1, 0, 2, id="two"),
        pytest.param(9, 0, 8, id="most"),
        pytest.param(200, 0, 5, id="many-tokens"),
        pytest.param(0, 0, 2, id="no-tokens"),
        pytest.param(9, 3, 5, id="groups"),
    ],
)
def test_several_weights(t: int, groups: int, count: int, dtype: Any) -> None:
    """One foreign call, each result bit for bit that of a call of its own; any numbers of rows."""
    x = normal(0, *((t, groups, 96) if groups else (t, 96)), dtype=jnp.bfloat16)
    rows = [n * (groups or 1) for n in ROWS[:count]]
    weights = [normal(i, n, 96, dtype=jnp.bfloat16) for i, n in enumerate(rows, 1)]
    assert dense_linears.lower(x, weights).as_text().count("@dsv4.dense_linear") == 1
    for i, y in enumerate(dense_linears(x, weights, dtype=dtype)):
        assert_same_bits(y, dense_linear(x, weights[i], dtype=dtype), f"weights[{i}]")


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_a_dtype_for_each_result(stored: jnp.dtype) -> None:
    x = normal(0, 5, 96, dtype=stored)
    weights = [normal(i, n, 96, dtype=stored) for i, n in enumerate((40, 3, 40), 1)]
    dtypes = jnp.float32, jnp.bfloat16, jnp.bfloat16
    for y, weight, dtype in zip(
        dense_linears(x, weights, dtype=dtypes), weights, dtypes, strict=True
    ):
        assert_same_bits(y, dense_linear(x, weight, dtype=dtype), str(dtype))


@pytest.mark.parametrize(("x_dtype", "w_dtype"), DTYPES)
def test_several_weights_of_fp32(x_dtype: jnp.dtype, w_dtype: jnp.dtype) -> None:
    x = normal(0, 5, 3, 96, dtype=x_dtype)
    weights = [normal(i, n, 96, dtype=w_dtype) for i, n in enumerate((39, 3), 1)]
    assert "dsv4." not in dense_linears.lower(x, weights).as_text()
    for i, y in enumerate(dense_linears(x, weights)):
        assert_same_bits(y, dense_linear(x, weights[i]), f"weights[{i}]")


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


def test_rounding() -> None:
    linears.check_rounding(OP)


def test_rows() -> None:
    linears.check_rows(OP)


def test_regimes() -> None:
    linears.check_regimes(OP)


def test_empty() -> None:
    linears.check_empty(OP)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_token_stays_alone(bad: float) -> None:
    linears.check_bad_rows(OP, bad)


WRONG = {
    "last-input-left-out": lambda x, w: (x[..., :-1], w[:, :-1]),
    "groups-swapped": lambda x, w: (x[:, ::-1], w),
    "rows-not-split": lambda x, w: (x, w.reshape(10, 4, 96).swapaxes(0, 1).reshape(40, 96)),
    "of-another-token": lambda x, w: (jnp.roll(x, 1, 0), w),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_variant_fails(wrong: Any) -> None:
    x, w = operands(OP, SHAPES["groups"])
    assert product_problems(dense_linear(x, w), exact(OP, *wrong(x, w)))


def test_subnormal_products() -> None:
    """Products below 2^-126 count; XLA's threads would flush them."""
    x = jnp.full((1, 32), 2.0**-100, jnp.bfloat16)
    w = jnp.full((3, 32), 2.0**-40, jnp.bfloat16)
    assert f64(dense_linear(x, w)).tolist() == [[2.0**-135] * 3]
