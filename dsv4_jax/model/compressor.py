"""Compressor module: projections, open-window state, entries that close (model.md 3.5)."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dsv4_jax.cache import CompressorState
from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.model.linear import RMSNorm, Weight
from dsv4_jax.model.step import Step
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.compressor import compressor
from dsv4_jax.ops.dense_linear import dense_linears
from dsv4_jax.ops.rope import rope
from dsv4_jax.precision import Precision
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

    def __call__(
        self, x: Float[Array, "n dim"], state: CompressorState, step: Step, frequencies: np.ndarray
    ) -> tuple[Float[Array, "b w d"], Int32[Array, "b w"], CompressorState]:
        """Entries in ``x``'s dtype, their pool slots (-1: not closed) and the new state."""
        b, t = step.tokens.shape
        ratio = self.kind.value
        weights = self.wkv(), self.wgate()
        kv, gate = (
            y.reshape(b, t, -1) for y in dense_linears(x, weights, regime=self.precision.regime)
        )
        gate = gate + self.ape[step.positions % ratio]
        entry, window, closed = compressor(
            kv, gate, state.kv, state.gate, step.start, step.taken, ratio=ratio
        )
        # Read the ring, then write it: without this edge XLA may copy the ring instead.
        entry, rows = lax.optimization_barrier((entry, CompressorState(kv, gate)))
        state = cache_write(state, rows, step.ring_slots(state.kv.shape[1]))
        entry = rope(self.norm(round_to(entry, x.dtype)), window * ratio, frequencies)
        return entry, jnp.where(closed, window, -1), state
