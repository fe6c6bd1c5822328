"""dense_linear at the shapes of Flash and Pro; run with ``-m bench``, or parts of it as a program.

Beside it XLA's BF16 product, at the shapes of the quantised weights as well. Rows ``.._x2`` are two
weights in one call (`dense_linears`).
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import pytest

from dsv4_jax.ops.dense_linear import dense_linear, dense_linears
from tests.bench import linears, timing

pytestmark = [pytest.mark.bench, pytest.mark.gpu]


def cases(rows: list[linears.Row], tokens: Sequence[int] = linears.TOKENS) -> list[linears.Case]:
    """The head is only ever run on a few tokens."""
    found = linears.linear_cases(rows, lambda _: ["bfloat16"], tokens)
    return [case for case in found if case.row.name != "head" or case.t <= MOST_HEAD_TOKENS]


MOST_HEAD_TOKENS = 256
CASES = cases(linears.DENSE)
EVERY = cases(linears.DENSE, linears.MORE_TOKENS)
BASELINES = linears.baseline_cases(
    cases([*(row for row in linears.DENSE if row.weights == 1), *linears.QUANTIZED])
)


def _several(x: jax.Array, *weights: jax.Array, dtype: Any) -> tuple[jax.Array, ...]:
    return dense_linears(x, weights, dtype=dtype)


def measure(case: linears.Case, **settings: Any) -> timing.Result:
    """One line."""
    op = _several if case.row.weights > 1 else dense_linear
    return linears.measure("dense_linear", op, case, **settings)


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
