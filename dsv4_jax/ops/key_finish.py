"""What a key goes through between its projection and where attention reads it (model.md 3.2)."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import library
from dsv4_jax.ops._check import FLOAT32, FLOATS, INTEGERS, as_int32, check_choice, check_operand
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.query_finish import CHUNK, MAX_ROTARY, MAX_WIDTH
from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.ops.rmsnorm_fp8 import CHANNELS, rmsnorm_fp8, rmsnorm_fp8_takes
from dsv4_jax.ops.rmsnorm_nvfp4 import BFLOAT16, MAX_DIM
from dsv4_jax.ops.rope import rope
from dsv4_jax.quant import fp8
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.quant.kv import KvRows, kv_quant
from dsv4_jax.typing import E4M3, UE8M0, Array, BFloat16, Float, Float32, Int32

__all__ = ["FinishedKeys", "QueryNorm", "key_finish", "ring_takes_first"]

FORMS = ("fp8", "bfloat16", "float32")


class QueryNorm(NamedTuple):
    """Low-rank queries and the weight of their norm: a second job beside the keys."""

    x: BFloat16[Array, "n r"]
    weight: BFloat16[Array, "r"]


class FinishedKeys(NamedTuple):
    """A chunk's keys ``[b, t, ...]`` as stored, and the ring ``[b, s, ...]`` after them.

    ``query``: the normed queries, codes ``[n, r]`` and scales ``[n, ceil(r / 128)]``, or BF16.
    """

    rows: KvRows
    ring: KvRows | None
    query: Fp8 | BFloat16[Array, "n r"] | None = None


def ring_takes_first(t: int, slots: int, window: int) -> bool:
    """Whether a chunk of ``t`` may go to a ring of ``slots`` before attention reads it.

    Attention takes positions of the chunk from the chunk and older ones from the ring. The oldest
    that its first query sees lies ``window - 1`` behind it, and the last of ``t`` positions takes
    the slot of the one ``slots`` behind itself.
    """
    return t <= slots - window + 1


@functools.partial(jax.jit, static_argnames=("eps", "form", "query_form"))
def key_finish(
    kv: Float[Array, "b t d"],
    weight: Float[Array, "d"],
    start: Int32[Array, "b"],
    frequencies: Float32[Array, "f"] | np.ndarray,
    eps: float,
    *,
    form: Literal["fp8", "bfloat16", "float32"],
    ring: KvRows | None = None,
    count: Int32[Array, "b"] | None = None,
    query: QueryNorm | None = None,
    query_form: Literal["fp8", "bfloat16"] = "fp8",
) -> FinishedKeys:
    """``kv_quant(rope(rmsnorm(kv, weight), start + j))``, also into a ring in place.

    Token ``j`` of row ``i`` has position ``start[i] + j``. With a ring, the tokens ``j < count[i]``
    go to slot ``position % s`` of it, the last ``s`` of them if they are more; nothing else of the
    ring is touched, and a row with a negative start writes nothing. A ring that is donated to the
    enclosing jit keeps its buffer. Whether the ring may be written before attention reads it is
    `ring_takes_first`; where it may not, call without a ring and `cache_write` the rows afterwards.

    BF16 keys in form ``fp8`` of up to 512 channels are one foreign call, a key independent of all
    others; other dtypes and sizes are the ops of the formula. The call adds squares in an order of
    its own (the same on CPU and GPU), so that against those a value on a rounding tie may fall the
    other way. A ``query`` has the bits of `rmsnorm_fp8`, or in BF16 those that it quantises; it is
    done in the same call and, with few tokens, in the same launch. NaN and infinities stay in
    their key, NaN of a block of 64 in its scale. No gradient. Under `jax.vmap` a call per element.
    Arrays on several devices are gathered unless the call is inside `jax.shard_map`.

    Args:
        weight: of the norm.
        frequencies: ``[rotary / 2]``, of the last ``rotary`` channels.
        eps: added to the mean squares.
        form: of the keys, as `kv_quant` has it.
        ring: in the same form.
        count: real tokens of each row, held to ``0 .. t``; with a ring only.
        query: to be normed as well.
        query_form: of the normed query, quantised or not.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, ``form`` or ``query_form`` is unknown, ``ring`` and ``count``
            do not come together, or ``query`` is none that `rmsnorm_fp8_takes`.
    """
    check_operand("key_finish", "kv", kv, "b t d", FLOATS)
    check_operand("key_finish", "weight", weight, "d", FLOATS)
    check_operand("key_finish", "start", start, "b", INTEGERS)
    check_choice("key_finish", "form", form, FORMS)
    check_choice("key_finish", "query_form", query_form, ("fp8", "bfloat16"))
    frequencies = jnp.asarray(frequencies)
    check_operand("key_finish", "frequencies", frequencies, "f", FLOAT32)
    (b, t, d), rotary = kv.shape, 2 * frequencies.shape[0]
    _check_shape("weight", weight, (d,))
    _check_shape("start", start, (b,))
    if not 0 < rotary < d:
        raise ValueError(f"key_finish: kv must have more than {rotary} channels (rotary), got {d}")
    start = as_int32(start)
    if (ring is None) != (count is None):
        raise ValueError("key_finish: ring and count must come together")
    if ring is not None and count is not None:
        check_operand("key_finish", "count", count, "b", INTEGERS)
        _check_shape("count", count, (b,))
        _check_ring(ring, form, b, d, rotary)
        count = as_int32(count)
    if query is not None:
        _check_query(query)
    nope = d - rotary
    served = nope % fp8.KV_BLOCK == 0 and d <= MAX_WIDTH
    served = served and rotary % CHUNK == 0 and rotary <= MAX_ROTARY
    both = kv.dtype == weight.dtype == jnp.bfloat16
    if both and served and form == "fp8":
        return _call(kv, weight, start, frequencies, eps, ring, count, query, query_form)
    normed = None
    if query is not None:
        norm = rmsnorm_fp8 if query_form == "fp8" else rmsnorm
        normed = norm(query.x, query.weight, eps)
    positions = start[:, None] + jnp.arange(t, dtype=jnp.int32)
    rows = kv_quant(rope(rmsnorm(kv, weight, eps), positions, frequencies), rotary, form)
    if ring is None or count is None:
        return FinishedKeys(rows, None, normed)
    slots = ring.nope.shape[1]
    taken = jnp.clip(count, 0, t)
    offset = jnp.arange(t, dtype=jnp.int32)
    keep = (offset < taken[:, None]) & (offset >= taken[:, None] - slots) & (start >= 0)[:, None]
    at = jnp.where(keep, positions % max(slots, 1), slots)
    return FinishedKeys(rows, cache_write(ring, rows, at), normed)


def _call(
    kv: Array,
    weight: Array,
    start: Array,
    frequencies: Array,
    eps: float,
    ring: KvRows | None,
    count: Array | None,
    query: QueryNorm | None,
    query_form: str,
) -> FinishedKeys:
    """The foreign call."""
    (b, t, d), rotary = kv.shape, 2 * frequencies.shape[0]
    nope = d - rotary
    results = [
        jax.ShapeDtypeStruct((b, t, nope), E4M3),
        jax.ShapeDtypeStruct((b, t, nope // fp8.KV_BLOCK), UE8M0),
        jax.ShapeDtypeStruct((b, t, rotary), kv.dtype),
    ]
    operands = [kv, weight, start, frequencies]
    aliases: dict[int, int] = {}
    if ring is not None and count is not None:
        operands.append(count)
        for leaf in jax.tree.leaves(ring):
            aliases[len(operands)] = len(results)
            operands.append(leaf)
            results.append(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    if query is not None:
        operands += query
        n, r = query.x.shape
        if query_form == "fp8":
            results.append(jax.ShapeDtypeStruct((n, r), E4M3))
            results.append(jax.ShapeDtypeStruct((n, -(-r // fp8.ACT_BLOCK)), UE8M0))
        else:
            results.append(jax.ShapeDtypeStruct((n, r), jnp.bfloat16))
    done = library.call("key_finish", results, *operands, aliases=aliases, eps=np.float32(eps))
    parts = [tuple(done[i : i + 3]) for i in range(0, 6 if ring is not None else 3, 3)]
    normed = None
    if query is not None:
        normed = Fp8(*done[-2:]) if query_form == "fp8" else done[-1]
    return FinishedKeys(KvRows(*parts[0]), KvRows(*parts[1]) if parts[1:] else None, normed)


def _check_shape(name: str, x: Array, want: tuple[int, ...]) -> None:
    if x.shape != want:
        raise ValueError(f"key_finish: {name} must be {list(want)}, got {list(x.shape)}")


def _check_query(query: QueryNorm) -> None:
    """What `rmsnorm_fp8` takes, in two axes."""
    check_operand("key_finish", "query x", query.x, "n r", BFLOAT16)
    check_operand("key_finish", "query weight", query.weight, "r", BFLOAT16)
    r = query.x.shape[1]
    if not rmsnorm_fp8_takes(r):
        raise ValueError(
            f"key_finish: query x must have a multiple of {CHANNELS} channels, "
            f"{CHANNELS}..{MAX_DIM}, got {list(query.x.shape)}"
        )
    _check_shape("query weight", query.weight, (r,))


def _check_ring(ring: KvRows, form: str, b: int, d: int, rotary: int) -> None:
    """``[b, s, ...]`` in ``form``."""
    dtype = jnp.dtype(E4M3 if form == "fp8" else form)
    check_operand("key_finish", "ring nope", ring.nope, "b s n", (dtype,))
    rotary_dtype = jnp.dtype(jnp.bfloat16 if form == "fp8" else form)
    check_operand("key_finish", "ring rope", ring.rope, "b s n", (rotary_dtype,))
    s = ring.nope.shape[1]
    _check_shape("ring nope", ring.nope, (b, s, d - rotary))
    _check_shape("ring rope", ring.rope, (b, s, rotary))
    if (ring.scale is not None) != (form == "fp8"):
        raise ValueError(
            f"key_finish: ring must have a scale in form fp8 and in no other, got "
            f"{'none' if ring.scale is None else 'one'} in {form}"
        )
    if ring.scale is not None:
        check_operand("key_finish", "ring scale", ring.scale, "b s n", (jnp.dtype(UE8M0),))
        _check_shape("ring scale", ring.scale, (b, s, -(-(d - rotary) // fp8.KV_BLOCK)))
