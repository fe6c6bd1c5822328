"""key_finish against its reference and the ops that it takes the place of; rings to the byte."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.attention import attention
from dsv4_jax.ops.key_finish import FinishedKeys, QueryNorm, key_finish, ring_takes_first
from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.ops.rmsnorm_fp8 import rmsnorm_fp8
from dsv4_jax.ops.rope import rope
from dsv4_jax.quant import fp8
from dsv4_jax.quant.kv import KvRows, kv_dequant, kv_quant
from dsv4_jax.typing import E4M3, UE8M0
from reference.key_finish import key_finish as reference_key_finish
from tests.support.numerics import assert_same_bits, assert_same_tree, f64, raw
from tests.support.op_cases import normal

EPS = 1e-6
LAST = 1_048_575
INT32 = np.iinfo(np.int32)
# Values within an FP32 sum's or a sine's error of a tie of BF16, then of a code (measured: 4e-5 of
# rotary values, no code).
MOST_TURNED = 2e-4
# (channels, rotary): the model's, one block, a lane's two chunks in part.
SIZES = [(512, 64), (96, 32), (328, 8)]


def table(rotary: int) -> np.ndarray:
    return (10000.0 ** -(np.arange(rotary // 2) / (rotary // 2))).astype(np.float32)


def operands(b: int, t: int, d: int = 512, rotary: int = 64) -> tuple[Any, ...]:
    """Keys of magnitudes 2^-6 .. 2^6, weights with small ones."""
    scale = np.exp2(np.round(np.asarray(normal(2, b, t, 1)) * 3))
    weight = 1 + np.asarray(normal(1, d, scale=0.3))
    weight[::7] *= np.float32(1e-3)
    kv = jnp.asarray((np.asarray(normal(0, b, t, d)) * scale).astype(jnp.bfloat16))
    start = np.random.default_rng(3).integers(0, LAST - t, b)
    start[0] = LAST - t + 1
    weight = jnp.asarray(weight.astype(jnp.bfloat16))
    return kv, weight, jnp.asarray(start, jnp.int32), table(rotary), EPS


@functools.partial(jax.jit, static_argnames="eps")
def plain(kv: Any, weight: Any, start: Any, frequencies: Any, eps: float) -> KvRows:
    """The ops that the call takes the place of."""
    positions = start[:, None] + jnp.arange(kv.shape[1], dtype=jnp.int32)
    turned = rope(rmsnorm(kv, weight, eps), positions, frequencies)
    return kv_quant(turned, 2 * len(frequencies), "fp8")


def poisoned(b: int, s: int, d: int = 512, rotary: int = 64, byte: int = 0xA5) -> KvRows:
    nope = d - rotary
    return KvRows(
        jnp.asarray(np.full((b, s, nope), byte, np.uint8).view(E4M3)),
        jnp.asarray(np.full((b, s, nope // 64), byte, np.uint8).view(UE8M0)),
        jnp.asarray(np.full((b, s, 2 * rotary), byte, np.uint8).view(jnp.bfloat16)),
    )


def queries(n: int, r: int) -> QueryNorm:
    x = np.asarray(normal(5, n, r)) * np.exp2(np.round(np.asarray(normal(6, n, 1)) * 3))
    weight = 1 + np.asarray(normal(7, r, scale=0.3))
    return QueryNorm(*(jnp.asarray(y.astype(jnp.bfloat16)) for y in (x, weight)))


def run(
    args: Any,
    ring: KvRows | None = None,
    count: Any = None,
    query: QueryNorm | None = None,
    query_form: Any = "fp8",
) -> FinishedKeys:
    if count is not None:
        count = jnp.asarray(count, jnp.int32)
    settings: dict[str, Any] = {"ring": ring, "count": count, "query": query}
    return key_finish(*args, form="fp8", query_form=query_form, **settings)


def ring_after(ring: KvRows, rows: KvRows, start: Any, count: Any) -> list[np.ndarray]:
    """Bytes of the ring, by the definition."""
    out = [raw(x).copy() for x in jax.tree.leaves(ring)]
    new = [raw(x) for x in jax.tree.leaves(rows)]
    b, t = new[0].shape[:2]
    for i in range(b):
        if start[i] < 0:
            continue
        for j in range(max(min(int(count[i]), t), 0)):
            for part, fresh in zip(out, new, strict=True):
                part[i, (int(start[i]) + j) % part.shape[1]] = fresh[i, j]
    return out


def assert_ring(got: FinishedKeys, ring: KvRows, start: Any, count: Any) -> None:
    assert got.ring is not None
    want = ring_after(ring, got.rows, np.asarray(start), np.asarray(count))
    for mine, theirs in zip(jax.tree.leaves(got.ring), want, strict=True):
        np.testing.assert_array_equal(raw(mine), theirs)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_plain_ops(size: tuple[int, int]) -> None:
    """Bit for bit but for counted ties."""
    args = operands(3, 200, *size)
    for name, mine, theirs in zip(KvRows._fields, run(args).rows, plain(*args), strict=True):
        turned = raw(mine) != raw(theirs)
        print(f"{size} {name}: {turned.sum()} of {turned.size} turned by ties")
        assert turned.mean() <= MOST_TURNED + 1 / turned.size


@pytest.mark.parametrize("query_form", ["fp8", "bfloat16"])
def test_against_the_reference(query_form: Any) -> None:
    """Rows and rings, as the values that are stored."""
    kv, weight, start, frequencies, eps = operands(2, 50)
    old = poisoned(2, 8, byte=0x3F)
    count = jnp.asarray([50, 7], jnp.int32)
    query = queries(3, 512)
    want = reference_key_finish(
        kv.astype(jnp.float32),
        weight.astype(jnp.float32),
        start,
        jnp.asarray(frequencies),
        eps,
        form="fp8",
        ring=kv_dequant(old, jnp.float32),
        count=count,
        query=(query.x.astype(jnp.float32), query.weight.astype(jnp.float32)),
        query_form=query_form,
    )
    got = run((kv, weight, start, frequencies, eps), old, count, query, query_form)
    normed = got.query
    if isinstance(normed, fp8.Fp8):
        normed = fp8.dequantize_act(normed, fp8.ACT_BLOCK)
    assert normed is not None
    normed = f64(normed)
    assert (normed != f64(want[2])).mean() <= MOST_TURNED * 2
    for mine, theirs in zip(got[:2], want[:2], strict=True):
        assert mine is not None and theirs is not None
        assert (f64(kv_dequant(mine, jnp.float32)) != f64(theirs)).mean() <= MOST_TURNED * 2


@pytest.mark.parametrize("slots", [0, 8])
@pytest.mark.parametrize(("n", "r"), [(6, 1024), (1, 1536), (0, 128), (9, 16), (2, 2064)])
def test_a_query_has_the_bits_of_its_own_op(n: int, r: int, slots: int) -> None:
    """And the keys those of a call without one; its tokens need not be the keys'."""
    args, query = operands(2, 3), queries(n, r)
    ring = (poisoned(2, slots), [3, 1]) if slots else (None, None)
    got = run(args, *ring, query)
    assert_same_tree(got.query, rmsnorm_fp8(*query, EPS))
    assert_same_tree(got[:2], run(args, *ring)[:2])


