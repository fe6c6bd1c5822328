"""rmsnorm_nvfp4: bit for bit against IEEE arithmetic in numpy, the reference and the jnp recipe.

Nothing here knows the platform: with JAX_PLATFORMS=cuda,cpu the same tests hold the kernel.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.ops.rmsnorm_nvfp4 import MAX_DIM, rmsnorm_nvfp4
from dsv4_jax.quant import nvfp4
from dsv4_jax.quant.nvfp4 import Nvfp4
from dsv4_jax.typing import E2M1, E4M3
from reference.rmsnorm import rmsnorm as reference_rmsnorm
from reference.rmsnorm_nvfp4 import rmsnorm_nvfp4 as reference_rmsnorm_nvfp4
from reference.rounding import OFFICIAL
from tests.support.numerics import assert_same_bits, assert_same_tree, cosine, f64, raw, row_of

EPS = 1e-6
BF16 = ml_dtypes.bfloat16
FLOAT32_MAX = np.finfo(np.float32).max
# Norms whose sums ran in another order: relatively 1e-7 apart, so that a BF16 rounding (2^-9 apart)
# falls the other way for some 5 in 100,000. Measured on a CPU: 2 of 32,768 at d = 4096, else none.
MAX_FLIPPED = 1e-3
# NVFP4 of Gaussian data has a relative error of 9.5 % (model.md 9.1): a cosine of 0.9955.
MIN_COSINE = 0.99

# (d, t) and what of the kernel and of the CPU handler they reach.
SHAPES = [
    pytest.param(16, 1, id="d16-t1"),  # one block of 16: a single lane
    pytest.param(48, 2, id="d48-t2"),  # 3 lanes
    pytest.param(96, 3, id="d96-t3"),
    pytest.param(512, 8, id="d512-t8"),  # exactly one warp, one group of the sum
    pytest.param(528, 129, id="d528-t129"),  # a second warp with one lane
    pytest.param(1024, 129, id="d1024-t129"),  # several ranges of the CPU's thread pool
    pytest.param(1536, 3, id="d1536-t3"),  # the low rank of the queries
    pytest.param(4096, 8, id="d4096-t8"),  # Flash; the most threads of the first launch bound
    pytest.param(7168, 2, id="d7168-t2"),  # Pro; the second launch bound
    pytest.param(16384, 3, id="d16384-t3"),  # the widest; the third launch bound
]
SCALES = [
    pytest.param(None, id="dynamic"),
    pytest.param(2.0**-8, id="static-pow2"),
    pytest.param(0.0123, id="static"),
]


def values(seed: int, *shape: int) -> np.ndarray:
    """Normal BF16 values, each token at its own size from 1e-3 (where eps counts) to 1e3."""
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-3, 3, (*shape[:-1], 1))
    return (rng.standard_normal(shape) * size).astype(np.float32).astype(BF16)


def weights(seed: int, d: int) -> np.ndarray:
    """Normal BF16 weights of the norm."""
    return np.random.default_rng(seed).standard_normal(d).astype(np.float32).astype(BF16)


def quantized(x: Any, weight: Any, eps: float = EPS, scale: float | None = None) -> Nvfp4:
    """The op on the host."""
    s2 = None if scale is None else jnp.float32(scale)
    q = rmsnorm_nvfp4(jnp.asarray(x), jnp.asarray(weight), eps, s2)
    return jax.tree.map(np.asarray, q)


def decode(q: Nvfp4) -> np.ndarray:
    """The values that a result stands for."""
    return f64(jax.jit(nvfp4.dequantize)(q))


def assert_positive(*scales: np.ndarray) -> None:
    """Finite and above zero."""
    for scale in scales:
        assert np.isfinite(f64(scale)).all() and (f64(scale) > 0).all()


@dataclasses.dataclass(frozen=True)
class Ieee:
    """The recipe in numpy, one IEEE operation at a time, and the ways to get it wrong."""

    eps: float = EPS
    weighted: bool = True
    rounds_twice: bool = False  # BF16 in front of the weight too
    by_reciprocal: bool = False  # value * (1 / step)
    rounds_scale_late: bool = False  # the step with the unrounded block scale

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """BF16, summed in the order of ffi/rmsnorm_nvfp4/rmsnorm_nvfp4.h."""
        t, d = x.shape
        wide = x.astype(np.float32)
        squares = (wide * wide).reshape(t, d // 16, 16)
        lanes = squares[..., 0]
        for i in range(1, 16):
            lanes = lanes + squares[..., i]
        lanes = np.pad(lanes, [(0, 0), (0, -(d // 16) % 32)]).reshape(t, -1, 32)
        while lanes.shape[-1] > 1:
            half = lanes.shape[-1] // 2
            lanes = lanes[..., :half] + lanes[..., half:]
        total = np.zeros(t, np.float32)
        for group in range(lanes.shape[1]):
            total = total + lanes[:, group, 0]
        mean = total * (np.float32(1) / np.float32(d))
        root = np.sqrt((mean + np.float32(self.eps)).astype(np.float64))
        normed = wide * (1 / root).astype(np.float32)[:, None]  # rounded once
        if self.rounds_twice:
            normed = normed.astype(BF16).astype(np.float32)
        return (weight.astype(np.float32) * normed if self.weighted else normed).astype(BF16)

    def quantize(self, y: np.ndarray, scale: float | None) -> Nvfp4:
        """Block scales and codes by the casts of ml_dtypes, after clipping."""
        t, d = y.shape
        grouped = y.astype(np.float32).reshape(t, d // 16, 16)
        amax = np.minimum(np.abs(grouped).max(-1), FLOAT32_MAX)
        if scale is None:
            top = amax.max(-1)
            s2 = np.maximum(top * (np.float32(1) / np.float32(6 * 448)), np.float32(2.0**-100))
            s2 = np.where(top == 0, np.float32(1), s2)
        else:
            s2 = np.full(t, scale, np.float32)
        block = np.clip(amax / (np.float32(6) * s2[:, None]), np.float32(2.0**-9), np.float32(448))
        block = np.where(amax == 0, np.float32(1), block)
        block_scale = block.astype(ml_dtypes.float8_e4m3fn)
        used = block if self.rounds_scale_late else block_scale.astype(np.float32)
        step = (used * s2[:, None])[..., None]
        quotient = grouped * (np.float32(1) / step) if self.by_reciprocal else grouped / step
        code = np.clip(quotient, -6, 6).astype(ml_dtypes.float4_e2m1fn)
        return Nvfp4(code.reshape(t, d), block_scale, s2)

    def __call__(self, x: np.ndarray, weight: np.ndarray, scale: float | None = None) -> Nvfp4:
        with np.errstate(all="ignore"):
            return self.quantize(self.norm(x, weight), scale)


# The code of a magnitude exactly between two values: the even one.
TIES = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}


def quotients(y: np.ndarray, q: Nvfp4) -> np.ndarray:
    """Magnitudes of what E2M1 rounds, in FP64."""
    step = q.block_scale.astype(np.float32) * q.global_scale[:, None]
    return np.abs(f64(y)) / np.repeat(f64(step), 16, axis=-1)


def assert_equal(got: Nvfp4, want: Nvfp4) -> None:
    """Bit for bit; NaN is NaN, and codes under a NaN scale mean nothing."""
    assert_same_bits(got.block_scale, want.block_scale, "block_scale")
    assert_same_bits(got.global_scale, want.global_scale, "global_scale")
    nan = np.isnan(f64(want.block_scale) * f64(want.global_scale)[:, None])
    meant = np.repeat(~nan, 16, axis=-1)
    assert got.code.shape == want.code.shape
    if meant.all():
        meant = ...  # names the place of a difference
    assert_same_bits(got.code[meant], want.code[meant], "code")


def assert_equal_but_flips(got: Nvfp4, want: Nvfp4, y: np.ndarray, want_y: np.ndarray) -> None:
    """`assert_equal` for tokens whose norm ``want_y`` is the op's own ``y``; few others."""
    flipped = raw(y) != raw(want_y)
    same = ~flipped.any(-1)
    print(f"{flipped.sum()} of {flipped.size} norms differ, in {(~same).sum()} of {same.size}")
    assert_equal(row_of(got, same), row_of(want, same))
    assert flipped.mean() < MAX_FLIPPED
    # A token whose largest value flipped has another scale, and so codes of its own.
    scaled_alike = raw(got.global_scale) == raw(want.global_scale)
    for name in ("code", "block_scale"):
        differs = raw(getattr(got, name)) != raw(getattr(want, name))
        assert differs[scaled_alike].sum() <= MAX_FLIPPED * differs.size, name


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("d", "t"), SHAPES)
def test_against_ieee(d: int, t: int, scale: float | None) -> None:
    x, weight = values(d, t, d), weights(t, d)
    assert_equal(quantized(x, weight, scale=scale), Ieee()(x, weight, scale))


