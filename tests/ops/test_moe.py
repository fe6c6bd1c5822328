"""moe against dequantised experts in FP64, and the routings that stress its grouping."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops._moe_jax import moe_jax
from dsv4_jax.ops.moe import KERNEL_FORMATS, moe
from dsv4_jax.quant import bits, fp8, mxfp4, nvfp4
from dsv4_jax.typing import E4M3
from reference import formats
from reference.linear import global_scale
from reference.moe import moe as reference_moe
from tests.support.numerics import assert_same_bits, f64, rel_l2
from tests.support.op_cases import expert_leaves, normal

EXPERTS, INTER, DIM, K, LIMIT = 5, 64, 96, 3, 10.0
# FP32 throughout: three products and two exps.
FLOAT32_REL = 2e-6
# With rounding points, an FP32 sum beside a rounding boundary falls on the other side of it than
# the FP64 sum, and quantisation enlarges that: 1e-5 to 3e-4 measured over formats; a wrong scale or
# a missing rounding point is above 1e-3 (BF16 rounding alone is 2e-3).
ROUNDED_REL = 1e-3

FORMATS = [
    "float32",
    "bfloat16",
    "fp8_w8a8",
    "mxfp4_w4a8",
    "mxfp4_w4a16",
    "nvfp4_w4a4",
    "nvfp4_w4a8",
    "nvfp4_w4a16",
]


def bf(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def wide(leaves: dict[str, Any], form: str) -> np.ndarray:
    values = f64(decoded(leaves, form))
    return values * f64(leaves["global_scale"])[:, None, None] if form == "nvfp4" else values


@functools.partial(jax.jit, static_argnames="form")
def decoded(leaves: dict[str, Any], form: str) -> Any:
    if form == "mxfp4":
        return mxfp4.dequantize(mxfp4.Mxfp4(leaves["weight"], leaves["scale"]))
    if form == "fp8":
        return fp8.dequantize_weight(fp8.Fp8(leaves["weight"], leaves["scale"]))
    if form == "nvfp4":
        return nvfp4.dequantize_blocks(
            nvfp4.Nvfp4(leaves["weight"], leaves["block_scale"], leaves["global_scale"])
        )
    return leaves["weight"]


q8 = jax.jit(lambda x: formats.q8(x, 128))


@jax.jit
def nvfp4_parts(x: Any, act_scale: Any = None) -> Any:
    s2 = global_scale(x, act_scale)
    return *formats.nvfp4_quantize(x, s2), s2


def activation(x: np.ndarray, linear: str, act_scale: Any = None) -> np.ndarray:
    with jax.default_device(jax.devices("cpu")[0]):  # quotients are inexact on a GPU
        x32 = jnp.asarray(x.astype(np.float32))
        if linear.endswith("a8"):
            return f64(q8(x32))
        if linear.endswith("a4"):
            value, scale, s2 = map(f64, nvfp4_parts(x32, act_scale))
            return value * np.repeat(scale, 16, axis=-1) * s2
        return x


def exact(
    x: Any,
    idx: Any,
    weight: Any,
    valid: Any,
    leaves: list[Any],
    linear: str,
    rnd: Callable[[np.ndarray], np.ndarray] = bf,
    late: bool = False,
    act_scales: tuple[Any, Any] | None = None,
) -> np.ndarray:
    """model.md 5.2 pick by pick, products in FP64.

    ``act_scales``: static ones of ``w1`` and ``w3``, and of ``w2``, by expert. ``rnd`` and ``late``
    (the routing weight behind ``w2``) make wrong variants of it.
    """
    form, rnd = linear.split("_")[0], (lambda y: y) if linear == "float32" else rnd
    w1, w2, w3 = (wide(w, form) for w in leaves)
    total = np.zeros(x.shape)
    up_scale, down_scale = act_scales or ([None] * len(w1),) * 2
    a = activation(f64(x), linear)
    for pick, e in np.ndindex(np.shape(idx)[1], len(w1)):
        ours = (np.asarray(idx)[:, pick] == e) & np.asarray(valid, bool)
        if act_scales:
            a = activation(f64(x), linear, up_scale[e])
        share = np.where(ours, f64(weight)[:, pick], 0)[:, None]
        gate, up = np.minimum(rnd(a @ w1[e].T), LIMIT), np.clip(rnd(a @ w3[e].T), -LIMIT, LIMIT)
        h = rnd((ours[:, None] if late else share) * gate / (1 + np.exp(-gate)) * up)
        total += (share if late else 1) * rnd(activation(h, linear, down_scale[e]) @ w2[e].T)
    return total


def power_of_two_scales(leaves: dict[str, Any]) -> dict[str, Any]:
    """NVFP4 leaves whose block scales are the powers of two below them."""
    scale = np.exp2(np.floor(np.log2(f64(leaves["block_scale"]))))
    return {**leaves, "block_scale": jnp.asarray(scale.astype(np.float32)).astype(E4M3)}


class Experts:
    """Stacked weights in one format and the op on them."""

    def __init__(
        self,
        linear: str,
        inter: int = INTER,
        dim: int = DIM,
        change: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        form = linear.split("_")[0]
        self.linear: Any = linear
        self.dim = dim
        self.leaves = [
            change(expert_leaves(1, (EXPERTS, inter, dim), form)),
            change(expert_leaves(2, (EXPERTS, dim, inter), form)),
            change(expert_leaves(3, (EXPERTS, inter, dim), form)),
        ]
        self.dtype = jnp.float32 if linear == "float32" else jnp.bfloat16

    def x(self, t: int) -> Any:
        return normal(0, t, self.dim, scale=2, dtype=self.dtype)

    def __call__(
        self, x: Any, idx: Any, weight: Any, valid: Any = None, shared: Any = None, **settings: Any
    ) -> np.ndarray:
        valid = jnp.ones(x.shape[0], bool) if valid is None else jnp.asarray(valid)
        idx, weight = jnp.asarray(idx, jnp.int32), jnp.asarray(weight, jnp.float32)
        op = functools.partial(moe, linear=self.linear, limit=LIMIT, **settings)
        return np.asarray(op(x, idx, weight, valid, *self.leaves, shared))

    def part(self, first: int, stop: int) -> "Experts":
        """Experts ``first .. stop - 1`` alone."""
        part = object.__new__(Experts)
        part.__dict__ = dict(self.__dict__)
        part.leaves = [
            {name: cut(leaf, first, stop) for name, leaf in leaves.items()}
            for leaves in self.leaves
        ]
        return part


@functools.partial(jax.jit, static_argnames=("first", "stop"))
def cut(leaf: Any, first: int, stop: int) -> Any:
    """Rows of the leading axis, through bytes: XLA does not slice 4-bit arrays well."""
    return bits.from_byte_view(bits.byte_view(leaf)[first:stop], leaf.dtype)


def picks(t: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    idx = np.stack([np.sort(rng.permutation(EXPERTS)[:K]) for _ in range(t)])
    return idx.astype(np.int32), rng.uniform(0.1, 1, (t, K)).astype(np.float32)


@pytest.mark.parametrize("linear", FORMATS)
def test_against_fp64(linear: str) -> None:
    """21 tokens, some of them padding: their rows are zero."""
    experts, (idx, weight) = Experts(linear), picks(21)
    valid = np.arange(21) % 7 != 3
    x = experts.x(21)
    got = experts(x, idx, weight, valid)
    operands = x, idx, weight, valid, experts.leaves, linear
    bound = FLOAT32_REL if linear == "float32" else ROUNDED_REL
    assert got.dtype == np.float32
    error = rel_l2(got, exact(*operands))
    print(f"{linear}: relative L2 {error:.2e}")
    assert error < bound
    assert_same_bits(got[~valid], np.zeros_like(got[~valid]))
    if linear != "float32":  # wrong variants: no rounding, or the weight too late
        assert rel_l2(got, exact(*operands, rnd=lambda y: y)) > bound
        assert rel_l2(got, exact(*operands, late=True)) > bound


@pytest.mark.parametrize("linear", KERNEL_FORMATS)
@pytest.mark.parametrize(("inter", "dim"), [(128, 256), (160, 352)])
def test_sizes(linear: str, inter: int, dim: int) -> None:
    """A7: sizes that are multiples of 128, or of the group alone."""
    experts, (idx, weight) = Experts(linear, inter, dim), picks(21)
    x = experts.x(21)
    want = exact(x, idx, weight, np.ones(21), experts.leaves, linear)
    assert rel_l2(experts(x, idx, weight), want) < ROUNDED_REL


@pytest.mark.parametrize("linear", ["nvfp4_w4a4", "nvfp4_w4a8", "nvfp4_w4a16"])
@pytest.mark.parametrize(("inter", "dim"), [(48, 80), (128, 256)])
def test_power_of_two_block_scales(linear: str, inter: int, dim: int) -> None:
    """What a lossless cast from MXFP4 gives; there ``w4a8`` is exact in FP8 arithmetic."""
    experts = Experts(linear, inter, dim, power_of_two_scales)
    (idx, weight), x = picks(21), experts.x(21)
    want = exact(x, idx, weight, np.ones(21), experts.leaves, linear)
    got = experts(x, idx, weight)
    assert rel_l2(got, want) < ROUNDED_REL
    if linear == "nvfp4_w4a8":  # said so: the same, where sums are exact
        got = experts(x, idx, weight, regime="exact")
        assert_same_bits(experts(x, idx, weight, power_of_two=True, regime="exact"), got)


@pytest.mark.parametrize("linear", KERNEL_FORMATS)
def test_is_what_jnp_makes_of_it(linear: str) -> None:
    """The handler against the same recipe in `jax.numpy`, with all its arguments."""
    experts, (idx, weight) = Experts(linear), picks(21)
    x, valid, shared = experts.x(21), jnp.arange(21) % 7 != 3, experts.x(21)[::-1]
    operands: list[Any] = [x, jnp.asarray(idx), jnp.asarray(weight), valid]
    operands += [*experts.leaves, shared]
    settings: Any = {"linear": linear, "limit": LIMIT, "first_expert": 1, "dtype": jnp.bfloat16}
    got = moe(*operands, **settings)
    want = jax.jit(functools.partial(moe_jax, **settings))(*operands)
    assert got.dtype == want.dtype == jnp.bfloat16
    assert rel_l2(got, want) < ROUNDED_REL


@pytest.mark.parametrize("linear", ["float32", "mxfp4_w4a8", "nvfp4_w4a4", "nvfp4_w4a16"])
def test_against_reference(linear: str) -> None:
    experts, (idx, weight) = Experts(linear), picks(21)
    x, valid, shared = experts.x(21), jnp.arange(21) % 7 != 3, experts.x(21)[::-1]
    got = experts(x, idx, weight, valid, shared, first_expert=1)
    form = linear.split("_")[0]
    dense = [jnp.asarray(wide(w, form), jnp.float32) for w in experts.leaves]
    operands: list[Any] = [x.astype(jnp.float32), jnp.asarray(idx), jnp.asarray(weight), valid]
    operands += [*dense, shared.astype(jnp.float32)]
    want = reference_moe(*operands, limit=LIMIT, linear=linear, first_expert=1)
    assert rel_l2(got, want) < (FLOAT32_REL if linear == "float32" else ROUNDED_REL)


# Of an expert's tokens: smaller than their own, which saturates, to ten times as large.
UP_SCALE = np.asarray([4e-3, 3e-4, 1e-3, 2e-2, 2e-3], np.float32)
DOWN_SCALE = np.asarray([1e-3, 2e-2, 3e-3, 1e-4, 6e-3], np.float32)
STATIC = {"up_act_scale": jnp.asarray(UP_SCALE), "down_act_scale": jnp.asarray(DOWN_SCALE)}


@pytest.fixture(scope="module")
def w4a4() -> Experts:
    return Experts("nvfp4_w4a4")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_static_scales(w4a4: Experts, dtype: str) -> None:
    """A token is rounded for each pick under the scale of its expert; FP32 ``x`` in `jax.numpy`."""
    (idx, weight), valid = picks(21), np.arange(21) % 7 != 3
    x = w4a4.x(21).at[5].set(0).astype(dtype)
    rnd: Any = bf if dtype == "bfloat16" else lambda y: y
    got = w4a4(x, idx, weight, valid, **STATIC)
    operands = x, idx, weight, valid, w4a4.leaves, "nvfp4_w4a4", rnd
    assert rel_l2(got, exact(*operands, act_scales=(UP_SCALE, DOWN_SCALE))) < ROUNDED_REL
    assert_same_bits(got[~valid | (np.arange(21) == 5)], np.zeros((4, DIM), np.float32))
    # Wrong variants: no static scales, those of another expert, the one scale in the other's place.
    for scales in (
        None,
        (np.roll(UP_SCALE, 1), DOWN_SCALE),
        (UP_SCALE, np.roll(DOWN_SCALE, 1)),
        (DOWN_SCALE, UP_SCALE),
    ):
        assert rel_l2(got, exact(*operands, act_scales=scales)) > 10 * ROUNDED_REL


def test_static_scales_against_jax_and_reference(w4a4: Experts) -> None:
    """With all other arguments."""
    idx, weight = picks(21)
    x, valid, shared = w4a4.x(21), jnp.arange(21) % 7 != 3, w4a4.x(21)[::-1]
    operands: list[Any] = [x, jnp.asarray(idx), jnp.asarray(weight), valid]
    settings: Any = {"linear": "nvfp4_w4a4", "limit": LIMIT, "first_expert": 1}
    got = moe(*operands, *w4a4.leaves, shared, **STATIC, **settings)
    plain = jax.jit(functools.partial(moe_jax, **settings, dtype=jnp.float32))
    assert rel_l2(got, plain(*operands, *w4a4.leaves, shared, **STATIC)) < ROUNDED_REL
    dense = [jnp.asarray(wide(w, "nvfp4"), jnp.float32) for w in w4a4.leaves]
    operands[0] = x.astype(jnp.float32)
    operands += [*dense, shared.astype(jnp.float32)]
    want = reference_moe(*operands, **STATIC, **settings)
    assert rel_l2(got, want) < ROUNDED_REL


def test_static_scales_bit_by_bit() -> None:
    """Sums of one block are exact in any order: what is left are exps beside a rounding point."""
    experts, (idx, weight) = Experts("nvfp4_w4a4", 16, 16), picks(200)
    operands: list[Any] = [experts.x(200), jnp.asarray(idx), jnp.asarray(weight)]
    operands += [jnp.ones(200, bool), *experts.leaves, None, *STATIC.values()]
    settings: Any = {"linear": "nvfp4_w4a4", "limit": LIMIT}
    plain = jax.jit(functools.partial(moe_jax, **settings, first_expert=0, dtype=jnp.float32))
    got, want = np.asarray(moe(*operands, **settings)), np.asarray(plain(*operands))
    apart = np.mean(got != want)
    print(f"{apart:.2%} apart")
    assert apart < 0.02


@pytest.mark.parametrize("t", [21, 900])
def test_static_scales_batch_invariance(w4a4: Experts, t: int) -> None:
    """A token alone, and among few and many picks of a GPU's kernels, in one regime."""
    (idx, weight), x = picks(t), w4a4.x(t)
    whole = w4a4(x, idx, weight, regime="decode", **STATIC)
    for at in (slice(0, 1), slice(t - 8, t)):
        part = w4a4(x[at], idx[at], weight[at], regime="decode", **STATIC)
        assert_same_bits(part, whole[at])


