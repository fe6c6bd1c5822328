"""rmsnorm_nvfp4 at the widths of Flash and Pro; run with ``-m bench`` on the machine to measure."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax.ops.rmsnorm_nvfp4 import rmsnorm_nvfp4
from dsv4_jax.quant.nvfp4 import BLOCK, Nvfp4
from dsv4_jax.typing import E2M1, E4M3
from reference.rmsnorm_nvfp4 import rmsnorm_nvfp4 as reference_rmsnorm_nvfp4
from tests.bench import timing
from tests.support.numerics import assert_same_tree, f64

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

EPS = 1e-6
STATIC_SCALE = 2.0**-9
"""Of the size that a normalised token's own scale has: 4 / (6 * 448) rounded to a power of two."""
REFERENCE_TOKENS = 64
"""The reference is slow and tokens are independent: the first so many are compared with it."""
MOST_TIES = 1e-3
"""Of elements. The norm sums in another order than the reference, and a token's own scale brings
quotients close to the ties of E2M1: what FP32 cannot tell from a tie may turn."""

CASES = [
    # One thread block, all latency.
    pytest.param(4096, 1, False, 2.5, None, id="d4096-t1"),
    pytest.param(7168, 1, False, 2.5, None, id="d7168-t1"),
    pytest.param(4096, 8, False, 2.5, None, id="d4096-t8"),
    pytest.param(7168, 8, False, 2.5, None, id="d7168-t8"),
    # About a thread block per SM.
    pytest.param(4096, 128, False, 4.0, None, id="d4096-t128"),
    pytest.param(7168, 128, False, 4.0, None, id="d7168-t128"),
    # Resident thread blocks take several tokens each; memory bound.
    pytest.param(4096, 4096, False, None, 0.7, id="d4096-t4096"),
    pytest.param(7168, 4096, False, None, 0.7, id="d7168-t4096"),
    # No reduction for the scale.
    pytest.param(4096, 8, True, 2.5, None, id="d4096-t8-static"),
]


def launch_bytes(t: int, d: int) -> float:
    """x and weight read; codes, block scales and token scales written."""
    return 2 * t * d + 2 * d + t * d / 2 + t * d / BLOCK + 4 * t


@functools.partial(jax.jit, static_argnums=(1, 2))
def make_inputs(seed: int, t: int, d: int) -> tuple[jax.Array, jax.Array]:
    """Tokens of random magnitude; a weight around one."""
    keys = jax.random.split(jax.random.key(seed), 3)
    scale = jnp.exp2(jax.random.uniform(keys[1], (t, 1), minval=-8.0, maxval=8.0))
    x = jax.random.normal(keys[0], (t, d)) * scale
    weight = 1 + 0.1 * jax.random.normal(keys[2], (d,))
    return x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)


def outputs(t: int, d: int) -> Nvfp4:
    """Shapes of the results."""
    return Nvfp4(
        jax.ShapeDtypeStruct((t, d), E2M1),
        jax.ShapeDtypeStruct((t, d // BLOCK), E4M3),
        jax.ShapeDtypeStruct((t,), jnp.float32),
    )


def check(result: Nvfp4, x: Any, weight: Any, scale: Any) -> None:
    """Same bits as the CPU handler, and as the reference but for ties."""
    cpu = jax.devices("cpu")[0]
    x, weight, scale = jax.device_put((x, weight, scale), cpu)
    host = jax.device_get(result)
    assert_same_tree(host, jax.device_get(rmsnorm_nvfp4(x, weight, EPS, scale)), "CPU handler")
    x32, weight32 = x[:REFERENCE_TOKENS].astype(jnp.float32), weight.astype(jnp.float32)
    expected = jax.jit(reference_rmsnorm_nvfp4, static_argnums=2)(x32, weight32, EPS, scale)
    for name, actual, want in zip(Nvfp4._fields, host, expected, strict=True):
        # By value: the reference has no codes, so the sign of a zero does not count.
        differ = f64(actual[:REFERENCE_TOKENS]) != f64(want)
        print(f"{name}: {differ.sum()} of {differ.size} elements differ from the reference")
        if differ.sum() > MOST_TIES * differ.size:
            raise AssertionError(f"{name}: {differ.sum()} of {differ.size} differ")


@pytest.mark.parametrize(("d", "t", "static", "max_us", "min_fraction"), CASES)
def test_time(
    d: int, t: int, static: bool, max_us: float | None, min_fraction: float | None
) -> None:
    scale = jnp.float32(STATIC_SCALE) if static else None

    def op(_: Nvfp4, x: jax.Array, weight: jax.Array) -> Nvfp4:
        return rmsnorm_nvfp4(x, weight, EPS, scale)

    def check_set(i: int, out: Nvfp4) -> None:
        x, weight = make_inputs(i, t, d)
        check(out, x, weight, scale)

    result = timing.measure(
        "rmsnorm_nvfp4",
        f"d={d} t={t}{' static' if static else ''}",
        op,
        lambda i: (timing.poisoned(outputs(t, d)), make_inputs(i, t, d)),
        check_set,
        target="rmsnorm_nvfp4",
        launch_bytes=launch_bytes(t, d),
        max_us=max_us,
        min_fraction=min_fraction,
    )
    result.append(timing.default_path())
    result.require()
