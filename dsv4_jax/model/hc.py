"""Hyper-connections: parameters of the reads, and what does reads and write-backs (model.md 2).

A write-back waits for the read behind it: `Pending` is what goes from branch to branch, so that a
read with the write-back before it, and the norm behind it, are one call of `mhc`, two in a layer.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.config import ModelConfig
from dsv4_jax.ops.mhc import Form, Mixed, Read, Write, mhc, mhc_takes
from dsv4_jax.ops.mhc_head import mhc_head
from dsv4_jax.ops.mhc_post import mhc_post
from dsv4_jax.ops.mhc_pre import mhc_pre
from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.precision import Precision
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.typing import Array, Float, Float32

__all__ = ["BranchRead", "HcHead", "HyperConnection", "Pending", "is_fused", "write_back"]


class Pending(NamedTuple):
    """Streams of ``n`` tokens and what is still to be written into them."""

    streams: Float[Array, "n hc d"]
    write: Write | None


class BranchRead(NamedTuple):
    """What a branch reads: normalised input, the weights of its write-back, the streams.

    ``x_fp8``: ``x`` quantised per 128 channels, if `mhc` was asked for it.
    """

    streams: Float[Array, "n hc d"]
    x: Float[Array, "n d"]
    x_fp8: Fp8 | None
    post: Float32[Array, "n hc"]
    comb: Float32[Array, "n hc hc"]

    def pending(self, branch: Float[Array, "n d"]) -> Pending:
        """With the branch's output."""
        return Pending(self.streams, Write(branch, self.post, self.comb))


def is_fused(config: ModelConfig, precision: Precision) -> bool:
    """Whether the model calls `mhc`, in every layer and before the head.

    It does where streams and norms are BF16, ``hc_mult`` is 4 and ``hidden_size`` a multiple of 128
    up to 16384: V4-Flash and V4-Pro in every preset but ``float32``. Other models run `mhc_post`,
    `mhc_pre` or `mhc_head`, and `rmsnorm` one after the other, in plain `jax.numpy`.
    """
    takes = mhc_takes(config.hc_mult, config.hidden_size)
    return takes and precision.streams == precision.dense == "bfloat16"


def mix(
    pending: Pending,
    read: Read | None,
    *,
    config: ModelConfig,
    precision: Precision,
    forms: tuple[Form, ...] = ("bfloat16",),
) -> Mixed:
    """Writes what is pending back, then reads the streams; by `mhc` where `is_fused`.

    ``forms``: of the read; where it is not fused there is one, ``x``.
    """
    streams, write = pending
    eps = {"hc_eps": config.hc_eps, "rms_eps": config.rms_norm_eps}
    iters = config.hc_sinkhorn_iters
    if is_fused(config, precision):
        settings: dict[str, Any] = {"iters": iters, "regime": precision.regime, "forms": forms}
        return mhc(streams, write, read, **settings, **eps)
    if write is not None:
        streams = mhc_post(write.branch, streams, write.post, write.comb)
    if read is None:
        return Mixed(streams, None, None, None, None, None)
    *parameters, norm = read
    if len(read.fn) == config.hc_mult:
        y, post, comb = mhc_head(streams, *parameters, **eps), None, None
    else:
        y, post, comb = mhc_pre(streams, *parameters, iters=iters, **eps)
    x = rmsnorm(y, norm, config.rms_norm_eps)
    return Mixed(streams, post, comb, x, None, None)


def write_back(
    pending: Pending, *, config: ModelConfig, precision: Precision
) -> Float[Array, "n hc d"]:
    """The streams with nothing pending."""
    if pending.write is None:
        return pending.streams
    return mix(pending, None, config=config, precision=precision).streams


class HyperConnection(nn.Module):
    """mHC read of one branch, normalised, behind the write-back before it; parameters FP32.

    ``quantised``: something in the branch reads ``x`` in FP8.
    """

    config: ModelConfig
    precision: Precision
    quantised: bool

    def setup(self) -> None:
        hc = self.config.hc_mult
        self.parameters = _parameters(self, 2 * hc + hc * hc, 3)

    def __call__(self, pending: Pending, norm: Float[Array, "d"]) -> BranchRead:
        read = Read(*self.parameters, norm)
        forms: tuple[Form, ...] = ("bfloat16", "fp8") if self.quantised else ("bfloat16",)
        got: Any = mix(pending, read, config=self.config, precision=self.precision, forms=forms)
        return BranchRead(got.streams, got.x, got.fp8, got.post, got.comb)


class HcHead(nn.Module):
    """Collapse of the streams and the final norm, behind the last write-back; parameters FP32."""

    config: ModelConfig
    precision: Precision

    def setup(self) -> None:
        self.parameters = _parameters(self, self.config.hc_mult, 1)

    def __call__(
        self, pending: Pending, norm: Float[Array, "d"]
    ) -> tuple[Float[Array, "n hc d"], Float[Array, "n d"]]:
        """The streams, and the rows that the head multiplies."""
        read = Read(*self.parameters, norm)
        got: Any = mix(pending, read, config=self.config, precision=self.precision)
        return got.streams, got.x


def _parameters(
    module: HyperConnection | HcHead, mixes: int, scales: int
) -> tuple[Array, Array, Array]:
    """``fn``, ``base`` and ``scale`` on ``module``."""
    c, init = module.config, nn.initializers
    shape = mixes, c.hc_mult * c.hidden_size
    return (
        module.param("fn", init.normal(0.02), shape, jnp.float32),
        module.param("base", init.zeros, (mixes,), jnp.float32),
        module.param("scale", init.ones, (scales,), jnp.float32),
    )