def test_static_scales_in_two_places(w4a4: Experts) -> None:
    """Every device has the scales of its experts."""
    (idx, weight), x = picks(20), w4a4.x(20)
    idx[::2], idx[1::2] = [0, 1, 1], [2, 3, 4]
    whole = w4a4(x, idx, weight, **STATIC)
    low = {name: scale[:2] for name, scale in STATIC.items()}
    high = {name: scale[2:] for name, scale in STATIC.items()}
    first = w4a4.part(0, 2)(x, idx, weight, **low)
    rest = w4a4.part(2, EXPERTS)(x, idx, weight, first_expert=2, **high)
    assert_same_bits(first + rest, whole)


def test_static_scales_are_clamped(w4a4: Experts) -> None:
    """A14: 2^-100..2^100."""
    (idx, weight), x = picks(21), w4a4.x(21)

    def run(up: list[float], down: list[float]) -> np.ndarray:
        scales = {"up_act_scale": jnp.float32(up), "down_act_scale": jnp.float32(down)}
        return w4a4(x, idx, weight, **scales)

    got = run([0.0, -1.0, 1e-45, np.inf, 1e-3], [-np.inf, 1e-3, 1e38, 1e-3, 0.0])
    low, high = 2.0**-100, 2.0**100
    assert_same_bits(got, run([low, low, low, high, 1e-3], [low, 1e-3, high, 1e-3, low]))


