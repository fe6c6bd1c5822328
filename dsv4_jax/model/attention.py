"""Attention module of all three layer kinds (model.md 3)."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from dsv4_jax.cache import CompressorState, LayerCache
from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.model.compressor import Compressor
from dsv4_jax.model.indexer import Indexer
from dsv4_jax.model.linear import Linear, RMSNorm, linears
from dsv4_jax.model.step import Step
from dsv4_jax.ops.attention import attention
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.compressor import CompressorJob, compressor
from dsv4_jax.ops.dense_linear import dense_linears
from dsv4_jax.ops.index_query_finish import index_query_finish
from dsv4_jax.ops.key_finish import QueryNorm, key_finish, ring_takes_first
from dsv4_jax.ops.query_finish import query_finish
from dsv4_jax.ops.rmsnorm_fp8 import rmsnorm_fp8_takes
from dsv4_jax.ops.rope import rope_frequencies
from dsv4_jax.precision import Precision
from dsv4_jax.quant import fp8
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.quant.kv import IndexRows
from dsv4_jax.typing import Array, Float

__all__ = ["Attention"]


class Attention(nn.Module):
    """Low-rank queries, one shared key = value head, window + compressed keys, grouped output."""

    config: ModelConfig
    precision: Precision
    kind: LayerKind

    def setup(self) -> None:
        c, p = self.config, self.precision
        heads, dim = c.num_attention_heads, c.head_dim
        self.attn_sink = self.param("attn_sink", nn.initializers.zeros, (heads,), jnp.float32)
        self.wq_a = Linear(c.q_lora_rank, c.hidden_size, p.wq_a, p.regime)
        self.q_norm = RMSNorm(c.q_lora_rank, p.dense, c.rms_norm_eps)
        self.wq_b = Linear(heads * dim, c.q_lora_rank, p.wq_b, p.regime)
        self.wkv = Linear(dim, c.hidden_size, p.wkv, p.regime)
        self.kv_norm = RMSNorm(dim, p.dense, c.rms_norm_eps)
        self.wo_a = Linear(c.o_groups * c.o_lora_rank, heads * dim // c.o_groups, p.wo_a, p.regime)
        self.wo_b = Linear(c.hidden_size, c.o_groups * c.o_lora_rank, p.wo_b, p.regime)
        if self.kind is not LayerKind.SWA:
            self.compressor = Compressor(c, p, self.kind, dim)
        if self.kind is LayerKind.CSA:
            self.indexer = Indexer(c, p)

    def __call__(
        self, x: Float[Array, "n dim"], x_fp8: Fp8 | None, cache: LayerCache, step: Step
    ) -> tuple[Float[Array, "n dim"], LayerCache]:
        """Branch output for the chunk's tokens (flattened rows) and the layer's new state.

        ``x_fp8``: ``x`` quantised, if it is there already (`BranchRead`).
        """
        c, p = self.config, self.precision
        b, t = step.tokens.shape
        frequencies = rope_frequencies(c, self.kind)

        low, kv = linears(x, (self.wq_a, self.wkv), x_fp8)
        low = self.wq_a(x, low)
        form = self._query_form(low)
        norm = None if form is None else QueryNorm(low, self.q_norm.weight)
        # A decode step's keys go to the ring at once: no query of it sees what they replace.
        slots = cache.window.nope.shape[1]
        first = ring_takes_first(t, slots, c.sliding_window)
        rows, window, qr = key_finish(
            self.wkv(x, kv).reshape(b, t, c.head_dim),
            self.kv_norm.weight,
            step.start,
            frequencies,
            eps=c.rms_norm_eps,
            form=p.kv,
            ring=cache.window if first else None,
            count=step.taken if first else None,
            query=norm,
            query_form=form or "fp8",
        )
        if window is not None:
            cache = dataclasses.replace(cache, window=window)

        qr = self.q_norm(low, form == "fp8", qr)
        q, index_q = self._queries(qr, cache.index, step, frequencies)

        n_visible, weight, topk_idx = None, None, None
        if self.kind is not LayerKind.SWA:
            cache, weight = self._compress(x, cache, step, frequencies)
            n_visible = step.closed[self.kind.value]
        if cache.index is not None and index_q is not None and weight is not None:
            topk_idx = self.indexer(index_q, weight, cache.index, step)

        o = attention(
            q,
            cache.window,
            step.positions,
            self.attn_sink,
            window=c.sliding_window,
            chunk=rows,
            start=step.start,
            pool=cache.pool,
            n_visible=n_visible,
            topk_idx=topk_idx,
            frequencies=frequencies,
            regime=p.regime,
        )
        if not first:
            # Read the ring, then write it: without this edge XLA may copy the ring instead.
            o, rows = lax.optimization_barrier((o, rows))
            window = cache_write(cache.window, rows, step.ring_slots(slots))
            cache = dataclasses.replace(cache, window=window)
        grouped = o.reshape(b * t, c.o_groups, -1)
        u = self.wo_a(grouped).reshape(b * t, -1)
        return self.wo_b(u), cache

    def _query_form(self, low: Float[Array, "n rank"]) -> Literal["fp8", "bfloat16"] | None:
        """What ``wq_b`` and the indexer's read: the norm goes with the keys, where it can."""
        forms = {self.precision.wq_b}
        if self.kind is LayerKind.CSA:
            forms.add(self.precision.indexer_wq_b)
        rank = low.shape[-1]
        bf16 = low.dtype == self.q_norm.weight.dtype == jnp.bfloat16
        if not bf16 or not rmsnorm_fp8_takes(rank):
            return None
        return "fp8" if forms == {"fp8_w8a8"} and rank % fp8.ACT_BLOCK == 0 else "bfloat16"

    def _queries(
        self,
        qr: Float[Array, "n rank"] | Fp8,
        index: IndexRows | None,
        step: Step,
        frequencies: np.ndarray,
    ) -> tuple[Float[Array, "b t h d"], IndexRows | None]:
        """The heads' queries, and the indexer's if it selects: one call each for both.

        If it does not, nothing reads its own, and a call of their own is eliminated.
        """
        c, p = self.config, self.precision
        shape = *step.tokens.shape, c.num_attention_heads, c.head_dim
        settings: dict[str, Any] = {"eps": c.rms_norm_eps, "rounding": p.q_norm}
        if index is None or not self.indexer.selects(index):
            if index is not None:
                self.indexer.wq_b(qr)
            q = self.wq_b(qr).reshape(shape)
            return query_finish(q, step.positions, frequencies, **settings), None
        q, index_q = linears(qr, (self.wq_b, self.indexer.wq_b))
        settings["heads"] = self.wq_b(qr, q).reshape(shape)
        index_q = self.indexer.wq_b(qr, index_q).reshape(
            *step.tokens.shape, c.index_n_heads, c.index_head_dim
        )
        rows, q = index_query_finish(
            index_q, step.positions, frequencies, form=p.index_keys, **settings
        )
        return q, rows

    def _compress(
        self, x: Float[Array, "n dim"], cache: LayerCache, step: Step, frequencies: np.ndarray
    ) -> tuple[LayerCache, Array | None]:
        """The chunk's entries in the pools, and the states after it: one call for all.

        And the heads' weights of the indexer, if it selects: a product with ``x`` like those of the
        compressors, which are one call.
        """
        weights, dtypes = list(self.compressor.weights()), [jnp.dtype(jnp.float32)] * 2
        if cache.index is not None:
            weights += self.indexer.compressor.weights()
            dtypes *= 2
            heads = self.indexer.weights_proj()
            if self.indexer.selects(cache.index):
                weights.append(heads)
                dtypes.append(x.dtype)
        kv, gate, *rest = dense_linears(
            x, weights, dtype=tuple(dtypes), regime=self.precision.regime
        )
        jobs: list[CompressorJob] = []
        if cache.state is not None and cache.pool is not None:
            jobs.append(self.compressor(kv, gate, cache.state, cache.pool, step)[0])
        if cache.index_state is not None and cache.index is not None:
            kv, gate, *rest = rest
            state = cache.index_state
            jobs.append(self.indexer.compressor(kv, gate, state, cache.index, step)[0])
        written = compressor(
            jobs,
            step.start,
            step.taken,
            frequencies,
            ratio=self.kind.value,
            eps=self.config.rms_norm_eps,
            dtype=x.dtype,
        )
        states = [CompressorState(new.kv_state, new.gate_state) for new in written]
        cache = dataclasses.replace(cache, state=states[0], pool=written[0].pool)
        if len(written) > 1:
            cache = dataclasses.replace(cache, index_state=states[1], index=written[1].pool)
        return cache, rest[0] if rest else None
