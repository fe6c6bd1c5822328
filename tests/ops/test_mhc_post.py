"""mhc_post against FP64; a transposed comb is told apart."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.mhc_post import mhc_post
from tests.support.numerics import assert_near, f64
from tests.support.op_cases import normal

# hc + 1 products and sums in FP32.
REL = 5e-7


@pytest.mark.parametrize("hc", [4, 2])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_against_fp64(dtype: jnp.dtype, hc: int) -> None:
    branch, streams = normal(0, 5, 48, dtype=dtype), normal(1, 5, hc, 48, dtype=dtype)
    post, comb = normal(2, 5, hc), normal(3, 5, hc, hc)

    def exact(comb: np.ndarray) -> np.ndarray:
        mixed = np.einsum("tjk,tjd->tkd", comb, f64(streams))
        return f64(post)[:, :, None] * f64(branch)[:, None] + mixed

    size = np.einsum("tjk,tjd->tkd", np.abs(f64(comb)), np.abs(f64(streams)))
    size += np.abs(f64(post))[:, :, None] * np.abs(f64(branch))[:, None]
    got = mhc_post(branch, streams, post, comb)
    assert got.dtype == dtype
    assert_near(got, exact(f64(comb)), REL * size)
    with pytest.raises(AssertionError):
        assert_near(got, exact(f64(comb).swapaxes(1, 2)), REL * size)


def test_identity_keeps_every_bit() -> None:
    streams = normal(1, 5, 4, 48, dtype=jnp.bfloat16)
    comb = jnp.broadcast_to(jnp.eye(4), (5, 4, 4))
    got = mhc_post(normal(0, 5, 48, dtype=jnp.bfloat16), streams, jnp.zeros((5, 4)), comb)
    np.testing.assert_array_equal(f64(got), f64(streams))
