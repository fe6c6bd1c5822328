"""mxfp4_linear against the reference in FP64, its codes against the tables."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.mxfp4_linear import mxfp4_linear
from dsv4_jax.quant import bits
from dsv4_jax.typing import UE8M0
from reference import formats
from tests.support import linears
from tests.support.linears import SHAPES, assert_product, exact, operands
from tests.support.numerics import assert_same_bits
from tests.support.products import product_problems

OP = "mxfp4_linear"
ACTS = ("fp8", "bfloat16")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_reference(shape: linears.Shape, act: str) -> None:
    assert_product(OP, operands(OP, shape), jnp.float32, act=act)
    assert_product(OP, operands(OP, shape, jnp.float32), jnp.bfloat16, act=act)


def test_every_code_and_scale() -> None:
    """A16, A17: 16 codes under 256 scale bytes, each in both nibbles."""
    code, scale, at = (x.ravel() for x in np.meshgrid(range(16), range(256), (4, 31)))
    packed = np.zeros((len(code), 16), np.uint8)
    packed[np.arange(len(code)), at // 2] = code << 4 * (at % 2)
    x = np.zeros((2, 32), np.float32)
    x[0, 4] = x[1, 31] = 1
    scales = jnp.asarray(scale[:, None].astype(np.uint8)).view(UE8M0)
    got = mxfp4_linear(
        jnp.asarray(x, jnp.bfloat16),
        bits.bytes_to_e2m1(jnp.asarray(packed)),
        scales,
        act="bfloat16",
    )
    with np.errstate(over="ignore", invalid="ignore"):
        values = formats.decode_e2m1_packed(code.astype(np.uint8))[::2]
        want = values * formats.decode_ue8m0(scale) + np.float32(0)
    got = np.where(at == 4, *np.asarray(got))
    assert_same_bits(got, want)


@pytest.mark.parametrize("act", ACTS)
def test_rounding(act: str) -> None:
    linears.check_rounding(OP, act=act)


@pytest.mark.parametrize("act", ACTS)
def test_rows(act: str) -> None:
    linears.check_rows(OP, act=act)


@pytest.mark.parametrize("act", ACTS)
def test_regimes(act: str) -> None:
    linears.check_regimes(OP, act=act)


def test_empty() -> None:
    linears.check_empty(OP)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_token_stays_alone(bad: float, act: str) -> None:
    linears.check_bad_rows(OP, bad, act=act)


def nibbles_swapped(x: Any, w: Any, s: Any) -> Any:
    pairs = bits.e2m1_to_bytes(w)
    return x, bits.bytes_to_e2m1(pairs << 4 | pairs >> 4), s


WRONG = {
    "nibbles-swapped": nibbles_swapped,
    "scales-shifted": lambda x, w, s: (x, w, jnp.roll(s, 1, 1)),
    "groups-swapped": lambda x, w, s: (x[:, ::-1], w, s),
    "last-block-left-out": lambda x, w, s: (x.at[..., -16:].set(0), w, s),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_variant_fails(wrong: Any) -> None:
    x, w, s = operands(OP, SHAPES["groups"])
    assert product_problems(mxfp4_linear(x, w, s), exact(OP, *wrong(x, w, s)))


def test_wrong_activations_fail() -> None:
    x, *weights = operands(OP, SHAPES["edges"])
    for act, other in (ACTS, ACTS[::-1]):
        got = mxfp4_linear(x, *weights, act=act)
        assert product_problems(got, exact(OP, x, *weights, act=other))
