"""mHC, RoPE, q8, q4 and router at position 1,048,575 and on extreme inputs, against FP64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.ops.mhc_head import mhc_head
from dsv4_jax.ops.mhc_post import mhc_post
from dsv4_jax.ops.mhc_pre import mhc_pre
from dsv4_jax.ops.rope import rope, rope_frequencies
from dsv4_jax.ops.router import router
from dsv4_jax.quant import fp8, mxfp4
from tests.ops.test_mhc_pre import MIX_REL, exact, parameters
from tests.support import official
from tests.support.numerics import assert_near, f64
from tests.support.op_cases import normal

EPS = 1e-6
LAST = 1_048_575
POSITIONS = [0, 1, 127, 65_535, 65_536, 524_288, 1_000_003, LAST - 1, LAST]
# cos and sin of the FP32 angle as FP32 numbers: within two ulps of values up to 1 (measured 9e-8).
ROPE_ABS = 2.4e-7
# model.md 3.3: the FP32 product itself is off by up to half an ulp of 2^20 radians.
ANGLE_ERROR = 0.035


def frequencies(kind: LayerKind) -> np.ndarray:
    return rope_frequencies(ModelConfig.from_hf(official.tiny_config()), kind)


@pytest.mark.parametrize("kind", [LayerKind.SWA, LayerKind.CSA], ids=["main", "compress"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_rope_at_the_last_position(kind: LayerKind, inverse: bool) -> None:
    """B15: rotating (1, 0) gives cos and sin, here of the FP32 product in FP64."""
    table = frequencies(kind)
    x = jnp.tile(jnp.array([1.0, 0.0]), (len(POSITIONS), 1, len(table)))
    position = np.array(POSITIONS, np.int32)[:, None]
    got = f64(rope(x, jnp.asarray(position), table, inverse=inverse))[:, 0]
    angle = (position.astype(np.float32) * table).astype(np.float64) * (-1 if inverse else 1)
    assert angle.max() > (1e6 if kind is LayerKind.SWA and not inverse else 0) or inverse
    error = max(
        np.abs(got[:, 0::2] - np.cos(angle)).max(), np.abs(got[:, 1::2] - np.sin(angle)).max()
    )
    ideal = position * table.astype(np.float64) * (-1 if inverse else 1)
    drift = np.abs(got[:, 0::2] + 1j * got[:, 1::2] - np.exp(1j * ideal)).max()
    print(f"{kind.name}: {error:.2e} from the FP32 angle, {drift:.2e} from the real angle")
    assert error < ROPE_ABS
    assert drift < ANGLE_ERROR


def test_rope_every_position_near_the_end() -> None:
    """4096 positions up to the last, all channels: no argument reduction goes astray."""
    table = frequencies(LayerKind.SWA)
    position = np.arange(LAST - 4095, LAST + 1, dtype=np.int32)[None]
    x = jnp.tile(jnp.array([1.0, 0.0]), (1, 4096, len(table)))
    got = f64(rope(x, jnp.asarray(position), table))[0]
    angle = (position[0].astype(np.float32)[:, None] * table).astype(np.float64)
    assert np.abs(got[:, 0::2] - np.cos(angle)).max() < ROPE_ABS
    assert np.abs(got[:, 1::2] - np.sin(angle)).max() < ROPE_ABS


def one_hot(scale: float) -> np.ndarray:
    x = np.zeros((4, 4, 48), np.float32)
    for row in range(4):
        x[row, row, 11 * row] = scale
    return x


STREAMS = [
    pytest.param(np.asarray(normal(0, 4, 4, 48)) * np.float32(1e15), id="very-large"),
    pytest.param(np.asarray(normal(0, 4, 4, 48)) * np.float32(1e-3), id="as-small-as-eps"),
    pytest.param(np.asarray(normal(0, 4, 4, 48)) * np.float32(1e-30), id="tiny"),
    pytest.param(np.zeros((4, 4, 48), np.float32), id="zero"),
    pytest.param(one_hot(1.0), id="one-hot"),
    pytest.param(one_hot(1e15), id="one-hot-large"),
    pytest.param(np.ones((4, 4, 48), np.float32), id="constant"),
]


@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("gain", [1.0, 50.0], ids=["", "saturated"])
def test_mhc_pre(streams: np.ndarray, gain: float) -> None:
    """Saturated: logits of hundreds, where sigmoid is 0 or 1 and one Sinkhorn entry has it all."""
    fn, base, scale = parameters()
    p = fn, base, scale * gain
    got = mhc_pre(jnp.asarray(streams), *p, iters=20, hc_eps=EPS, rms_eps=EPS)
    want = exact(streams.astype(np.float64), *map(f64, p))
    # An error of mix (relative to about 10) is multiplied by the scale before the exponential.
    rel = MIX_REL * max(1.0, gain / 2)
    assert_near(got[0], want[0], rel * np.abs(f64(streams)).sum(axis=1), "y")
    assert_near(got[1], want[1], rel, "post")
    # Columns that start near eps are ill-conditioned: Sinkhorn divides eps-sized rounding by them.
    assert_near(got[2], want[2], rel if gain == 1 else 2e-3, "comb")


@pytest.mark.parametrize("scale", [1e25, 3e38], ids=["square-overflows", "largest"])
def test_mhc_pre_beyond_the_range_of_squares(scale: float) -> None:
    """FP32 squares overflow: `mix` is 0, as in the official code, and nothing is NaN."""
    streams = np.zeros((2, 4, 48), np.float32)
    streams[:, 1, 5] = scale
    fn, base, s = parameters()
    y, post, comb = mhc_pre(jnp.asarray(streams), fn, base, s, iters=20, hc_eps=EPS, rms_eps=EPS)
    want = exact(np.zeros_like(streams, np.float64), *map(f64, (fn, base, s)))
    assert_near(post, want[1], MIX_REL)
    assert_near(comb, want[2], MIX_REL)
    assert np.isfinite(f64(y)).all()


@pytest.mark.parametrize("streams", STREAMS)
def test_mhc_head(streams: np.ndarray) -> None:
    fn, base, scale = normal(1, 4, 4 * 48, scale=0.2), normal(2, 4), jnp.array([0.7])
    got = mhc_head(jnp.asarray(streams), fn, base, scale, hc_eps=EPS, rms_eps=EPS)
    wide = streams.astype(np.float64)
    flat = wide.reshape(4, -1)
    mix = flat @ f64(fn).T / np.sqrt(np.mean(flat * flat, axis=-1, keepdims=True) + EPS)
    pre = 1 / (1 + np.exp(-(mix * f64(scale) + f64(base)))) + EPS
    assert_near(got, np.einsum("tj,tjd->td", pre, wide), MIX_REL * np.abs(wide).sum(axis=1))


@pytest.mark.parametrize("streams", STREAMS)
def test_mhc_post(streams: np.ndarray) -> None:
    branch = normal(1, 4, 48)
    post, comb = jnp.full((4, 4), 2.0), jnp.abs(normal(2, 4, 4, 4))
    got = mhc_post(branch, jnp.asarray(streams), post, comb)
    wide = streams.astype(np.float64)
    want = np.einsum("tjk,tjd->tkd", f64(comb), wide) + 2 * f64(branch)[:, None]
    size = np.einsum("tjk,tjd->tkd", f64(comb), np.abs(wide)) + 2 * np.abs(f64(branch))[:, None]
    # hc + 1 products and sums in FP32.
    assert_near(got, want, 5e-7 * size)


@pytest.mark.parametrize("z", [0.0, 20.0, -20.0, 80.0, -80.0, 1e4, -1e4, 3e38, -3e38])
def test_router_branches_of_softplus(z: float) -> None:
    """One expert at ``z`` among experts at 0; far below, the score underflows to exactly 0."""
    x = jnp.ones((1, 1))
    weight = jnp.array([[z], [0.0], [0.0], [0.0]])
    _, got = router(x, weight, None, jnp.arange(4, dtype=jnp.int32)[None], k=4, scale=1.0)
    score = np.sqrt(np.logaddexp(0, f64(weight)[:, 0]))
    want = (score / score.sum())[None]
    # softplus and root in FP32; exp(-80 / 2) keeps its relative accuracy, 1e-44 does not exist.
    assert_near(got, want, 1e-6 * want + 1e-38)
    assert np.isfinite(f64(got)).all()


def test_router_all_scores_tiny() -> None:
    """Scores of exp(-40): their quotient is still exact to a few ulps."""
    weight = jnp.array([[-80.0], [-81.0], [-79.0]])
    _, got = router(jnp.ones((1, 1)), weight, jnp.zeros(3), None, k=2, scale=1.0)
    score = np.exp(np.array([-80.0, -79.0]) / 2)
    want = (score / score.sum())[None]
    assert_near(got, want, 2e-6 * want)


def test_router_bias_decides() -> None:
    """A bias of +-1e4 selects, and scores stay what they are."""
    weight = normal(1, 6, 8, scale=0.2)
    bias = jnp.array([-1e4, 1e4, 0, 0, 1e4, -1e4])
    idx, got = router(normal(0, 3, 8), weight, bias, None, k=2, scale=1.0)
    assert np.asarray(idx).tolist() == [[1, 4]] * 3
    np.testing.assert_allclose(np.asarray(got).sum(axis=1), 1, rtol=1e-6)


@pytest.mark.parametrize("amax", [2.0**-126, 1e-30, 1e-4, 1.0, 448.0, 1e15, 2.5e38])
def test_q8_across_the_range(amax: float) -> None:
    """Against ml_dtypes with the power of two found in FP64."""
    x = (np.linspace(-1, 1, 64) * amax).astype(np.float32)[None]
    scale = 2.0 ** np.ceil(np.log2(max(np.abs(f64(x)).max(), 1e-4) / 448 * (1 - 1e-7)))
    want = f64((f64(x) / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)) * scale
    got = f64(jax.jit(lambda x: fp8.dequantize_act(fp8.quantize_act(x, 64), 64))(x))
    # Below 2^-126 XLA's CPU code has only zero.
    np.testing.assert_array_equal(got, np.where(np.abs(want) < 2.0**-126, 0, want))


@pytest.mark.parametrize("amax", [2.0**-120, 1e-30, 1.0, 6.0, 1e15, 2.5e38])
def test_q4_across_the_range(amax: float) -> None:
    """Against ml_dtypes with the power of two found in FP64."""
    x = (np.linspace(-1, 1, 32) * amax).astype(np.float32)[None]
    scale = 2.0 ** np.ceil(np.log2(np.abs(f64(x)).max() / 6 * (1 - 1e-7)))
    want = f64((f64(x) / scale).astype(np.float32).astype(ml_dtypes.float4_e2m1fn)) * scale
    got = f64(jax.jit(lambda x: mxfp4.dequantize(mxfp4.quantize(x)))(x))
    np.testing.assert_array_equal(got, want)
