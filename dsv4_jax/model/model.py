"""The whole model as one functional Linen module over an explicit cache."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax import cache as cache_lib
from dsv4_jax.cache import Cache, LayerCache, MtpCache
from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.model.block import Block
from dsv4_jax.model.hc import HcHead, Pending, write_back
from dsv4_jax.model.linear import RMSNorm, Weight
from dsv4_jax.model.mtp import MtpModule
from dsv4_jax.model.step import Step, check_tokens, make_step
from dsv4_jax.ops.dense_linear import dense_linear
from dsv4_jax.precision import Precision
from dsv4_jax.typing import Array, Float, Float32, Int32

__all__ = ["DeepseekV4"]


class DeepseekV4(nn.Module):
    """DeepSeek-V4 over a cache that is passed in and returned.

    Every call *appends*: row ``i`` takes its first ``num_tokens[i]`` tokens (right padding, 0
    allowed) at its own length, which the cache holds, so prefill, chunked prefill and decode are
    one function. Pure; nothing but shapes causes a recompilation. Layers are unrolled. Where
    streams and norms are BF16 and the sizes are the release's, hyper-connections and the norms
    behind them are the foreign call `mhc`, else plain `jax.numpy`; `model.hc.is_fused` tells which.

    Attributes:
        config: the architecture.
        precision: the number formats; parameters are declared in them.
        mtp: whether the multi-token-prediction module belongs to the parameters.
    """

    config: ModelConfig
    precision: Precision = Precision()
    mtp: bool = False

    def setup(self) -> None:
        c, p = self.config, self.precision
        self.embed = Weight((c.vocab_size, c.hidden_size), p.dense)
        self.layers = [
            Block(c, p, c.layer_kind(i), c.is_hash_layer(i), p.experts)
            for i in range(c.num_hidden_layers)
        ]
        self.hc_head = HcHead(c, p)
        self.norm = RMSNorm(c.hidden_size, p.dense, c.rms_norm_eps)
        self.head = Weight((c.vocab_size, c.hidden_size), p.dense)
        if self.mtp:
            self.mtp_0 = MtpModule(c, p, LayerKind.SWA, False, p.mtp_experts)

    def init_cache(self, batch_size: int, max_len: int, *, draft_tokens: int = 0) -> Cache:
        """An empty cache for ``batch_size`` rows of up to ``max_len`` tokens each.

        Args:
            draft_tokens: tokens that `rewind` can take back later (longer rings).

        Raises:
            ValueError: a size is out of range.
        """
        return cache_lib.init_cache(
            self.config,
            self.precision,
            batch_size,
            max_len,
            draft_tokens=draft_tokens,
            mtp=self.mtp,
        )

    def __call__(
        self,
        tokens: Int32[Array, "b t"],
        cache: Cache,
        *,
        num_tokens: Int32[Array, "b"] | None = None,
        logits: Literal["all", "last"] = "all",
    ) -> tuple[Float32[Array, "b *t v"], Cache]:
        """Appends tokens and predicts the next ones.

        Args:
            tokens: ids, right-padded.
            num_tokens: how many of them each row takes; all when ``None``.
            logits: ``"all"``: ``[b, t, vocab]``, zeros at padding; ``"last"``: ``[b, vocab]`` at
                each row's last taken token, zeros for a row that took none.

        Returns:
            FP32 logits and the new cache. A token past ``max_len`` is dropped like padding and
            sets the row's ``overflow`` flag; other rows are untouched.

        Raises:
            ValueError: shapes disagree or ``logits`` is not one of the two words.
            TypeError: ids or counts are not integers.
        """
        if logits not in ("all", "last"):
            raise ValueError(f"logits must be 'all' or 'last', got {logits!r}")
        pending, step, cache = self._advance(tokens, cache, num_tokens)
        b, t = step.tokens.shape
        if self.is_initializing() and self.mtp:
            self.draft(self._written(pending, b, t), tokens, cache)
        if b * t == 0:
            shape = (b,) if logits == "last" else (b, t)
            return jnp.zeros((*shape, self.config.vocab_size), jnp.float32), cache
        if logits == "last":
            if t > 1:
                last = jnp.arange(b) * t + jnp.maximum(step.taken - 1, 0)
                pending = jax.tree.map(lambda x: jnp.take(x, last, 0, mode="clip"), pending)
            out = self._head(pending)
            return jnp.where((step.taken > 0)[:, None], out, 0), cache
        out = self._head(pending).reshape(b, t, -1)
        return jnp.where(step.valid[..., None], out, 0), cache

    def streams(
        self,
        tokens: Int32[Array, "b t"],
        cache: Cache,
        *,
        num_tokens: Int32[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b t hc d"], Cache]:
        """Like ``__call__``, but returns the streams after the last layer (what `draft` takes)."""
        pending, step, cache = self._advance(tokens, cache, num_tokens)
        return self._written(pending, *step.tokens.shape), cache

    def layer(
        self,
        streams: Float[Array, "b t hc d"],
        tokens: Int32[Array, "b t"],
        cache: Cache,
        *,
        layer: int,
        num_tokens: Int32[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b t hc d"], Cache]:
        """One layer on given streams; writes that layer's state only and advances no lengths.

        Raises:
            ValueError: no such layer, or shapes disagree.
        """
        if not 0 <= layer < self.config.num_hidden_layers:
            raise ValueError(f"layer must be 0..{self.config.num_hidden_layers - 1}, got {layer}")
        step, _ = self._step(tokens, cache, num_tokens, cache.lengths)
        self._check_streams(streams, tokens)
        streams, state = self.layers[layer](streams, cache.layers[layer], step)
        layers = (*cache.layers[:layer], state, *cache.layers[layer + 1 :])
        return streams, dataclasses.replace(cache, layers=layers)

    def embed_tokens(self, tokens: Int32[Array, "b t"]) -> Float[Array, "b t hc d"]:
        """The streams before the first layer: the token's embedding row in each of them."""
        b, t = tokens.shape
        rows = self._embed(tokens).reshape(b, t, 1, self.config.hidden_size)
        return jnp.broadcast_to(rows, (b, t, self.config.hc_mult, self.config.hidden_size))

    def head_logits(self, streams: Float[Array, "b t hc d"]) -> Float32[Array, "b t v"]:
        """Logits of every position from its streams after the last layer (model.md 6.1)."""
        b, t = streams.shape[:2]
        pending = Pending(streams.reshape(b * t, *streams.shape[2:]), None)
        return self._head(pending).reshape(b, t, -1)

    def draft(
        self,
        streams: Float[Array, "b t hc d"],
        next_tokens: Int32[Array, "b t"],
        cache: Cache,
        *,
        num_tokens: Int32[Array, "b"] | None = None,
    ) -> tuple[Float32[Array, "b t v"], Float[Array, "b t hc d"], Cache]:
        """The MTP module on positions it has not seen yet (model.md 6.2).

        Args:
            streams: main streams after the last layer at those positions.
            next_tokens: the token *after* each position.

        Returns:
            Logits of the token after ``next_tokens``, the module's streams (feed them back as
            ``streams`` for a further draft), and the cache with ``cache.mtp`` advanced.

        Raises:
            ValueError: the model or the cache has no MTP module, or shapes disagree.
        """
        if not self.mtp or cache.mtp is None:
            raise ValueError("draft: the model and the cache must be made with mtp=True")
        step, overflow = self._step(next_tokens, cache, num_tokens, cache.mtp.lengths)
        self._check_streams(streams, next_tokens)
        embedded = self._embed(step.tokens)
        state = LayerCache(window=cache.mtp.window)
        streams, hidden, state = self.mtp_0.predict(streams, embedded, state, step)
        out = dense_linear(hidden, self.head(), regime=self.precision.regime).reshape(
            *next_tokens.shape, -1
        )
        mtp = MtpCache(state.window, cache.mtp.lengths + step.taken)
        out = jnp.where(step.valid[..., None], out, 0)
        cache = dataclasses.replace(cache, mtp=mtp, overflow=cache.overflow | overflow)
        return out, streams, cache

    def _step(
        self, tokens: Array, cache: Cache, num_tokens: Array | None, start: Array
    ) -> tuple[Step, Array]:
        tokens = jnp.asarray(tokens)
        num_tokens = check_tokens(tokens, cache, num_tokens)
        return make_step(tokens.astype(jnp.int32), start, num_tokens, cache.max_len)

    def _check_streams(self, streams: Array, tokens: Array) -> None:
        want = (*tokens.shape, self.config.hc_mult, self.config.hidden_size)
        if streams.shape != want:
            raise ValueError(f"streams must be {list(want)}, got {list(streams.shape)}")
        if streams.dtype != jnp.dtype(self.precision.streams):
            raise TypeError(f"streams must be {self.precision.streams}, got {streams.dtype}")

    def _embed(self, tokens: Int32[Array, "b t"]) -> Float[Array, "n d"]:
        rows = jnp.take(self.embed(), tokens.reshape(-1), axis=0, mode="clip")
        return rows.astype(jnp.dtype(self.precision.streams))

    def _advance(
        self, tokens: Array, cache: Cache, num_tokens: Array | None
    ) -> tuple[Pending, Step, Cache]:
        step, overflow = self._step(tokens, cache, num_tokens, cache.lengths)
        streams = self.embed_tokens(step.tokens)
        pending = Pending(streams.reshape(-1, *streams.shape[2:]), None)
        states: list[LayerCache] = []
        for i, block in enumerate(self.layers):
            with jax.named_scope(f"layer_{i}"):
                if self.is_mutable_collection("intermediates"):  # every layer's streams are kept
                    streams, state = block(streams, cache.layers[i], step)
                    self.sow("intermediates", f"streams_{i}", streams)
                    pending = Pending(streams.reshape(pending.streams.shape), None)
                else:
                    pending, state = block.advance(pending, cache.layers[i], step)
            states.append(state)
        cache = dataclasses.replace(
            cache,
            layers=tuple(states),
            lengths=cache.lengths + step.taken,
            overflow=cache.overflow | overflow,
        )
        return pending, step, cache

    def _written(self, pending: Pending, b: int, t: int) -> Float[Array, "b t hc d"]:
        streams = write_back(pending, config=self.config, precision=self.precision)
        return streams.reshape(b, t, *streams.shape[1:])

    def _head(self, pending: Pending) -> Float32[Array, "n v"]:
        _, x = self.hc_head(pending, self.norm.weight)
        return dense_linear(x, self.head(), regime=self.precision.regime)
