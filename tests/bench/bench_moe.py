"""moe of whole layers of Flash and Pro; run with ``-m bench``, or parts of it as a program.

``python -m tests.bench.bench_moe --models flash --tokens 1 8 --forms mxfp4_w4a8``; ``--rows`` is
the routing. One stack of codes serves all formats of a model, with scales for each. Floors count
the experts that the routings at hand touch. Beside it what XLA makes of one token: gather +
dequantise + einsum.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv4_jax.ops.moe import moe
from dsv4_jax.precision import act_format, weight_format
from dsv4_jax.quant import bits
from tests.bench import linears, timing
from tests.support import products as support

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

K, LIMIT = 6, 10.0
ZIPF = 1.0
CHECKED_TOKENS = 4
MOST_STEP = 1.5
"""No number of tokens may cost more than this per floor than its neighbours."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """Routed experts of a model under one kind of routing."""

    model: str
    name: str  # uniform or zipf
    experts: int
    d: int
    inter: int


SIZES = {"flash": (256, 4096, 2048), "pro": (384, 7168, 3072)}
UNIFORM = [Layer(model, "uniform", *size) for model, size in SIZES.items()]
SKEWED = [Layer(model, "zipf", *size) for model, size in SIZES.items()]

BARS = {
    ("flash", "mxfp4_w4a8"): {1: 30.0, 8: 160.0, 32: 440.0, 128: 785.0, 4096: 1500.0},
    ("pro", "mxfp4_w4a8"): {1: 60.0, 8: 390.0, 32: 1220.0, 128: 2750.0, 4096: 5000.0},
    ("flash", "nvfp4_w4a16"): {1: 30.0, 8: 175.0, 32: 530.0, 128: 940.0, 4096: 2400.0},
    ("pro", "nvfp4_w4a16"): {1: 70.0, 8: 465.0, 32: 1500.0, 128: 3350.0, 4096: 6300.0},
}
"""us on an H200."""
POWERS_OF_TWO = 1.08
"""``nvfp4_w4a8`` over ``mxfp4_w4a8``."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    row: Layer
    form: str  # a format of dsv4_jax.precision, or xla_...
    t: int

    @property
    def name(self) -> str:
        """What the line is called."""
        return f"{self.row.model} {self.form} {self.row.name} t={self.t}"

    @property
    def id(self) -> str:
        """For pytest."""
        return self.name.replace(" ", "-").replace("=", "")

    @property
    def linear(self) -> Any:
        """The format."""
        return self.form.removeprefix("xla_")

    @property
    def max_us(self) -> float | None:
        """The bar, of uniform routing."""
        if self.row.name != "uniform":
            return None
        form = {"nvfp4_w4a4": "nvfp4_w4a16", "nvfp4_w4a8": "mxfp4_w4a8"}.get(self.form, self.form)
        bar = BARS.get((self.row.model, form), {}).get(self.t)
        if bar is not None and self.form == "nvfp4_w4a8":
            bar = round(bar * POWERS_OF_TWO, 1)
        return bar


FORMS = ("mxfp4_w4a8", "nvfp4_w4a4", "nvfp4_w4a16", "nvfp4_w4a8")
EVERY_TOKENS_FORMS = ("mxfp4_w4a8", "nvfp4_w4a4")
"""Of the two kinds of scales; between the tokens of the bars too."""
SKEWED_TOKENS = (8, 128, 4096)


def _cases(layers: Iterable[Layer], forms: Iterable[str], tokens: Iterable[int]) -> list[Case]:
    return [Case(layer, form, t) for layer in layers for form in forms for t in tokens]


