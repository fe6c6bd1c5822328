"""Write-back, read, norm and quantisation of hyper-connections (model.md 2.2-2.4, 4.5, 9.2)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from reference.formats import nvfp4_quantize, nvfp4_token_scale, q8
from reference.mhc_head import mhc_head
from reference.mhc_post import mhc_post
from reference.mhc_pre import mhc_pre
from reference.rmsnorm import rmsnorm
from reference.rounding import OFFICIAL, Rounding


class Mixed(NamedTuple):
    """`nvfp4`: E2M1 values, E4M3 values, a scale per token; `fp8`: what it decodes to."""

    streams: jax.Array
    post: jax.Array | None
    comb: jax.Array | None
    x: jax.Array | None
    nvfp4: tuple[jax.Array, jax.Array, jax.Array] | None
    fp8: jax.Array | None


def mhc(
    streams: jax.Array,
    write: Any,
    read: Any,
    global_scale: jax.Array | None = None,
    *,
    iters: int,
    hc_eps: float,
    rms_eps: float,
    forms: tuple[str, ...] = ("bfloat16",),
    regime: str | None = None,
    rounding: Rounding = OFFICIAL,
) -> Mixed:
    """One step after the other, each on its own.

    Args:
        streams: `[t, hc, dim]`.
        write: `branch [t, dim]`, `post [t, hc]`, `comb [t, hc, hc]`, or nothing.
        read: `fn`, `base`, `scale` of `mhc_pre` or `mhc_head`, and `norm [dim]`; or nothing.
        global_scale: of NVFP4; each token's own `max|x| / (6 * 448)` without.
        iters: See `mhc_pre`.
        hc_eps: See `mhc_pre`.
        rms_eps: Added to every mean square.
        forms: Of `x`.
        regime: Of the op's kernels; nothing here.
        rounding: Of the streams, of `y` and of `x`.
    """
    if write is not None:
        branch, post, comb = write
        streams = mhc_post(branch, streams, post, comb, rounding)
    if read is None:
        return Mixed(streams, None, None, None, None, None)
    *parameters, norm = read
    eps = {"hc_eps": hc_eps, "rms_eps": rms_eps}
    if parameters[2].shape == (1,):
        y, post, comb = mhc_head(streams, *parameters, **eps, rounding=rounding), None, None
    else:
        y, post, comb = mhc_pre(streams, *parameters, iters=iters, **eps, rounding=rounding)
    x = rmsnorm(y, norm, rms_eps, rounding)
    s2 = nvfp4_token_scale(x)
    if global_scale is not None:
        s2 = jnp.broadcast_to(global_scale, s2.shape)
    nvfp4 = (*nvfp4_quantize(x, s2), s2[..., 0])
    return Mixed(
        *(streams, post, comb),
        x if "bfloat16" in forms else None,
        nvfp4 if "nvfp4" in forms else None,
        q8(x, 128) if "fp8" in forms else None,
    )
