"""nvfp4_linear against dequantised operands in FP64."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.nvfp4_linear import nvfp4_linear
from dsv4_jax.quant import bits, nvfp4
from reference import formats
from tests.support.numerics import assert_near, f64
from tests.support.op_cases import normal

# FP32 sums of exact products and two global scales, relative to the sum of magnitudes.
REL = 1e-6


@pytest.mark.parametrize("act", ["nvfp4", "fp8", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "k", "groups", "dtype"),
    [(40, 192, 0, jnp.bfloat16), (8, 16, 0, jnp.float32), (40, 160, 2, jnp.bfloat16)],
)
def test_against_fp64(act: str, n: int, k: int, groups: int, dtype: jnp.dtype) -> None:
    """The activation's global scale is its row's own and folds into the epilogue."""
    wide = normal(1, n, k)
    q = nvfp4.quantize(wide, nvfp4.tensor_global_scale(wide))
    w = f64(formats.decode_e2m1_packed(np.asarray(bits.e2m1_to_bytes(q.code))))
    w *= np.repeat(formats.decode_e4m3(np.asarray(q.block_scale).view(np.uint8)), 16, axis=-1)
    w *= float(q.global_scale)
    x = normal(0, *((3, groups, k) if groups else (3, k)), dtype=dtype)
    x32 = x.astype(jnp.float32)
    if act == "nvfp4":
        s2 = formats.nvfp4_token_scale(x32)
        value, scale = formats.nvfp4_quantize(x32, s2)
        a = f64(value) * np.repeat(f64(scale), 16, axis=-1) * f64(s2)
    else:
        a = f64(formats.q8(x32, 128) if act == "fp8" else x.astype(jnp.bfloat16))
    got = nvfp4_linear(x, *q, act=act)
    if groups:
        w = w.reshape(groups, n // groups, k)
        want = np.einsum("tgk,gnk->tgn", a, w)
        size = np.einsum("tgk,gnk->tgn", np.abs(a), np.abs(w))
    else:
        want, size = a @ w.T, np.abs(a) @ np.abs(w).T
    assert got.dtype == jnp.float32
    assert_near(got, want, REL * size)
