"""Attention over one shared key = value head with a sink per query head (sections 3.2, 3.4)."""

from typing import Any

import jax
import jax.numpy as jnp

from reference import formats
from reference.rope import rope_tail
from reference.rounding import FP32, Rounding, bf


def key_quant(keys: jax.Array, rope_dim: int, rounding: Rounding = FP32) -> jax.Array:
    """`q8` in blocks of 64 on the channels before the rotary part of `keys [s, d]`."""
    if not rounding.kv_fp8:
        return keys
    split = keys.shape[-1] - rope_dim
    return jnp.concatenate([formats.q8(keys[:, :split], 64), keys[:, split:]], axis=-1)


def masked_attention(
    q: jax.Array, keys: jax.Array, sink: jax.Array, mask: jax.Array, rounding: Rounding = FP32
) -> jax.Array:
    """Softmax attention with a sink that enters the denominator only.

    `a_u = d^(-1/2) q_h . key_u`, `M = max_u a_u`, `e_u = exp(a_u - M)`,
    `o_h = sum_u e_u key_u / (sum_u e_u + exp(sink_h - M))`. With `bf16_probs` the numerator uses
    `bf(e_u)` and the denominator the unrounded `e_u`. Every query must see at least one key.

    Args:
        q: `[t, h, d]`.
        keys: `[s, d]`, keys and values.
        sink: `[h]`.
        mask: `[t, s]`, True where the query sees the key.
        rounding: Rounding points.

    Returns:
        `[t, h, d]`, before the inverse RoPE.
    """
    a = rounding.einsum("thd,sd->ths", q, keys) * q.shape[-1] ** -0.5
    a = jnp.where(mask[:, None, :], a, -jnp.inf)
    top = jnp.max(a, axis=-1, keepdims=True)
    e = jnp.exp(a - top)
    denominator = jnp.sum(e, axis=-1, keepdims=True) + jnp.exp(sink[:, None] - top)
    e = bf(e) if rounding.bf16_probs else e
    return rounding.bf(rounding.einsum("ths,sd->thd", e, keys) / denominator)


def stored_keys(rows: Any) -> jax.Array:
    """Keys `[..., d]` in FP32 of their parts `nope`, `scale` (E8M0 per 64 of them) and `rope`."""
    nope = rows.nope.astype(jnp.float32)
    if rows.scale is not None:
        scale = jnp.repeat(rows.scale.astype(jnp.float32), 64, axis=-1)[..., : nope.shape[-1]]
        nope = nope * scale
    return jnp.concatenate([nope, rows.rope.astype(jnp.float32)], axis=-1)


def attention(
    q: jax.Array,
    ring: Any,
    positions: jax.Array,
    sink: jax.Array,
    *,
    window: int,
    chunk: Any = None,
    start: jax.Array | None = None,
    pool: Any = None,
    n_visible: jax.Array | None = None,
    topk_idx: jax.Array | None = None,
    frequencies: jax.Array | None = None,
    regime: str | None = None,
    return_lse: bool = False,
    rounding: Rounding = FP32,
) -> Any:
    """Attention over keys as stored; every query gathers its own list of keys.

    Position `u` of the window `max(0, p - window + 1) .. p` is row `u - start` of the chunk from
    `start` on, else row `u mod s` of the ring. Then come entries `0 .. n_visible - 1` of the pool,
    or those of them that `topk_idx` names, as often as it does. Without any key the output is zero
    and the log-sum-exp the sink.

    Args:
        q: `[b, t, h, d]`.
        ring, chunk, pool: Parts `nope [b, s, dn]`, `scale [b, s, dn / 64]` or None, `rope [b, s,
            d - dn]`.
        positions: `[b, t]`; a negative one has no window.
        sink: `[h]`.
        window: Positions a query sees.
        start: `[b]`, first position of the chunk.
        n_visible: `[b, t]`.
        topk_idx: `[b, t, k]`; ids outside `0 .. n_visible - 1` are skipped.
        frequencies: Rotates the rotary channels of the output back, or None.
        return_lse: Also `M + log(denominator)`, `[b, t, h]`.
        rounding: Rounding points.
    """
    b, t, _, d = q.shape
    u = positions[..., None] - window + 1 + jnp.arange(window)  # [b, t, window]
    seen = (u >= 0) & (positions[..., None] >= 0)
    keys = _rows(stored_keys(ring), u % ring.nope.shape[1])
    if chunk is not None and start is not None:
        row = u - start[:, None, None]
        keys = jnp.where((row < 0)[..., None], keys, _rows(stored_keys(chunk), row))
        seen &= row < chunk.nope.shape[1]
    if pool is not None and n_visible is not None:
        slots = pool.nope.shape[1]
        every = jnp.broadcast_to(jnp.arange(slots), (b, t, slots))
        entry = every if topk_idx is None else topk_idx
        visible = (entry >= 0) & (entry < jnp.minimum(n_visible, slots)[..., None])
        keys = jnp.concatenate([keys, _rows(stored_keys(pool), entry)], axis=2)
        seen = jnp.concatenate([seen, visible], axis=2)
    keys = jnp.where(seen[..., None], keys, 0)

    a = rounding.einsum("bthd,btsd->bths", q.astype(jnp.float32), keys) * d**-0.5
    a = jnp.where(seen[:, :, None], a, -jnp.inf)
    top = jnp.maximum(jnp.max(a, axis=-1, initial=-jnp.inf), sink)[..., None]
    e = jnp.exp(a - top)
    denominator = jnp.sum(e, axis=-1, keepdims=True) + jnp.exp(sink[:, None] - top)
    e = bf(e) if rounding.bf16_probs else e
    o = rounding.bf(rounding.einsum("bths,btsd->bthd", e, keys) / denominator)
    if frequencies is not None:
        o = rope_tail(o, positions[:, :, None], frequencies, inverse=True, rounding=rounding)
    return (o, (top + jnp.log(denominator))[..., 0]) if return_lse else o


def _rows(keys: jax.Array, idx: jax.Array) -> jax.Array:
    """`keys [b, s, d]` at `idx [b, t, k]`, clipped: `[b, t, k, d]`."""
    clipped = jnp.clip(idx, 0, keys.shape[1] - 1)
    return keys[jnp.arange(keys.shape[0])[:, None, None], clipped]
