"""router of Flash and Pro, its product included; run with ``-m bench``, or parts as a program."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.router import router
from tests.bench import linears, timing
from tests.support import products as support
from tests.support.numerics import f64

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

K, SCALE = 6, 1.5
REL = 1e-5
"""FP32 product over the model's width, softplus, root, sum and quotient."""

ROWS = [linears.Row("flash", "router", 256, 4096), linears.Row("pro", "router", 384, 7168)]
CASES = [
    linears.Case(row, form, t)
    for row in ROWS
    for form, tokens in (("bfloat16", linears.TOKENS), ("hash", (1, 128)))
    for t in tokens
]
EVERY = [
    linears.Case(row, form, t)
    for row in ROWS
    for form in ("bfloat16", "hash")
    for t in linears.MORE_TOKENS
]
SETS = 32
"""Of 2.1 and 5.5 MB; what they leave in the L2 is read out of it before the next round."""


def launch_bytes(row: linears.Row, t: int) -> float:
    """Weight and ``x`` read, logits written and read, ids and weights written."""
    return 2 * row.n * row.k + t * (2 * row.k + 8 * row.n + 8 * K)


def check(
    x: np.ndarray,
    weight: jax.Array,
    bias: jax.Array | None,
    given: jax.Array | None,
    result: tuple[jax.Array, jax.Array],
) -> None:
    """The first tokens against FP64; no two scores are as close as the sums are wrong."""
    idx, got = (np.asarray(part)[: linears.CHECKED_TOKENS] for part in result)
    logits = f64(x[: linears.CHECKED_TOKENS]) @ f64(weight).T
    score = np.sqrt(np.logaddexp(0, logits))
    if bias is not None:
        best = np.argsort(-(score + f64(bias)), axis=-1, kind="stable")[:, :K]
    else:
        best = np.asarray(given)[: linears.CHECKED_TOKENS]
    np.testing.assert_array_equal(idx, np.sort(best, axis=-1))
    picked = np.take_along_axis(score, idx, axis=-1)
    want = picked / picked.sum(axis=-1, keepdims=True) * SCALE
    np.testing.assert_allclose(got, want, rtol=REL)


def measure(case: linears.Case, **settings: Any) -> timing.Result:
    """One line; a call of the op is a product and one launch."""
    row, t = case.row, case.t
    hosts = [support.normal_values(i + 1, t, row.k) for i in range(2)]
    xs = jax.device_put(hosts)
    sets = settings.pop("sets", SETS)
    weights = [support.random_weight(i, "bfloat16", (row.n, row.k))["weight"] for i in range(sets)]
    bias = jax.device_put(np.random.default_rng(0).normal(0, 0.1, row.n).astype(np.float32))
    given = jax.device_put(support.routing(0, t, K, row.n)[0])
    selectors = (None, given) if case.form == "hash" else (bias, None)

    def run(_: Any, x: jax.Array, weight: jax.Array, *selectors: jax.Array | None) -> Any:
        return router(x, weight, *selectors, k=K, scale=SCALE)

    shapes = jax.ShapeDtypeStruct((t, K), jnp.int32), jax.ShapeDtypeStruct((t, K), jnp.float32)
    return timing.measure(
        "router",
        case.name,
        run,
        lambda i: (timing.poisoned(shapes), (xs[i % 2], weights[i], *selectors)),
        lambda i, result: check(hosts[i % 2], weights[i], *selectors, result),
        target="router",
        launch_bytes=launch_bytes(row, t),
        bytes_at="read",
        flops=2.0 * t * row.n * row.k,
        **{
            "sets": sets,
            "call_us": linears.CALL_US,
            "replays": linears.REPLAYS,
            **settings,
        },
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_time(case: linears.Case) -> None:
    result = measure(case)
    result.append(timing.default_path())
    result.require()


if __name__ == "__main__":
    sys.exit(linears.program(CASES, EVERY, measure))
