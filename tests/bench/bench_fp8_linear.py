"""fp8_linear at the shapes of Flash and Pro; run with ``-m bench``, or parts of it as a program.

Beside it what XLA makes of dequantise + dot; of the dot alone see bench_dense_linear.
"""

import functools
import sys

import pytest

from dsv4_jax.ops.fp8_linear import fp8_linear
from tests.bench import linears, timing

pytestmark = [pytest.mark.bench, pytest.mark.gpu]


def forms(row: linears.Row) -> list[str]:
    """The official contracts: ``wo_a`` keeps BF16 activations."""
    return ["fp8_w8a16" if row.name == "wo_a" else "fp8_w8a8"]


ALL_FORMS = ["fp8_w8a8", "fp8_w8a16"]
CASES = linears.linear_cases(linears.QUANTIZED, forms)
EVERY = linears.linear_cases(linears.QUANTIZED, lambda _: ALL_FORMS, linears.MORE_TOKENS)
BASELINES = linears.baseline_cases(CASES)
measure = functools.partial(linears.measure, "fp8_linear", fp8_linear)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_time(case: linears.Case) -> None:
    result = measure(case)
    result.append(timing.default_path())
    result.require()


@pytest.mark.parametrize("case", linears.compared(BASELINES), ids=lambda case: case.id)
def test_baseline(case: linears.Case) -> None:
    """Beside the same shapes; no bar."""
    linears.skip_when_late()
    measure(case).append(timing.default_path())


if __name__ == "__main__":
    sys.exit(linears.program(CASES, EVERY, measure, BASELINES))
