"""cache_write: bytes of every dtype and tree, dropped rows, untouched neighbours, donation."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsv4_jax.cache import CompressorState
from dsv4_jax.ops.cache_write import MAX_PARTS, cache_write
from dsv4_jax.quant import bits
from dsv4_jax.quant.kv import IndexRows, KvRows
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from reference.cache_write import cache_write as reference_cache_write
from tests.support.numerics import assert_same_tree, raw

B, S, T, D = 3, 10, 4, 8
DTYPES = [jnp.bfloat16, jnp.float32, E4M3, UE8M0, E2M1]
SLOTS = np.array([[0, 9, 4, 2], [-1, 10, 3, 2**31 - 1], [-(2**31), 5, 11, 6]], np.int32)
BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32

# Stores as trees of (dtype, row length).
STORES: dict[str, Any] = {
    "kv-fp8": KvRows((E4M3, 448), (UE8M0, 7), (BF16, 64)),  # rows of 448, 7 and 128 bytes
    "kv-bfloat16": KvRows((BF16, 448), None, (BF16, 64)),
    "index-mxfp4": IndexRows((E2M1, 128), (UE8M0, 4)),
    "index-fp8": IndexRows((E4M3, 128), (UE8M0, 1)),
    "state": CompressorState((F32, 24), (F32, 24)),
    "odd-rows": {"a": (E2M1, 6), "b": [(UE8M0, 3), (BF16, 5)], "c": (F32, 1), "d": None},
    "most": [(DTYPES[i % 5], 2 * i + 2) for i in range(MAX_PARTS)],
}
NAMES = list(STORES)


def typed(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random bytes, NaN patterns included, in a buffer of JAX's own (numpy's cannot be donated)."""
    dtype = np.dtype(dtype)
    if dtype == E2M1:
        data = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] // 2))
        return bits.bytes_to_e2m1(jnp.asarray(data, jnp.uint8))
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    data = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    return jnp.array(data.view(dtype), copy=True)


def is_part(x: Any) -> bool:
    return type(x) is tuple and len(x) == 2 and isinstance(x[1], int)


def store(name: str, seed: int, *lead: int) -> Any:
    """A store of random bytes ``[*lead, row length]``."""
    paths, structure = jax.tree.flatten(STORES[name], is_leaf=is_part)
    parts = [typed(seed + i, (*lead, d), dtype) for i, (dtype, d) in enumerate(paths)]
    return jax.tree.unflatten(structure, parts)


def shapes(name: str, *lead: int) -> Any:
    def shape(part: Any) -> Any:
        return jax.ShapeDtypeStruct((*lead, part[1]), part[0])

    return jax.tree.map(shape, STORES[name], is_leaf=is_part)


def ragged_slots(seed: int, b: int, t: int, s: int) -> np.ndarray:
    """Distinct where in range; about one in four outside, before or behind."""
    rng = np.random.default_rng(seed)
    out = [-1, -s, s, s + 1, 2**31 - 1, -(2**31)]
    slots = np.stack([rng.permutation(max(s, t))[:t] for _ in range(b)])
    outside = (slots >= s) | (rng.random((b, t)) < 0.25)
    return np.where(outside, rng.choice(out, (b, t)), slots).astype(np.int32)


