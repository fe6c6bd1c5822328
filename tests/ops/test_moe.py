"""moe against dequantised experts in FP64, and the routings that stress its grouping."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops.moe import moe
from dsv4_jax.quant import fp8, mxfp4, nvfp4
from reference import formats
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
    if form == "mxfp4":
        return f64(mxfp4.dequantize(mxfp4.Mxfp4(leaves["weight"], leaves["scale"])))
    if form == "fp8":
        return f64(fp8.dequantize_weight(fp8.Fp8(leaves["weight"], leaves["scale"])))
    if form == "nvfp4":
        s2 = leaves["global_scale"][:, None]
        q = nvfp4.Nvfp4(leaves["weight"], leaves["block_scale"], s2)
        return f64(nvfp4.dequantize_blocks(q)) * f64(s2)[..., None]
    return f64(leaves["weight"])


def activation(x: np.ndarray, linear: str) -> np.ndarray:
    x32 = jnp.asarray(x.astype(np.float32))
    if linear.endswith("a8"):
        return f64(formats.q8(x32, 128))
    if linear.endswith("a4"):
        s2 = formats.nvfp4_token_scale(x32)
        value, scale = formats.nvfp4_quantize(x32, s2)
        return f64(value) * np.repeat(f64(scale), 16, axis=-1) * f64(s2)
    return x


def exact(x: Any, idx: Any, weight: Any, valid: Any, leaves: list[Any], linear: str) -> np.ndarray:
    """model.md 5.2 expert by expert, products in FP64."""
    form, rnd = linear.split("_")[0], (lambda y: y) if linear == "float32" else bf
    w1, w2, w3 = (wide(w, form) for w in leaves)
    total = np.zeros(x.shape)
    for e in range(EXPERTS):
        share = np.where(np.asarray(idx) == e, f64(weight), 0).sum(axis=1)
        share *= np.asarray(valid)
        a = activation(f64(x), linear)
        gate, up = np.minimum(rnd(a @ w1[e].T), LIMIT), np.clip(rnd(a @ w3[e].T), -LIMIT, LIMIT)
        h = rnd(share[:, None] * gate / (1 + np.exp(-gate)) * up)
        total += rnd(activation(h, linear) @ w2[e].T)
    return total


class Experts:
    """Stacked weights in one format and the op on them."""

    def __init__(self, linear: str) -> None:
        form = linear.split("_")[0]
        self.linear: Any = linear
        self.leaves = [
            expert_leaves(1, (EXPERTS, INTER, DIM), form),
            expert_leaves(2, (EXPERTS, DIM, INTER), form),
            expert_leaves(3, (EXPERTS, INTER, DIM), form),
        ]
        self.dtype = jnp.float32 if linear == "float32" else jnp.bfloat16

    def x(self, t: int) -> Any:
        return normal(0, t, DIM, scale=2, dtype=self.dtype)

    def __call__(self, x: Any, idx: Any, weight: Any, valid: Any = None) -> np.ndarray:
        valid = jnp.ones(x.shape[0], bool) if valid is None else jnp.asarray(valid)
        idx, weight = jnp.asarray(idx, jnp.int32), jnp.asarray(weight, jnp.float32)
        return np.asarray(moe(x, idx, weight, valid, *self.leaves, linear=self.linear, limit=LIMIT))


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
    want = exact(x, idx, weight, valid, experts.leaves, linear)
    assert got.dtype == np.float32
    error = rel_l2(got, want)
    print(f"{linear}: relative L2 {error:.2e}")
    assert error < (FLOAT32_REL if linear == "float32" else ROUNDED_REL)
    assert_same_bits(got[~valid], np.zeros_like(got[~valid]))


@pytest.fixture(scope="module")
def experts() -> Experts:
    return Experts("float32")


ROUTINGS = [
    pytest.param(np.tile([[2, 2, 2]], (21, 1)), id="B13-all-to-one-expert"),
    pytest.param(np.tile([[0, 2, 4]], (21, 1)), id="B13-experts-with-none"),
    pytest.param(np.tile([[-1, 2, 4]], (21, 1)), id="B13-negative-id"),
    pytest.param(np.tile([[1, 2, EXPERTS]], (21, 1)), id="B13-id-one-too-large"),
    pytest.param(np.tile([[1, 2, 2**31 - 1]], (21, 1)), id="B13-int32-max"),
    pytest.param(np.full((21, 3), -(2**31)), id="B13-no-expert-at-all"),
    pytest.param(np.arange(63).reshape(21, 3) % EXPERTS, id="round-robin"),
]


@pytest.mark.parametrize("idx", ROUTINGS)
def test_routings(experts: Experts, idx: np.ndarray) -> None:
    x, weight = experts.x(21), picks(21)[1]
    got = experts(x, idx, weight)
    want = exact(x, idx, weight, np.ones(21), experts.leaves, "float32")
    if not want.any():
        assert_same_bits(got, np.zeros_like(got))
    else:
        assert rel_l2(got, want) < FLOAT32_REL


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
