"""Lightning indexer: scores of compressed entries and the exact set of the best (model.md 3.5)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import library
from dsv4_jax.ops._blocks import KEY_BLOCK
from dsv4_jax.ops._check import FLOATS, INTEGERS, check_choice, check_operand
from dsv4_jax.ops._index_topk_jax import index_scores_jax, index_topk_jax
from dsv4_jax.ops._round import round_to
from dsv4_jax.quant import mxfp4
from dsv4_jax.quant.kv import IndexRows
from dsv4_jax.typing import E2M1, E4M3, UE8M0, Array, Float, Float32, Int32

__all__ = ["index_topk"]

STORED = (jnp.dtype(E2M1), jnp.dtype(E4M3), *FLOATS)
MAX_WIDTH = 1024
"""``kIndexTopkMaxWidth`` of ffi/index_topk/index_topk.h."""
SCRATCH_BUDGET = 68 << 20
"""``kIndexTopkScratchBudget``: bytes that a call on a GPU keeps scores in, one query's at least."""
GROUP = 16
"""``kIndexTopkGroup``: entries whose largest score is kept as well."""
_INT32 = jnp.iinfo(jnp.int32)


@functools.partial(jax.jit, static_argnames=("topk", "rounding", "return_scores", "weight_scale"))
def index_topk(
    q: IndexRows,
    weight: Float[Array, "b t h"],
    keys: IndexRows,
    n_visible: Int32[Array, "b t"],
    *,
    topk: int,
    rounding: Literal["float32", "bfloat16"] = "float32",
    return_scores: bool = False,
    weight_scale: float = 1.0,
) -> Int32[Array, "b t k"] | tuple[Int32[Array, "b t k"], Float32[Array, "b t s"]]:
    """Ids of the ``min(topk, n_visible)`` largest scores, ascending, then -1.

    ``score_w = sum_h round(weight_h * weight_scale) * relu(q_h . key_w)``, rounded to ``weight``'s
    dtype, sums in FP32. The set is exact: equal scores go to the lower id, -0 equals 0, NaN is
    below every number and -inf a number above it. The last axis is ``min(topk, capacity)``. Entries
    that are not visible may hold anything. A query depends on no other.

    Queries and keys in E2M1 or E4M3 with up to 1024 channels are one foreign call that reads both
    as they are stored and keeps no scores of all queries; other dtypes and ``bfloat16`` rounding
    are `jax.numpy`. No gradient. Under `jax.vmap` a call per element. Arrays on several devices are
    gathered unless the call is inside `jax.shard_map`.

    Args:
        q: stored indexer queries ``[b, t, h, ...]``.
        keys: stored indexer keys ``[b, s, ...]`` in the same format; ``s`` a multiple of 128 in
            `jax.numpy`.
        n_visible: entries ``0 .. n - 1`` visible to each query; more than ``s`` count as ``s``.
        rounding: ``bfloat16`` rounds the product, each head's term and the sum as the official
            code does; for comparison with it only.
        return_scores: whether to return the scores too, -inf where an entry is not visible.
        weight_scale: of all weights.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, or ``topk`` < 1.
    """
    if topk < 1:
        raise ValueError(f"index_topk: topk must be at least 1, got {topk}")
    check_choice("index_topk", "rounding", rounding, ("float32", "bfloat16"))
    check_operand("index_topk", "q", q.key, "b t h d", STORED)
    check_operand("index_topk", "weight", weight, "b t h", FLOATS)
    check_operand("index_topk", "n_visible", n_visible, "b t", INTEGERS)
    check_operand("index_topk", "keys", keys.key, "b s d", (q.key.dtype,))
    b, t, heads, dim = q.key.shape
    capacity = keys.key.shape[1]
    if keys.key.shape != (b, capacity, dim) or capacity > _INT32.max:
        raise ValueError(
            f"index_topk: keys must be [{b}, s, {dim}] with s up to {_INT32.max} for q "
            f"{list(q.key.shape)}, got {list(keys.key.shape)}"
        )
    _check_scale("q", q)
    _check_scale("keys", keys)
    if weight.shape != (b, t, heads) or n_visible.shape != (b, t):
        raise ValueError(
            f"index_topk: weight and n_visible must be {[b, t, heads]} and {[b, t]} for q "
            f"{list(q.key.shape)}, got {list(weight.shape)} and {list(n_visible.shape)}"
        )
    k = min(topk, capacity)
    if n_visible.dtype != jnp.int32:  # saturate instead of wrapping round
        n_visible = jnp.clip(n_visible, _INT32.min, _INT32.max).astype(jnp.int32)
    if q.scale is None or keys.scale is None or rounding == "bfloat16" or dim > MAX_WIDTH:
        if capacity % KEY_BLOCK:
            raise ValueError(
                f"index_topk: keys must hold a multiple of {KEY_BLOCK} entries where there is no "
                f"kernel, got {capacity}"
            )
        scaled = round_to(weight.astype(jnp.float32) * jnp.float32(weight_scale), weight.dtype)
        operands = q, scaled.astype(jnp.float32), keys, n_visible
        idx = index_topk_jax(*operands, topk=k, rounding=rounding)
        if not return_scores:
            return idx
        return idx, index_scores_jax(*operands, rounding=rounding)
    idx, scores, _ = library.call(
        "index_topk",
        [
            jax.ShapeDtypeStruct((b, t, k), jnp.int32),
            jax.ShapeDtypeStruct((b, t, capacity if return_scores else 0), jnp.float32),
            jax.ShapeDtypeStruct((_scratch_bytes(b * t, capacity),), jnp.uint8),
        ],
        *(q.key, q.scale, weight, keys.key, keys.scale, n_visible),
        weight_scale=np.float32(weight_scale),
    )
    return (idx, scores) if return_scores else idx


def _scratch_bytes(queries: int, slots: int) -> int:
    """``IndexTopkScratchBytes`` of ffi/index_topk/index_topk.h."""
    row = 4 * (slots + 4 * -(-slots // (4 * GROUP)))
    if not queries or not row:
        return 0
    return row * min(max(SCRATCH_BUDGET // row, 1), queries)


def _check_scale(name: str, rows: IndexRows) -> None:
    """That the codes have theirs: E2M1 one per 32 channels, E4M3 one, floats none."""
    quantized = rows.key.dtype in (E2M1, E4M3)
    if (rows.scale is not None) != quantized:
        raise ValueError(
            f"index_topk: {name} must have a scale with float4_e2m1fn and float8_e4m3fn and with "
            f"nothing else, got {'none' if rows.scale is None else 'one'} with {rows.key.dtype}"
        )
    if rows.scale is None:
        return
    *lead, dim = rows.key.shape
    axes = "b t h n" if len(lead) == 3 else "b s n"
    check_operand("index_topk", f"{name} scale", rows.scale, axes, (jnp.dtype(UE8M0),))
    block = mxfp4.BLOCK if rows.key.dtype == E2M1 else max(dim, 1)
    if dim % block or not dim:
        raise ValueError(
            f"index_topk: {name} must have a multiple of {block} channels, got "
            f"{list(rows.key.shape)}"
        )
    want = (*lead, dim // block)
    if rows.scale.shape != want:
        raise ValueError(
            f"index_topk: {name} scale must be {list(want)} for {name} {list(rows.key.shape)}, "
            f"got {list(rows.scale.shape)}"
        )
