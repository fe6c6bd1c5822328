"""One layer: attention and MoE branches around the residual streams (model.md 2.3)."""

import jax
from flax import linen as nn

from dsv4_jax.cache import LayerCache
from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.model.attention import Attention
from dsv4_jax.model.hc import HyperConnection
from dsv4_jax.model.linear import RMSNorm
from dsv4_jax.model.moe import MoE
from dsv4_jax.model.step import Step
from dsv4_jax.ops.mhc_post import mhc_post
from dsv4_jax.precision import LinearFormat, Precision
from dsv4_jax.typing import Array, Float

__all__ = ["Block"]


class Block(nn.Module):
    """A main layer, or the layer inside the MTP module."""

    config: ModelConfig
    precision: Precision
    kind: LayerKind
    hashed: bool
    experts_form: LinearFormat

    def setup(self) -> None:
        c, p = self.config, self.precision
        self.hc_attn = HyperConnection(c)
        self.attn_norm = RMSNorm(c.hidden_size, p.dense, c.rms_norm_eps)
        self.attn = Attention(c, p, self.kind)
        self.hc_ffn = HyperConnection(c)
        self.ffn_norm = RMSNorm(c.hidden_size, p.dense, c.rms_norm_eps)
        self.ffn = MoE(c, p, self.experts_form, self.hashed)

    def __call__(
        self, streams: Float[Array, "b t hc d"], cache: LayerCache, step: Step
    ) -> tuple[Float[Array, "b t hc d"], LayerCache]:
        if streams.size == 0:
            return streams, cache
        flat = streams.reshape(-1, *streams.shape[2:])  # [b * t, hc, d]
        with jax.named_scope("attention"):
            y, post, comb = self.hc_attn(flat)
            branch, cache = self.attn(self.attn_norm(y), cache, step)
            flat = mhc_post(branch, flat, post, comb)
        with jax.named_scope("moe"):
            y, post, comb = self.hc_ffn(flat)
            branch = self.ffn(self.ffn_norm(y), step.tokens.reshape(-1), step.valid.reshape(-1))
            flat = mhc_post(branch, flat, post, comb)
        return flat.reshape(streams.shape), cache
