"""fp8_linear against the reference in FP64, its codes against the tables."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops.fp8_linear import fp8_linear, fp8_linears
from dsv4_jax.quant import fp8
from dsv4_jax.typing import E4M3, UE8M0
from reference import formats
from reference import fp8_linear as reference_fp8
from tests.support import linears
from tests.support.linears import LIMIT, SHAPES, assert_product, exact, gated, operands, ungated
from tests.support.numerics import assert_same_bits, f64
from tests.support.products import product_problems

OP = "fp8_linear"
MORE = {"odd": (5, 0, 37, 19), "odd-tiles": (2, 0, 131, 130), "groups-in-a-tile": (4, 3, 200, 96)}
ACTS = ("fp8", "bfloat16")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", (SHAPES | MORE).values(), ids=SHAPES | MORE)
def test_against_reference(shape: linears.Shape, act: str) -> None:
    """Whole and edge tiles; activations quantised per token and 128 inputs, or in BF16."""
    assert_product(OP, operands(OP, shape), jnp.float32, act=act)
    assert_product(OP, operands(OP, shape, jnp.float32), jnp.bfloat16, act=act)


def test_every_code_and_scale() -> None:
    """A16, A17: 256 codes under 256 scale bytes, two tiles of one input each."""
    code = np.tile(np.arange(256, dtype=np.uint8), 256)
    scale = np.repeat(np.arange(256, dtype=np.uint8), 2)
    x = jnp.ones((1, 1), jnp.bfloat16)
    got = fp8_linear(
        x,
        jnp.asarray(code[:, None]).view(E4M3),
        jnp.asarray(scale[:, None]).view(UE8M0),
        act="bfloat16",
    )
    with np.errstate(over="ignore", invalid="ignore"):
        value = formats.decode_e4m3(code) * formats.decode_ue8m0(np.repeat(scale, 128))
        want = value.astype(ml_dtypes.bfloat16).astype(np.float32) + np.float32(0)
    assert_same_bits(got, want[None])


@pytest.mark.parametrize("act", ACTS)
def test_rounding(act: str) -> None:
    linears.check_rounding(OP, act=act)


@pytest.mark.parametrize("act", ACTS)
def test_rows(act: str) -> None:
    linears.check_rows(OP, act=act)


@pytest.mark.parametrize("act", ACTS)
def test_regimes(act: str) -> None:
    linears.check_regimes(OP, act=act)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("t", "groups"), [(1, 0), (9, 3), (200, 0), (0, 0)])
def test_several_weights(t: int, groups: int, act: Any) -> None:
    """One foreign call, each result bit for bit that of a call of its own; any numbers of rows."""
    x, *_ = operands(OP, (t, groups, 160, 3))
    rows = [n * (groups or 1) for n in (40, 1, 130, 0, 16)]
    weights, scales = zip(*(linears.stored(OP, n, 160, n) for n in rows), strict=True)
    dtypes = jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32
    lowered = fp8_linears.lower(x, weights, scales, act=act, dtype=dtypes)
    assert lowered.as_text().count("@dsv4.fp8_linear") == 1
    several = fp8_linears(x, weights, scales, act=act, dtype=dtypes)
    for y, weight, scale, dtype in zip(several, weights, scales, dtypes, strict=True):
        assert_same_bits(y, fp8_linear(x, weight, scale, act=act, dtype=dtype), str(weight.shape))


@jax.jit
def quantised_act(x: jax.Array) -> fp8.Fp8:
    return fp8.quantize_act(x.astype(jnp.float32), fp8.ACT_BLOCK)


@pytest.mark.parametrize("t", [1, 9, 200])
@pytest.mark.parametrize("groups", [0, 3])
def test_quantised_x(groups: int, t: int) -> None:
    """Bit for bit the array's result, as one call and as one of several; NaN in its own row."""
    lead, n = (t, groups) if groups else (t,), 24 * (groups or 1)
    rng = np.random.default_rng(t)
    x = rng.standard_normal((*lead, 384)) * np.exp2(rng.integers(-30, 30, (*lead, 1)))
    x[..., 128:256] *= 2.0**-20
    x[0, ..., 5] = 0
    x[-1, ..., 3] = np.inf
    if t > 1:
        x[1, ..., 200], x[0] = np.nan, 0
    wide = jax.device_put(x.astype(np.float32).astype(jnp.bfloat16))
    quantised = quantised_act(wide)
    assert quantised.scale.shape == (*lead, 3)
    weights, scales = zip(*(linears.stored(OP, n * i, 384, i) for i in (1, 8)), strict=True)
    several = fp8_linears(quantised, weights, scales, dtype=(jnp.float32, jnp.bfloat16))
    expected = fp8_linears(wide, weights, scales, dtype=(jnp.float32, jnp.bfloat16))
    for got, want, weight, scale in zip(several, expected, weights, scales, strict=True):
        bad = np.isnan(f64(want))
        assert t == 1 or bad[1].all()
        np.testing.assert_array_equal(np.isnan(f64(got)), bad)
        clean = [np.where(bad, 0, np.asarray(y)) for y in (got, want)]
        assert_same_bits(*clean)
        alone = fp8_linear(quantised, weight, scale, dtype=got.dtype)
        assert_same_bits(alone, got)