@jax.jit
def reference(x: jax.Array, weight: jax.Array, s2: jax.Array | None) -> tuple[Any, jax.Array]:
    wide = x.astype(jnp.float32), weight.astype(jnp.float32)
    norm = reference_rmsnorm(*wide, EPS, OFFICIAL)
    return reference_rmsnorm_nvfp4(*wide, EPS, s2), norm.astype(jnp.bfloat16)


@jax.jit
def norm_then_quantize(
    x: jax.Array, weight: jax.Array, s2: jax.Array | None
) -> tuple[Nvfp4, jax.Array]:
    y = rmsnorm(x, weight, EPS)
    wide = y.astype(jnp.float32)
    s2 = nvfp4.token_global_scale(wide) if s2 is None else jnp.broadcast_to(s2, x.shape[:-1])
    return nvfp4.quantize(wide, s2), y


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("d", "t"), SHAPES)
def test_against_reference(d: int, t: int, scale: float | None) -> None:
    x, weight = values(d, t, d), weights(t, d)
    with jax.default_device(jax.devices("cpu")[0]):
        got, y = reference(x, weight, None if scale is None else np.float32(scale))
    code, block_scale, token_scale = map(np.asarray, got)
    want = Nvfp4(code.astype(E2M1), block_scale.astype(E4M3), token_scale)
    own = Ieee().norm(x, weight)
    assert_equal_but_flips(quantized(x, weight, scale=scale), want, own, np.asarray(y))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("d", "t"), SHAPES[1::2])  # each takes a second to compile
