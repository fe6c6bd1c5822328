"""mhc_head against FP64."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.mhc_head import mhc_head
from tests.support.numerics import assert_near, f64
from tests.support.op_cases import normal

EPS = 1e-6
# See test_mhc_pre.
MIX_REL = 4e-6


@pytest.mark.parametrize("hc", [4, 2])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_against_fp64(dtype: jnp.dtype, hc: int) -> None:
    streams = normal(0, 5, hc, 48, dtype=dtype)
    fn, base, scale = normal(1, hc, hc * 48, scale=0.2), normal(2, hc), jnp.array([0.7])
    got = mhc_head(streams, fn, base, scale, hc_eps=EPS, rms_eps=EPS)
    wide = f64(streams)
    flat = wide.reshape(5, -1)
    mix = flat @ f64(fn).T / np.sqrt(np.mean(flat * flat, axis=-1, keepdims=True) + EPS)
    pre = 1 / (1 + np.exp(-(mix * f64(scale) + f64(base)))) + EPS
    assert got.dtype == dtype
    assert_near(got, np.einsum("tj,tjd->td", pre, wide), MIX_REL * np.abs(wide).sum(axis=1))
