"""nvfp4_linear against the reference in FP64, its codes against the tables."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.nvfp4_linear import nvfp4_linear, nvfp4_linears
from dsv4_jax.quant import bits
from dsv4_jax.typing import E4M3
from reference import formats
from reference import nvfp4_linear as reference_nvfp4
from tests.support import linears
from tests.support.linears import LIMIT, SHAPES, assert_product, exact, gated, operands, ungated
from tests.support.numerics import assert_same_bits, f64
from tests.support.products import product_problems

OP = "nvfp4_linear"
MORE = {"one-block": (3, 0, 16, 8), "blocks": (2, 0, 176, 24), "blocks-groups": (9, 2, 48, 10)}
ACTS = ("nvfp4", "fp8", "bfloat16")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", (SHAPES | MORE).values(), ids=SHAPES | MORE)
def test_against_reference(shape: linears.Shape, act: str) -> None:
    """The activation's global scale is its row's own and folds into the epilogue."""
    assert_product(OP, operands(OP, shape), jnp.float32, act=act)
    assert_product(OP, operands(OP, shape, jnp.float32), jnp.bfloat16, act=act)


@pytest.mark.parametrize("scale", [2.0**-8, 0.0123, 1e-3, 1.0])
@pytest.mark.parametrize("shape", ["edges", "groups"])
def test_static_scale_against_reference(shape: str, scale: float) -> None:
    """Too small a scale saturates, too large a one rounds to zero; both as the format defines."""
    for dtype in (jnp.float32, jnp.bfloat16):
        arguments = (*operands(OP, SHAPES[shape], dtype), jnp.float32(scale))
        assert_product(OP, arguments, dtype, act="nvfp4")


@pytest.mark.parametrize(
    ("scale", "used"),
    [
        *((scale, 2.0**-100) for scale in (1e-38, 1e-45, 0.0, -1.0, -np.inf)),
        *((scale, 2.0**100) for scale in (1e38, np.inf)),
    ],
)
def test_static_scale_is_clamped(scale: float, used: float) -> None:
    """A14: 2^-100..2^100."""
    arguments = operands(OP, SHAPES["small"])
    got = nvfp4_linear(*arguments, jnp.float32(scale))
    assert_same_bits(got, nvfp4_linear(*arguments, jnp.float32(used)))
    assert np.isfinite(f64(got)).all()


def test_static_scale_of_a_token() -> None:
    """The token's own scale, given as a static one, changes no bit."""
    x, *weights = operands(OP, SHAPES["one-row"])
    own = formats.nvfp4_token_scale(x.astype(jnp.float32))[0, 0]
    assert_same_bits(nvfp4_linear(x, *weights, own), nvfp4_linear(x, *weights))


def test_every_code_and_scale() -> None:
    """A16, A17: 16 codes under 256 scale bytes, each in both nibbles."""
    code, scale, at = (x.ravel() for x in np.meshgrid(range(16), range(256), (4, 15)))
    packed = np.zeros((len(code), 8), np.uint8)
    packed[np.arange(len(code)), at // 2] = code << 4 * (at % 2)
    x = np.zeros((2, 16), np.float32)
    x[0, 4] = x[1, 15] = 1
    weights = (
        bits.bytes_to_e2m1(jnp.asarray(packed)),
        jnp.asarray(scale[:, None].astype(np.uint8)).view(E4M3),
        jnp.float32(1),
    )
    values = formats.decode_e2m1_packed(code.astype(np.uint8))[::2]
    want = values * formats.decode_e4m3(scale) + np.float32(0)
    for act in ("bfloat16", "fp8"):
        got = nvfp4_linear(jnp.asarray(x, jnp.bfloat16), *weights, act=act)
        assert_same_bits(np.where(at == 4, *np.asarray(got)), want, act)
    # 6 under a static scale of 1 is the code 6 with the block scale 1.
    got = nvfp4_linear(jnp.asarray(6 * x, jnp.bfloat16), *weights, jnp.float32(1))
    assert_same_bits(np.where(at == 4, *np.asarray(got)), 6 * want, "nvfp4")


@pytest.mark.parametrize("act", ACTS)
def test_rounding(act: str) -> None:
    linears.check_rounding(OP, act=act)


@pytest.mark.parametrize("act", ACTS)
def test_rows(act: str) -> None:
    linears.check_rows(OP, act=act)


@pytest.mark.parametrize("act", ACTS)
def test_regimes(act: str) -> None:
    linears.check_regimes(OP, act=act)


@pytest.mark.parametrize(
    ("act", "static"), [("nvfp4", False), ("nvfp4", True), ("fp8", False), ("bfloat16", False)]
)
@pytest.mark.parametrize(("t", "groups"), [(1, 0), (5, 3), (40, 0), (130, 0), (0, 0)])
def test_several_weights(t: int, groups: int, act: Any, static: bool) -> None:
    """One foreign call, each result bit for bit that of a call of its own; any numbers of rows."""
    x, *_ = operands(OP, (t, groups, 160, 3))
    rows = [n * (groups or 1) for n in (40, 1, 130, 0, 16)]
    leaves = [
        (*linears.stored(OP, n, 160, n)[:2], jnp.float32(0.01 * (1 + i)))
        for i, n in enumerate(rows)
    ]
    more = (jnp.float32(0.0123),) if static else ()
    several = (x, *zip(*leaves, strict=True), *more)
    dtypes = jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32
    lowered = nvfp4_linears.lower(*several, act=act, dtype=dtypes)
    assert lowered.as_text().count("@dsv4.nvfp4_linear") == 1
    results = nvfp4_linears(*several, act=act, dtype=dtypes)
    for y, own, dtype in zip(results, leaves, dtypes, strict=True):
        alone = nvfp4_linear(x, *own, *more, act=act, dtype=dtype)
        assert_same_bits(y, alone, str(own[0].shape))


GATED = [
    *((1, 2048, 0, 40), (2, 256, 0, 136), (3, 128, 0, 8), (4, 512, 0, 300), (9, 384, 0, 130)),
    *((130, 640, 0, 136), (3, 48, 0, 19), (2, 256, 3, 256), (40, 144, 2, 24)),
]
"""``(t, k, groups, n)``: on a GPU one launch, or x laid out ahead of the product."""


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("t", "k", "groups", "n"), GATED)
def test_gated(t: int, k: int, groups: int, n: int, static: bool) -> None:
    """`swiglu` and then the linear, bit for bit, in every regime."""
    gate, up = gated(t, k, groups)
    weights = linears.stored(OP, n * (groups or 1), k)
    weights += (jnp.float32(0.0123),) if static else ()
    h = ungated(gate, up)
    regimes = linears.REGIMES if jax.default_backend() != "cpu" else ("decode",)
    for regime in regimes:
        got = nvfp4_linear(gate, *weights, up=up, limit=LIMIT, regime=regime)
        assert_same_bits(got, nvfp4_linear(h, *weights, regime=regime), str(regime))