EVERY = [
    case
    for model in SIZES
    for case in _cases(
        [layer for layer in (*UNIFORM, *SKEWED) if layer.model == model],
        (*FORMS, "mxfp4_w4a16"),
        linears.MORE_TOKENS,
    )
]
_TABLE = {
    *_cases(UNIFORM, FORMS, linears.TOKENS),
    *_cases(UNIFORM, EVERY_TOKENS_FORMS, linears.MORE_TOKENS),
    *_cases(SKEWED, EVERY_TOKENS_FORMS, SKEWED_TOKENS),
}
CASES = [case for case in EVERY if case in _TABLE]
BASELINES = _cases(UNIFORM, ("xla_mxfp4_w4a16", "xla_nvfp4_w4a16"), (1,))


def _shapes(layer: Layer) -> dict[str, tuple[int, int, int]]:
    wide, narrow = (layer.experts, layer.inter, layer.d), (layer.experts, layer.d, layer.inter)
    return {"w1": wide, "w2": narrow, "w3": wide}


@functools.lru_cache(maxsize=1)
def _codes(model: str) -> dict[str, jax.Array]:
    _scales.cache_clear()  # those of the model before
    shapes = _shapes(Layer(model, "", *SIZES[model])).items()
    return {
        name: support.random_weight(i, "nvfp4", shape, leaves=["weight"])["weight"]
        for i, (name, shape) in enumerate(shapes)
    }


@functools.lru_cache(maxsize=4)
def _scales(model: str, form: str, pow2: bool) -> dict[str, dict[str, jax.Array]]:
    shapes = _shapes(Layer(model, "", *SIZES[model])).items()
    leaves = [leaf for leaf in support.leaves_of(form) if leaf != "weight"]
    return {
        name: support.random_weight(i, form, shape, pow2=pow2, leaves=leaves)
        for i, (name, shape) in enumerate(shapes)
    }


def stacks(model: str, linear: Any) -> dict[str, dict[str, jax.Array]]:
    """``w1``, ``w2``, ``w3``; block scales are powers of two for ``nvfp4_w4a8``."""
    codes = _codes(model)
    scales = _scales(model, weight_format(linear), linear == "nvfp4_w4a8")
    return {name: {"weight": codes[name], **scales[name]} for name in codes}


def launch_bytes(layer: Layer, form: str, t: int, touched: float) -> float:
    """Weights of the experts touched; ``x`` and ``y``; the intermediate, a byte and its scales."""
    weights = touched * 3 * layer.d * layer.inter * support.BYTES[form]
    return weights + 4 * t * layer.d + 1.125 * K * t * layer.inter


def check(
    case: Case,
    x: np.ndarray,
    idx: np.ndarray,
    weight: np.ndarray,
    weights: dict[str, dict[str, jax.Array]],
    y: jax.Array,
) -> None:
    """A few tokens, expert by expert."""
    tokens = np.unique(np.linspace(0, case.t - 1, CHECKED_TOKENS).astype(np.int64))
    exact = support.expected_experts(
        x[tokens], idx[tokens], weight[tokens], weights, case.linear, LIMIT
    )
    support.assert_experts(np.asarray(y)[tokens], exact, case.linear, case.name)


def _baseline(case: Case, zero: jax.Array, x: jax.Array, idx: jax.Array, *rest: Any) -> jax.Array:
    """Gather + dequantise + einsum, for one token."""
    weight, _, *stacked = rest
    form = weight_format(case.linear)

    def picked(leaves: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array | float]:
        view = {name: bits.byte_view(leaf)[idx[0]] for name, leaf in leaves.items()}
        typed = [bits.from_byte_view(view[n], leaves[n].dtype) for n in support.leaves_of(form)]
        wide = linears.dequantized(zero, form, *typed)
        return wide, view["global_scale"][:, None] if form == "nvfp4" else 1.0

    (w1, s1), (w2, s2), (w3, s3) = map(picked, stacked)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    bf = functools.partial(lax.reduce_precision, exponent_bits=8, mantissa_bits=7)
    gate = bf(dot("d,kid->ki", x[0], w1) * s1)
    up = bf(dot("d,kid->ki", x[0], w3) * s3)
    h = jax.nn.silu(jnp.minimum(gate, LIMIT)) * jnp.clip(up, -LIMIT, LIMIT)
    h = bf(weight[0][:, None] * h).astype(jnp.bfloat16)
    y = bf(dot("ki,kdi->kd", h, w2) * s2)
    return jnp.sum(y, axis=0, keepdims=True).astype(jnp.bfloat16)


