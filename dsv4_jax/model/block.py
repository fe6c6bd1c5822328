"""One layer: attention and MoE branches around the residual streams (model.md 2.3)."""

import jax
from flax import linen as nn

from dsv4_jax.cache import LayerCache
from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.model.attention import Attention
from dsv4_jax.model.hc import HyperConnection, Pending, write_back
from dsv4_jax.model.linear import RMSNorm
from dsv4_jax.model.moe import MoE
from dsv4_jax.model.step import Step
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
        self.hc_attn = HyperConnection(c, p, "fp8_w8a8" in (p.wq_a, p.wkv))
        self.attn_norm = RMSNorm(c.hidden_size, p.dense, c.rms_norm_eps)
        self.attn = Attention(c, p, self.kind)
        self.hc_ffn = HyperConnection(c, p, p.shared_expert == "fp8_w8a8")
        self.ffn_norm = RMSNorm(c.hidden_size, p.dense, c.rms_norm_eps)
        self.ffn = MoE(c, p, self.experts_form, self.hashed)

    def __call__(
        self, streams: Float[Array, "b t hc d"], cache: LayerCache, step: Step
    ) -> tuple[Float[Array, "b t hc d"], LayerCache]:
        """The streams after both branches, and the layer's new state."""
        flat = streams.reshape(-1, *streams.shape[2:])  # [b * t, hc, d]
        pending, cache = self.advance(Pending(flat, None), cache, step)
        flat = write_back(pending, config=self.config, precision=self.precision)
        return flat.reshape(streams.shape), cache

    def advance(
        self, pending: Pending, cache: LayerCache, step: Step
    ) -> tuple[Pending, LayerCache]:
        """Like ``__call__``, but leaves the last write-back to the read behind it."""
        if pending.streams.size == 0:
            return pending, cache
        with jax.named_scope("attention"):
            read = self.hc_attn(pending, self.attn_norm.weight)
            branch, cache = self.attn(read.x, read.x_fp8, cache, step)
            pending = read.pending(branch)
        with jax.named_scope("moe"):
            read = self.hc_ffn(pending, self.ffn_norm.weight)
            tokens, valid = step.tokens.reshape(-1), step.valid.reshape(-1)
            branch = self.ffn(read.x, read.x_fp8, tokens, valid)
            pending = read.pending(branch)
        return pending, cache
