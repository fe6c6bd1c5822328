"""mxfp4_linear at the shapes of Flash and Pro; run with ``-m bench``, or parts of it as a program.

Beside it what XLA makes of dequantise + dot; of the dot alone see bench_dense_linear.
"""

import functools
import sys

import pytest

from dsv4_jax.ops.mxfp4_linear import mxfp4_linear
from tests.bench import linears, timing

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

# The format of experts; no dense weight of the release has it.
ROWS = [row for row in linears.QUANTIZED if row.name in linears.LARGEST]
ALL_FORMS = ["mxfp4_w4a8", "mxfp4_w4a16"]
CASES = linears.linear_cases(ROWS, lambda _: ["mxfp4_w4a8"])
EVERY = linears.linear_cases(linears.QUANTIZED, lambda _: ALL_FORMS, linears.MORE_TOKENS)
BASELINES = linears.baseline_cases(CASES)
measure = functools.partial(linears.measure, "mxfp4_linear", mxfp4_linear)


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
