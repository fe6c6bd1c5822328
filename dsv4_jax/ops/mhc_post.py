"""mHC write-back of a branch output into the residual streams (model.md 2.3)."""

import jax
import jax.numpy as jnp

from dsv4_jax.ops._check import FLOATS, check_operand
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import row_tiled
from dsv4_jax.ops.mhc_pre import check_shapes
from dsv4_jax.typing import Array, Float, Float32

__all__ = ["mhc_post"]


@jax.jit
def mhc_post(
    branch: Float[Array, "t d"],
    streams: Float[Array, "t hc d"],
    post: Float32[Array, "t hc"],
    comb: Float32[Array, "t hc hc"],
) -> Float[Array, "t hc d"]:
    """``S'_k = post_k * branch + sum_j comb[j, k] * S_j``: the sum is over comb's first index.

    FP32 inside, rounded once to the streams' dtype.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: a shape disagrees with ``streams``.
    """
    check_operand("mhc_post", "streams", streams, "t hc d", FLOATS)
    t, hc, dim = streams.shape
    check_shapes(
        "mhc_post",
        streams,
        branch=(branch, (t, dim)),
        post=(post, (t, hc)),
        comb=(comb, (t, hc, hc)),
    )

    def rows(branch: Array, streams: Array, post: Array, comb: Array) -> Array:
        total = post[:, :, None] * branch[:, None, :].astype(jnp.float32)
        for j in range(hc):
            total = total + comb[:, j, :, None] * streams[:, j, None, :].astype(jnp.float32)
        return round_to(total, streams.dtype)

    return row_tiled(rows, branch, streams, post, comb)
