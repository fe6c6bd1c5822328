"""rmsnorm_fp8 against its reference and the ops that it takes the place of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.ops.rmsnorm_fp8 import rmsnorm_fp8
from dsv4_jax.quant import fp8
from dsv4_jax.quant.fp8 import Fp8
from reference.rmsnorm_fp8 import rmsnorm_fp8 as reference_rmsnorm_fp8
from tests.support.numerics import assert_same_tree, f64, raw
from tests.support.op_cases import normal

EPS = 1e-6
# BF16 values within an FP32 sum's error of a tie, then of a code (measured: none of 2e5).
MOST_TURNED = 2e-4
WIDTHS = [16, 144, 512, 528, 1536, 7168]


def operands(t: int, d: int) -> tuple[jax.Array, jax.Array]:
    """Tokens of magnitudes 2^-9 .. 2^9."""
    scale = np.exp2(np.round(np.asarray(normal(2, t, 1)) * 3))
    weight = 1 + np.asarray(normal(1, d, scale=0.3))
    x = np.asarray(normal(0, t, d)) * scale
    return jnp.asarray(x.astype(jnp.bfloat16)), jnp.asarray(weight.astype(jnp.bfloat16))


@jax.jit
def plain(x: Any, weight: Any) -> Fp8:
    """The ops that the call takes the place of."""
    return fp8.quantize_act(rmsnorm(x, weight, EPS).astype(jnp.float32), fp8.ACT_BLOCK)


@pytest.mark.parametrize("d", WIDTHS)
def test_against_the_plain_ops(d: int) -> None:
    """Bit for bit but for counted ties."""
    args = operands(20, d)
    for name, mine, theirs in zip(Fp8._fields, rmsnorm_fp8(*args, EPS), plain(*args), strict=True):
        turned = raw(mine) != raw(theirs)
        print(f"{d} {name}: {turned.sum()} of {turned.size} turned by ties")
        assert turned.mean() <= MOST_TURNED + 1 / turned.size


def test_against_the_reference() -> None:
    x, weight = operands(30, 1536)
    want = reference_rmsnorm_fp8(x.astype(jnp.float32), weight.astype(jnp.float32), EPS)
    got = fp8.dequantize_act(rmsnorm_fp8(x, weight, EPS), fp8.ACT_BLOCK)
    assert (f64(got) != f64(want)).mean() <= MOST_TURNED


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_stays_in_its_token(bad: float) -> None:
    """A13, A14: NaN in the scale of its block."""
    x, weight = operands(3, 512)
    clean, got = rmsnorm_fp8(x, weight, EPS), rmsnorm_fp8(x.at[1, 200].set(bad), weight, EPS)
    assert raw(got.scale)[1, 1] == 255
    for mine, theirs in zip(got, clean, strict=True):
        mine, theirs = raw(mine).copy(), raw(theirs)
        mine[1] = theirs[1]
        np.testing.assert_array_equal(mine, theirs)


def test_tokens_do_not_meet() -> None:
    """P2, in any leading shape."""
    x, weight = operands(24, 1024)
    whole = jax.tree.map(np.asarray, rmsnorm_fp8(x, weight, EPS))
    alone = rmsnorm_fp8(x[5], weight, EPS)
    assert_same_tree(alone, jax.tree.map(lambda part: part[5], whole))
    stacked = rmsnorm_fp8(x.reshape(2, 3, 4, 1024), weight, EPS)
    assert_same_tree(jax.tree.map(lambda part: part.reshape(24, -1), stacked), whole)


def test_zeros_and_nothing() -> None:
    """A6, A15."""
    weight = jnp.ones(512, jnp.bfloat16)
    got = rmsnorm_fp8(jnp.zeros((2, 512), jnp.bfloat16), weight, EPS)
    assert not f64(got.code).any() and (raw(got.scale) == 127 - 22).all()
    assert rmsnorm_fp8(jnp.zeros((0, 512), jnp.bfloat16), weight, EPS).scale.shape == (0, 4)


def test_a_wrong_variant_fails() -> None:
    """A norm over other channels would be seen."""
    x, weight = operands(20, 1024)
    got, want = rmsnorm_fp8(x.at[:, :512].multiply(1.01), weight, EPS), plain(x, weight)
    assert (raw(got.code) != raw(want.code)).mean() > 100 * MOST_TURNED
