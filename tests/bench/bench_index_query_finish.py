"""index_query_finish at the model's size, and the same formula by XLA; run with ``-m bench``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.bench.weights import any_leaf
from dsv4_jax.ops.hadamard import hadamard
from dsv4_jax.ops.index_query_finish import index_query_finish
from dsv4_jax.ops.rope import rope
from dsv4_jax.quant.kv import IndexRows, index_quant
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.bench import timing
from tests.support.numerics import raw

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

H, D, ROTARY = 64, 128, 64
FREQUENCIES = (160000.0 ** -(np.arange(ROTARY // 2) / (ROTARY // 2))).astype(np.float32)
MOST_TURNED = 1e-4
"""Of codes, against XLA's sines."""
CHECKED_TOKENS = 64

CASES = [
    pytest.param(form, t, *bar, id=f"{form}-t{t}")
    for t, bar in ((1, (3.0, None)), (8, (3.0, None)), (128, (5.0, None)), (4096, (None, None)))
    for form in ("mxfp4", "fp8")
]


def plain(form: Any, q: jax.Array, positions: jax.Array) -> IndexRows:
    """What XLA makes of the formula."""
    return index_quant(hadamard(rope(q, positions, FREQUENCIES)), form)


def call(form: Any, q: jax.Array, positions: jax.Array) -> IndexRows:
    """The op as the model calls it."""
    return index_query_finish(q, positions, FREQUENCIES, form=form)


def make_inputs(seed: int, t: int) -> tuple[jax.Array, jax.Array]:
    q = any_leaf(seed, (1, t, H, D), jnp.bfloat16)
    positions = (np.arange(t, dtype=np.int32) + 1000 * seed + 900_000)[None]
    return q, jnp.asarray(positions)


def check(form: Any, got: IndexRows, q: jax.Array, positions: jax.Array) -> None:
    """Same codes as the CPU handler, and as XLA's chain but for ties; the first tokens."""
    few = slice(None), slice(0, CHECKED_TOKENS)
    host = jax.device_put((q[few], positions[few]), jax.devices("cpu")[0])
    want, by_xla = call(form, *host), jax.jit(plain, static_argnums=0)(form, q[few], positions[few])
    for mine, theirs, other in zip(got, want, by_xla, strict=True):
        mine = raw(jax.device_get(mine)[few])
        np.testing.assert_array_equal(mine, raw(theirs))
        turned = (mine != raw(jax.device_get(other))).mean()
        print(f"{turned:.1e} differ from XLA's")
        assert turned <= MOST_TURNED, turned


def measure(
    form: Any, t: int, op: Any = call, target: str | None = "index_query_finish", **bars: Any
) -> Any:
    """One line; heads are read once, codes and scales written once."""
    dtype, blocks = (E2M1, D // 32) if form == "mxfp4" else (E4M3, 1)
    like = IndexRows(
        jax.ShapeDtypeStruct((1, t, H, D), dtype), jax.ShapeDtypeStruct((1, t, H, blocks), UE8M0)
    )
    code_bytes = D / 2 if form == "mxfp4" else D
    return timing.measure(
        "index_query_finish",
        f"{form} t={t}{'' if target else ' XLA'}",
        lambda out, q, positions: op(form, q if target else timing.kept(q, out.key), positions),
        lambda i: (timing.poisoned(like), make_inputs(i, t)),
        lambda i, got: check(form, got, *make_inputs(i, t)) if target else None,
        target=target,
        launch_bytes=t * H * (2 * D + code_bytes + blocks),
        **bars,
    )


@pytest.mark.parametrize(("form", "t", "max_us", "min_fraction"), CASES)
def test_time(form: Any, t: int, max_us: float | None, min_fraction: float | None) -> None:
    result = measure(form, t, max_us=max_us, min_fraction=min_fraction)
    result.append(timing.default_path())
    measure(form, t, plain, None).append(timing.default_path())
    result.require()
