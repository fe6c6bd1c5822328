"""query_finish at the sizes of Flash and Pro, and the formula by XLA; run with ``-m bench``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.bench.weights import any_leaf
from dsv4_jax.ops.head_norm import head_norm
from dsv4_jax.ops.query_finish import query_finish
from dsv4_jax.ops.rope import rope
from tests.bench import timing
from tests.support.numerics import raw

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

EPS = 1e-6
D, ROTARY = 512, 64
FREQUENCIES = (160000.0 ** -(np.arange(ROTARY // 2) / (ROTARY // 2))).astype(np.float32)
MOST_TURNED = 1e-4
"""Of values, against XLA's sums and sines."""
CHECKED_TOKENS = 64

CASES = [
    pytest.param(h, t, *bar, id=f"h{h}-t{t}")
    for t, bar in ((1, (3.0, None)), (8, (3.0, None)), (128, (None, 0.6)), (4096, (None, 0.75)))
    for h in (64, 128)
]


@jax.jit
def plain(q: jax.Array, positions: jax.Array) -> jax.Array:
    """What XLA makes of the formula."""
    return rope(head_norm(q, EPS, rounding="bfloat16"), positions, FREQUENCIES)


def make_inputs(seed: int, h: int, t: int) -> tuple[jax.Array, jax.Array]:
    q = any_leaf(seed, (1, t, h, D), jnp.bfloat16)
    positions = (np.arange(t, dtype=np.int32) + 1000 * seed + 900_000)[None]
    return q, jnp.asarray(positions)


def call(_: jax.Array, q: jax.Array, positions: jax.Array) -> jax.Array:
    """The op as the model calls it."""
    return query_finish(q, positions, FREQUENCIES, EPS, rounding="bfloat16")


def check(got: Any, q: jax.Array, positions: jax.Array) -> None:
    """Same bits as the CPU handler, and as XLA's chain but for ties; the first tokens."""
    few = slice(None), slice(0, CHECKED_TOKENS)
    host = jax.device_put((q[few], positions[few]), jax.devices("cpu")[0])
    mine = raw(jax.device_get(got[few]))
    np.testing.assert_array_equal(mine, raw(call(got, *host)))
    turned = (mine != raw(jax.device_get(plain(q[few], positions[few])))).mean()
    print(f"{turned:.1e} of values differ from XLA's")
    assert turned <= MOST_TURNED, turned


def measure(
    h: int, t: int, op: Any = call, target: str | None = "query_finish", **bars: Any
) -> Any:
    """One line; heads are read once and written once."""
    shape = jax.ShapeDtypeStruct((1, t, h, D), jnp.bfloat16)
    return timing.measure(
        "query_finish",
        f"h={h} t={t}{'' if target else ' XLA'}",
        op,
        lambda i: (timing.poisoned(shape), make_inputs(i, h, t)),
        lambda i, got: check(got, *make_inputs(i, h, t)) if target else None,
        target=target,
        launch_bytes=4.0 * t * h * D,
        **bars,
    )


@pytest.mark.parametrize(("h", "t", "max_us", "min_fraction"), CASES)
def test_time(h: int, t: int, max_us: float | None, min_fraction: float | None) -> None:
    result = measure(h, t, max_us=max_us, min_fraction=min_fraction)
    result.append(timing.default_path())
    by_xla = measure(h, t, lambda out, q, positions: plain(timing.kept(q, out), positions), None)
    by_xla.append(timing.default_path())
    result.require()