def test_against_norm_then_quantize(d: int, t: int, scale: float | None) -> None:
    """The same recipe in jnp: `rmsnorm`, then `nvfp4.quantize`.

    On the CPU: XLA divides inexactly on a GPU, and ties of E2M1 fall either way.
    """
    x, weight = values(d, t, d), weights(t, d)
    with jax.default_device(jax.devices("cpu")[0]):
        want, y = norm_then_quantize(x, weight, None if scale is None else np.float32(scale))
    own = Ieee().norm(x, weight)
    want = jax.tree.map(np.asarray, want)
    assert_equal_but_flips(quantized(x, weight, scale=scale), want, own, np.asarray(y))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("d", "t"), [(96, 129), (4096, 8)])
def test_against_the_exact_norm(d: int, t: int, scale: float | None) -> None:
    """Decoded, it is the unquantised norm in FP64 up to the format: finds a bad format."""
    x, weight = values(d, t, d), weights(t, d)
    wide = f64(x)
    exact = f64(weight) * wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + EPS)
    decoded = decode(quantized(x, weight, scale=scale))
    cosines = [cosine(decoded[i], exact[i]) for i in range(t)]
    print(f"cosine of the worst token {min(cosines):.5f}, of all {cosine(decoded, exact):.5f}")
    assert min(cosines) >= MIN_COSINE


