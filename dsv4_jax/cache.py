"""Everything that survives between steps, as typed arrays (model.md 4.1, 4.4).

Rings are position-indexed: row ``position % ring length``, lengths read off the array shapes. Pools
hold closed windows at their own index. Nothing here is cleared when a slot is reused: what a
sequence may read is decided by its length alone.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.ops._blocks import KEY_BLOCK
from dsv4_jax.precision import Precision
from dsv4_jax.quant import fp8, mxfp4
from dsv4_jax.quant.kv import IndexRows, KvRows
from dsv4_jax.typing import E2M1, E4M3, UE8M0, Array, Bool, Float32, Int32

__all__ = [
    "Cache",
    "CompressorState",
    "LayerCache",
    "MtpCache",
    "init_cache",
    "rewind",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CompressorState:
    """Projections of the last positions, FP32 ``[b, ring, c * d]``; ``gate`` includes ``ape``."""

    kv: Float32[Array, "b r cd"]
    gate: Float32[Array, "b r cd"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """State of one layer; what its kind does not have is ``None``.

    ``window``: ring of keys. ``pool``: compressed entries. ``state``: the compressor's open
    window. ``index``, ``index_state``: the same two for the indexer (CSA).
    """

    window: KvRows
    pool: KvRows | None = None
    state: CompressorState | None = None
    index: IndexRows | None = None
    index_state: CompressorState | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MtpCache:
    """The MTP module's own window ring and its own lengths (it lags the main model by one)."""

    window: KvRows
    lengths: Int32[Array, "b"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers", "lengths", "overflow", "mtp"],
    meta_fields=["max_len", "draft_tokens"],
)
@dataclasses.dataclass(frozen=True)
class Cache:
    """A batch of sequences; a pytree to pass in and get back, donated at the jit boundary.

    Attributes:
        layers: one `LayerCache` per main layer.
        lengths: tokens each row holds.
        overflow: rows that were given a token past ``max_len`` (the token was dropped).
        mtp: the MTP module's state, if asked for.
        max_len: most tokens a row can hold; static.
        draft_tokens: tokens that `rewind` can take back; static.
    """

    layers: tuple[LayerCache, ...]
    lengths: Int32[Array, "b"]
    overflow: Bool[Array, "b"]
    mtp: MtpCache | None
    max_len: int
    draft_tokens: int

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.lengths.shape[0]


def init_cache(
    config: ModelConfig,
    precision: Precision,
    batch_size: int,
    max_len: int,
    *,
    draft_tokens: int = 0,
    mtp: bool = False,
) -> Cache:
    """An empty cache; `DeepseekV4.init_cache` is the usual way here.

    Raises:
        ValueError: ``batch_size`` < 0, ``max_len`` outside ``1 .. max_position_embeddings``, or
            ``draft_tokens`` < 0.
    """
    if batch_size < 0:
        raise ValueError(f"init_cache: batch_size must be >= 0, got {batch_size}")
    if not 1 <= max_len <= config.max_position_embeddings:
        raise ValueError(
            f"init_cache: max_len must be 1..{config.max_position_embeddings} "
            f"(max_position_embeddings), got {max_len}"
        )
    if draft_tokens < 0:
        raise ValueError(f"init_cache: draft_tokens must be >= 0, got {draft_tokens}")
    return _empty(config, precision, batch_size, max_len, draft_tokens, mtp)