def test_every_quantised_x() -> None:
    """256 codes under 256 scales, as of a weight."""
    code = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 128, 1) * (np.arange(128) == 5)
    scale = np.arange(256, dtype=np.uint8)
    x = fp8.Fp8(
        jnp.asarray(np.tile(code, (256, 1)).astype(np.uint8)).view(E4M3),
        jnp.asarray(np.repeat(scale, 256)[:, None]).view(UE8M0),
    )
    one = jnp.asarray(np.full((1, 128), 0x38, np.uint8)).view(E4M3)
    got = fp8_linear(x, one, jnp.asarray([[127]], jnp.uint8).view(UE8M0))
    with np.errstate(over="ignore", invalid="ignore"):
        value = formats.decode_e4m3(np.tile(np.arange(256, dtype=np.uint8), 256))
        value = value * formats.decode_ue8m0(np.repeat(scale, 256))
        if jax.default_backend() == "cpu":  # tensor cores take the code, where BF16 is subnormal
            value = value.astype(ml_dtypes.bfloat16)
        want = value.astype(np.float32) + np.float32(0)
    bad = np.isnan(want)
    np.testing.assert_array_equal(np.isnan(got[:, 0]), bad)
    assert_same_bits(np.asarray(got)[~bad, 0], want[~bad])


GATED = [
    *((1, 2048, 0, 40), (2, 256, 0, 136), (3, 128, 0, 8), (4, 512, 0, 300), (9, 384, 0, 130)),
    *((130, 640, 0, 136), (3, 37, 0, 19), (130, 192, 0, 40), (2, 256, 3, 256), (40, 136, 2, 24)),
]
"""``(t, k, groups, n)``: on a GPU one launch, or x laid out or quantised ahead of the product."""


@pytest.mark.parametrize(("t", "k", "groups", "n"), GATED)
def test_gated(t: int, k: int, groups: int, n: int) -> None:
    """`swiglu` and then the linear, bit for bit, in every regime."""
    gate, up = gated(t, k, groups)
    weights = linears.stored(OP, n * (groups or 1), k)
    h = ungated(gate, up)
    regimes = linears.REGIMES if jax.default_backend() != "cpu" else ("decode",)
    for regime in regimes:
        dtype = jnp.float32 if regime == "exact" else jnp.bfloat16
        got = fp8_linear(gate, *weights, up=up, limit=LIMIT, dtype=dtype, regime=regime)
        want = fp8_linear(h, *weights, dtype=dtype, regime=regime)
        assert_same_bits(got, want, str(regime))


def test_gated_against_reference() -> None:
    gate, up = gated(9, 160)
    code, scale = linears.stored(OP, 40, 160)
    got = fp8_linear(gate, code, scale, up=up, limit=LIMIT, regime="exact")
    operands = f64(gate).astype(np.float32), *(np.asarray(x).view(np.uint8) for x in (code, scale))
    with jax.default_device(jax.devices("cpu")[0]):
        want = reference_fp8.fp8_linear(*operands, up=f64(up).astype(np.float32), limit=LIMIT)
    assert product_problems(got, want) == []


@pytest.mark.parametrize("k", [256, 200])
def test_gated_bits(k: int) -> None:
    """SwiGLUs that are quantised, one per output of an identity: the clamps, zeros, Inf and NaN."""
    edges = [0, 1e-3, 1, 9.94, 10, 10.06, 20, 80, 90, 3e38, np.inf]
    values = np.float32([*edges, *np.negative(edges), np.nan])
    gate, up = (x.ravel()[:, None].astype(jnp.bfloat16) for x in np.meshgrid(values, values))
    one = np.arange(k) == k - 1
    gate, up = (jax.device_put(np.where(one, x, 0).astype(jnp.bfloat16)) for x in (gate, up))
    code = jnp.asarray((one[None] * 0x38).astype(np.uint8)).view(E4M3)
    weights = code, jnp.full((1, -(-k // 128)), 127, jnp.uint8).view(UE8M0)
    got = fp8_linear(gate, *weights, up=up, limit=LIMIT)
    want = fp8_linear(ungated(gate, up), *weights)
    bad = np.isnan(want)
    assert 0 < bad.sum() < 3 * len(values)
    np.testing.assert_array_equal(np.isnan(got), bad)
    assert_same_bits(np.where(bad, 0, np.asarray(got)), np.where(bad, 0, np.asarray(want)))


def test_wrong_gated_fails() -> None:
    """`test_gated` sees every operand and the clamps."""
    linears.check_wrong_gated(OP)


def test_gated_empty() -> None:
    linears.check_gated_empty(OP)


def test_empty() -> None:
    linears.check_empty(OP)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_token_stays_alone(bad: float, act: str) -> None:
    linears.check_bad_rows(OP, bad, act=act)


WRONG = {
    "scales-by-row": lambda x, w, s: (x, w, s.T),
    "scales-shifted": lambda x, w, s: (x, w, jnp.roll(s, 1, 1)),
    "groups-swapped": lambda x, w, s: (x[:, ::-1], w, s),
    "last-block-left-out": lambda x, w, s: (x.at[..., -16:].set(0), w, s),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_variant_fails(wrong: Any) -> None:
    x, w, _ = operands(OP, SHAPES["groups-of-tiles"])
    scale = jnp.asarray([[120, 122], [119, 121]], jnp.uint8).view(UE8M0)
    assert product_problems(fp8_linear(x, w, scale), exact(OP, x, w, scale)) == []
    assert product_problems(fp8_linear(x, w, scale), exact(OP, *wrong(x, w, scale)))


def test_wrong_activations_fail() -> None:
    x, *weights = operands(OP, SHAPES["edges"])
    for act, other in (ACTS, ACTS[::-1]):
        assert product_problems(fp8_linear(x, *weights, act=act), exact(OP, x, *weights, act=other))
