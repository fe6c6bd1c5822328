"""CUDA kernels against the CPU handlers of the same library, bit for bit, and how they are run.

Some tests start other processes: XLA reads its flags, and we DSV4_SYNC, once. Such a process is
this module as a program: ``python -m tests.ops.test_gpu_ops RESULTS.npz`` or ``--fault``.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import library
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.rmsnorm_nvfp4 import rmsnorm_nvfp4
from dsv4_jax.quant.kv import KvRows
from dsv4_jax.quant.nvfp4 import BLOCK, Nvfp4
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.bench.sanitize import fault
from tests.bench.timing import filled, random_bytes
from tests.support.numerics import assert_same_bits, assert_same_tree, raw

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
EPS = 1e-6
INT32 = np.iinfo(np.int32)
DTYPES = [jnp.bfloat16, jnp.float32, E4M3, UE8M0, E2M1]
STATIC_SCALES = (1e-38, 2.0**-9, 0.0123, 1e30)
"""The first is subnormal; with the last every code is 0."""
CHILD_SECONDS = 120
"""Start-up of JAX on a GPU takes under ten; a hang is a failure."""


def host(tree: Any) -> Any:
    """A tree as numpy arrays."""
    return jax.tree.map(np.asarray, tree)


def on_cpu(fn: Callable[..., Any], *args: Any) -> Any:
    """``fn`` by the CPU handlers, its results as numpy arrays."""
    return host(fn(*jax.device_put(args, jax.devices("cpu")[0])))


USED = ("dsv4.cache_write", "dsv4.rmsnorm_nvfp4")
"""Targets of the workload."""


def counts() -> dict[str, tuple[int, int]]:
    return library.launch_counts()


def tokens(seed: int, t: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of 1e-30 to 1e30, every few with zeros, signed zeros, NaN, Inf or subnormals."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((t, d)) * 10.0 ** rng.uniform(-30, 30, (t, 1))
    x[::7] = rng.standard_normal((len(x[::7]), d)) * 10.0 ** rng.uniform(-9, 0, (1, d))
    x[3::11] = 0.0
    x[4::11, : min(d, 32)] = -0.0
    x[5::11, d // 2] = np.nan
    x[6::11, d - 1] = -np.inf
    x[7::11, :BLOCK] *= 1e-38
    weight = 1 + 0.5 * rng.standard_normal(d)
    weight[:: max(d // 5, 1)] *= 1e-30  # whole values far below their block's step, or subnormal
    cast = np.dtype(jnp.bfloat16)
    with np.errstate(over="ignore"):
        return x.astype(np.float32).astype(cast), weight.astype(np.float32).astype(cast)


@jax.jit
def every_scale(x: jax.Array, weight: jax.Array, *scales: jax.Array) -> list[Nvfp4]:
    """The dynamic and the static forms: enough launches for a command buffer."""
    static = [rmsnorm_nvfp4(x, weight, EPS, scale) for scale in scales]
    return [rmsnorm_nvfp4(x, weight, EPS), *static]


@pytest.mark.parametrize("t", [0, 1, 2, 3, 129, 1000])
@pytest.mark.parametrize("d", [16, 48, 512, 528, 1024, 1536, 4096, 7168, 16384])
def test_rmsnorm_nvfp4_equals_the_cpu_handler(d: int, t: int) -> None:
    """A7, A13-A16, A18: every lane count, every launch bound, more tokens than thread blocks."""
    args = (*tokens(d + t, t, d), *map(np.float32, STATIC_SCALES))
    got, expected = host(every_scale(*args)), on_cpu(every_scale, *args)
    for scale, a, e in zip(("dynamic", *STATIC_SCALES), got, expected, strict=True):
        assert_same_tree(a, e, f"d={d} t={t} scale {scale}")


@pytest.mark.parametrize("exponent", [-126, -130, -149])
def test_rmsnorm_nvfp4_subnormal_results(exponent: int) -> None:
    """Norms at and below the smallest normal number: no side may flush them."""
    x, _ = tokens(0, 5, 64)
    weight = np.full(64, 2.0 ** max(exponent, -133), np.float32).astype(jnp.bfloat16)
    args = (x, weight, *map(np.float32, STATIC_SCALES))
    assert_same_tree(host(every_scale(*args)), on_cpu(every_scale, *args))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("d", [16, 4096, 7168])
def test_a_bad_token_stays_alone(bad: float, d: int) -> None:
    """A13."""
    x, weight = tokens(1, 3, d)
    x[:] = 1.5
    x[2] = 2.5
    clean = host(rmsnorm_nvfp4(jnp.asarray(x), jnp.asarray(weight), EPS))
    x[1, d // 3] = bad
    got = host(rmsnorm_nvfp4(jnp.asarray(x), jnp.asarray(weight), EPS))
    for part, want in zip(got, clean, strict=True):
        assert_same_bits(part[[0, 2]], want[[0, 2]])
    assert np.isnan(got.block_scale[1].astype(np.float32)).any()


@pytest.mark.parametrize(("d", "t"), [(16, 1), (528, 3), (7168, 2), (1536, 700)])
@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_rmsnorm_nvfp4_writes_every_element(d: int, t: int, byte: int) -> None:
    """B17: the results take donated buffers full of one byte."""
    shapes = Nvfp4(((t, d), E2M1), ((t, d // BLOCK), E4M3), ((t,), jnp.float32))
    x, weight = map(jnp.asarray, tokens(2, t, d))
    poison = Nvfp4(*(filled(byte, *shape) for shape in shapes))
    pointers = {leaf.unsafe_buffer_pointer() for leaf in poison}
    run = jax.jit(lambda _, x, w: rmsnorm_nvfp4(x, w, EPS), donate_argnums=0, keep_unused=True)
    got = run(poison, x, weight)
    assert {leaf.unsafe_buffer_pointer() for leaf in got} == pointers
    assert_same_tree(host(got), on_cpu(lambda x, w: rmsnorm_nvfp4(x, w, EPS), x, weight))


def test_rmsnorm_nvfp4_of_slices_and_transposes() -> None:
    """A11, A12: whatever address and layout XLA makes of them."""
    flat = jnp.asarray(np.random.default_rng(3).standard_normal(4 * 64 + 1), jnp.bfloat16)
    weight = jnp.asarray(np.random.default_rng(4).standard_normal(64), jnp.bfloat16)

    def run(flat: jax.Array, weight: jax.Array) -> list[Nvfp4]:
        shifted, turned = flat[1:].reshape(4, 64), flat[:256].reshape(64, 4).T
        return [rmsnorm_nvfp4(x, weight, EPS) for x in (shifted, turned)]

    run = jax.jit(run)
    assert_same_tree(host(run(flat, weight)), on_cpu(run, flat, weight))


# Bytes of a row of 1, 2, 7, 14, 28, 33, 64 or more, so that units of 1, 4 and 16 bytes occur.
WIDTHS = [1, 7, 8, 33, 64, 448]
SLOTS = np.array(
    [
        [0, 9, 4, 2, -1],
        [INT32.max, 3, 10, INT32.min, 0],
        [-1, -7, 10, INT32.max, INT32.min],  # nothing
        [9, 8, 7, 6, 5],
    ],
    np.int32,
)
ROWS = 10


def write_expected(cache: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    out = cache.copy()
    for i, j in np.ndindex(*slots.shape):
        if 0 <= slots[i, j] < cache.shape[1]:
            out[i, slots[i, j]] = rows[i, j]
    return out


@pytest.mark.parametrize("donated", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_write_every_byte(dtype: Any, width: int, donated: bool) -> None:
    """Rows in their slots, rows outside dropped, all other bytes as they were; the copy too."""
    width += width % 2 if dtype == E2M1 else 0
    b, t = SLOTS.shape
    cache = random_bytes(0, (b, ROWS, width), dtype)
    rows = random_bytes(1, (b, t, width), dtype)
    before, new, pointer = raw(cache).copy(), raw(rows), cache.unsafe_buffer_pointer()
    write = jax.jit(lambda c, r, s: cache_write(c, r, s), donate_argnums=0 if donated else ())
    got = write(cache, rows, jnp.asarray(SLOTS))
    assert (got.unsafe_buffer_pointer() == pointer) == donated
    np.testing.assert_array_equal(raw(got), write_expected(before, new, SLOTS))
    if not donated:
        np.testing.assert_array_equal(raw(cache), before)


def store(seed: int, b: int, s: int) -> dict[str, Any]:
    """Arrays of every unit, under one set of slots."""
    return {
        "keys": KvRows(
            random_bytes(seed, (b, s, 448), E4M3),
            random_bytes(seed + 1, (b, s, 7), UE8M0),
            random_bytes(seed + 2, (b, s, 64), jnp.bfloat16),
        ),
        "codes": random_bytes(seed + 3, (b, s, 14), E2M1),
        "state": random_bytes(seed + 4, (b, s, 33), jnp.float32),
    }


def test_cache_write_several_arrays() -> None:
    """Of one store, and from slices that start inside a buffer (A12)."""
    b, t = SLOTS.shape

    def write(cache: Any, rows: Any, slots: jax.Array) -> Any:
        return cache_write(cache, jax.tree.map(lambda x: x[:, 1:], rows), slots)

    write = jax.jit(write)
    cache, rows = store(0, b, ROWS), store(10, b, t + 1)
    got = write(cache, rows, jnp.asarray(SLOTS))
    for leaf, old, new in zip(*map(jax.tree.leaves, (got, cache, rows)), strict=True):
        np.testing.assert_array_equal(raw(leaf), write_expected(raw(old), raw(new)[:, 1:], SLOTS))


def test_cache_write_many_rows() -> None:
    """More rows than a grid has warps (65,536 blocks of 4)."""
    b, t = 3, 100_000
    cache, rows = random_bytes(0, (b, t, 7), E4M3), random_bytes(1, (b, t, 7), E4M3)
    slots = np.stack([np.random.default_rng(i).permutation(t) for i in range(b)]).astype(np.int32)
    got = raw(cache_write(cache, rows, jnp.asarray(slots)))
    expected = np.empty_like(got)
    expected[np.arange(b)[:, None], slots] = raw(rows)
    np.testing.assert_array_equal(got, expected)


def _empty_norm() -> Any:
    return rmsnorm_nvfp4(jnp.zeros((0, 64), jnp.bfloat16), jnp.ones(64, jnp.bfloat16), EPS)


def _no_rows() -> Any:
    return cache_write(jnp.ones((2, 4, 8)), jnp.ones((2, 0, 8)), jnp.zeros((2, 0), jnp.int32))


def _no_batch() -> Any:
    return cache_write(jnp.ones((0, 4, 8)), jnp.ones((0, 3, 8)), jnp.zeros((0, 3), jnp.int32))


def _no_slots() -> Any:
    return cache_write(jnp.ones((2, 0, 8)), jnp.ones((2, 3, 8)), jnp.zeros((2, 3), jnp.int32))


@pytest.mark.parametrize("call", [_empty_norm, _no_rows, _no_batch, _no_slots])
def test_empty_calls_launch_nothing(call: Callable[[], Any]) -> None:
    """A6: alone, and among others in a command buffer."""
    before = counts()
    alone = host(call())
    many = jax.jit(lambda: [call() for _ in range(6)])
    for _ in range(3):
        for each in host(many()):
            assert_same_tree(each, alone)
    assert counts() == before
    with jax.default_device(jax.devices("cpu")[0]):
        assert_same_tree(alone, host(call()))


class Step:
    """Six launches that depend on one another through a cache; the program of the next tests."""

    def __init__(self, seed: int = 0) -> None:
        self.x, self.weight = map(jnp.asarray, tokens(seed, 3, 528))
        self.slots = jnp.asarray([[2, 0, 3]], jnp.int32)

    @staticmethod
    def cache() -> Nvfp4:
        shapes = ((1, 4, 528), E2M1), ((1, 4, 33), E4M3), ((1, 4, 1), jnp.float32)
        return Nvfp4(*(filled(0, *shape) for shape in shapes))

    @staticmethod
    def once(cache: Nvfp4, x: jax.Array, weight: jax.Array, slots: jax.Array) -> Nvfp4:
        code, block_scale, token_scale = rmsnorm_nvfp4(x, weight, EPS)
        rows = Nvfp4(code[None], block_scale[None], token_scale[None, :, None])
        return cache_write(cache, rows, slots)

    @staticmethod
    def thrice(cache: Nvfp4, x: jax.Array, weight: jax.Array, slots: jax.Array) -> Nvfp4:
        for shift in range(3):
            cache = Step.once(cache, jnp.roll(x, shift, 1), weight, (slots + shift) % 4)
        return cache

    def args(self) -> tuple[jax.Array, ...]:
        return self.x, self.weight, self.slots


def test_same_bits_however_it_is_run() -> None:
    """A21: eager, under jit twice, ahead of time, in a scan; and the CPU handlers."""
    step = Step()
    eager = host(step.thrice(step.cache(), *step.args()))
    jitted = jax.jit(Step.thrice, donate_argnums=0)
    compiled = jitted.lower(step.cache(), *step.args()).compile()

    @jax.jit
    def scanned(cache: Nvfp4, x: jax.Array, weight: jax.Array, slots: jax.Array) -> Nvfp4:
        def body(cache: Nvfp4, shift: jax.Array) -> tuple[Nvfp4, None]:
            one = jnp.roll(x, shift, 1), weight, (slots + shift) % 4
            return Step.once(cache, *one), None

        return jax.lax.scan(body, cache, jnp.arange(3, dtype=jnp.int32))[0]

    runs = {
        "jit": jitted,
        "jit again": jitted,
        "jit a third time": jitted,
        "ahead of time": compiled,
        "scan": scanned,
        "scan again": scanned,
    }
    for name, run in runs.items():
        assert_same_tree(host(run(step.cache(), *step.args())), eager, name)
    assert_same_tree(on_cpu(Step.thrice, step.cache(), *step.args()), eager, "CPU handlers")


def test_steps_are_replayed_from_a_graph() -> None:
    """Captured once; afterwards no handler runs and the cache stays where it is."""
    step = Step()
    run = jax.jit(Step.thrice, donate_argnums=0)
    args, cache = step.args(), step.cache()
    pointers = [leaf.unsafe_buffer_pointer() for leaf in cache]
    before = counts()
    for _ in range(3):
        cache = jax.block_until_ready(run(cache, *args))
    warm = counts()
    for target in ("dsv4.cache_write", "dsv4.rmsnorm_nvfp4"):
        new = warm[target][0] - before[target][0]
        assert new > 0 and new % 3 == 0, f"{target}: {new} launches captured, three a step"
    for _ in range(5):
        cache = jax.block_until_ready(run(cache, *args))
    assert counts() == warm
    assert [leaf.unsafe_buffer_pointer() for leaf in cache] == pointers


def test_cache_in_a_scan_stays_where_it_is() -> None:
    """B12, with a cache that a copy could not hide."""
    s, t = 1 << 16, 8  # 47 MB
    cache, rows = store(0, 1, s), store(5, 1, t)

    def scanned(cache: Any, rows: Any) -> Any:
        def body(cache: Any, i: jax.Array) -> tuple[Any, None]:
            slots = i * t + jnp.arange(t, dtype=jnp.int32)[None]
            return cache_write(cache, rows, slots), None

        return jax.lax.scan(body, cache, jnp.arange(16, dtype=jnp.int32))[0]

    run = jax.jit(scanned, donate_argnums=0)
    before = [raw(leaf).copy() for leaf in jax.tree.leaves(cache)]
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]
    memory = run.lower(cache, rows).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1e6
    cache = run(cache, rows)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)] == pointers
    for old, leaf, new in zip(before, *map(jax.tree.leaves, (cache, rows)), strict=True):
        old[:, : 16 * t] = np.tile(raw(new), (1, 16, 1))
        np.testing.assert_array_equal(raw(leaf), old)


def test_threads() -> None:
    """E8."""
    run = jax.jit(Step.thrice, donate_argnums=0)
    steps = [Step(seed) for seed in range(4)]
    expected = [host(run(step.cache(), *step.args())) for step in steps]

    def work(i: int) -> None:
        for _ in range(20):
            assert_same_tree(host(run(steps[i].cache(), *steps[i].args())), expected[i], f"{i}")

    with concurrent.futures.ThreadPoolExecutor(len(steps)) as pool:
        list(pool.map(work, range(len(steps))))


# Other processes: their settings, what they print and write.
CHILDREN: dict[str, tuple[dict[str, str], str]] = {
    "no graphs": ({"XLA_FLAGS": "--xla_gpu_enable_command_buffer="}, ""),
    "sync": ({"DSV4_SYNC": "1"}, ""),
    "fault": ({"DSV4_SYNC": "1"}, "--fault"),
}


def _flat(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): raw(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def workload() -> dict[str, Any]:
    """Everything of which results must not depend on settings."""
    step = Step()
    run = jax.jit(Step.thrice, donate_argnums=0)
    x, weight = map(jnp.asarray, tokens(9, 40, 1536))
    b, t = SLOTS.shape
    results: dict[str, Any] = {}
    for _ in range(3):  # the first may be without a graph anyway
        results["norms"] = every_scale(x, weight, *map(np.float32, STATIC_SCALES))
        results["cache"] = run(step.cache(), *step.args())
        results["store"] = cache_write(store(0, b, ROWS), store(10, b, t), jnp.asarray(SLOTS))
    return results


@pytest.fixture(scope="module")
def children(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], tuple[str, Path]]]:
    """Starts all at once; ``children(name)`` waits for one: what it printed, its npz file."""
    folder = tmp_path_factory.mktemp("children")
    running: dict[str, tuple[subprocess.Popen[str], Path]] = {}
    for name, (settings, argument) in CHILDREN.items():
        out = folder / f"{len(running)}.npz"
        environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **settings}
        running[name] = (
            subprocess.Popen(
                [sys.executable, "-m", "tests.ops.test_gpu_ops", argument or str(out)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ),
            out,
        )

    def finished(name: str) -> tuple[str, Path]:
        process, out = running[name]
        printed = process.communicate(timeout=CHILD_SECONDS)[0]
        assert process.returncode == 0, printed
        return printed, out

    yield finished
    for process, _ in running.values():
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


@pytest.mark.parametrize("name", ["no graphs", "sync"])
def test_same_results_without_graphs(
    name: str, children: Callable[[str], tuple[str, Path]]
) -> None:
    """E10: capture off by XLA's flag, and by DSV4_SYNC; here it is on."""
    before = counts()
    expected = _flat(workload())
    for target in USED:
        assert counts()[target][0] > before[target][0], f"{target} is captured here"
    printed, out = children(name)
    launches = json.loads(printed.splitlines()[-1])
    for target in USED:
        captured, eager = launches[target]
        assert captured == 0 and eager > 0, target
    with np.load(out) as found:
        assert sorted(found) == sorted(expected)
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value, err_msg=f"{name} {key}")


def test_sync_names_the_op(children: Callable[[str], tuple[str, Path]]) -> None:
    """A kernel of ours that reads unallocated memory, under DSV4_SYNC=1."""
    printed, _ = children("fault")
    assert "dsv4.cache_write" in printed and "CUDA error" in printed, printed


def main(argument: str) -> None:
    """A process of the tests above."""
    if argument == "--fault":
        fault()
    np.savez(argument, **_flat(workload()))
    print(json.dumps(counts()))


if __name__ == "__main__":
    main(sys.argv[1])
