"""Bit-level blocks: every code of E2M1 and UE8M0, ties, packing, byte views."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.quant import bits
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.support.numerics import assert_same_bits, raw

E2M1_TABLE = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1_TABLE = np.concatenate([E2M1_TABLE, -E2M1_TABLE])
UE8M0_TABLE = np.append(2.0 ** (np.arange(255) - 127), np.nan).astype(np.float32)

INF, NAN = np.float32(np.inf), np.float32(np.nan)


def test_decode_every_e2m1_code() -> None:
    packed = jnp.arange(256, dtype=jnp.uint8)[:, None]
    expected = np.stack([E2M1_TABLE[np.arange(256) & 15], E2M1_TABLE[np.arange(256) >> 4]], -1)
    assert_same_bits(bits.decode_e2m1_bytes(packed), expected, "low nibble first")
    assert_same_bits(bits.decode_e2m1(bits.bytes_to_e2m1(packed)), expected, "typed")


def test_e2m1_table_is_the_dtype() -> None:
    """The typed array means to NumPy what the table says."""
    typed = bits.bytes_to_e2m1(jnp.arange(256, dtype=jnp.uint8)[:, None])
    values = np.asarray(typed).astype(np.float32)
    assert_same_bits(values[:, 0], E2M1_TABLE[np.arange(256) & 15])


def test_decode_every_ue8m0_byte() -> None:
    scale = bits.ue8m0_from_exponent(jnp.arange(256, dtype=jnp.uint8))
    assert_same_bits(bits.decode_ue8m0(scale), UE8M0_TABLE)
    assert_same_bits(np.asarray(scale).astype(np.float32), UE8M0_TABLE, "ml_dtypes")


def test_encode_inverts_decode() -> None:
    codes = np.arange(16, dtype=np.uint8)
    assert_same_bits(bits.encode_e2m1(jnp.asarray(E2M1_TABLE)), codes)


@pytest.mark.parametrize(
    ("x", "value"),
    [
        pytest.param(0.25, 0.0, id="tie-.25-down"),
        pytest.param(0.75, 1.0, id="tie-.75-up"),
        pytest.param(1.25, 1.0, id="tie-1.25-down"),
        pytest.param(1.75, 2.0, id="tie-1.75-up"),
        pytest.param(2.5, 2.0, id="tie-2.5-down"),
        pytest.param(3.5, 4.0, id="tie-3.5-up"),
        pytest.param(5.0, 4.0, id="tie-5-down"),
        pytest.param(6.0, 6.0, id="largest"),
        pytest.param(7.0, 6.0, id="above-saturates"),
        pytest.param(3e38, 6.0, id="huge-saturates"),
        pytest.param(INF, 6.0, id="inf-saturates"),
        pytest.param(0.0, 0.0, id="zero"),
        pytest.param(1e-30, 0.0, id="tiny"),
    ],
)
def test_encode_e2m1(x: float, value: float) -> None:
    """Ties to the even mantissa; both signs, and the sign of zero is kept (A18)."""
    code = np.asarray(bits.encode_e2m1(jnp.array([x, -x], jnp.float32)))
    assert_same_bits(E2M1_TABLE[code], np.array([value, -value], np.float32))


def test_encode_e2m1_is_the_nearest_value() -> None:
    """Random values and both sides of every tie, against ml_dtypes."""
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
    x = np.concatenate(
        [
            np.random.default_rng(0).uniform(-6, 6, 20_000).astype(np.float32),
            np.nextafter(ties, np.float32(0)),
            np.nextafter(ties, np.float32(9)),
        ]
    )
    x = np.concatenate([x, -x])
    expected = raw(x.astype(ml_dtypes.float4_e2m1fn))
    assert_same_bits(bits.encode_e2m1(jnp.asarray(x)), expected)


def test_nan_encodes_as_the_largest() -> None:
    """E2M1 has no NaN: the caller's scale carries it."""
    assert int(bits.encode_e2m1(jnp.array(NAN))) & 7 == 7


def test_packing_round_trip() -> None:
    code = jnp.asarray(np.random.default_rng(0).integers(0, 16, (3, 5, 8)), jnp.uint8)
    packed = bits.pack_e2m1(code)
    assert packed.dtype == E2M1 and packed.shape == code.shape
    assert_same_bits(raw(packed), code)
    view = bits.e2m1_to_bytes(packed)
    assert_same_bits(view, code[..., ::2] | (code[..., 1::2] << 4))
    assert_same_bits(raw(bits.bytes_to_e2m1(view)), code)


@pytest.mark.parametrize(
    ("x", "exponent"),
    [
        pytest.param(1.0, 127, id="power"),
        pytest.param(np.nextafter(np.float32(1), np.float32(2)), 128, id="just-above"),
        pytest.param(np.nextafter(np.float32(1), np.float32(0)), 127, id="just-below"),
        pytest.param(2.0**-126, 1, id="smallest-normal"),
        pytest.param(3e38, 255, id="no-power-above"),
        pytest.param(NAN, 255, id="nan"),
        pytest.param(INF, 255, id="inf"),
    ],
)
def test_pow2_ceil(x: float, exponent: int) -> None:
    assert int(bits.pow2_ceil_exponent(jnp.float32(x))) == exponent


def test_round_bf16_survives_the_compiler() -> None:
    """XLA may cancel a pair of casts; this rounding stays, inside a fusion too."""
    x = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    assert_same_bits(bits.round_bf16(jnp.asarray(x)), expected)
    assert_same_bits(jax.jit(lambda x: bits.round_bf16(x * 2) * 0.5)(x), expected)


@pytest.mark.parametrize("dtype", [E2M1, E4M3, UE8M0, jnp.bfloat16, jnp.float32])
def test_byte_view_round_trip(dtype: jnp.dtype) -> None:
    """Every byte survives, NaN patterns included."""
    count = 256 * 4
    data = np.tile(np.arange(256, dtype=np.uint8), count // 256).reshape(4, -1)
    if dtype == E2M1:
        typed = bits.bytes_to_e2m1(jnp.asarray(data))
    else:
        typed = jnp.asarray(data.view(np.dtype(dtype)))
    view = bits.byte_view(typed)
    words = {1: jnp.uint8, 2: jnp.uint16}
    assert view.dtype == words.get(typed.dtype.itemsize, typed.dtype)
    back = bits.from_byte_view(view, typed.dtype)
    assert back.dtype == typed.dtype and back.shape == typed.shape
    np.testing.assert_array_equal(raw(back), raw(typed))