def test_nan_under_static_scales(w4a4: Experts) -> None:
    """NaN reaches its token through the block's scale, and no other."""
    (idx, weight), x = picks(21), w4a4.x(21)
    clean = w4a4(x, idx, weight, **STATIC)
    late = weight.copy()
    late[9, 1] = np.nan
    got = w4a4(x.at[4, 17].set(jnp.nan), idx, late, **STATIC)
    bad = np.isin(np.arange(21), (4, 9))
    assert np.isnan(got[bad]).all()
    assert_same_bits(got[~bad], clean[~bad])


@pytest.mark.parametrize("linear", ["float32", *KERNEL_FORMATS])
def test_shared_and_rounding(linear: str) -> None:
    """``shared`` comes last and the sum is rounded once: the bits of doing it outside."""
    experts, (idx, weight) = Experts(linear), picks(21)
    x, valid, shared = experts.x(21), np.arange(21) % 7 != 3, experts.x(21)[::-1]
    routed = experts(x, idx, weight, valid)
    both = routed + np.asarray(shared).astype(np.float32)
    assert_same_bits(experts(x, idx, weight, valid, shared), both)
    for dtype in (jnp.bfloat16, np.dtype("float32")):
        got = experts(x, idx, weight, valid, shared, dtype=dtype)
        assert_same_bits(got, both.astype(dtype))
        assert_same_bits(experts(x, idx, weight, valid, dtype=dtype), routed.astype(dtype))