@pytest.mark.parametrize(
    ("n", "r", "slots"),
    [(6, 1024, 8), (0, 128, 0), (9, 16, 8), (2, 2064, 0), (300, 1024, 0), (3, 8192, 0)],
)
def test_a_query_in_bf16(n: int, r: int, slots: int) -> None:
    """`rmsnorm`, bit for bit but for counted ties; quantised, it is the other form's.

    On a GPU in the launch of the keys, or in one of its own of each kind.
    """
    args, query = operands(2, 3), queries(n, r)
    ring = (poisoned(2, slots), [3, 1]) if slots else (None, None)
    got = run(args, *ring, query, "bfloat16")
    assert_same_tree(got[:2], run(args, *ring)[:2])
    assert isinstance(got.query, jax.Array) and got.query.dtype == jnp.bfloat16
    turned = raw(got.query) != raw(rmsnorm(*query, EPS))
    assert n == 0 or turned.mean() <= MOST_TURNED + 1 / turned.size
    codes = run(args, *ring, query).query
    assert isinstance(codes, fp8.Fp8)
    again = fp8.quantize_act(got.query.astype(jnp.float32), fp8.ACT_BLOCK)
    if r % fp8.ACT_BLOCK == 0:
        assert_same_bits(again.code, codes.code)
        assert_same_bits(again.scale, codes.scale)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_query_stays_alone(bad: float) -> None:
    args, query = operands(1, 1), queries(3, 1024)
    clean = run(args, query=query, query_form="bfloat16")
    dirty = QueryNorm(query.x.at[1, 77].set(bad), query.weight)
    got = run(args, query=dirty, query_form="bfloat16")
    want = f64(rmsnorm(*dirty, EPS))
    np.testing.assert_array_equal(np.isnan(f64(got.query)), np.isnan(want))
    assert np.isnan(want[1]).any() and not np.isnan(want[[0, 2]]).any()
    assert_same_bits(np.asarray(got.query)[[0, 2]], np.asarray(clean.query)[[0, 2]])
    assert_same_tree(got[:2], clean[:2])


