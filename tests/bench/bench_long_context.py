"""Decode steps of Flash's CSA and HCA layers over caches of 2^20 positions; run as a program.

``python -m tests.bench.bench_long_context --rows csa-1048575 --tokens 1 8``. The number in a row's
name is the position of the last of the steps that are timed, the tokens are rows of the batch. A
step is a whole layer, experts included, on random weights; steps follow each other in a loop over
the donated cache and pass more than the L2 holds. The floor counts what a step must read: weights,
with the experts that as many tokens are expected to choose, index keys, the chosen or all entries,
window and states. `tests/model/test_long_context.py` has the results right.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax import DeepseekV4, ModelConfig, Precision
from dsv4_jax.bench.floor import cache_bytes, cut, weight_bytes
from dsv4_jax.bench.weights import any_leaf, any_leaves, random_cache
from dsv4_jax.checkpoint.names import expected_tree, tree_bytes
from dsv4_jax.config import LayerKind
from tests.bench import linears, timing

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

CONFIG = ModelConfig.flash()
PRECISION = Precision.preset("official")
MAX_LEN = 1 << 20
POSITIONS = (4095, 32767, 131071, MAX_LEN - 1)
STEPS = 16
"""In a timed call."""
TOKENS = (1, 8, 32)


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer, and where its sequences are."""

    model: str
    kind: LayerKind
    position: int

    @property
    def name(self) -> str:
        """For the command line."""
        return f"{self.kind.name.lower()}-{self.position}"


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    row: Row
    form: str
    t: int  # rows of the batch, a token each

    @property
    def name(self) -> str:
        """What the line is called."""
        return f"{self.row.model} {self.form} {self.row.name} b={self.t}"

    @property
    def config(self) -> ModelConfig:
        """A model of this layer alone."""
        ratios = list(CONFIG.compress_ratios)
        return cut(CONFIG, [ratios.index(self.row.kind.value)], score_routed=True)

    @property
    def cache_bytes(self) -> dict[str, float]:
        """Read by a step, by what it is."""
        return cache_bytes(CONFIG, PRECISION, self.row.kind, self.row.position, self.t)


ROWS = [Row("flash", kind, p) for kind in (LayerKind.CSA, LayerKind.HCA) for p in POSITIONS]
EVERY = [Case(row, "official", t) for row in ROWS for t in TOKENS]
CASES = [case for case in EVERY if case.t == 1]


def measure(
    case: Case,
    config: ModelConfig | None = None,
    *,
    steps: int = STEPS,
    max_len: int = MAX_LEN,
    **settings: Any,
) -> timing.Result:
    """One line; its bytes are printed."""
    config = case.config if config is None else config
    model = DeepseekV4(config, PRECISION)
    params = any_leaves({"layers_0": expected_tree(config, PRECISION, False)["layers_0"]})
    shape = case.t, 1, config.hc_mult, config.hidden_size
    streams = any_leaf(1, shape, jnp.bfloat16)
    ids = jnp.zeros((case.t, 1), jnp.int32)

    def step(carry: Any, params: Any, streams: jax.Array) -> Any:
        out, cache = carry
        # The same input every time, which XLA must take for a result of the step before.
        view = jax.lax.bitcast_convert_type(streams, jnp.uint16) ^ timing.held(out)
        given = jax.lax.bitcast_convert_type(view, jnp.bfloat16)
        variables = {"params": params}
        out, cache = model.apply(variables, given, ids, cache, layer=0, method="layer")
        return out, dataclasses.replace(cache, lengths=cache.lengths + 1)

    def check(carry: Any) -> None:
        out, cache = carry
        assert np.isfinite(np.asarray(out, np.float32)).all(), f"{case.name}: not finite"
        np.testing.assert_array_equal(cache.lengths, case.row.position + 1)

    weights = sum(weight_bytes(config, PRECISION, 0, case.t).values())
    before = case.row.position + 1 - steps
    parts = {"weights": weights, **case.cache_bytes}
    amounts = ", ".join(f"{name} {x / 1e6:.3f}" for name, x in parts.items() if x)
    whole = tree_bytes(jax.eval_shape(lambda: model.init_cache(case.t, max_len)).layers)
    print(f"{case.name}: MB a step: {amounts}; cache {whole / 1e6:.0f} MB")
    return timing.measure_scan(
        "long_context",
        case.name,
        step,
        lambda: (
            jnp.zeros_like(streams),
            random_cache(model, case.t, max_len, before),
        ),
        (params, streams),
        check,
        launches={},
        length=steps,
        unroll=1,
        launch_bytes=sum(parts.values()),
        bytes_at="read",
        max_temporaries=float("inf"),
        **settings,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_time(case: Case) -> None:
    measure(case).append(timing.default_path())


if __name__ == "__main__":
    sys.exit(linears.program(CASES, EVERY, measure))