WRONG = {
    "weight-skipped": Ieee(weighted=False),
    "eps-wrong": Ieee(eps=1e-5),
    "eps-zero": Ieee(eps=0.0),
    "rounded-before-the-weight": Ieee(rounds_twice=True),
    "step-of-the-unrounded-scale": Ieee(rounds_scale_late=True),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_variant_fails(wrong: Ieee, scale: float | None) -> None:
    """Each wrong recipe moves more codes than the flips that are allowed."""
    x, weight = values(0, 129, 1024), weights(1, 1024)
    got, other = quantized(x, weight, scale=scale), wrong(x, weight, scale)
    assert np.mean(raw(got.code) != raw(other.code)) > 2 * MAX_FLIPPED


def of_norm(y: np.ndarray, scale: float | None) -> Nvfp4:
    """The op on one token whose norm is ``y [d]``, bit for bit; ``d`` must be a power of two.

    Its values are +-1 and eps is 0, so that the mean square is exactly 1 and the norm +-weight.
    """
    x = np.ones((1, len(y)), BF16)
    x[0, 1::3] = -1
    return quantized(x, y * x[0], 0.0, scale)


def every_pair() -> np.ndarray:
    """Norms ``[calls, 16384]``: every mantissa of a block's largest value, with it every value of
    the six binades below, signs and places at random.

    For a given block scale and a power of two as global scale, all quotients there are (but for
    factors of two).
    """
    rng = np.random.default_rng(0)
    blocks = []
    for largest in range(127 << 7, 128 << 7):
        below = np.arange(largest - 6 * 128, largest)
        below = np.pad(below, (0, -len(below) % 15), mode="edge").reshape(-1, 15)
        blocks.append(np.insert(below, 0, largest, axis=1))
    bits = rng.permuted(np.concatenate(blocks), axis=1).ravel()
    bits = np.pad(bits, (0, -len(bits) % MAX_DIM), mode="edge")
    bits += rng.integers(0, 2, len(bits)) << 15
    return bits.astype(np.uint16).view(BF16).reshape(-1, MAX_DIM)


@pytest.mark.parametrize(
    "scale",
    # With a sixth, 6 * scale is 1: there the block scales have ties, too.
    [*SCALES, pytest.param(float(np.float32(1) / 6), id="static-sixth")],
)
def test_every_quotient(scale: float | None) -> None:
    """Every quotient of a BF16 value and its block's scale: IEEE division, ties to even."""
    ties = 0
    for y in every_pair():
        got = of_norm(y, scale)
        assert_equal(got, Ieee().quantize(y[None], scale))
        quotient = quotients(y[None], got)
        for tie, code in TIES.items():
            at = quotient == tie
            ties += at.sum()
            assert (raw(got.code)[at] & 7 == code).all(), tie
    print(f"{ties} exact ties")
    assert ties > 500 or scale != 2.0**-8


def test_division_by_reciprocal_fails() -> None:
    """``value * (1 / step)`` decides exact ties the wrong way, which the test above would find."""
    y = every_pair()
    wrong, right = (Ieee(by_reciprocal=b).quantize(y, 2.0**-8) for b in (True, False))
    with pytest.raises(AssertionError):
        assert_equal(wrong, right)


@pytest.mark.parametrize("scale", [None, 1.0, 2.0**-8, 0.0123, 1e-20, 1e20])
def test_every_bf16_value(scale: float | None) -> None:
    """All finite values as norms, subnormals too; 16 neighbours share a block.

    Quotients that overflow saturate (A14) and block scales take all their codes (A16).
    """
    bits = np.arange(1 << 16)
    bits = np.where(bits >> 7 & 0xFF == 0xFF, 0, bits).astype(np.uint16)
    for y in bits.view(BF16).reshape(-1, MAX_DIM):
        got = of_norm(y, scale)
        with np.errstate(over="ignore"):
            assert_equal(got, Ieee().quantize(y[None], scale))
        assert_positive(got.block_scale, got.global_scale)


def test_subnormal_block_scales() -> None:
    """A16: under a large static scale block scales are multiples of 2^-9, at least one."""
    y = np.repeat(np.arange(1, 65), 16) * 2.0**-11 * 6
    got = of_norm(y.astype(BF16), 1.0)
    steps = np.maximum(np.round(f64(y.astype(BF16))[::16] / 6 * 2**9), 1)  # numpy: ties to even
    assert f64(got.block_scale)[0].tolist() == (steps * 2.0**-9).tolist()
    assert (steps < 8).sum() > 20
    tiny = of_norm(np.full(16, 1e-20, BF16), 1.0)
    assert f64(tiny.block_scale).tolist() == [[2.0**-9]]
    assert (raw(tiny.code) & 7 == 0).all()


@pytest.mark.parametrize("scale", [None, 0.0123])
def test_zeros(scale: float | None) -> None:
    """A15, A18: codes 0 with the sign of their zeros, block scale 1, exact zeros decoded."""
    x = values(0, 3, 96)
    x[1] = 0
    x[1, 3] = -0.0
    x[2, 32:48] = 0
    x[2, 40] = -0.0
    q = quantized(x, np.abs(weights(1, 96)), scale=scale)
    assert (f64(q.block_scale)[1] == 1).all() and f64(q.block_scale)[2, 2] == 1
    assert q.global_scale[1] == np.float32(1 if scale is None else scale)
    assert np.flatnonzero(raw(q.code)[1]).tolist() == [3] and raw(q.code)[1, 3] == 8
    assert np.flatnonzero(raw(q.code)[2, 32:48]).tolist() == [8] and raw(q.code)[2, 40] == 8
    decoded = decode(q)
    assert (decoded[1] == 0).all() and (decoded[2, 32:48] == 0).all()
    assert (decoded[0] != 0).any() and (decoded[2, :32] != 0).any()


@pytest.mark.parametrize("scale", [None, 0.0123])
@pytest.mark.parametrize("sign", [1, -1])
def test_sign_of_small_values(sign: int, scale: float | None) -> None:
    """A18: what rounds to zero keeps its sign."""
    y = np.full(64, sign * 1e-6)
    y[::16] = 6.0
    got = of_norm(y.astype(BF16), scale)
    small = np.arange(64) % 16 != 0
    assert (raw(got.code)[0, small] == (8 if sign < 0 else 0)).all()


@pytest.mark.parametrize("scale", [None, 0.0123])
@pytest.mark.parametrize("at", [0, 17, 527])
def test_nan_stays_in_its_token(at: int, scale: float | None) -> None:
    """A13: all of the token is NaN when decoded, every other token keeps its bits."""
    x, weight = values(0, 5, 528), weights(1, 528)
    clean = quantized(x, weight, scale=scale)
    x[2, at] = np.nan
    dirty = quantized(x, weight, scale=scale)
    assert np.isnan(f64(dirty.block_scale)[2]).all()
    assert np.isnan(dirty.global_scale[2]) == (scale is None)
    assert np.isnan(decode(dirty)[2]).all()
    others = np.arange(5) != 2
    assert_same_tree(row_of(dirty, others), row_of(clean, others))


@pytest.mark.parametrize("scale", [None, 0.0123])
@pytest.mark.parametrize("inf", [np.inf, -np.inf])
def test_inf_input(inf: float, scale: float | None) -> None:
    """A14: the mean is Inf, its inverse root 0, and Inf * 0 NaN, as the norm defines it.

    What is finite * 0 stays 0 where a static scale lets it.
    """
    x, weight = values(0, 5, 528), weights(1, 528)
    clean = quantized(x, weight, scale=scale)
    x[2, 17] = inf
    got = quantized(x, weight, scale=scale)
    others = np.arange(5) != 2
    assert_same_tree(row_of(got, others), row_of(clean, others))
    nan = np.isnan(decode(got)[2])
    if scale is None:
        assert nan.all()
    else:
        assert np.flatnonzero(nan).tolist() == list(range(16, 32))
        assert (raw(got.code)[2, ~nan] & 7 == 0).all()


def test_sum_of_squares_overflows() -> None:
    """A14: finite values whose squares are not have a norm of zero, as in the reference."""
    x = np.full((1, 64), 1e30, BF16)
    q = quantized(x, np.ones(64, BF16))
    assert (raw(q.code) == 0).all() and (f64(q.block_scale) == 1).all()
    assert q.global_scale.tolist() == [1]
    with jax.default_device(jax.devices("cpu")[0]):
        y = reference_rmsnorm(jnp.asarray(x, jnp.float32), jnp.ones(64), EPS, OFFICIAL)
        assert (np.asarray(y) == 0).all()


@pytest.mark.parametrize("scale", [None, 0.0123])
@pytest.mark.parametrize("sign", [1, -1])
def test_norm_overflows_bf16(sign: int, scale: float | None) -> None:
    """A14: a norm above the largest BF16 saturates; all scales stay finite and positive."""
    x = np.ones((2, 64), BF16)
    x[:, 5] = [3, 0]
    weight = np.ones(64, BF16)
    weight[5] = sign * float(ml_dtypes.finfo(BF16).max)
    with np.errstate(over="ignore"):
        assert np.isinf(f64(Ieee().norm(x, weight))[0, 5])
    q = quantized(x, weight, scale=scale)
    assert_positive(q.block_scale, q.global_scale)
    assert f64(q.code)[0, 5] == sign * 6
    assert_equal(q, Ieee()(x, weight, scale))


@pytest.mark.parametrize("scale", [None, 0.0123])
def test_subnormal_activations(scale: float | None) -> None:
    """Subnormal BF16 are numbers, on the CPU too, although XLA has its threads flush them."""
    x = values(0, 3, 96)
    x[1] = 3e-39
    x[2, 16:32] = -3e-39
    weight = np.ones(96, BF16)
    weight[48:64] = 2e-39
    q = quantized(x, weight, scale=scale)
    assert_equal(q, Ieee()(x, weight, scale))
    assert_positive(q.block_scale, q.global_scale)
    decoded = decode(q)
    assert (decoded[1] == 0).all() and (decoded[2, 16:32] == 0).all()
    assert (decoded[:, 48:64] == 0).all() and (decoded[0, :48] != 0).any()


@pytest.mark.parametrize(
    ("scale", "used"),
    [
        *((scale, 2.0**-100) for scale in (2.0**-100, 1e-38, 1e-45, 0.0, -1.0, -np.inf)),
        *((scale, 2.0**100) for scale in (2.0**100, 1e38, np.inf)),
    ],
)
def test_static_scale_is_clamped(scale: float, used: float) -> None:
    """A14: 2^-100..2^100, the token scale being the one used; every block scale positive."""
    x, weight = values(0, 2, 96), weights(1, 96)
    q = quantized(x, weight, scale=scale)
    assert_equal(q, Ieee()(x, weight, used))
    assert_positive(q.block_scale, q.global_scale)


@pytest.mark.parametrize("scale", [None, 0.0123])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)])
def test_leading_axes(lead: tuple[int, ...], scale: float | None) -> None:
    """A6, A7: any leading axes, the same tokens; without any token empty arrays."""
    x, weight = values(0, *lead, 48), weights(1, 48)
    got = quantized(x, weight, scale=scale)
    assert (got.code.shape, got.code.dtype) == ((*lead, 48), E2M1)
    assert (got.block_scale.shape, got.block_scale.dtype) == ((*lead, 3), E4M3)
    assert (got.global_scale.shape, got.global_scale.dtype) == (lead, np.float32)
    flat = quantized(x.reshape(-1, 48), weight, scale=scale)
    assert_same_tree(got, jax.tree.map(lambda a, b: a.reshape(b.shape), flat, got))


