"""rmsnorm_fp8 at the widths of both models, and the formula by XLA; run with ``-m bench``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.ops.rmsnorm_fp8 import rmsnorm_fp8
from dsv4_jax.quant import fp8
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.typing import E4M3, UE8M0
from tests.bench import timing
from tests.bench.bench_rmsnorm_nvfp4 import make_inputs
from tests.support.numerics import raw

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

EPS = 1e-6
MOST_TURNED = 2e-4
"""Of codes, against XLA's sums."""

CASES = [
    pytest.param(d, t, *bar, id=f"d{d}-t{t}")
    # wq_b's input of Flash and Pro, the layers' inputs of both.
    for d in (1024, 1536, 4096, 7168)
    for t, bar in (
        *((1, (2.5, None)), (8, (2.5, None)), (128, (4.0, None))),
        (4096, (None, 0.8 if d >= 4096 else None)),
    )
]


def plain(x: jax.Array, weight: jax.Array) -> Fp8:
    """What XLA makes of the formula."""
    return fp8.quantize_act(rmsnorm(x, weight, EPS).astype(jnp.float32), fp8.ACT_BLOCK)


def check(got: Fp8, x: jax.Array, weight: jax.Array) -> None:
    """Same bits as the CPU handler, and as XLA's chain but for ties."""
    want = rmsnorm_fp8(*jax.device_put((x, weight), jax.devices("cpu")[0]), EPS)
    for mine, theirs, other in zip(got, want, jax.jit(plain)(x, weight), strict=True):
        mine = raw(jax.device_get(mine))
        np.testing.assert_array_equal(mine, raw(theirs))
        turned = (mine != raw(jax.device_get(other))).mean()
        print(f"{turned:.1e} differ from XLA's")
        assert turned <= MOST_TURNED + 1 / mine.size, turned


def measure(d: int, t: int, target: str | None = "rmsnorm_fp8", **bars: Any) -> Any:
    """One line."""

    def op(out: Fp8, x: jax.Array, weight: jax.Array) -> Fp8:
        return rmsnorm_fp8(x, weight, EPS) if target else plain(timing.kept(x, out.code), weight)

    like = Fp8(jax.ShapeDtypeStruct((t, d), E4M3), jax.ShapeDtypeStruct((t, -(-d // 128)), UE8M0))
    return timing.measure(
        "rmsnorm_fp8",
        f"d={d} t={t}{'' if target else ' XLA'}",
        op,
        lambda i: (timing.poisoned(like), make_inputs(i, t, d)),
        lambda i, got: check(got, *make_inputs(i, t, d)) if target else None,
        target=target,
        launch_bytes=3.0 * t * d + t * d / 128 + 2 * d,
        **bars,
    )


@pytest.mark.parametrize(("d", "t", "max_us", "min_fraction"), CASES)
def test_time(d: int, t: int, max_us: float | None, min_fraction: float | None) -> None:
    result = measure(d, t, max_us=max_us, min_fraction=min_fraction)
    result.append(timing.default_path())
    measure(d, t, None).append(timing.default_path())
    result.require()
