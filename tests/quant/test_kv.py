"""Keys in storage: splits, shapes, dtypes and values of every form against the reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.quant.kv import index_dequant, index_quant, kv_dequant, kv_quant
from reference import formats
from reference.attention import key_quant
from reference.rounding import OFFICIAL, bf
from tests.support.numerics import assert_same_bits


def keys(shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    """Random values that BF16 holds."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) * np.float32(scale)
    return np.asarray(bf(jnp.asarray(x)))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize(("dim", "rotary"), [(512, 64), (96, 32), (40, 16)])
def test_fp8_is_the_reference(dim: int, rotary: int, scale: float) -> None:
    """448 E4M3 with a scale per 64 (a shorter last block allowed) and BF16 rotary channels."""
    x = keys((5, dim), scale)
    rows = kv_quant(jnp.asarray(x), rotary, "fp8")
    assert rows.nope.shape == (5, dim - rotary) and rows.nope.dtype == jnp.float8_e4m3fn
    assert rows.scale is not None and rows.scale.shape == (5, -(-(dim - rotary) // 64))
    assert rows.rope.shape == (5, rotary) and rows.rope.dtype == jnp.bfloat16
    expected = key_quant(jnp.asarray(x), rotary, OFFICIAL)
    assert_same_bits(kv_dequant(rows, jnp.dtype(jnp.float32)), expected)
    in_bf16 = kv_dequant(rows, jnp.dtype(jnp.bfloat16)).astype(jnp.float32)
    assert_same_bits(in_bf16, expected, "BF16 holds every stored value")


@pytest.mark.parametrize("form", ["bfloat16", "float32"])
def test_unquantised_forms_keep_every_bit(form: str) -> None:
    x = jnp.asarray(keys((2, 3, 96))).astype(form)
    rows = kv_quant(x, 32, form)
    assert rows.scale is None and rows.nope.dtype == rows.rope.dtype == jnp.dtype(form)
    assert_same_bits(kv_dequant(rows, jnp.dtype(form)), x)


def test_quantising_again_changes_nothing() -> None:
    """What came out of the store goes back into it with the same values."""
    x = jnp.asarray(keys((64, 512)))
    once = kv_dequant(kv_quant(x, 64, "fp8"), jnp.dtype(jnp.float32))
    twice = kv_dequant(kv_quant(once, 64, "fp8"), jnp.dtype(jnp.float32))
    assert_same_bits(twice, once)


@pytest.mark.parametrize(
    ("form", "block"), [pytest.param("mxfp4", 32, id="mxfp4"), pytest.param("fp8", 128, id="fp8")]
)
def test_index_forms_are_the_reference(form: str, block: int) -> None:
    x = jnp.asarray(keys((6, 128)))
    rows = index_quant(x, form)
    assert rows.scale is not None and rows.scale.shape == (6, 128 // block)
    recipe = formats.q4 if form == "mxfp4" else formats.q8
    got = np.asarray(index_dequant(rows))
    np.testing.assert_array_equal(got, np.asarray(recipe(x, block)))
    assert_same_bits(np.asarray(bf(jnp.asarray(got))), got, "exact in BF16")


@pytest.mark.parametrize("form", ["bfloat16", "float32"])
def test_unquantised_index_forms(form: str) -> None:
    x = jnp.asarray(keys((6, 128)))
    rows = index_quant(x, form)
    assert rows.scale is None and rows.key.dtype == jnp.dtype(form)
    assert_same_bits(index_dequant(rows), x)
