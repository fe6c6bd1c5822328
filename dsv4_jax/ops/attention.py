"""Attention over keys as they are stored, one softmax with a sink (model.md 3.4)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import library
from dsv4_jax.ops._attention_jax import attention_jax
from dsv4_jax.ops._blocks import KEY_BLOCK
from dsv4_jax.ops._check import FLOAT32, FLOATS, INTEGERS, check_choice, check_operand
from dsv4_jax.ops._linear import REGIMES
from dsv4_jax.precision import Regime
from dsv4_jax.quant import fp8
from dsv4_jax.quant.kv import KvRows
from dsv4_jax.typing import E4M3, UE8M0, Array, Float, Float32, Int32

__all__ = ["attention"]

STORED = (jnp.dtype(E4M3), *FLOATS)
MAX_WIDTH = 2048
"""``kAttentionMaxWidth`` of ffi/attention/attention.h."""
_INT32 = jnp.iinfo(jnp.int32)


@functools.partial(jax.jit, static_argnames=("window", "regime", "return_lse"))
def attention(
    q: Float[Array, "b t h d"],
    ring: KvRows,
    positions: Int32[Array, "b t"],
    sink: Float32[Array, "h"],
    *,
    window: int,
    chunk: KvRows | None = None,
    start: Int32[Array, "b"] | None = None,
    pool: KvRows | None = None,
    n_visible: Int32[Array, "b t"] | None = None,
    topk_idx: Int32[Array, "b t k"] | None = None,
    frequencies: Float32[Array, "f"] | np.ndarray | None = None,
    regime: Regime | None = None,
    return_lse: bool = False,
) -> Float[Array, "b t h d"] | tuple[Float[Array, "b t h d"], Float32[Array, "b t h"]]:
    """``o = sum_u e_u key_u / (sum_u e_u + exp(sink - M))``, keys = values.

    ``a_u = d^(-1/2) q . key_u`` in FP32, ``M`` the largest ``a_u`` or the sink, ``e_u = exp(a_u -
    M)``; ``e_u`` is rounded to ``q``'s dtype for the value product, the denominator sums the
    unrounded values. The query at position ``p`` sees the keys of positions ``max(0, p - window +
    1) .. p`` and its entries of ``pool``. Without any key ``o`` is zero and the log-sum-exp is the
    sink. Slots that no query sees may hold anything. A query depends on no other.

    BF16 queries over keys with E4M3 codes (in multiples of 64, an even rotary part, up to 2048
    channels) are one foreign call that reads the keys as they are stored; other dtypes and sizes
    are `jax.numpy`. No gradient. Under `jax.vmap` a call per element. Arrays on several devices are
    gathered unless the call is inside `jax.shard_map`.

    Args:
        ring: keys ``[b, s, ...]`` of earlier positions, position ``p`` in slot ``p % s``: at least
            ``window - 1`` with a chunk; without one ``window + t - 1``, all positions being here.
        positions: absolute positions of the queries; a negative one has no window.
        chunk: keys ``[b, n, ...]`` of positions ``start .. start + n - 1``, which the ring need not
            hold; positions beyond have no key.
        start: first position of the chunk, of every row.
        pool: compressed entries ``[b, s, ...]``; ``s`` a multiple of 128 in `jax.numpy`.
        n_visible: entries ``0 .. n - 1`` visible to each query.
        topk_idx: when given, only these entries (-1 and ids that are not visible are skipped; one
            that is given twice counts twice).
        frequencies: ``[rotary / 2]``: ``o`` is rounded and its rotary channels are then rotated
            back by the query's position, as by `rope` with ``inverse``.
        regime: of the kernel on a GPU (`Precision`); ``None``: by the number of queries. A query
            has the same bits in every call of one regime. Without effect on the CPU, where it has
            them in every call.
        return_lse: whether to return ``M + log(the denominator)`` too.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, operands that belong together are not given together, the ring
            is too short, or ``window`` or ``regime`` is not possible.
    """
    check_choice("attention", "regime", regime, tuple(REGIMES))
    check_operand("attention", "q", q, "b t h d", FLOATS)
    check_operand("attention", "positions", positions, "b t", INTEGERS)
    check_operand("attention", "sink", sink, "h", FLOAT32)
    b, t, heads, dim = q.shape
    _check_shape("positions", positions, (b, t), q)
    _check_shape("sink", sink, (heads,), q)
    if not 1 <= window <= _INT32.max:
        raise ValueError(f"attention: window must be 1..{_INT32.max}, got {window}")
    if (chunk is None) != (start is None):
        raise ValueError("attention: chunk and start must be given together")
    if (pool is None) != (n_visible is None) or (pool is None and topk_idx is not None):
        raise ValueError("attention: pool must come with n_visible, and topk_idx with pool")
    stores = {"ring": ring, "chunk": chunk, "pool": pool}
    for name, rows in stores.items():
        if rows is not None:
            _check_rows(name, rows, ring, q)
    least = window - 1 + (t if chunk is None else 0)
    if t > 0 and ring.nope.shape[1] < least:
        raise ValueError(
            f"attention: ring must have at least {least} slots for {t} tokens and window {window} "
            f"{'without' if chunk is None else 'with'} a chunk, got {ring.nope.shape[1]}"
        )
    if start is not None:
        check_operand("attention", "start", start, "b", INTEGERS)
        _check_shape("start", start, (b,), q)
    if n_visible is not None:
        check_operand("attention", "n_visible", n_visible, "b t", INTEGERS)
        _check_shape("n_visible", n_visible, (b, t), q)
    if topk_idx is not None:
        check_operand("attention", "topk_idx", topk_idx, "b t k", INTEGERS)
        _check_shape("topk_idx", topk_idx, (b, t, topk_idx.shape[2]), q)
    rotary = ring.rope.shape[2]
    if frequencies is not None:
        frequencies = jnp.asarray(frequencies)
        check_operand("attention", "frequencies", frequencies, "f", FLOAT32)
        if 2 * frequencies.shape[0] != rotary:
            raise ValueError(
                f"attention: frequencies must be half of the {rotary} rotary channels, "
                f"got {list(frequencies.shape)}"
            )

    positions = _int32(positions)
    start, n_visible, topk_idx = (
        None if x is None else _int32(x) for x in (start, n_visible, topk_idx)
    )
    served = ring.nope.shape[2] % fp8.KV_BLOCK == 0 and rotary % 2 == 0 and dim <= MAX_WIDTH
    if q.dtype != jnp.bfloat16 or ring.scale is None or not served:
        if pool is not None and pool.nope.shape[1] % KEY_BLOCK:
            raise ValueError(
                f"attention: pool must hold a multiple of {KEY_BLOCK} entries where there is no "
                f"kernel, got {pool.nope.shape[1]}"
            )
        o, lse = attention_jax(
            q,
            ring,
            positions,
            sink,
            window=window,
            chunk=chunk,
            start=start,
            pool=pool,
            n_visible=n_visible,
            topk_idx=topk_idx,
            frequencies=frequencies,
        )
    else:
        optional = (start, pool, n_visible, topk_idx, frequencies)
        o, lse = library.call(
            "attention",
            [
                jax.ShapeDtypeStruct(q.shape, q.dtype),
                jax.ShapeDtypeStruct((b, t, heads), jnp.float32),
            ],
            *(q, positions, sink),
            *jax.tree.leaves((ring, chunk, *optional)),
            window=np.int32(window),
            regime=np.int32(REGIMES[regime]),
            has_chunk=np.int32(chunk is not None),
            has_pool=np.int32(pool is not None),
            has_topk=np.int32(topk_idx is not None),
            has_frequencies=np.int32(frequencies is not None),
        )
    return (o, lse) if return_lse else o


def _int32(x: Array) -> Array:
    """Saturates instead of wrapping round onto a key."""
    if x.dtype == jnp.int32:
        return x
    return jnp.clip(x, _INT32.min, _INT32.max).astype(jnp.int32)


def _check_shape(name: str, x: Array, want: tuple[int, ...], q: Array) -> None:
    if x.shape != want:
        raise ValueError(
            f"attention: {name} must be {list(want)} for q {list(q.shape)}, got {list(x.shape)}"
        )


def _check_rows(name: str, rows: KvRows, ring: KvRows, q: Array) -> None:
    """Dtypes and sizes of one store, its formats those of the ring."""
    same = None if name == "ring" else ring
    accepted = STORED if same is None else (same.nope.dtype,)
    check_operand("attention", f"{name} nope", rows.nope, "b s dn", accepted)
    check_operand("attention", f"{name} rope", rows.rope, "b s dr", FLOATS)
    b, dim = q.shape[0], q.shape[3]
    slots, nope = rows.nope.shape[1:]
    fits = nope <= dim and (same is None or nope == same.nope.shape[2])
    if rows.nope.shape[0] != b or rows.rope.shape != (b, slots, dim - nope) or not fits:
        raise ValueError(
            f"attention: {name} must be [{b}, s, ...] with {dim} channels for q {list(q.shape)}"
            f"{'' if same is None else f', {same.nope.shape[2]} of them nope'}, "
            f"got {list(rows.nope.shape)} and {list(rows.rope.shape)}"
        )
    if (rows.scale is not None) != (rows.nope.dtype == E4M3):
        raise ValueError(
            f"attention: {name} must have a scale with float8_e4m3fn and with nothing else, got "
            f"{'none' if rows.scale is None else 'one'} with {rows.nope.dtype}"
        )
    if rows.scale is None:
        return
    check_operand("attention", f"{name} rope", rows.rope, "b s dr", (jnp.dtype(jnp.bfloat16),))
    check_operand("attention", f"{name} scale", rows.scale, "b s n", (jnp.dtype(UE8M0),))
    want = (b, slots, -(-nope // fp8.KV_BLOCK))
    if rows.scale.shape != want:
        raise ValueError(
            f"attention: {name} scale must be {list(want)} for {nope} channels, "
            f"got {list(rows.scale.shape)}"
        )
