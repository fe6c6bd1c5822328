"""rope against FP64 of the FP32 angle, its inverse, and the frequency tables of model.md."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.ops.rope import rope, rope_frequencies
from reference import rope as reference
from tests.support import official
from tests.support.numerics import assert_near, assert_same_bits, f64
from tests.support.op_cases import normal

# cos and sin to an FP32 ulp of 1 (6e-8 each way), two products and a sum.
ABS = 4e-7
FREQUENCIES = (10000.0 ** -(np.arange(0, 16, 2) / 16)).astype(np.float32)


def exact(x: np.ndarray, positions: np.ndarray, inverse: bool) -> np.ndarray:
    """Pairs ``(2i, 2i + 1)`` of the last channels as complex numbers."""
    rotary = 2 * len(FREQUENCIES)
    angle = (positions.astype(np.float32)[..., None] * FREQUENCIES).astype(np.float64)
    angle = angle.reshape(*positions.shape, *(1,) * (x.ndim - 3), -1)
    tail = x[..., -rotary:]
    turned = (tail[..., 0::2] + 1j * tail[..., 1::2]) * np.exp((-1j if inverse else 1j) * angle)
    out = x.copy()
    out[..., -rotary::2] = turned.real
    out[..., -rotary + 1 :: 2] = turned.imag
    return out


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("shape", [(2, 5, 24), (2, 5, 3, 24)], ids=["keys", "heads"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_against_fp64(dtype: jnp.dtype, shape: tuple[int, ...], inverse: bool) -> None:
    x = normal(0, *shape, dtype=dtype)
    positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5) * 37
    got = rope(x, positions, FREQUENCIES, inverse=inverse)
    largest = np.abs(f64(x)).max()
    assert_near(got, exact(f64(x), np.asarray(positions), inverse), ABS * largest)
    assert_same_bits(got[..., :8], x[..., :8], "channels before the rotation")


def test_inverse_undoes_it() -> None:
    x = normal(0, 2, 5, 24)
    positions = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    back = rope(rope(x, positions, FREQUENCIES), positions, FREQUENCIES, inverse=True)
    assert_near(back, f64(x), 2 * ABS * np.abs(f64(x)).max())


def test_position_zero_keeps_every_bit() -> None:
    x = normal(0, 1, 1, 24, dtype=jnp.bfloat16)
    assert_same_bits(rope(x, jnp.zeros((1, 1), jnp.int32), FREQUENCIES), x)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(LayerKind.SWA, "main"), (LayerKind.CSA, "compress")],
    ids=["main", "compress"],
)
def test_frequencies_are_the_reference(kind: LayerKind, name: str) -> None:
    """Within an FP32 ulp: the two compute the powers in FP64 and in FP32."""
    raw = official.tiny_config()
    got = rope_frequencies(ModelConfig.from_hf(raw), kind)
    np.testing.assert_allclose(got, reference.rope_frequencies(name, raw), rtol=2.5e-7)
