"""Hyper-connections: the parameters of the mHC read and of the head collapse (model.md 2)."""

import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.config import ModelConfig
from dsv4_jax.ops.mhc_head import mhc_head
from dsv4_jax.ops.mhc_pre import mhc_pre
from dsv4_jax.typing import Array, Float, Float32

__all__ = ["HcHead", "HyperConnection"]


class HyperConnection(nn.Module):
    """mHC read of one branch; parameters FP32."""

    config: ModelConfig

    def setup(self) -> None:
        hc, dim = self.config.hc_mult, self.config.hidden_size
        mixes = 2 * hc + hc * hc
        normal = nn.initializers.normal(0.02)
        self.fn = self.param("fn", normal, (mixes, hc * dim), jnp.float32)
        self.base = self.param("base", nn.initializers.zeros, (mixes,), jnp.float32)
        self.scale = self.param("scale", nn.initializers.ones, (3,), jnp.float32)

    def __call__(
        self, streams: Float[Array, "t hc d"]
    ) -> tuple[Float[Array, "t d"], Float32[Array, "t hc"], Float32[Array, "t hc hc"]]:
        return mhc_pre(
            streams,
            self.fn,
            self.base,
            self.scale,
            iters=self.config.hc_sinkhorn_iters,
            hc_eps=self.config.hc_eps,
            rms_eps=self.config.rms_norm_eps,
        )


class HcHead(nn.Module):
    """Collapse of the streams before the final norm; parameters FP32."""

    config: ModelConfig

    def setup(self) -> None:
        hc, dim = self.config.hc_mult, self.config.hidden_size
        normal = nn.initializers.normal(0.02)
        self.fn = self.param("fn", normal, (hc, hc * dim), jnp.float32)
        self.base = self.param("base", nn.initializers.zeros, (hc,), jnp.float32)
        self.scale = self.param("scale", nn.initializers.ones, (1,), jnp.float32)

    def __call__(self, streams: Float[Array, "t hc d"]) -> Float[Array, "t d"]:
        return mhc_head(
            streams,
            self.fn,
            self.base,
            self.scale,
            hc_eps=self.config.hc_eps,
            rms_eps=self.config.rms_norm_eps,
        )
