"""Compressor module: projections and what else makes entries of them (model.md 3.5)."""

import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.cache import CompressorState
from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.model.linear import RMSNorm, Weight
from dsv4_jax.model.step import Step
from dsv4_jax.ops.compressor import CompressorJob
from dsv4_jax.precision import Precision
from dsv4_jax.quant.kv import IndexRows, KvRows
from dsv4_jax.typing import Array, Float, Int32

__all__ = ["Compressor"]


class Compressor(nn.Module):
    """One entry of width ``width`` per closed window; used by the layer and by its indexer."""

    config: ModelConfig
    precision: Precision
    kind: LayerKind
    width: int

    def setup(self) -> None:
        halves = 2 if self.kind is LayerKind.CSA else 1
        shape = (halves * self.width, self.config.hidden_size)
        self.wkv = Weight(shape, self.precision.dense)
        self.wgate = Weight(shape, self.precision.dense)
        self.ape = self.param(
            "ape", nn.initializers.normal(0.02), (self.kind.value, shape[0]), jnp.float32
        )
        self.norm = RMSNorm(self.width, self.precision.dense, self.config.rms_norm_eps)

    def weights(self) -> tuple[Array, Array]:
        """Of keys and gates, whose products with ``x`` are FP32."""
        return self.wkv(), self.wgate()

    def __call__(
        self,
        kv: Float[Array, "n channels"],
        gate: Float[Array, "n channels"],
        state: CompressorState,
        pool: KvRows | IndexRows,
        step: Step,
    ) -> tuple[CompressorJob, Int32[Array, "b w"]]:
        """What `compressor` needs of this one, and the windows that close (-1: not)."""
        b, t = step.tokens.shape
        kv, gate = (y.reshape(b, t, -1) for y in (kv, gate))
        job = CompressorJob(kv, gate, self.ape, self.norm.weight, state.kv, state.gate, pool)
        return job, step.closing(self.kind.value)