def test_a_query_beside_other_keys() -> None:
    """Keys that are plain ops leave it to `rmsnorm_fp8`."""
    kv, *rest = operands(2, 3)
    query = queries(6, 144)
    kv, weight = kv.astype(jnp.float32), rest[0].astype(jnp.float32)
    got = key_finish(kv, weight, *rest[1:], form="float32", query=query)
    assert_same_tree(got.query, rmsnorm_fp8(*query, EPS))
    settings: dict[str, Any] = {"form": "float32", "query": query, "query_form": "bfloat16"}
    assert_same_tree(key_finish(kv, weight, *rest[1:], **settings).query, rmsnorm(*query, EPS))


@pytest.mark.parametrize("slots", [1, 8, 128, 131])
@pytest.mark.parametrize("t", [1, 2, 9, 300])
def test_rings(t: int, slots: int) -> None:
    """B6: chunks shorter and longer than the ring; every other byte stays."""
    args = operands(3, t)
    ring, count = poisoned(3, slots), [t, t - 1, max(t - 5, 0)]
    got = run(args, ring, count)
    assert_same_tree(got.rows, run(args).rows)
    assert_ring(got, ring, args[2], count)


def test_ragged_rows_and_wild_lengths() -> None:
    """B1, B8: padding, no token, counts and starts that nobody checked."""
    start = np.array([0, 3, 126, INT32.max, -1, INT32.min, 4, INT32.max - 3], np.int32)
    count = np.array([0, 3, 7, 2, 7, 7, -5, INT32.max], np.int32)
    args = list(operands(8, 7))
    args[2] = jnp.asarray(start)
    ring = poisoned(8, 5)
    got = run(tuple(args), ring, count)
    assert_ring(got, ring, start, count)
    # Padding is a row like others: attention of padding reads it.
    for mine, theirs in zip(got.rows, plain(*args), strict=True):
        assert (raw(mine) != raw(theirs))[:3].mean() <= MOST_TURNED * 10


@pytest.mark.parametrize("donate", [False, True], ids=["copied", "donated"])
def test_in_place(donate: bool) -> None:
    """B11, B12."""
    args = operands(2, 1)
    ring, count = poisoned(2, 128), jnp.asarray([1, 0], jnp.int32)
    before = [raw(x).copy() for x in ring]
    query = queries(2, 144)
    want = run(args, ring, count, query)

    def step(ring: KvRows, kv: Any, weight: Any, start: Any, count: Any) -> FinishedKeys:
        settings: dict[str, Any] = {"form": "fp8", "ring": ring, "count": count, "query": query}
        return key_finish(kv, weight, start, args[3], EPS, **settings)

    jitted = jax.jit(step, donate_argnums=(0,) if donate else ())
    ring = jax.tree.map(jnp.copy, ring)
    if donate:
        memory = jitted.lower(ring, *args[:3], count).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4096
    pointers = [x.unsafe_buffer_pointer() for x in ring]
    got = jitted(ring, *args[:3], count)
    assert_same_tree(got, want)
    assert got.ring is not None
    moved = [x.unsafe_buffer_pointer() != p for x, p in zip(got.ring, pointers, strict=True)]
    assert not any(moved) if donate else all(moved)
    if not donate:
        for x, old in zip(ring, before, strict=True):
            np.testing.assert_array_equal(raw(x), old)