def _moe(case: Case, x: jax.Array, *rest: Any) -> jax.Array:
    pow2 = case.linear == "nvfp4_w4a8"
    settings = {"linear": case.linear, "limit": LIMIT, "power_of_two": pow2}
    return moe(x, *rest, **settings, dtype=jnp.bfloat16)


def measure(case: Case, **settings: Any) -> timing.Result:
    """One line. Every set has a routing of its own."""
    layer, t, sets = case.row, case.t, timing.FEWEST_SETS
    weights = stacks(layer.model, case.linear)
    skew = ZIPF if layer.name == "zipf" else 0.0
    routings = [support.routing(i, t, K, layer.experts, skew) for i in range(sets)]
    touched = float(np.mean([len(np.unique(idx)) for idx, _ in routings]))
    different = sets if t < linears.FEW_X_TOKENS else 2
    hosts = [support.normal_values(i + 1, t, layer.d) for i in range(different)]
    xs = jax.device_put(hosts)
    stacked = tuple(weights[name] for name in ("w1", "w2", "w3"))
    valid = jnp.ones(t, bool)

    def run(carry: jax.Array, *inputs: Any) -> jax.Array:
        if case.form.startswith("xla_"):
            return _baseline(case, timing.held(carry), *inputs)
        return _moe(case, *inputs)

    def make_set(i: int) -> timing.Set:
        inputs = xs[i % different], *jax.device_put(routings[i]), valid, *stacked
        return linears.poisoned((t, layer.d), jnp.bfloat16), inputs

    act = act_format(case.linear)
    return timing.measure(
        "moe",
        case.name,
        run,
        make_set,
        lambda i, y: check(case, hosts[i % different], *routings[i], weights, y),
        target=None if case.form.startswith("xla_") else "moe",
        launch_bytes=launch_bytes(layer, weight_format(case.linear), t, touched),
        bytes_at="read",
        flops=6.0 * K * t * layer.d * layer.inter,
        flops_at="fp8" if act == "fp8" else "bf16",
        max_us=case.max_us,
        **{
            "sets": sets,
            "call_us": linears.CALL_US,
            "replays": linears.REPLAYS,
            "evict_bytes": 0.0,
            **settings,
        },
    )


_measured: dict[Case, timing.Result] = {}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_time(case: Case) -> None:
    result = _measured[case] = measure(case)
    result.append(timing.default_path())
    result.require()


def steps(measured: dict[Case, timing.Result]) -> list[str]:
    """Numbers of tokens that cost more of their floor than the ones beside them."""
    found: list[str] = []
    for case, result in measured.items():
        line = sorted(c.t for c in measured if (c.row, c.form) == (case.row, case.form))
        at = line.index(case.t)
        for t in (*line[max(at - 1, 0) : at], *line[at + 1 : at + 2]):
            beside = measured[dataclasses.replace(case, t=t)]
            step = beside.fraction / result.fraction
            if step > MOST_STEP:
                found.append(f"{case.name}: {step:.2f} times what t={t} costs")
    return found


def test_no_steps() -> None:
    """Of what was measured before, in this run."""
    found = steps(_measured)
    assert not found or next(iter(_measured.values())).gpu != timing.BAR_GPU, found


@pytest.mark.parametrize("case", BASELINES, ids=lambda case: case.id)
def test_baseline(case: Case) -> None:
    """One token; no bar."""
    linears.skip_when_late()
    measure(case).append(timing.default_path())


if __name__ == "__main__":
    sys.exit(linears.program(CASES, EVERY, measure, BASELINES))
