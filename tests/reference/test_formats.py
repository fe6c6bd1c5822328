"""Number formats of the reference against ml_dtypes and against the tables of model.md."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.quant import fp8
from reference import formats, rope
from reference.rounding import bf
from reference.weights import dequantize_official

# An FP32 matrix product of 128 terms against FP64.
HADAMARD_ABS = 1e-6
# One FP32 ulp (1.2e-7) plus half a unit of the last printed digit.
ROPE_REL = 2e-7


def assert_same_bits(actual, expected):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    real = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[real].view(np.uint32), expected[real].view(np.uint32))


def samples(scale, n=200_000):
    rng = np.random.default_rng(0)
    return (scale * rng.standard_normal(n) * 2.0 ** rng.integers(-12, 1, n)).astype(np.float32)


def test_bf_rounds_like_ml_dtypes():
    x = samples(3.0)
    assert_same_bits(bf(jnp.asarray(x)), x.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_all_e4m3_bytes():
    codes = np.arange(256, dtype=np.uint8)
    assert_same_bits(
        formats.decode_e4m3(codes), codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )


def test_all_ue8m0_bytes():
    codes = np.arange(256, dtype=np.uint8)
    assert_same_bits(
        formats.decode_ue8m0(codes), codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    )


def test_e2m1_codes_low_nibble_first():
    packed = np.array([[0x10, 0x32, 0x54, 0x76], [0x98, 0xBA, 0xDC, 0xFE]], np.uint8)
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert_same_bits(formats.decode_e2m1_packed(packed), [positive, [-1.0 * v for v in positive]])


def test_round_e4m3_like_ml_dtypes():
    """Random values, every midpoint of two neighbours, and both sides of each midpoint."""
    grid = formats.decode_e4m3(np.arange(127, dtype=np.uint8))
    middle = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate(
        [
            samples(100.0),
            grid,
            middle,
            np.nextafter(middle, np.float32(0)),
            np.nextafter(middle, 999),
        ]
    )
    x = np.clip(np.concatenate([x, -x]), -448, 448).astype(np.float32)
    assert_same_bits(
        formats.round_e4m3(jnp.asarray(x)), x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    )


@pytest.mark.parametrize("x", [448.0, 449.0, 464.0, 465.0, 1e30, float("inf")])
def test_round_e4m3_saturates(x):
    assert_same_bits(formats.round_e4m3(jnp.array([x, -x])), [448, -448])


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (0.25, 0),
        (0.75, 1),
        (1.25, 1),
        (1.75, 2),
        (2.5, 2),
        (3.5, 4),
        (5.0, 4),
        (6.0, 6),
        (7.0, 6),
        (1e9, 6),
    ],
)
def test_round_e2m1_ties(x, expected):
    assert_same_bits(
        formats.round_e2m1(jnp.array([x, -x], jnp.float32)), [expected, -1.0 * expected]
    )


@pytest.mark.parametrize(
    ("middle", "below", "above"),
    [
        (0.25, 0, 0.5),
        (0.75, 0.5, 1),
        (1.25, 1, 1.5),
        (1.75, 1.5, 2),
        (2.5, 2, 3),
        (3.5, 3, 4),
        (5.0, 4, 6),
    ],
)
def test_round_e2m1_beside_ties(middle, below, above):
    middle = np.float32(middle)
    x = np.array([np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(9))])
    assert_same_bits(formats.round_e2m1(jnp.asarray(x)), [below, above])


def test_round_e2m1_like_ml_dtypes():
    x = np.clip(samples(4.0), -6, 6)
    assert_same_bits(
        formats.round_e2m1(jnp.asarray(x)), x.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    )


def test_pow2ceil():
    x = jnp.array(
        [1.0, np.nextafter(np.float32(1), np.float32(2)), 1.5, 2.0, 3.0, 2.0**-22, 2.0**-126],
        jnp.float32,
    )
    assert_same_bits(formats.pow2ceil(x), [1, 2, 2, 2, 4, 2.0**-22, 2.0**-126])


@pytest.mark.parametrize("j", range(-15, 16))
def test_q8_amax_448_times_power_of_two_uses_that_scale(j):
    """The product with FP32(1/448) is exactly 2^j, so grid points times 2^j survive."""
    x = formats.decode_e4m3(np.arange(127, dtype=np.uint8)[-64:]) * np.float32(2.0**j)
    assert_same_bits(formats.q8(jnp.asarray(x), 64), x)


def test_q8_above_448_doubles_the_scale():
    x = np.array([np.nextafter(np.float32(448), np.float32(500)), 17.0], np.float32)
    assert_same_bits(
        formats.q8(jnp.asarray(x), 2), [448, 16]
    )  # 17 / 2 lies between 8 and 9; the tie goes to 8


def test_q8_zero_and_tiny_blocks():
    """amax is floored at 1e-4, so the scale is at least 2^-22 and the finest step 2^-31."""
    x = np.array([0.0, 0.0, 1e-4, 2.0**-31, 2.0**-33, -(2.0**-33)], np.float32)
    y = np.asarray(formats.q8(jnp.asarray(x), 2))
    assert_same_bits(y[[0, 1, 3, 4, 5]], [0.0, 0.0, 2.0**-31, 0.0, -0.0])
    assert abs(y[2] - x[2]) <= 1e-4 / 16


def test_q8_blocks_are_independent_and_bf16_exact():
    x = samples(1.0, 1000)
    y = np.asarray(formats.q8(jnp.asarray(x), 64))  # 15 blocks and one of 40
    for start in range(0, 1000, 64):
        assert_same_bits(y[start : start + 64], formats.q8(jnp.asarray(x[start : start + 64]), 64))
    assert_same_bits(bf(jnp.asarray(y)), y)


@pytest.mark.parametrize("j", [-120, -20, -1, 0, 1, 20, 120])
def test_q4_amax_6_times_power_of_two_uses_that_scale(j):
    x = np.tile(np.concatenate([formats.E2M1_VALUES, -formats.E2M1_VALUES]), 2) * np.float32(2.0**j)
    assert_same_bits(formats.q4(jnp.asarray(x)), x)


def test_q4_above_6_doubles_the_scale():
    x = np.zeros(32, np.float32)
    x[:3] = np.nextafter(np.float32(6), np.float32(7)), 2.5, 0.5
    assert_same_bits(
        np.asarray(formats.q4(jnp.asarray(x)))[:3], [6, 2, 0]
    )  # 3 -> 6; 1.25 -> 1 -> 2; .25 -> 0


def test_q4_zero_block():
    assert_same_bits(formats.q4(jnp.zeros(64)), np.zeros(64))


def test_nvfp4_of_representable_values_is_exact():
    """Blocks whose amax is 6 * s_b * s2 with the tensor's amax 6 * 448 * s2 come back unchanged."""
    block = np.concatenate([formats.E2M1_VALUES, -formats.E2M1_VALUES])
    x = (
        np.stack([block * s for s in (448.0, 1.0, 0.25, 2.0**-9)]).reshape(1, -1).astype(np.float32)
        * 2.0**-4
    )
    scale = formats.nvfp4_token_scale(jnp.asarray(x))
    assert_same_bits(scale, [[2.0**-4]])
    assert_same_bits(formats.nvfp4(jnp.asarray(x), scale), x)


