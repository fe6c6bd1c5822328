"""key_finish with the window ring, and the same formula by XLA; run with ``-m bench``.

A decoded token goes to the ring in the same launch; a chunk longer than the ring's spare slots is
written after attention, by `cache_write`, and has rows alone here.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.bench.weights import any_leaf
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.key_finish import FinishedKeys, key_finish
from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.ops.rope import rope
from dsv4_jax.quant.kv import KvRows, kv_quant
from dsv4_jax.typing import E4M3, UE8M0
from tests.bench import timing
from tests.support.numerics import raw

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

EPS = 1e-6
D, ROTARY, WINDOW = 512, 64, 128
FREQUENCIES = (160000.0 ** -(np.arange(ROTARY // 2) / (ROTARY // 2))).astype(np.float32)
STORED = 448 + 7 + 128
"""Bytes of a key."""
MOST_TURNED = 2e-4
"""Of bytes, against XLA's sums and sines."""

# (b, t, with a ring, us, fraction of copy)
CASES = [
    pytest.param(1, 1, True, 3.0, None, id="b1-t1"),
    pytest.param(8, 1, True, 3.0, None, id="b8-t1"),
    pytest.param(128, 1, True, 4.0, None, id="b128-t1"),
    pytest.param(1, 128, False, 4.0, None, id="b1-t128"),
    pytest.param(1, 4096, False, None, 0.6, id="b1-t4096"),
    pytest.param(1, 4096, True, None, None, id="b1-t4096-ring"),
]


def store(b: int, rows: int) -> KvRows:
    """Shapes."""
    return KvRows(
        jax.ShapeDtypeStruct((b, rows, D - ROTARY), E4M3),
        jax.ShapeDtypeStruct((b, rows, (D - ROTARY) // 64), UE8M0),
        jax.ShapeDtypeStruct((b, rows, ROTARY), jnp.bfloat16),
    )


def make_inputs(seed: int, b: int, t: int) -> tuple[jax.Array, ...]:
    kv = any_leaf(seed, (b, t, D), jnp.bfloat16)
    weight = (1 + any_leaf(seed + 1, (D,), jnp.float32) / 8).astype(jnp.bfloat16)
    start = jnp.arange(b, dtype=jnp.int32) * 1001 + 1000 * seed + 900_000
    return kv, weight, start, jnp.full(b, t, jnp.int32)


def call(state: FinishedKeys, kv: Any, weight: Any, start: Any, count: Any) -> FinishedKeys:
    """The op as the model calls it."""
    settings: dict[str, Any] = {"ring": state.ring, "count": count} if state.ring else {}
    return key_finish(kv, weight, start, FREQUENCIES, EPS, form="fp8", **settings)


def plain(state: FinishedKeys, kv: Any, weight: Any, start: Any, count: Any) -> FinishedKeys:
    """What XLA makes of the formula, and `cache_write`."""
    positions = start[:, None] + jnp.arange(kv.shape[1], dtype=jnp.int32)
    turned = rope(rmsnorm(kv, weight, EPS), positions, FREQUENCIES)
    rows = kv_quant(turned, ROTARY, "fp8")
    if state.ring is None:
        return FinishedKeys(rows, None)
    slots = state.ring.nope.shape[1]
    keep = positions >= (start + count)[:, None] - slots
    return FinishedKeys(rows, cache_write(state.ring, rows, jnp.where(keep, positions % slots, -1)))


def check(got: FinishedKeys, seed: int, b: int, t: int) -> None:
    """Same bytes as the CPU handler, rows and ring, and as XLA's chain but for ties."""
    empty = FinishedKeys(store(b, t), store(b, WINDOW) if got.ring else None)
    host = jax.device_put(make_inputs(seed, b, t), jax.devices("cpu")[0])
    with jax.default_device(jax.devices("cpu")[0]):
        want = call(timing.poisoned(empty), *host)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(raw(jax.device_get(mine)), raw(theirs))
    by_xla = jax.jit(plain)(FinishedKeys(got.rows, None), *make_inputs(seed, b, t))
    turned = total = 0
    for mine, theirs in zip(got.rows, by_xla.rows, strict=True):
        a, e = raw(jax.device_get(mine)), raw(jax.device_get(theirs))
        turned, total = turned + int((a != e).sum()), total + a.size
    print(f"{turned} of {total} elements differ from XLA's")
    assert turned <= MOST_TURNED * total + 1


def measure(
    b: int, t: int, ring: bool, op: Any = call, target: str | None = "key_finish", **bars: Any
) -> Any:
    """One line; keys are read once, rows and what stays in the ring written once."""
    like = FinishedKeys(store(b, t), store(b, WINDOW) if ring else None)
    written = t + (min(t, WINDOW) if ring else 0)
    return timing.measure(
        "key_finish",
        f"b={b} t={t}{' ring' if ring else ''}{'' if target else ' XLA'}",
        op,
        lambda i: (timing.poisoned(like), make_inputs(i, b, t)),
        lambda i, got: check(got, i, b, t) if target else None,
        target=target,
        launch_bytes=float(b * (2 * D * t + STORED * written) + 2 * D),
        **bars,
    )


@pytest.mark.parametrize(("b", "t", "ring", "max_us", "min_fraction"), CASES)
def test_time(b: int, t: int, ring: bool, max_us: float | None, min_fraction: float | None) -> None:
    result = measure(b, t, ring, max_us=max_us, min_fraction=min_fraction)
    result.append(timing.default_path())
    if not ring:  # with one XLA's chain has a foreign call in it
        op = lambda state, kv, *rest: plain(state, timing.kept(kv, state.rows.rope), *rest)  # noqa: E731
        measure(b, t, ring, op, None).append(timing.default_path())
    result.require()
