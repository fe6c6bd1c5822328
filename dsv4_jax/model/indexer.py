"""Lightning indexer module: which compressed entries a CSA layer attends to (model.md 3.5)."""

from flax import linen as nn

from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.model.compressor import Compressor
from dsv4_jax.model.linear import Linear, Weight
from dsv4_jax.model.step import Step
from dsv4_jax.ops.index_topk import index_topk
from dsv4_jax.precision import Precision
from dsv4_jax.quant.kv import IndexRows
from dsv4_jax.typing import Array, Float, Int32

__all__ = ["Indexer"]


class Indexer(nn.Module):
    """Scores the layer's closed windows by its own small keys and keeps the best ``index_topk``."""

    config: ModelConfig
    precision: Precision

    def setup(self) -> None:
        c, p = self.config, self.precision
        heads, dim = c.index_n_heads, c.index_head_dim
        self.wq_b = Linear(heads * dim, c.q_lora_rank, p.indexer_wq_b, p.regime)
        self.weights_proj = Weight((heads, c.hidden_size), p.dense)
        self.compressor = Compressor(c, p, LayerKind.CSA, dim)

    def selects(self, index: IndexRows) -> bool:
        """Whether the pool can ever hold more entries than are kept."""
        return index.key.shape[1] > self.config.index_topk

    def __call__(
        self,
        query: IndexRows,
        weight: Float[Array, "n heads"],
        index: IndexRows,
        step: Step,
    ) -> Int32[Array, "b t k"]:
        """Selected entries per query, where it `selects`.

        ``query``: the product with ``wq_b``, finished. ``weight``: that with ``weights_proj``.
        """
        b, t = step.tokens.shape
        heads, dim = self.config.index_n_heads, self.config.index_head_dim
        return index_topk(
            query,
            weight.reshape(b, t, heads),
            index,
            step.closed[LayerKind.CSA.value],
            topk=self.config.index_topk,
            rounding=self.precision.index_scores,
            weight_scale=dim**-0.5 * heads**-0.5,
        )
