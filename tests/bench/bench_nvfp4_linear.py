"""nvfp4_linear at the shapes of Flash and Pro; run with ``-m bench``, or parts of it as a program.

Beside it what XLA makes of dequantise + dot; of the dot alone see bench_dense_linear.
"""

import functools
import sys

import pytest

from dsv4_jax.ops.nvfp4_linear import nvfp4_linear
from tests.bench import linears, timing

pytestmark = [pytest.mark.bench, pytest.mark.gpu]


def forms(row: linears.Row) -> list[str]:
    """``w4a4`` of every weight, ``w4a16`` of the largest two."""
    more = ["nvfp4_w4a16"] if row.name in linears.LARGEST else []
    return ["nvfp4_w4a4", *more]


ALL_FORMS = ["nvfp4_w4a4", "nvfp4_w4a8", "nvfp4_w4a16"]
CASES = linears.linear_cases(linears.QUANTIZED, forms)
EVERY = linears.linear_cases(linears.QUANTIZED, lambda _: ALL_FORMS, linears.MORE_TOKENS)
BASELINES = linears.baseline_cases(CASES)
measure = functools.partial(linears.measure, "nvfp4_linear", nvfp4_linear)


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