def test_gated_against_reference() -> None:
    gate, up = gated(9, 160)
    code, scale, global_scale = linears.stored(OP, 40, 160)
    got = nvfp4_linear(gate, code, scale, global_scale, up=up, limit=LIMIT)
    packed = np.asarray(bits.e2m1_to_bytes(code)), np.asarray(scale).view(np.uint8)
    wide, wide_up = (f64(x).astype(np.float32) for x in (gate, up))
    with jax.default_device(jax.devices("cpu")[0]):
        settings: dict[str, Any] = {"up": wide_up, "limit": LIMIT}
        want = reference_nvfp4.nvfp4_linear(wide, *packed, float(global_scale), **settings)
    assert product_problems(got, want) == []


@pytest.mark.parametrize("t", [1, 9])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_gates(bad: float, t: int) -> None:
    """In a gate or in up, as in the SwiGLU by itself, in no other row."""
    gate, up = gated(t + 1, 256)
    weights = linears.stored(OP, 40, 256)
    for dirty in ((gate.at[-1, 37].set(bad), up), (gate, up.at[-1, 37].set(bad))):
        got = f64(nvfp4_linear(dirty[0], *weights, up=dirty[1], limit=LIMIT))
        want = f64(nvfp4_linear(ungated(*dirty), *weights))
        nan = np.isnan(want)
        np.testing.assert_array_equal(np.isnan(got), nan)
        assert not np.isnan(bad) or nan[-1].all()
        assert not nan[:-1].any()
        assert_same_bits(np.where(nan, 0, got), np.where(nan, 0, want))


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
    row = linears.check_bad_rows(OP, bad, act=act)
    if act == "nvfp4":
        assert np.isnan(f64(row)).all() == np.isnan(bad)


def test_nan_under_a_static_scale() -> None:
    """NaN reaches its row through the block's scale."""
    x, *weights = operands(OP, SHAPES["edges"])
    clean = nvfp4_linear(x, *weights, jnp.float32(0.01))
    dirty = nvfp4_linear(x.at[2, 33].set(jnp.nan), *weights, jnp.float32(0.01))
    assert np.isnan(f64(dirty[2])).all()
    others = np.arange(17) != 2
    assert_same_bits(np.asarray(dirty)[others], np.asarray(clean)[others])


def test_zero_tokens() -> None:
    """A15."""
    x, *weights = operands(OP, SHAPES["small"])
    for zero in (0.0, -0.0):
        got = f64(nvfp4_linear(x.at[1].set(zero), *weights))
        assert (got[1] == 0).all()


def nibbles_swapped(x: Any, w: Any, *scales: Any) -> Any:
    pairs = bits.e2m1_to_bytes(w)
    return x, bits.bytes_to_e2m1(pairs << 4 | pairs >> 4), *scales


WRONG = {
    "nibbles-swapped": nibbles_swapped,
    "scales-shifted": lambda x, w, s, s2: (x, w, jnp.roll(s, 1, 1), s2),
    "global-scale-divides": lambda x, w, s, s2: (x, w, s, 1 / s2),
    "groups-swapped": lambda x, w, s, s2: (x[:, ::-1], w, s, s2),
    "last-block-left-out": lambda x, w, s, s2: (x.at[..., -16:].set(0), w, s, s2),
    "static-scale": lambda *operands: (*operands, jnp.float32(0.0123)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_variant_fails(wrong: Any) -> None:
    arguments = operands(OP, SHAPES["groups"])
    assert product_problems(nvfp4_linear(*arguments), exact(OP, *wrong(*arguments)))


def test_wrong_activations_fail() -> None:
    arguments = operands(OP, SHAPES["edges"])
    for act in ACTS:
        got = nvfp4_linear(*arguments, act=act)
        for other in set(ACTS) - {act}:
            assert product_problems(got, exact(OP, *arguments, act=other))
