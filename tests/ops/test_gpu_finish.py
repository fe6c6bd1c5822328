"""CUDA kernels of the finishing ops and of rmsnorm_fp8 against their CPU handlers.

Bit for bit: sums, sines and products have one order on both sides and no contraction, and NaN of
BF16 is the one thing whose bits nobody promises. `test_query_finish.py` and its neighbours are run
on a GPU as well; here are the shapes that reach each part of the kernels.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import library
from dsv4_jax.ops.index_query_finish import index_query_finish
from dsv4_jax.ops.key_finish import FinishedKeys, QueryNorm, key_finish
from dsv4_jax.ops.query_finish import query_finish
from dsv4_jax.ops.rmsnorm_fp8 import rmsnorm_fp8
from dsv4_jax.quant.kv import KvRows
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.bench.timing import filled, random_bytes
from tests.ops.test_gpu_ops import host, on_cpu
from tests.support.numerics import assert_same_tree, raw

pytestmark = pytest.mark.gpu

EPS = 1e-6
INT32 = np.iinfo(np.int32)
WILD = np.array([0, 1, 1_048_575, -1, INT32.min, INT32.max, 127, 65_536], np.int32)
BFLOAT16 = np.dtype(jnp.bfloat16)


def table(rotary: int) -> np.ndarray:
    return (160000.0 ** -(np.arange(rotary // 2) / max(rotary // 2, 1))).astype(np.float32)


def values(seed: int, *shape: int) -> np.ndarray:
    """Rows of 1e-20 to 1e20, every few with zeros, signed zeros, NaN, Inf or subnormals."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((int(np.prod(shape[:-1])), shape[-1]))
    x *= 10.0 ** rng.uniform(-20, 20, (len(x), 1))
    x[::5] = rng.standard_normal((len(x[::5]), shape[-1])) * 10.0 ** rng.uniform(-9, 0, shape[-1])
    x[3::11] = 0.0
    x[4::11, :8] = -0.0
    x[5::11, shape[-1] // 2] = np.nan
    x[6::11, shape[-1] - 1] = -np.inf
    x[7::11] *= 1e-38
    with np.errstate(over="ignore"):
        return x.reshape(shape).astype(np.float32).astype(BFLOAT16)


# (b, t, heads, channels, rotary): one head a warp and several, groups that are not full, narrow.
QUERIES = [
    *((1, 1, 64, 512, 64), (1, 1, 128, 512, 64), (8, 1, 128, 512, 64), (1, 128, 64, 512, 64)),
    *((2, 300, 67, 512, 64), (1, 700, 128, 512, 64), (3, 5, 5, 96, 32), (2, 3, 3, 264, 0)),
    *((1, 2, 1, 8, 8), (1, 0, 64, 512, 64)),
]


@pytest.mark.parametrize("rounding", ["bfloat16", "float32"])
@pytest.mark.parametrize("size", QUERIES, ids=str)
def test_queries_equal_the_cpu_handler(size: tuple[int, ...], rounding: Any) -> None:
    """A7, A13-A15, A18, B15."""
    b, t, h, d, rotary = size
    q, positions = values(0, b, t, h, d), np.resize(WILD, (b, t))
    run = jax.jit(lambda q, p: query_finish(q, p, table(rotary), EPS, rounding=rounding))
    assert_same_tree(host(run(q, positions)), on_cpu(run, q, positions))


@pytest.mark.parametrize("t", [0, 1, 2, 3, 129, 1000])
@pytest.mark.parametrize("d", [16, 48, 144, 512, 528, 1024, 1536, 4096, 7168, 16384])
def test_norms_equal_the_cpu_handler(d: int, t: int) -> None:
    """A7, A13-A15, A18: every lane count, every launch bound."""
    x, weight = values(d + t, t, d), values(1, 1, d)[0]
    run = jax.jit(lambda x, w: rmsnorm_fp8(x, w, EPS))
    assert_same_tree(host(run(x, weight)), on_cpu(run, x, weight))


# (b, t, heads, channels, rotary)
INDEX_QUERIES = [
    *((1, 1, 64, 128, 64), (8, 1, 64, 128, 64), (1, 128, 64, 128, 64), (2, 300, 61, 128, 64)),
    *((1, 1500, 64, 128, 64), (3, 5, 5, 64, 32), (2, 3, 3, 32, 8), (2, 3, 3, 128, 0)),
    (1, 0, 64, 128, 64),
]


@pytest.mark.parametrize("form", ["mxfp4", "fp8"])
@pytest.mark.parametrize("size", INDEX_QUERIES, ids=str)
def test_index_queries_equal_the_cpu_handler(size: tuple[int, ...], form: Any) -> None:
    """A7, A13-A16, A18, B15."""
    b, t, h, d, rotary = size
    q, positions = values(0, b, t, h, d), np.resize(WILD, (b, t))
    run = jax.jit(lambda q, p: index_query_finish(q, p, table(rotary), form=form))
    assert_same_tree(host(run(q, positions)), on_cpu(run, q, positions))


# (b, t, indexer heads, channels, rotary, heads, channels): in one launch with the indexer's, then
# tokens, channels or heads for which there are two.
BOTH = [
    *((1, 1, 64, 128, 64, 64, 512), (1, 1, 64, 128, 64, 128, 512), (8, 4, 61, 128, 64, 67, 512)),
    *((3, 1, 5, 128, 32, 3, 512), (1, 33, 64, 128, 64, 64, 512), (1, 700, 64, 128, 64, 64, 512)),
    *((2, 3, 5, 64, 32, 5, 96), (2, 3, 5, 128, 0, 5, 264), (1, 2, 0, 128, 64, 3, 512)),
    *((1, 2, 3, 128, 64, 0, 512), (1, 0, 64, 128, 64, 64, 512)),
]


@pytest.mark.parametrize("rounding", ["bfloat16", "float32"])
@pytest.mark.parametrize("form", ["mxfp4", "fp8"])
@pytest.mark.parametrize("size", BOTH, ids=str)
def test_both_queries(size: tuple[int, ...], form: Any, rounding: Any) -> None:
    """The bits of the two ops, and of the CPU handler."""
    b, t, h, d, rotary, n, c = size
    q, heads, positions = values(0, b, t, h, d), values(1, b, t, n, c), np.resize(WILD, (b, t))

    def run(q: Any, heads: Any, p: Any) -> Any:
        rest: dict[str, Any] = {"eps": EPS, "rounding": rounding}
        both = index_query_finish(q, p, table(rotary), form=form, heads=heads, **rest)
        alone = index_query_finish(q, p, table(rotary), form=form)
        return both, (alone, query_finish(heads, p, table(rotary), **rest))

    run = jax.jit(run)
    both, apart = host(run(q, heads, positions))
    assert_same_tree(both, apart)
    assert_same_tree(both, on_cpu(run, q, heads, positions)[0])


def test_both_queries_that_are_slices() -> None:
    """A11, A12: of addresses that are not aligned."""
    flat = jnp.asarray(values(0, 1, 3 * 4 * 512 + 8)[0])
    positions = np.resize(WILD, (1, 3))

    def run(flat: Any) -> Any:
        shifted = flat[1 : 1 + 3 * 4 * 512]
        settings: dict[str, Any] = {"form": "mxfp4", "eps": EPS, "rounding": "bfloat16"}
        settings["heads"] = shifted.reshape(1, 3, 4, 512)
        return index_query_finish(shifted.reshape(1, 3, 16, 128), positions, table(64), **settings)

    run = jax.jit(run)
    assert_same_tree(host(run(flat)), on_cpu(run, flat))


# (b, t, slots, channels, rotary)
KEYS = [
    *((1, 1, 128, 512, 64), (8, 1, 128, 512, 64), (128, 1, 131, 512, 64), (1, 128, 128, 512, 64)),
    *((3, 300, 128, 512, 64), (2, 2100, 131, 512, 64), (9, 7, 5, 96, 32), (2, 3, 1, 328, 8)),
    *((8, 4, 0, 512, 64), (3, 0, 8, 512, 64)),
]


def store(seed: int, b: int, s: int, d: int, rotary: int) -> KvRows:
    nope = d - rotary
    return KvRows(
        random_bytes(seed, (b, s, nope), E4M3),
        random_bytes(seed + 1, (b, s, nope // 64), UE8M0),
        random_bytes(seed + 2, (b, s, rotary), jnp.bfloat16),
    )


@pytest.mark.parametrize("size", KEYS, ids=str)
def test_keys_equal_the_cpu_handler(size: tuple[int, ...]) -> None:
    """A7, A13-A16, B1, B8: rows and rings, wild lengths; every other byte of a ring stays."""
    b, t, slots, d, rotary = size
    kv, weight = values(0, b, t, d), values(1, 1, d)[0]
    ring = store(0, b, slots, d, rotary)
    before = jax.tree.map(lambda x: np.asarray(x).copy(), ring)

    def run(kv: Any, weight: Any, start: Any, count: Any, *ring: Any) -> FinishedKeys:
        rest = {"ring": KvRows(*ring), "count": count} if slots else {}
        return key_finish(kv, weight, start, table(rotary), EPS, form="fp8", **rest)

    run = jax.jit(run)
    lengths = np.resize(WILD, b), np.resize(np.array([t, t + 9, -1, t // 2], np.int32), b)
    args = kv, weight, *lengths, *before
    got = host(run(*args))
    assert_same_tree(got, on_cpu(run, *args))
    if slots and t and b > 2:  # a row of a negative start
        for part, old in zip(got.ring, before, strict=True):
            np.testing.assert_array_equal(raw(part)[3:5], raw(old)[3:5])


# (b, t, key channels, rotary, queries, their channels): in one launch with the keys; channels,
# tokens, or keys for which there are two.
NORMS = [
    *((1, 1, 512, 64, 1, 1024), (1, 1, 512, 64, 1, 1536), (8, 4, 512, 64, 32, 1024)),
    *((3, 1, 512, 64, 7, 16), (128, 2, 512, 64, 256, 2048), (5, 1, 512, 64, 5, 528)),
    *((2, 1, 512, 64, 2, 2064), (1, 257, 512, 64, 257, 1024), (1, 2, 512, 64, 1000, 1536)),
    *((2, 3, 96, 32, 6, 1024), (0, 1, 512, 64, 3, 1024), (3, 1, 512, 64, 0, 1024)),
]


@pytest.mark.parametrize("slots", [0, 128])
@pytest.mark.parametrize("size", NORMS, ids=str)
def test_a_query_beside_the_keys(size: tuple[int, ...], slots: int) -> None:
    """The bits of the two ops, and of the CPU handler."""
    b, t, d, rotary, n, r = size
    kv, weight = values(0, b, t, d), values(1, 1, d)[0]
    x, norm = values(2, n, r), values(3, 1, r)[0]
    ring = jax.tree.map(np.asarray, store(0, b, slots, d, rotary))

    def run(kv: Any, weight: Any, start: Any, count: Any, x: Any, norm: Any, *ring: Any) -> Any:
        rest: dict[str, Any] = {"form": "fp8"}
        if slots:
            rest |= {"ring": KvRows(*ring), "count": count}
        keys = kv, weight, start, table(rotary), EPS
        both = key_finish(*keys, **rest, query=QueryNorm(x, norm))
        return both, key_finish(*keys, **rest)._replace(query=rmsnorm_fp8(x, norm, EPS))

    run = jax.jit(run)
    lengths = np.resize(WILD, b), np.resize(np.array([t, t + 9, -1, t // 2], np.int32), b)
    args = kv, weight, *lengths, x, norm, *ring
    both, apart = host(run(*args))
    assert_same_tree(both, apart)
    assert_same_tree(both, on_cpu(run, *args)[0])


def test_a_query_that_is_a_slice() -> None:
    """A11, A12: of addresses that are not aligned."""
    flat = jnp.asarray(values(0, 1, 3 * 1024 + 8)[0])
    kv, weight = values(1, 3, 1, 512), values(2, 1, 512)[0]
    start = np.resize(WILD, 3)

    def run(flat: Any, kv: Any) -> Any:
        x, norm = flat[1 : 1 + 3 * 1024].reshape(3, 1024), flat[3 : 3 + 1024]
        query = QueryNorm(x, norm)
        return key_finish(kv, weight, start, table(64), EPS, form="fp8", query=query)

    run = jax.jit(run)
    assert_same_tree(host(run(flat, kv)), on_cpu(run, flat, kv))


def test_a_ring_stays_where_it_is() -> None:
    """B12: donated, in a step of several layers that is replayed from a graph."""
    kv = jnp.asarray(values(0, 4, 1, 512))
    query = QueryNorm(jnp.asarray(values(2, 4, 1024)), jnp.asarray(values(3, 1, 1024)[0]))
    weight = jnp.asarray(values(1, 1, 512)[0])
    count = jnp.asarray([1, 1, 0, 1], jnp.int32)
    rings = [store(3 * i, 4, 128, 512, 64) for i in range(6)]
    before = [[raw(leaf).copy() for leaf in ring] for ring in rings]

    def step(rings: Any, kv: Any, start: Any) -> Any:
        new: list[FinishedKeys] = []
        for ring in rings:
            settings: dict[str, Any] = {"form": "fp8", "ring": ring, "count": count}
            settings["query"] = query if len(new) % 2 else None
            new.append(key_finish(kv, weight, start, table(64), EPS, **settings))
        return [x.ring for x in new], new[0].rows

    run = jax.jit(step, donate_argnums=0)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(rings)]
    rows: Any = None
    for i in range(6):
        rings, rows = jax.block_until_ready(run(rings, kv, jnp.asarray([5, 130, 7, 0]) + i))
    captured, _ = library.launch_counts()["dsv4.key_finish"]
    assert captured >= len(rings)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(rings)] == pointers
    for ring, old in zip(rings, before, strict=True):
        for part, was, fresh in zip(ring, old, rows, strict=True):
            part, written = raw(part), np.zeros((4, 128), bool)
            for row, first in ((0, 5), (1, 2), (3, 0)):
                written[row, first : first + 6] = True
                np.testing.assert_array_equal(part[row, first + 5], raw(fresh)[row, 0])
            np.testing.assert_array_equal(part[~written], was[~written])


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_every_element_is_written(byte: int) -> None:
    """B17: the results take donated buffers full of one byte."""
    q, kv = jnp.asarray(values(0, 1, 5, 67, 512)), jnp.asarray(values(1, 5, 3, 512))
    iq, weight = jnp.asarray(values(2, 1, 5, 61, 128)), jnp.asarray(values(3, 1, 512)[0])
    positions, start = jnp.asarray(np.resize(WILD, (1, 5))), jnp.asarray(np.resize(WILD, 5))
    poison = (
        filled(byte, q.shape, jnp.bfloat16),
        filled(byte, (5, 3, 448), E4M3),
        filled(byte, (5, 3, 7), UE8M0),
        filled(byte, (5, 3, 64), jnp.bfloat16),
        filled(byte, iq.shape, E2M1),
        filled(byte, (1, 5, 61, 4), UE8M0),
    )

    def run(_: Any, q: Any, kv: Any, iq: Any) -> Any:
        rows = key_finish(kv, weight, start, table(64), EPS, form="fp8").rows
        queries = query_finish(q, positions, table(64), EPS, rounding="bfloat16")
        return queries, *rows, *index_query_finish(iq, positions, table(64), form="mxfp4")

    want = host(jax.jit(run)(None, q, kv, iq))
    got = jax.jit(run, donate_argnums=0, keep_unused=True)(poison, q, kv, iq)
    assert_same_tree(host(got), want)


def test_slices() -> None:
    """A11, A12: whatever address XLA makes of them."""
    flat = jnp.asarray(values(0, 1, 3 * 4 * 512 + 8)[0])
    weight = jnp.asarray(values(1, 1, 513)[0])
    positions = np.resize(WILD, (1, 3))

    def run(flat: Any, weight: Any) -> Any:
        shifted = flat[1 : 1 + 3 * 4 * 512]
        start = positions[0, :3]
        return (
            query_finish(
                shifted.reshape(1, 3, 4, 512), positions, table(64), EPS, rounding="float32"
            ),
            key_finish(
                shifted.reshape(3, 4, 512), weight[1:], start, table(64), EPS, form="fp8"
            ).rows,
            index_query_finish(shifted.reshape(1, 3, 16, 128), positions, table(64), form="fp8"),
        )

    run = jax.jit(run)
    assert_same_tree(host(run(flat, weight)), on_cpu(run, flat, weight))


@pytest.mark.parametrize("t", [1, 8, 128])
def test_rows_do_not_meet(t: int) -> None:
    """P2: a token's bits, whatever the call holds."""
    q, iq, kv = values(0, 1, 128, 64, 512), values(1, 1, 128, 64, 128), values(2, 128, 1, 512)
    weight, positions = values(3, 1, 512)[0], np.resize(WILD, (1, 128))

    def run(q: Any, iq: Any, kv: Any, positions: Any) -> Any:
        return (
            query_finish(q, positions, table(64), EPS, rounding="bfloat16"),
            index_query_finish(iq, positions, table(64), form="mxfp4"),
            key_finish(kv, weight, positions[0], table(64), EPS, form="fp8").rows,
        )

    whole = host(run(*map(jnp.asarray, (q, iq, kv, positions))))
    at = 128 - t
    part = q[:, at:], iq[:, at:], kv[at:], positions[:, at:]
    got = host(run(*map(jnp.asarray, part)))
    want = (
        whole[0][:, at:],
        jax.tree.map(lambda x: x[:, at:], whole[1]),
        jax.tree.map(lambda x: x[at:], whole[2]),
    )
    assert_same_tree(got, want)