@pytest.mark.parametrize("linear", ["float32", "mxfp4_w4a8", "nvfp4_w4a4"])
def test_experts_in_two_places(linear: str) -> None:
    """Halves of the experts: their FP32 results add up to the whole, exactly where only one has
    any of the token's picks."""
    experts, (idx, weight) = Experts(linear), picks(30)
    idx[::3], idx[1::3] = [0, 1, 1], [2, 3, 4]
    x = experts.x(30)
    whole = experts(x, idx, weight)
    low = experts.part(0, 2)(x, idx, weight)
    high = experts.part(2, EXPERTS)(x, idx, weight, first_expert=2)
    mixed = np.arange(30) % 3 == 2
    assert_same_bits((low + high)[~mixed], whole[~mixed])
    assert_same_bits(low[1::3], np.zeros_like(low[1::3]))
    # A sum of three in another order: two roundings.
    np.testing.assert_allclose((low + high)[mixed], whole[mixed], rtol=0, atol=1e-6)
    last = 2**31 - 1 - EXPERTS
    shifted = experts(x, np.where(idx == 0, -(2**31), idx + last), weight, first_expert=last)
    want = experts(x, np.where(idx == 0, -1, idx), weight)
    assert_same_bits(shifted, want)


@pytest.fixture(scope="module", params=["float32", "mxfp4_w4a8", "nvfp4_w4a4"])
def experts(request: pytest.FixtureRequest) -> Experts:
    return Experts(request.param)


