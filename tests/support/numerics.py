"""How far two arrays agree: bit for bit, in ulps of BF16, or as a whole."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from tests.support.golden_layers import bf16_ulp

__all__ = [
    "assert_near",
    "assert_same_bits",
    "assert_same_tree",
    "bf16_ulp",
    "cosine",
    "f64",
    "raw",
    "rel_l2",
    "row_of",
]

_BYTES = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def f64(x: Any) -> np.ndarray:
    """Values in FP64, of any dtype that JAX or ml_dtypes knows."""
    x = np.asarray(x)
    return x.astype(np.float32).astype(np.float64) if x.dtype.kind == "V" else x.astype(np.float64)


def raw(x: Any) -> np.ndarray:
    """Bits of every element as unsigned integers; a 4-bit float gives its code in a byte."""
    x = np.asarray(x)
    if x.dtype == ml_dtypes.float4_e2m1fn:
        return x.view(np.uint8) & 0xF
    return x if x.dtype.kind in "biu" else np.ascontiguousarray(x).view(_BYTES[x.dtype.itemsize])


def assert_same_bits(actual: Any, expected: Any, what: str = "") -> None:
    """Same dtype, shape and bits (one NaN is as good as another); names the first difference."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    differs = raw(actual) != raw(expected)
    if actual.dtype.kind not in "biu":
        wide = actual.astype(np.float32), expected.astype(np.float32)
        differs &= ~(np.isnan(wide[0]) & np.isnan(wide[1]))
    if differs.any():
        first = tuple(int(i) for i in np.argwhere(differs)[0])
        raise AssertionError(
            f"{what}: {differs.sum()} of {differs.size} elements differ, first at {list(first)}: "
            f"{actual[first]!r} is not {expected[first]!r}"
        )


def assert_same_tree(actual: Any, expected: Any, what: str = "") -> None:
    """`assert_same_bits` of every leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected), what
    pairs = zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), e in pairs:
        assert_same_bits(a, e, f"{what}{jax.tree_util.keystr(path)}")


def row_of(tree: Any, rows: Any) -> Any:
    """Rows (an index or slice of the leading axis) of every leaf, on the host."""
    return jax.tree.map(lambda x: np.asarray(x)[rows], tree)


def rel_l2(actual: Any, expected: Any) -> float:
    """``|actual - expected| / |expected|``."""
    return float(np.linalg.norm(f64(actual) - f64(expected)) / np.linalg.norm(f64(expected)))


def cosine(a: Any, b: Any) -> float:
    """Cosine of the angle between two arrays taken as vectors."""
    a, b = f64(a).ravel(), f64(b).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def assert_near(actual: Any, exact: np.ndarray, bound: Any, what: str = "") -> None:
    """``|actual - exact| <= bound``, for BF16 plus the half ulp that its one rounding may add.

    NaN and Inf must be in the same places.
    """
    wide = f64(actual)
    assert wide.shape == exact.shape, f"{what}: {wide.shape} is not {exact.shape}"
    np.testing.assert_array_equal(np.isnan(wide), np.isnan(exact), err_msg=what)
    np.testing.assert_array_equal(np.isinf(wide), np.isinf(exact), err_msg=what)
    allowed = np.broadcast_to(np.asarray(bound, np.float64), exact.shape)
    if np.asarray(actual).dtype == jnp.bfloat16:
        largest = np.maximum(np.abs(wide), np.abs(exact))
        allowed = allowed + 0.5 * bf16_ulp(np.where(np.isfinite(exact), largest, 0))
    finite = np.isfinite(exact)
    error = np.where(finite, np.abs(np.where(finite, wide, 0) - np.where(finite, exact, 0)), 0)
    over = error > allowed
    if over.any():
        first = tuple(int(i) for i in np.argwhere(over)[0])
        raise AssertionError(
            f"{what}: {over.sum()} of {over.size} elements too far, first at {list(first)}: "
            f"{wide[first]!r} is not {exact[first]!r} within {allowed[first]:.3e}; "
            f"largest excess {np.max(error / np.maximum(allowed, 1e-300)):.3g} times the bound"
        )