@functools.partial(jax.jit, static_argnums=tuple(range(6)))
def _empty(
    config: ModelConfig,
    precision: Precision,
    batch_size: int,
    max_len: int,
    draft_tokens: int,
    mtp: bool,
) -> Cache:
    """One program for all arrays: array by array a dozen would be compiled."""
    window = config.sliding_window + draft_tokens

    def keys(slots: int) -> KvRows:
        return _kv_rows(config, precision, batch_size, slots)

    layers: list[LayerCache] = []
    for layer in range(config.num_hidden_layers):
        kind = config.layer_kind(layer)
        if kind is LayerKind.SWA:
            layers.append(LayerCache(keys(window)))
            continue
        ratio, halves = kind.value, 2 if kind is LayerKind.CSA else 1
        ring = halves * ratio + draft_tokens
        capacity = _round_up(max(max_len // ratio, 1), KEY_BLOCK)
        csa = kind is LayerKind.CSA
        layers.append(
            LayerCache(
                window=keys(window),
                pool=keys(capacity),
                state=_state(batch_size, ring, halves * config.head_dim),
                index=_index_rows(config, precision, batch_size, capacity) if csa else None,
                index_state=_state(batch_size, ring, 2 * config.index_head_dim) if csa else None,
            )
        )
    lengths = jnp.zeros(batch_size, jnp.int32)
    return Cache(
        layers=tuple(layers),
        lengths=lengths,
        overflow=jnp.zeros(batch_size, bool),
        mtp=MtpCache(keys(window), jnp.zeros(batch_size, jnp.int32)) if mtp else None,
        max_len=max_len,
        draft_tokens=draft_tokens,
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _zeros(shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Zero *bytes*: a zero of dtype UE8M0 would be NaN."""
    if dtype == UE8M0:
        return lax.bitcast_convert_type(jnp.zeros(shape, jnp.uint8), UE8M0)
    return jnp.zeros(shape, dtype)


def _kv_rows(config: ModelConfig, precision: Precision, b: int, slots: int) -> KvRows:
    nope, rotary = config.nope_dim, config.qk_rope_head_dim
    if precision.kv == "fp8":
        return KvRows(
            nope=_zeros((b, slots, nope), E4M3),
            scale=_zeros((b, slots, nope // fp8.KV_BLOCK), UE8M0),
            rope=_zeros((b, slots, rotary), jnp.bfloat16),
        )
    dtype = jnp.dtype(precision.kv)
    return KvRows(_zeros((b, slots, nope), dtype), None, _zeros((b, slots, rotary), dtype))


def _index_rows(config: ModelConfig, precision: Precision, b: int, slots: int) -> IndexRows:
    dim = config.index_head_dim
    if precision.index_keys == "mxfp4":
        scale = _zeros((b, slots, dim // mxfp4.BLOCK), UE8M0)
        return IndexRows(_zeros((b, slots, dim), E2M1), scale)
    if precision.index_keys == "fp8":
        return IndexRows(_zeros((b, slots, dim), E4M3), _zeros((b, slots, 1), UE8M0))
    return IndexRows(_zeros((b, slots, dim), jnp.dtype(precision.index_keys)), None)


def _state(b: int, ring: int, width: int) -> CompressorState:
    return CompressorState(
        kv=jnp.zeros((b, ring, width), jnp.float32), gate=jnp.zeros((b, ring, width), jnp.float32)
    )


def rewind(cache: Cache, lengths: Int32[Array, "b"] | Sequence[int] | np.ndarray) -> Cache:
    """Takes tokens back: sets each row's length to ``lengths``.

    A row that gives tokens back loses its overflow flag.

    A row can lose up to ``draft_tokens`` tokens (rejected drafts), or all of them (0: the slot
    takes a new sequence). Only lengths change; entries of windows that reopen become invisible
    and are overwritten when the windows close again. The MTP module's length follows when it is
    longer; rows it computed from its own drafts go by ``rewind(cache, cache.lengths)`` before the
    true streams of those positions are appended.

    Raises:
        TypeError: lengths are not integers.
        ValueError: the shape is wrong or, when both sides are known on the host, a length grows
            or loses more than ``draft_tokens``. Inside `jax.jit` lengths that grow are clamped.
    """
    new = jnp.asarray(lengths)
    if not jnp.issubdtype(new.dtype, jnp.integer):
        raise TypeError(f"rewind: lengths must be integers, got {new.dtype}")
    new = new.astype(jnp.int32)
    if new.shape != cache.lengths.shape:
        raise ValueError(
            f"rewind: lengths must be {list(cache.lengths.shape)}, got {list(new.shape)}"
        )
    if not isinstance(new, Tracer) and not isinstance(cache.lengths, Tracer):
        before, after = np.asarray(cache.lengths), np.asarray(new)
        lost = before - after
        bad = (after < 0) | (lost < 0) | ((lost > cache.draft_tokens) & (after != 0))
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise ValueError(
                f"rewind: row {row} holds {before[row]} tokens and can go back to "
                f"{max(before[row] - cache.draft_tokens, 0)}..{before[row]} or 0 "
                f"(draft_tokens={cache.draft_tokens}), got {after[row]}"
            )
    new = jnp.clip(new, 0, cache.lengths)
    mtp = cache.mtp
    if mtp is not None:
        mtp = dataclasses.replace(mtp, lengths=jnp.minimum(mtp.lengths, new))
    # A copy: the caller may donate the result while the old cache still holds `lengths`.
    return dataclasses.replace(
        cache, lengths=new, overflow=cache.overflow & (new == cache.lengths), mtp=mtp
    )