@pytest.mark.parametrize("scale", [None, 0.0123])
@pytest.mark.parametrize(("d", "t"), [(96, 3000), (528, 700), (7168, 40)])
def test_a_token_is_the_same_in_any_batch(d: int, t: int, scale: float | None) -> None:
    """P1, P2: again, alone, in another order; more tokens than thread blocks, too."""
    x, weight = values(0, t, d), weights(1, d)
    whole = quantized(x, weight, scale=scale)
    assert_same_tree(quantized(x, weight, scale=scale), whole, "again")
    order = np.random.default_rng(2).permutation(t)
    assert_same_tree(quantized(x[order], weight, scale=scale), row_of(whole, order), "shuffled")
    for start, stop in ((0, 1), (t // 2, t // 2 + 1), (t - 1, t), (1, 9), (7, t)):
        part = quantized(x[start:stop], weight, scale=scale)
        assert_same_tree(part, row_of(whole, slice(start, stop)), f"{start}..{stop}")


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)], ids=str)
def test_vmap_is_a_loop(axes: tuple[int | None, int | None]) -> None:
    """A19: over tokens, over weights, over both."""
    whole = values(0, 4, 5, 96), values(1, 4, 96)
    args = [x if axis == 0 else x[0] for x, axis in zip(whole, axes, strict=True)]
    mapped = jax.jit(jax.vmap(lambda x, w: rmsnorm_nvfp4(x, w, EPS), in_axes=axes))(*args)
    for i in range(4):
        one = [x[i] if axis == 0 else x for x, axis in zip(args, axes, strict=True)]
        assert_same_tree(row_of(mapped, i), quantized(*one), f"{i}")


def test_eps_is_inside_the_root() -> None:
    """1 + 3 under the root halves the weight exactly."""
    q = quantized(np.ones((1, 16), BF16), np.full(16, 12.0, BF16), 3.0, 1.0)
    assert (decode(q) == 6).all()