def test_nvfp4_block_scales_follow_the_recipe():
    x = samples(1.0, 4 * 64).reshape(4, 64)
    x[0, 16:32] = 0
    scale = formats.nvfp4_weight_scale(jnp.asarray(x))
    assert_same_bits(scale, np.abs(x).max() / np.float32(6 * 448))
    q, block_scale = formats.nvfp4_quantize(jnp.asarray(x), scale)
    amax = np.abs(x.reshape(4, 4, 16)).max(-1)
    expected = np.clip(amax / (np.float32(6) * np.asarray(scale)), 2.0**-9, 448).astype(
        ml_dtypes.float8_e4m3fn
    )
    assert_same_bits(block_scale, np.where(amax == 0, 1, expected.astype(np.float32)))
    step = np.repeat(np.asarray(block_scale) * np.asarray(scale), 16, axis=1)
    expected = np.clip(x / step, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert_same_bits(q, expected)


def test_nvfp4_zero_token():
    x = jnp.zeros((2, 32))
    assert_same_bits(formats.nvfp4(x, formats.nvfp4_token_scale(x)), np.zeros((2, 32)))


def test_hadamard_is_orthonormal_and_symmetric():
    h = formats.hadamard_matrix(128).astype(np.float64)
    np.testing.assert_array_equal(h, h.T)
    np.testing.assert_allclose(h @ h, np.eye(128), atol=HADAMARD_ABS)
    assert (h[0] > 0).all() and h[1, 1] < 0 < h[1, 2]  # Sylvester order


def test_hadamard_twice_is_identity():
    x = samples(1.0, 256).reshape(2, 128)
    np.testing.assert_allclose(
        formats.hadamard(formats.hadamard(jnp.asarray(x))), x, atol=4 * HADAMARD_ABS
    )


@pytest.mark.parametrize(("i", "value"), [(0, 1.0), (1, 0.7498942), (31, 1.3335215e-4)])
def test_rope_main_frequencies(config, i, value):
    np.testing.assert_allclose(rope.rope_frequencies("main", config)[i], value, rtol=ROPE_REL)


@pytest.mark.parametrize(
    ("i", "value"),
    [
        (1, 0.68765604),
        (15, 3.6355385e-3),
        (16, 2.2656249e-3),
        (20, 2.9697779e-4),
        (24, 1.9531253e-5),
        (25, 5.3723124e-6),
        (31, 5.6805294e-7),
    ],
)
def test_rope_compress_frequencies(config, i, value):
    np.testing.assert_allclose(rope.rope_frequencies("compress", config)[i], value, rtol=ROPE_REL)


def test_rope_inverse_undoes_rope(config):
    freqs = jnp.asarray(rope.rope_frequencies("compress", config))
    x, positions = (
        jnp.asarray(samples(1.0, 64 * 5).reshape(5, 64)),
        jnp.array([0, 1, 127, 4096, 1_000_000]),
    )
    back = rope.rope(rope.rope(x, positions, freqs), positions, freqs, inverse=True)
    np.testing.assert_allclose(back, x, atol=1e-5)  # two FP32 rotations of values of order one


def test_dequantize_block_scales_cover_partial_blocks():
    """A 130 x 3 FP8 tensor has scales [2, 1]; byte 0x38 is 1.0."""
    raw = {
        "a.weight": ("F8_E4M3", (130, 3), np.full(390, 0x38, np.uint8)),
        "a.scale": ("F8_E8M0", (2, 1), np.array([128, 126], np.uint8)),
    }
    value = dequantize_official(raw)["a.weight"]
    assert_same_bits(value[:128], np.full((128, 3), 2.0))
    assert_same_bits(value[128:], np.full((2, 3), 0.5))


RECIPES: dict[str, tuple[Any, tuple]] = {
    "q8": (formats.q8, (64,)),
    "q4": (formats.q4, (32,)),
    "weight_q8": (formats.weight_q8, ()),
    "nvfp4": (formats.nvfp4, (np.float32(0.01),)),
}


def rounded_values():
    """Blocks of ordinary, tiny, huge and zero values; what NVFP4's scale of 0.01 clips, too."""
    x = samples(1.0, 128 * 256).reshape(128, 256)
    x[:, :32] *= 1e6
    x[:, 32:64] = 0
    x[:, 64:128] *= 1e-7
    return jnp.asarray(x)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradient_passes_straight_through(recipe):
    """That of the identity bit by bit, under jit and through an outer function."""
    function, arguments = RECIPES[recipe]
    x = rounded_values()
    cotangent = jnp.asarray(samples(1.0, x.size)[::-1].reshape(x.shape))
    grad = jax.jit(jax.grad(lambda x: jnp.sum(cotangent * function(x, *arguments))))(x)
    assert_same_bits(grad, cotangent)
    tangent = jax.jvp(lambda x: function(x, *arguments), (x,), (cotangent,))[1]
    assert_same_bits(tangent, cotangent)
    assert np.abs(np.asarray(function(x, *arguments)) - x).max() > 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_straight_through_leaves_values_alone(recipe):
    """The same bits plain, under differentiation and without the wrapper."""
    function, arguments = RECIPES[recipe]
    x = rounded_values()
    plain = function.fun(x, *arguments)
    assert_same_bits(function(x, *arguments), plain)
    assert_same_bits(jax.jvp(lambda x: function(x, *arguments), (x,), (x,))[0], plain)


def test_nvfp4_scale_has_no_gradient():
    x = rounded_values()[:2]
    grad = jax.grad(lambda x, scale: formats.nvfp4(x, scale).sum(), 1)(x, jnp.float32(0.01))
    assert float(grad) == 0


@pytest.mark.parametrize("lead", [(), (3,)])
def test_weight_q8_stores_like_dsv4_jax(lead):
    """Tiles of different magnitudes, one of zeros and one below the floor of 1e-4."""
    w = samples(1.0, 3 * 256 * 384).reshape(3, 256, 384)
    w[0, :128, :128], w[0, :128, 128:256] = 0, w[0, :128, 128:256] * 1e-7
    w[0, 128:, :128] *= 1e5
    w = w if lead else w[0]
    weight_q8 = jax.jit(formats.weight_q8)
    stored = jax.jit(lambda w: fp8.dequantize_weight(fp8.quantize_weight(w)))
    whole = weight_q8(w)
    assert_same_bits(whole, stored(w))
    one = weight_q8(w[..., :128, 256:])
    assert_same_bits(whole[..., :128, 256:], one)  # tiles are independent