def test_rows_do_not_meet() -> None:
    """P2, P3: a key alone, in a ring alone, and in chunks."""
    args = operands(3, 20)
    whole = run(args, poisoned(3, 8), [20, 20, 20])
    kv, weight, start, *rest = args
    ring = poisoned(3, 8)
    parts: list[KvRows] = []
    for first, last in ((0, 1), (1, 7), (7, 20)):
        piece = kv[:, first:last], weight, start + first, *rest
        done = run(piece, ring, [last - first] * 3)
        assert done.ring is not None
        parts.append(done.rows)
        ring = done.ring
    assert_same_tree(ring, whole.ring)
    joined = KvRows(*(np.concatenate(x, axis=1) for x in zip(*parts, strict=True)))
    assert_same_tree(joined, jax.tree.map(np.asarray, whole.rows))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_stays_in_its_key(bad: float) -> None:
    """A13, A14: NaN in the scale of its block."""
    args = operands(2, 3)
    kv = args[0].at[1, 1, 100].set(bad)
    clean, got = run(args).rows, run((kv, *args[1:])).rows
    assert raw(got.scale)[1, 1, 1] == 255
    for mine, theirs in zip(got, clean, strict=True):
        mine, theirs = raw(mine).copy(), raw(theirs)
        mine[1, 1] = theirs[1, 1]
        np.testing.assert_array_equal(mine, theirs)


def test_zeros() -> None:
    """A15: codes 0 and the least scale."""
    kv, *rest = operands(1, 1)
    got = run((jnp.zeros_like(kv), *rest)).rows
    assert not f64(got.nope).any() and not f64(got.rope).any()
    assert (raw(got.scale) == 127 - 22).all()


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    """A6."""
    kv = jnp.zeros((*shape, 512), jnp.bfloat16)
    start = jnp.zeros(shape[0], jnp.int32)
    args = kv, jnp.ones(512, jnp.bfloat16), start, table(64), EPS
    ring = poisoned(shape[0], 4)
    got = run(args, ring, start)
    assert got.rows.nope.shape == (*shape, 448)
    assert got.ring is not None
    assert_same_tree(got.ring, ring)


@pytest.mark.parametrize("form", ["fp8", "bfloat16", "float32"])
def test_other_dtypes_are_plain_ops(form: Any) -> None:
    """FP32 keys, and BF16 ones in forms without codes, have the same rings."""
    kv, weight, start, frequencies, eps = operands(3, 9, 96, 32)
    kv, weight = kv.astype(jnp.float32), weight.astype(jnp.float32)
    ring = jax.tree.map(jnp.zeros_like, kv_quant(jnp.zeros((3, 5, 96)), 32, form))
    args = kv, weight, start, frequencies, eps
    count = jnp.asarray([9, 2, 0], jnp.int32)

    def call(*operands: Any) -> FinishedKeys:
        return key_finish(*operands, eps, form=form, ring=ring, count=count)

    assert "dsv4.key_finish" not in str(jax.make_jaxpr(call)(*args[:4]))
    got = call(*args[:4])
    assert_ring(got, ring, start, count)


def test_where_the_ring_takes_the_chunk_first() -> None:
    """Attention over a ring that already has the chunk is bit for bit that over the ring before.

    As long as `ring_takes_first` says; a token more and a query misses a key of its window.
    """
    window, heads, start = 8, 2, 37
    for slots in (8, 9, 11):
        for t in range(1, slots + 1):
            q = normal(5, 1, t, heads, 96, dtype=jnp.bfloat16)
            positions = jnp.asarray(start + np.arange(t)[None], jnp.int32)
            old = operands(1, start, 96, 32)
            held = run(
                (old[0], old[1], jnp.zeros(1, jnp.int32), *old[3:]),
                poisoned(1, slots, 96, 32),
                [start],
            ).ring
            assert held is not None
            args = operands(1, t, 96, 32)
            args = (args[0], args[1], jnp.asarray([start], jnp.int32), *args[3:])
            rows, written, _ = run(args, held, [t])
            assert written is not None
            outputs = [
                attention(
                    q, ring, positions, jnp.zeros(heads), window=window, chunk=rows, start=args[2]
                )
                for ring in (held, written)
            ]
            same = bool((raw(outputs[0]) == raw(outputs[1])).all())
            assert same == ring_takes_first(t, slots, window), (slots, t)


def test_a_wrong_variant_fails() -> None:
    """Positions off by one, and one slot further, would be seen."""
    args = operands(2, 20)
    got = run((*args[:2], args[2] + 1, *args[3:]), poisoned(2, 8), [20, 20])
    want = plain(*args)
    assert (raw(got.rows.rope) != raw(want.rope)).mean() > 100 * MOST_TURNED
    with pytest.raises(AssertionError):
        assert_ring(got, poisoned(2, 8), args[2], [20, 20])
    assert_same_bits(got.rows.nope, run(args).rows.nope)
