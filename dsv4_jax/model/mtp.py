"""Multi-token-prediction module (model.md 6.2)."""

import jax.numpy as jnp

from dsv4_jax.cache import LayerCache
from dsv4_jax.model.block import Block
from dsv4_jax.model.hc import HcHead, Pending
from dsv4_jax.model.linear import Linear, RMSNorm
from dsv4_jax.model.step import Step
from dsv4_jax.ops._round import round_to
from dsv4_jax.typing import Array, Float

__all__ = ["MtpModule"]


class MtpModule(Block):
    """A sliding-window layer whose input mixes the next token's embedding into the streams."""

    def setup(self) -> None:
        super().setup()
        c, p = self.config, self.precision
        self.e_proj = Linear(c.hidden_size, c.hidden_size, p.mtp_proj, p.regime)
        self.h_proj = Linear(c.hidden_size, c.hidden_size, p.mtp_proj, p.regime)
        self.enorm = RMSNorm(c.hidden_size, p.dense, c.rms_norm_eps)
        self.hnorm = RMSNorm(c.hidden_size, p.dense, c.rms_norm_eps)
        self.norm = RMSNorm(c.hidden_size, p.dense, c.rms_norm_eps)
        self.hc_head = HcHead(c, p)

    def predict(
        self,
        streams: Float[Array, "b t hc d"],
        embedded: Float[Array, "n d"],
        cache: LayerCache,
        step: Step,
    ) -> tuple[Float[Array, "b t hc d"], Float[Array, "n d"], LayerCache]:
        """New streams, the normalised hidden rows for the head, and the module's window.

        Args:
            streams: main streams ``S_i`` after the last layer.
            embedded: embedding rows of the *next* tokens ``x_{i+1}``.
        """
        b, t, hc, dim = streams.shape
        e = self.e_proj(self.enorm(embedded)).astype(jnp.float32)  # [b * t, d]
        h = self.h_proj(self.hnorm(streams.reshape(-1, dim))).astype(jnp.float32)
        mixed = round_to(e[:, None] + h.reshape(b * t, hc, dim), streams.dtype)
        pending, cache = self.advance(Pending(mixed, None), cache, step)
        new, hidden = self.hc_head(pending, self.norm.weight)
        return new.reshape(streams.shape), hidden, cache
