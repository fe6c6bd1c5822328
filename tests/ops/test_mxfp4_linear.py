"""mxfp4_linear against dequantised operands in FP64."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.mxfp4_linear import mxfp4_linear
from dsv4_jax.quant import bits, mxfp4
from reference import formats
from tests.support.numerics import assert_near, f64
from tests.support.op_cases import normal

# FP32 sums of exact products, relative to the sum of their magnitudes.
REL = 1e-6


@pytest.mark.parametrize("act", ["fp8", "bfloat16"])
@pytest.mark.parametrize(
    ("n", "k", "groups", "dtype"),
    [(40, 192, 0, jnp.bfloat16), (8, 32, 0, jnp.float32), (40, 160, 2, jnp.bfloat16)],
)
def test_against_fp64(act: str, n: int, k: int, groups: int, dtype: jnp.dtype) -> None:
    q = mxfp4.quantize(normal(1, n, k))
    w = f64(formats.decode_e2m1_packed(np.asarray(bits.e2m1_to_bytes(q.code))))
    w *= np.repeat(f64(formats.decode_ue8m0(np.asarray(q.scale).view(np.uint8))), 32, axis=-1)
    x = normal(0, *((3, groups, k) if groups else (3, k)), dtype=dtype)
    wide = formats.q8(x.astype(jnp.float32), 128) if act == "fp8" else x.astype(jnp.bfloat16)
    wide = f64(wide)
    got = mxfp4_linear(x, *q, act=act)
    if groups:
        w = w.reshape(groups, n // groups, k)
        want = np.einsum("tgk,gnk->tgn", wide, w)
        size = np.einsum("tgk,gnk->tgn", np.abs(wide), np.abs(w))
    else:
        want, size = wide @ w.T, np.abs(wide) @ np.abs(w).T
    assert got.dtype == jnp.float32
    assert_near(got, want, REL * size)