ROUTINGS = [
    pytest.param(np.tile([[2, 2, 2]], (21, 1)), id="B13-all-to-one-expert"),
    pytest.param(np.tile([[0, 2, 4]], (21, 1)), id="B13-experts-with-none"),
    pytest.param(np.tile([[-1, 2, 4]], (21, 1)), id="B13-negative-id"),
    pytest.param(np.tile([[1, 2, EXPERTS]], (21, 1)), id="B13-id-one-too-large"),
    pytest.param(np.tile([[1, 2, 2**31 - 1]], (21, 1)), id="B13-int32-max"),
    pytest.param(np.full((21, 3), -(2**31)), id="B13-no-expert-at-all"),
    pytest.param(np.tile([[1, 1, 4]], (21, 1)), id="B13-duplicates"),
    pytest.param(np.arange(63).reshape(21, 3) % EXPERTS, id="round-robin"),
]


@pytest.mark.parametrize("idx", ROUTINGS)
def test_routings(experts: Experts, idx: np.ndarray) -> None:
    x, weight = experts.x(21), picks(21)[1]
    got = experts(x, idx, weight)
    want = exact(x, idx, weight, np.ones(21), experts.leaves, experts.linear)
    if not want.any():
        assert_same_bits(got, np.zeros_like(got))
    else:
        assert rel_l2(got, want) < (FLOAT32_REL if experts.linear == "float32" else ROUNDED_REL)


