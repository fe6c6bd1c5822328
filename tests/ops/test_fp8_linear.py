"""fp8_linear against dequantised operands in FP64."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.fp8_linear import fp8_linear
from dsv4_jax.quant import fp8
from reference import formats
from tests.support.numerics import assert_near, f64
from tests.support.op_cases import normal

# FP32 sums of exact products, relative to the sum of their magnitudes.
REL = 1e-6


@pytest.mark.parametrize("act", ["fp8", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "k", "dtype"),
    [
        (160, 192, jnp.bfloat16),
        (160, 192, jnp.float32),
        (128, 256, jnp.bfloat16),
        (24, 40, jnp.bfloat16),
    ],
)
def test_against_fp64(act: str, n: int, k: int, dtype: jnp.dtype) -> None:
    """Whole and edge tiles; activations quantised per token and 128 inputs, or in BF16."""
    q = fp8.quantize_weight(normal(1, n, k))
    w = formats.decode_e4m3(np.asarray(q.code).view(np.uint8)).astype(np.float64)
    scale = f64(formats.decode_ue8m0(np.asarray(q.scale).view(np.uint8)))
    w *= np.kron(scale, np.ones((128, 128)))[:n, :k]
    x = normal(0, 3, k, dtype=dtype)
    wide = formats.q8(x.astype(jnp.float32), 128) if act == "fp8" else x.astype(jnp.bfloat16)
    got = fp8_linear(x, *q, act=act)
    assert got.dtype == jnp.float32
    assert_near(got, f64(wide) @ w.T, REL * (np.abs(f64(wide)) @ np.abs(w).T))


def test_groups() -> None:
    """A group is quantised on its own and meets its own rows."""
    q = fp8.quantize_weight(normal(1, 256, 128))
    x = normal(0, 5, 2, 128, dtype=jnp.bfloat16)
    w = f64(fp8.dequantize_weight(q)).reshape(2, 128, 128)
    wide = f64(formats.q8(x.astype(jnp.float32), 128))
    want = np.einsum("tgk,gnk->tgn", wide, w)
    size = np.einsum("tgk,gnk->tgn", np.abs(wide), np.abs(w))
    assert_near(fp8_linear(x, *q), want, REL * size)
