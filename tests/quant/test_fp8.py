"""FP8: the encoder against ml_dtypes, `q8` against the reference, saturation and NaN."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.quant import bits, fp8
from reference import formats
from tests.support.numerics import assert_same_bits, f64, raw, rel_l2

FLOAT32_MAX = np.finfo(np.float32).max
# E4M3 has 3 mantissa bits: uniform rounding errors of up to 2^-4 relative give 0.026 on Gaussian
# data (0.0264 to 0.0266 measured); plain powers of two as scales do not change that.
GAUSSIAN_ERROR = 0.0270


def qdq(x: np.ndarray, block: int) -> np.ndarray:
    return np.asarray(_qdq(x, block))


@functools.partial(jax.jit, static_argnums=1)
def _qdq(x: jax.Array, block: int) -> jax.Array:
    return fp8.dequantize_act(fp8.quantize_act(x, block), block)


reference_q8 = jax.jit(formats.q8, static_argnums=1)
"""Compiled: its many small steps take longer one by one than all these tests together."""


def edges(unit: float) -> np.ndarray:
    """Blocks of 64 whose largest value is at or beside ``unit * 2^j``, with ties below it."""
    rows = []
    for j in range(-20, 21, 4):
        top = np.float32(unit * 2.0**j)
        for first in (top, np.nextafter(top, np.float32(0)), np.nextafter(top, FLOAT32_MAX)):
            row = np.linspace(-1, 1, 64).astype(np.float32) * first
            row[:2] = first, -first
            rows.append(row)
    return np.stack(rows)


def test_encode_e4m3_like_ml_dtypes() -> None:
    """Random values, every value, every midpoint and both sides of it, both signs."""
    grid = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    middle = (grid[1:] + grid[:-1]) / 2
    sides = np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(999))
    noise = [
        np.random.default_rng(0).standard_normal(20_000).astype(np.float32) * scale
        for scale in (100, 1, 0.01)
    ]
    x = np.clip(np.concatenate([grid, middle, *sides, *noise]), -448, 448)
    x = np.concatenate([x, -x]).astype(np.float32)
    assert_same_bits(raw(bits.encode_e4m3(jnp.asarray(x))), raw(x.astype(ml_dtypes.float8_e4m3fn)))


@pytest.mark.parametrize("x", [449.0, 464.0, 465.0, 1e30, float("inf")])
def test_encode_e4m3_saturates(x: float) -> None:
    """A14: a plain cast gives NaN above 464."""
    assert f64(bits.encode_e4m3(jnp.array([x, -x]))).tolist() == [448, -448]


def test_nan_and_signed_zero() -> None:
    codes = raw(bits.encode_e4m3(jnp.array([jnp.nan, 0.0, -0.0])))
    assert codes[0] & 0x7F == 0x7F
    assert codes[1:].tolist() == [0x00, 0x80]


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 300.0, 1e6, 1e30])
def test_q8_is_the_reference(block: int, scale: float) -> None:
    """Bitwise, a ragged last block included."""
    x = (np.random.default_rng(0).standard_normal((40, 300)) * scale).astype(np.float32)
    assert_same_bits(qdq(x, block), reference_q8(jnp.asarray(x), block))


@pytest.mark.parametrize("unit", [448.0, 6.0, 1.0])
def test_q8_at_the_edges_of_a_scale(unit: float) -> None:
    x = edges(unit)
    assert_same_bits(qdq(x, 64), reference_q8(jnp.asarray(x), 64))


@pytest.mark.parametrize("j", [-13, -1, 0, 1, 100])
def test_scale_of_an_exact_power(j: int) -> None:
    """``amax = 448 * 2^j`` (above the floor) gives exactly ``2^j``: no spurious next power."""
    q = fp8.quantize_act(jnp.full((1, 64), np.float32(448 * 2.0**j)), 64)
    assert raw(q.scale).tolist() == [[127 + j]]
    assert (f64(q.code) == 448).all()


@pytest.mark.parametrize("amax", [0.0, 1e-30, 9.9e-5, 1e-4])
def test_floor_of_the_scale(amax: float) -> None:
    """model.md 4.5: amax is at least 1e-4, hence the scale at least 2^-22; A15: zeros are exact."""
    x = np.zeros((1, 64), np.float32)
    x[0, 3] = amax
    q = fp8.quantize_act(jnp.asarray(x), 64)
    assert raw(q.scale).tolist() == [[127 - 22]]
    got = qdq(x, 64)
    assert_same_bits(np.delete(got, 3, axis=1), np.zeros((1, 63), np.float32))
    assert_same_bits(got, reference_q8(jnp.asarray(x), 64))


def test_q8_keeps_the_sign_of_zero() -> None:
    """A18."""
    x = np.array([[-0.0, 0.0, 1.0, -1e-9] * 16], np.float32)
    assert_same_bits(np.signbit(qdq(x, 64)), np.signbit(x))


@pytest.mark.parametrize("x", [np.inf, -np.inf, FLOAT32_MAX])
def test_q8_saturates(x: float) -> None:
    """A14: the code saturates, the scale is finite and not zero, no neighbour becomes NaN."""
    row = np.ones((1, 128), np.float32)
    row[0, 5] = x
    q = fp8.quantize_act(jnp.asarray(row), 64)
    scale = f64(q.scale)
    assert np.isfinite(scale).all() and (scale > 0).all()
    assert np.isfinite(f64(q.code)).all()
    if np.isinf(x):
        assert f64(q.code)[0, 5] == np.sign(x) * 448
    assert_same_bits(qdq(row, 64)[:, 64:], np.ones((1, 64), np.float32))


def test_q8_nan_stays_in_its_block() -> None:
    x = np.ones((2, 128), np.float32)
    x[1, 70] = np.nan
    got = qdq(x, 64)
    assert np.isnan(got[1, 64:]).all()
    assert (got[0] == 1).all() and (got[1, :64] == 1).all()


def test_q8_error_on_gaussian_data() -> None:
    x = np.random.default_rng(0).standard_normal((64, 1024)).astype(np.float32)
    error = rel_l2(qdq(x, 128), x)
    print(f"relative L2 of q8 on Gaussian data: {error:.4f}")
    assert 0.02 < error < GAUSSIAN_ERROR


def test_q8_is_exact_in_bf16() -> None:
    x = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32) * 50
    got = qdq(x, 64)
    assert_same_bits(got.astype(ml_dtypes.bfloat16).astype(np.float32), got)


@pytest.mark.parametrize("shape", [(128, 128), (160, 200), (1, 1), (2, 130, 64)])
def test_weight_tiles(shape: tuple[int, ...]) -> None:
    """One scale per 128x128 tile, edge tiles smaller; against the recipe per tile in NumPy."""
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    q = fp8.quantize_weight(jnp.asarray(w))
    tiles = tuple(-(-n // 128) for n in shape[-2:])
    assert q.scale.shape == (*shape[:-2], *tiles)
    got = np.asarray(fp8.dequantize_weight(q))
    for i in range(tiles[0]):
        for j in range(tiles[1]):
            part = np.s_[..., i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            lead = int(np.prod(shape[:-2], dtype=int))
            flat = w[part].reshape(lead, -1)
            expected = reference_q8(jnp.asarray(flat), flat.shape[-1]).reshape(w[part].shape)
            assert_same_bits(got[part], expected, f"tile {i}, {j}")


def test_every_code_times_every_scale() -> None:
    """256 E4M3 codes x 256 UE8M0 bytes against FP64, where FP32 can hold scale and product."""
    code = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    scale = bits.ue8m0_from_exponent(jnp.arange(256, dtype=jnp.uint8))
    q = fp8.Fp8(jnp.asarray(np.tile(code, (256, 1))), scale[:, None])
    got = np.asarray(fp8.dequantize_act(q, 256))
    exact = f64(code)[None] * np.append(2.0 ** (np.arange(255.0) - 127), np.nan)[:, None]
    with np.errstate(over="ignore"):
        expected = exact.astype(np.float32)
    normal = ~(np.abs(exact) < 2.0**-126) & (np.arange(256) > 0)[:, None] | (exact == 0)
    assert_same_bits(got[normal], expected[normal])
    # XLA's CPU code flushes subnormal operands and results to zero of the same sign.
    assert ((got == expected) | (got == 0))[~normal & ~np.isnan(expected)].all()
    assert np.isnan(got[np.isnan(expected)]).all()


def test_jit_changes_nothing() -> None:
    x = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
    eager = fp8.quantize_act(jnp.asarray(x), 64)
    jitted = jax.jit(lambda x: fp8.quantize_act(x, 64))(x)
    assert_same_bits(raw(jitted.code), raw(eager.code))
    assert_same_bits(raw(jitted.scale), raw(eager.scale))
