"""What every op promises of its rows on the CPU, bit for bit: none depends on its neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.numerics import assert_same_tree, f64, row_of
from tests.support.op_cases import CASES, MAX_ROWS

NAMES = list(CASES)
# Below, at and above the 8 rows of a CPU tile, and one row alone (a matrix-vector product).
SIZES = (1, 2, 3, 8, 9)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_in_any_call(name: str) -> None:
    """Calls of 1, 2, 3, 8 and 9 rows at several positions of a call of 17."""
    case = CASES[name]()
    whole = case.fn(*case.rows(0, MAX_ROWS))
    for size in SIZES:
        for start in (0, 5, MAX_ROWS - size):
            rows = case.rows(start, start + size)
            what = f"{name}, {size} rows from {start}"
            assert_same_tree(
                row_of(case.fn(*rows), slice(None)), row_of(whole, slice(start, start + size)), what
            )


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name: str) -> None:
    """A6: empty arrays of the right shape and dtype."""
    case = CASES[name]()
    want = jax.eval_shape(case.fn, *case.rows(0, 1))
    got = case.fn(*case.rows(0, 0))
    for empty, one in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert empty.shape == (0, *one.shape[1:])
        assert empty.dtype == one.dtype


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_in_its_row(name: str) -> None:
    """A13: one NaN in a row reaches that row's outputs and no other row."""
    case = CASES[name]()
    rows = list(case.rows(0, 9))
    clean = case.fn(*rows)
    x = np.array(rows[case.poisoned])
    x[(4, *(0,) * (x.ndim - 1))] = np.nan
    rows[case.poisoned] = jax.device_put(x)
    dirty = case.fn(*rows)
    others = np.arange(9) != 4
    assert_same_tree(row_of(dirty, others), row_of(clean, others), name)
    if "compressor" in name:  # may not close
        return
    floats = [x for x in jax.tree.leaves(dirty) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert any(np.isnan(f64(np.asarray(x)[4])).any() for x in floats)
