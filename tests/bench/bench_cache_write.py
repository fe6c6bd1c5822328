"""cache_write into the stores of a decode step and a prefill; run with ``-m bench``.

Also what a step promises: its time does not depend on the cache's length, the cache stays where it
is, and a launch inside a `lax.scan` costs little more than any launch.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.cache import CompressorState
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.rmsnorm_nvfp4 import rmsnorm_nvfp4
from dsv4_jax.quant.kv import IndexRows, KvRows
from dsv4_jax.quant.nvfp4 import BLOCK, Nvfp4
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.bench import timing
from tests.support.numerics import raw

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

WINDOW = 128
STORES = {
    "kv": KvRows((448, E4M3), (7, UE8M0), (64, jnp.bfloat16)),
    "state": CompressorState((1024, jnp.float32), (1024, jnp.float32)),
    "index": IndexRows((128, E2M1), (4, UE8M0)),
}
"""Row length and dtype of every array; at head dim 512 and CSA's two halves."""

CASES = [
    pytest.param("kv", 1, 1, WINDOW, id="window-b1"),  # one warp per array
    pytest.param("kv", 8, 1, WINDOW, id="window-b8"),
    pytest.param("kv", 128, 1, WINDOW, id="window-b128"),
    pytest.param("kv", 1, 4096, 4096, id="pool-prefill-t4096"),  # 1024 thread blocks per array
    pytest.param("state", 1, 1, 8, id="state-b1"),  # 16-byte units
    pytest.param("state", 128, 1, 8, id="state-b128"),
    pytest.param("index", 1, 1, 1024, id="index-b1"),  # packed codes, 4-byte scale rows
    pytest.param("index", 128, 1, 1024, id="index-b128"),
]

RATIO = 4
SHORT, LONG = 4096 // RATIO, 1048576 // RATIO
"""Rows of a CSA pool for 4 k and for 1 M positions."""
LONG_SETS = 8
"""Of 153 MB each at `LONG`."""
MOST_GROWTH = 1.25
"""1 M over 4 k positions. The same bytes move; what is left is noise and page-table misses."""
MOST_TEMPORARIES = 1e6
"""Bytes; a copied cache would be 153 MB."""
SCAN_STEPS, SCAN_UNROLL = 2048, 16
"""Long enough that dispatch vanishes; the loop's own counter kernel is spread over 32 launches."""
SCAN_US = 1.5
"""Per launch; 1.1 us is what a trivial kernel takes from launch to launch."""


def is_spec(x: Any) -> bool:
    return isinstance(x, tuple) and not hasattr(x, "_fields")


def struct(store: str, b: int, rows: int) -> Any:
    """Shapes of a store, or of rows for it."""
    return jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct((b, rows, spec[0]), spec[1]),
        STORES[store],
        is_leaf=is_spec,
    )


def row_bytes(store: str) -> float:
    """Of all arrays; two E2M1 codes share a byte."""
    specs = jax.tree.leaves(STORES[store], is_leaf=is_spec)
    return sum(n * (0.5 if dtype == E2M1 else np.dtype(dtype).itemsize) for n, dtype in specs)


def make_rows(store: str, seed: int, b: int, t: int, s: int) -> tuple[Any, jax.Array]:
    """Random bytes for slots ``start .. start + t - 1`` of each sequence, modulo ``s``."""
    leaves, structure = jax.tree.flatten(struct(store, b, t))
    rows = [
        timing.random_bytes(seed * 8 + j, leaf.shape, leaf.dtype) for j, leaf in enumerate(leaves)
    ]
    start = np.random.default_rng(seed).integers(0, s, (b, 1))
    slots = jnp.asarray((start + np.arange(t)) % s, jnp.int32)
    return structure.unflatten(rows), slots


def check(store: str, result: Any, rows: Any, slots: jax.Array) -> None:
    """Every byte: rows in their slots, 0xFF elsewhere."""
    where = np.arange(slots.shape[0])[:, None], np.asarray(slots)
    for part, new in zip(jax.tree.leaves(result), jax.tree.leaves(rows), strict=True):
        actual = raw(jax.device_get(part))
        expected = np.full_like(actual, 0xF if part.dtype == E2M1 else np.iinfo(actual.dtype).max)
        expected[where] = raw(jax.device_get(new))
        if not np.array_equal(actual, expected):
            raise AssertionError(f"{store}: {np.sum(actual != expected)} elements are wrong")