def test_padding_touches_nothing(experts: Experts) -> None:
    """NaN, Inf and wild ids in padding rows change no bit of the others."""
    (idx, weight), x = picks(21), experts.x(21)
    valid = np.arange(21) % 2 == 0
    clean = experts(x, idx, weight, valid)
    x = jnp.where(valid[:, None], x, jnp.nan)
    idx = np.where(valid[:, None], idx, 77)
    weight = np.where(valid[:, None], weight, np.inf)
    assert_same_bits(experts(x, idx, weight, valid), clean)


def test_weight_enters_before_the_second_quantisation() -> None:
    """Scaling the result instead gives other bits: the order of model.md 5.2 is told apart."""
    experts, (idx, _) = Experts("mxfp4_w4a8"), picks(21)
    x, weight = experts.x(21), np.full((21, K), 0.3, np.float32)
    ones = np.ones((21, K), np.float32)
    assert np.mean(experts(x, idx, weight) != np.float32(0.3) * experts(x, idx, ones)) > 0.5


def test_no_valid_token(experts: Experts) -> None:
    idx, weight = picks(21)
    got = experts(experts.x(21), idx, weight, np.zeros(21, bool))
    assert_same_bits(got, np.zeros((21, DIM), np.float32))


def test_no_token(experts: Experts) -> None:
    """A6, with every dtype of the result."""
    idx, weight = picks(1)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = experts.x(1)[:0]
        got = experts(x, idx[:0], weight[:0], shared=x, dtype=dtype)
        assert (got.shape, got.dtype) == ((0, DIM), dtype)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_token_stays_alone(experts: Experts, bad: float) -> None:
    """A13, A14: activations, routing weights, what is added last."""
    (idx, weight), x = picks(21), experts.x(21)
    clean = experts(x, idx, weight, shared=x)
    others = np.arange(21) != 4
    w = weight.copy()
    w[4, 1] = bad
    for operands in (
        {"x": x.at[4, 5].set(bad), "weight": weight, "shared": x},
        {"x": x, "weight": w, "shared": x},
        {"x": x, "weight": weight, "shared": x.at[4, 5].set(bad)},
    ):
        got = experts(idx=idx, **operands)
        assert_same_bits(got[others], clean[others])
        if np.isnan(bad):
            assert np.isnan(got[4]).any()
        else:
            assert not np.array_equal(got[4], clean[4])


def test_ids_of_64_bits(experts: Experts) -> None:
    """Ids beyond 32 bits are outside, not wrapped round onto an expert."""
    (idx, weight), x = picks(21), experts.x(21)
    want = experts(x, np.where(idx == 1, -1, idx), weight)
    with jax.enable_x64(True):
        for far in (1 + 2**32, 1 - 2**32):
            wide = jnp.asarray(np.where(idx == 1, far, idx.astype(np.int64)))
            valid, w = jnp.ones(21, bool), jnp.asarray(weight)
            got = moe(x, wide, w, valid, *experts.leaves, linear=experts.linear, limit=LIMIT)
            assert_same_bits(got, want)


@pytest.mark.parametrize("linear", KERNEL_FORMATS)
def test_one_call(linear: str) -> None:
    """A kernel format with BF16 activations is one foreign call; with FP32 ones it is none."""
    experts, (idx, weight) = Experts(linear), picks(3)
    op = functools.partial(moe, linear=experts.linear, limit=LIMIT)
    operands = idx, weight, np.ones(3, bool), *experts.leaves
    jaxpr = str(jax.make_jaxpr(op)(experts.x(3), *operands))
    assert jaxpr.count("ffi_call[") == jaxpr.count("dsv4.moe") == 1
    assert "dot_general" not in jaxpr
    assert "ffi_call[" not in str(jax.make_jaxpr(op)(experts.x(3).astype(jnp.float32), *operands))