def expected(cache: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    out = cache.copy()
    for i, j in np.ndindex(*slots.shape):
        if 0 <= slots[i, j] < cache.shape[1]:
            out[i, slots[i, j]] = rows[i, j]
    return out


def written(cache: Any, rows: Any, slots: np.ndarray) -> Any:
    """What must come out, as bits: of the loop above."""
    return jax.tree.map(lambda c, r: expected(raw(c).copy(), raw(r), slots), cache, rows)


def pointers(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def pick(tree: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def of_bits(tree: Any) -> Any:
    return jax.tree.map(lambda x: raw(x).copy(), tree)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte(dtype: Any) -> None:
    """Rows land in their slots, rows outside are dropped, every other byte stays."""
    cache, rows = typed(0, (B, S, D), dtype), typed(1, (B, T, D), dtype)
    got = cache_write(cache, rows, jnp.asarray(SLOTS))
    assert got.dtype == cache.dtype
    np.testing.assert_array_equal(raw(got), expected(raw(cache), raw(rows), SLOTS))


@pytest.mark.parametrize(
    ("name", "b", "t", "s"),
    [
        *(pytest.param(name, 2, 40, 57, id=f"{name}-b2-t40-s57") for name in NAMES),
        pytest.param("kv-fp8", 1, 1, 1, id="kv-fp8-b1-t1-s1"),
        pytest.param("kv-fp8", 5, 1, 17, id="kv-fp8-b5-t1-s17"),  # a decode step
        pytest.param("index-mxfp4", 2, 129, 130, id="index-mxfp4-b2-t129-s130"),  # a chunk
        pytest.param("state", 2, 40, 7, id="state-b2-t40-s7"),  # more rows than slots
        # Several ranges of the CPU's thread pool.
        pytest.param("kv-fp8", 3, 2000, 4000, id="kv-fp8-b3-t2000-s4000"),
    ],
)
def test_store_against_reference(name: str, b: int, t: int, s: int) -> None:
    """A7: one call for all parts of a store; the cache's old bytes, NaN among them, stay."""
    cache, rows, slots = store(name, 0, b, s), store(name, 100, b, t), ragged_slots(0, b, t, s)
    got = cache_write(cache, rows, jnp.asarray(slots))
    assert jax.tree.structure(got) == jax.tree.structure(cache)
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(cache)]
    old, new = jax.tree.map(raw, cache), jax.tree.map(raw, rows)
    want = jax.jit(reference_cache_write)(old, new, jnp.asarray(slots))
    assert_same_tree(of_bits(got), want, name)
    untouched = np.ones((b, s), bool)
    for i, j in np.argwhere((slots >= 0) & (slots < s)):
        untouched[i, slots[i, j]] = False
    for mine, before in zip(jax.tree.leaves(got), jax.tree.leaves(old), strict=True):
        np.testing.assert_array_equal(raw(mine)[untouched], before[untouched])


def test_wrong_order_of_parts_fails() -> None:
    """The comparison above tells two parts of one shape apart."""
    cache, rows, slots = (
        store("state", 0, 2, 9),
        store("state", 100, 2, 3),
        ragged_slots(0, 2, 3, 9),
    )
    swapped = cache_write(cache, CompressorState(rows.gate, rows.kv), jnp.asarray(slots))
    with pytest.raises(AssertionError):
        assert_same_tree(of_bits(swapped), written(cache, rows, slots))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_dropped(dtype: Any) -> None:
    cache, rows = typed(0, (B, S, D), dtype), typed(1, (B, T, D), dtype)
    got = cache_write(cache, rows, jnp.full((B, T), -1, jnp.int32))
    np.testing.assert_array_equal(raw(got), raw(cache))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: Any) -> None:
    """A6."""
    cache = typed(0, (B, S, D), dtype)
    got = cache_write(cache, typed(1, (B, 0, D), dtype), jnp.zeros((B, 0), jnp.int32))
    np.testing.assert_array_equal(raw(got), raw(cache))


@pytest.mark.parametrize(
    ("b", "t", "s"), [(0, 3, 9), (2, 0, 9), (2, 3, 0), (0, 0, 0)], ids=lambda n: str(n)
)
@pytest.mark.parametrize("name", ["kv-fp8", "index-mxfp4"])
def test_nothing_to_do(name: str, b: int, t: int, s: int) -> None:
    """A6: no sequence, no row, no slot."""
    cache, rows = store(name, 0, b, s), store(name, 100, b, t)
    got = cache_write(cache, rows, jnp.zeros((b, t), I32))
    assert_same_tree(of_bits(got), of_bits(cache))
    assert [x.shape for x in jax.tree.leaves(got)] == [x.shape for x in jax.tree.leaves(cache)]


def test_rows_that_share_a_slot() -> None:
    """Any mixture of their bytes, and nothing else in the cache moves."""
    cache, rows = store("kv-fp8", 0, 2, 50), store("kv-fp8", 100, 2, 4000)
    got = cache_write(cache, rows, jnp.full((2, 4000), 7, I32))
    for mine, old, new in zip(*map(jax.tree.leaves, (got, cache, rows)), strict=True):
        mine, old, new = raw(mine), raw(old), raw(new)
        others = np.arange(50) != 7
        np.testing.assert_array_equal(mine[:, others], old[:, others])
        assert (mine[:, 7:8] == new).any(axis=1).all()


@pytest.mark.parametrize("donate", [False, True], ids=["copied", "donated"])
def test_cache_as_its_own_rows(donate: bool) -> None:
    """All rows are those from before the call, whatever lies where: here a reversal."""
    cache = store("kv-fp8", 0, B, 64)
    slots = np.tile(np.arange(63, -1, -1, dtype=np.int32), (B, 1))
    want = jax.tree.map(lambda x: raw(x)[:, ::-1].copy(), cache)
    write = jax.jit(lambda c: cache_write(c, c, slots), donate_argnums=(0,) if donate else ())
    assert_same_tree(of_bits(write(cache)), want)


def test_one_array_as_two_parts() -> None:
    cache, rows = typed(0, (B, S, D), F32), [typed(i, (B, T, D), F32) for i in (1, 2)]
    want = [written(cache, each, SLOTS) for each in rows]
    write = jax.jit(lambda c: cache_write([c, c], rows, SLOTS), donate_argnums=0)
    assert_same_tree(of_bits(write(cache)), want)


def test_reads_around_a_write() -> None:
    """In one program a read before the write sees the old bytes, one after it the new ones."""
    cache, rows = store("kv-fp8", 0, B, S), store("kv-fp8", 100, B, T)
    before, after = of_bits(cache), written(cache, rows, SLOTS)

    def step(cache: Any) -> tuple[Any, Any, Any]:
        new = cache_write(cache, rows, SLOTS)
        return (*(jax.tree.map(lambda x: x[:, 2:7], c) for c in (cache, new)), new)

    got = jax.jit(step, donate_argnums=0)(cache)
    old_slice, new_slice = (jax.tree.map(lambda x: x[:, 2:7], c) for c in (before, after))
    assert_same_tree(of_bits(got), (old_slice, new_slice, after))


def test_64_bit_slots_do_not_wrap() -> None:
    """A slot beyond int32 is outside, not the slot that its low half names."""
    slots = np.array([[2**32 + 3, 5, -(2**32) + 1, 2**63 - 1]], np.int64)
    cache, rows = store("kv-fp8", 0, 1, 9), store("kv-fp8", 100, 1, 4)
    with jax.enable_x64(True):
        got = cache_write(cache, rows, jnp.asarray(slots))
    assert_same_tree(of_bits(got), written(cache, rows, slots))


# Ways to write `rows` at `slots` and then at `slots + 1`.
def _twice(cache: Any, rows: Any, slots: jax.Array) -> Any:
    return cache_write(cache_write(cache, rows, slots), rows, slots + 1)


def _scan(cache: Any, rows: Any, slots: jax.Array) -> Any:
    def step(cache: Any, shift: jax.Array) -> tuple[Any, None]:
        return cache_write(cache, rows, slots + shift), None

    return lax.scan(step, cache, jnp.arange(2, dtype=I32))[0]


def _while(cache: Any, rows: Any, slots: jax.Array) -> Any:
    def step(state: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        shift, cache = state
        return shift + 1, cache_write(cache, rows, slots + shift)

    return lax.while_loop(lambda state: state[0] < 2, step, (jnp.int32(0), cache))[1]


LOOPS: dict[str, Callable[..., Any]] = {"jit": _twice, "scan": _scan, "while": _while}


@pytest.mark.parametrize(
    ("name", "loop", "ahead"),
    [
        *((name, "jit", False) for name in NAMES),
        *((name, "scan", False) for name in ("kv-fp8", "index-mxfp4", "most")),
        *((name, "while", False) for name in ("kv-fp8", "index-mxfp4", "most")),
        *(("kv-fp8", loop, True) for loop in LOOPS),
    ],
)
def test_donated_cache_keeps_its_pointers(name: str, loop: str, ahead: bool) -> None:
    """B12: every part of the result lies where the donated one lay, its old bytes untouched."""
    cache, rows = store(name, 0, B, 300), store(name, 100, B, T)
    rng = np.random.default_rng(0)
    slots = np.stack([2 * rng.permutation(149)[:T] for _ in range(B)]).astype(np.int32)
    slots[1, 2], slots[2, 0] = -9, 300
    want = written(written(cache, rows, slots), rows, slots + 1)
    before = pointers(cache)
    step = jax.jit(LOOPS[loop], donate_argnums=0)
    if ahead:
        step = step.lower(cache, rows, jnp.asarray(slots)).compile()
    got = step(cache, rows, jnp.asarray(slots))
    assert all(part.is_deleted() for part in jax.tree.leaves(cache))
    assert pointers(got) == before
    assert_same_tree(of_bits(got), want)


def test_used_after_donation() -> None:
    """B10: JAX's own error."""
    cache, rows = typed(0, (B, S, D), jnp.float32), typed(1, (B, T, D), jnp.float32)
    write = jax.jit(cache_write, donate_argnums=0)
    write(cache, rows, jnp.asarray(SLOTS))
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        write(cache, rows, jnp.asarray(SLOTS))


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", ["kv-fp8", "index-mxfp4"])
def test_not_donated_leaves_the_input_alone(name: str, loop: str) -> None:
    """B11: without donation XLA copies the cache, once."""
    cache, rows = store(name, 0, B, 30), store(name, 100, B, T)
    slots = np.tile(np.array([4, -9, 0, 28], np.int32), (B, 1))
    before, place = of_bits(cache), pointers(cache)
    want = written(written(cache, rows, slots), rows, slots + 1)
    got = jax.jit(LOOPS[loop])(cache, rows, jnp.asarray(slots))
    assert_same_tree(of_bits(got), want)
    assert_same_tree(of_bits(cache), before)
    assert not set(pointers(got)) & set(place)


SLOTS_OF_64_MIB = 115_112
KV_BYTES = 448 + 7 + 2 * 64
# What XLA may keep beside the cache: counters, relaid rows; a copy of any part would be 800 KiB.
MAX_TEMPORARIES = 1 << 19


@pytest.mark.parametrize("loop", [*LOOPS, "vmap"])
def test_no_temporaries(loop: str) -> None:
    """B12: no copy of a 64 MiB cache, nor of its smallest part."""
    cache, rows = shapes("kv-fp8", 1, SLOTS_OF_64_MIB), shapes("kv-fp8", 1, T)
    slots = jax.ShapeDtypeStruct((1, T), I32)
    fn = LOOPS.get(loop)
    if fn is None:
        cache, rows = shapes("kv-fp8", 1, 1, SLOTS_OF_64_MIB), shapes("kv-fp8", 1, 1, T)
        slots, fn = jax.ShapeDtypeStruct((1, 1, T), I32), jax.vmap(cache_write)
    memory = jax.jit(fn, donate_argnums=0).lower(cache, rows, slots).compile().memory_analysis()
    print(memory)
    assert memory.temp_size_in_bytes < MAX_TEMPORARIES
    assert memory.alias_size_in_bytes == SLOTS_OF_64_MIB * KV_BYTES


# Both steps are all dispatch, some 10 us on a CPU; to copy the larger cache takes it 10 ms.
MOST_TIMES_SLOWER = 3.0


def test_time_does_not_depend_on_the_cache() -> None:
    """A donated step on a cache of 1,000,000 rows against one of 4,000."""
    write = jax.jit(cache_write, donate_argnums=0)
    rows = store("index-mxfp4", 0, 1, 1)
    caches = [jax.tree.map(jnp.zeros_like, shapes("index-mxfp4", 1, s)) for s in (4000, 1000_000)]
    slots = [jnp.full((1, 1), slot, I32) for slot in (3999, 999_999)]
    times: list[list[float]] = [[], []]
    for _ in range(100):  # in turns, so that a busy machine slows both down
        for i in (0, 1):
            start = time.perf_counter()
            caches[i] = jax.block_until_ready(write(caches[i], rows, slots[i]))
            times[i].append(time.perf_counter() - start)
    short, long = (float(np.median(each)) for each in times)
    print(f"{short * 1e6:.0f} us of 4,000 rows, {long * 1e6:.0f} us of 1,000,000")
    assert long < MOST_TIMES_SLOWER * short


@pytest.mark.parametrize(
    "axes", [(0, 0, 0), (0, 0, None), (0, None, 0), (None, 0, 0), (1, 0, 1), (-1, 2, 0)], ids=str
)
@pytest.mark.parametrize("name", ["kv-fp8", "index-fp8"])
def test_vmap_is_a_loop(name: str, axes: tuple[int | None, ...]) -> None:
    """A19: equal to single calls, by one launch."""
    n = 4
    whole = store(name, 0, n, B, S), store(name, 100, n, B, T), ragged_slots(0, n * B, T, S)
    whole = (*whole[:2], jnp.asarray(whole[2].reshape(n, B, T)))
    args = [
        pick(x, 0)
        if axis is None
        else jax.tree.map(lambda x, axis=axis: jnp.moveaxis(x, 0, axis), x)
        for x, axis in zip(whole, axes, strict=True)
    ]
    mapped = jax.vmap(cache_write, in_axes=axes)
    got = jax.jit(mapped)(*args)
    for i in range(n):
        one = [pick(x, 0 if axis is None else i) for x, axis in zip(whole, axes, strict=True)]
        assert_same_tree(of_bits(pick(got, i)), of_bits(cache_write(*one)), f"{i}")
    jaxpr = str(jax.make_jaxpr(mapped)(*args))
    assert jaxpr.count("ffi_call[") == 1 and "scan[" not in jaxpr and "while[" not in jaxpr


def test_vmap_donated() -> None:
    """B12 under `jax.vmap`."""
    cache, rows, slots = store("kv-fp8", 0, 2, B, S), store("kv-fp8", 9, 2, B, T), SLOTS
    want = [written(pick(cache, i), pick(rows, i), slots) for i in (0, 1)]
    before = pointers(cache)
    write = jax.jit(jax.vmap(cache_write, in_axes=(0, 0, None)), donate_argnums=0)
    got = write(cache, rows, jnp.asarray(slots))
    assert pointers(got) == before
    for i in (0, 1):
        assert_same_tree(of_bits(pick(got, i)), want[i])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_shard_map(kind: AxisType) -> None:
    """On a mesh of one device; of two: tests/fault/test_ffi_faults.py."""
    mesh = jax.make_mesh((1,), ("b",), axis_types=(kind,))
    spec = PartitionSpec("b")
    cache, rows, slots = store("kv-fp8", 0, B, S), store("kv-fp8", 100, B, T), jnp.asarray(SLOTS)
    want = written(cache, rows, SLOTS)
    args = jax.device_put((cache, rows, slots), NamedSharding(mesh, spec))
    mapped = jax.shard_map(cache_write, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec)
    before = pointers(args[0])
    got = jax.jit(mapped, donate_argnums=0)(*args)
    assert pointers(got) == before
    assert_same_tree(of_bits(got), want)