def measure(
    store: str, case: str, b: int, t: int, s: int, max_us: float | None = None, **settings: Any
) -> timing.Result:
    """One store; every array's rows are read and written, and the slots read."""
    result = timing.measure(
        "cache_write",
        case,
        cache_write,
        lambda i: (timing.poisoned(struct(store, b, s)), make_rows(store, i, b, t, s)),
        lambda i, cache: check(store, cache, *make_rows(store, i, b, t, s)),
        target="cache_write",
        launch_bytes=b * t * (2 * row_bytes(store) + 4),
        max_us=max_us,
        **settings,
    )
    result.append(timing.default_path())
    return result


@pytest.mark.parametrize(("store", "b", "t", "s"), CASES)
def test_time(store: str, b: int, t: int, s: int) -> None:
    measure(store, f"{store} b={b} t={t} of {s}", b, t, s)


def test_independent_of_max_len() -> None:
    """One row into a pool for 4 k and for 1 M positions."""
    short = measure("kv", f"kv b=1 t=1 of {SHORT}", 1, 1, SHORT, sets=LONG_SETS)
    bar = round(short.us * MOST_GROWTH, 3)
    measure("kv", f"kv b=1 t=1 of {LONG}", 1, 1, LONG, bar, sets=LONG_SETS).require()


@pytest.mark.parametrize("s", [SHORT, LONG])
def test_in_place(s: int) -> None:
    """B12: the donated cache keeps its buffers and XLA sets nothing of its size aside."""
    cache = timing.poisoned(struct("kv", 1, s))
    rows, slots = make_rows("kv", 0, 1, 1, s)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)]
    step = jax.jit(lambda c, r, j: cache_write(c, r, j), donate_argnums=0)
    memory = step.lower(cache, rows, slots).compile().memory_analysis()
    assert memory.temp_size_in_bytes < MOST_TEMPORARIES
    for _ in range(3):
        cache = step(cache, rows, slots)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache)] == pointers
    check("kv", cache, rows, slots)


def test_scan() -> None:
    """A token's norm, its codes and scales into a pool: two launches a step, one graph.

    The norm's static scale is the step before's, so that no launch repeats another for XLA.
    """
    d, eps = 512, 1e-6
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (1, d)).astype(jnp.bfloat16)
    weight = (1 + 0.1 * jax.random.normal(keys[1], (d,))).astype(jnp.bfloat16)
    slots = jnp.full((1, 1), LONG - 1, jnp.int32)
    scale = jnp.float32(2.0**-9)
    shapes = Nvfp4(
        jax.ShapeDtypeStruct((1, LONG, d), E2M1),
        jax.ShapeDtypeStruct((1, LONG, d // BLOCK), E4M3),
        jax.ShapeDtypeStruct((1, LONG, 1), jnp.float32),
    )

    def rows(x: jax.Array, weight: jax.Array, scale: jax.Array) -> Nvfp4:
        code, block_scale, token_scale = rmsnorm_nvfp4(x, weight, eps, scale)
        return Nvfp4(code[None], block_scale[None], token_scale[None, :, None])

    def step(
        carry: tuple[Nvfp4, jax.Array], x: jax.Array, weight: jax.Array, slots: jax.Array
    ) -> tuple[Nvfp4, jax.Array]:
        new = rows(x, weight, carry[1])
        return cache_write(carry[0], new, slots), new.global_scale.reshape(())

    def check_row(carry: tuple[Nvfp4, jax.Array]) -> None:
        new = rows(*jax.device_put((x, weight, scale), jax.devices("cpu")[0]))
        check("scan", carry[0], new, slots)

    result = timing.measure_scan(
        "scan",
        f"rmsnorm_nvfp4 + cache_write, d={d} t=1",
        step,
        lambda: (timing.poisoned(shapes), jnp.copy(scale)),
        (x, weight, slots),
        check_row,
        launches={"rmsnorm_nvfp4": 1, "cache_write": 1},
        length=SCAN_STEPS,
        unroll=SCAN_UNROLL,
        max_us=SCAN_US,
        max_temporaries=MOST_TEMPORARIES,
    )
    result.append(timing.default_path())
    result.require()
