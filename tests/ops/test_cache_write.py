"""cache_write: bytes of every dtype, dropped rows, untouched neighbours, donation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.quant import bits
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.support.numerics import assert_same_bits, raw

B, S, T, D = 3, 10, 4, 8
DTYPES = [jnp.bfloat16, jnp.float32, E4M3, UE8M0, E2M1]
SLOTS = np.array([[0, 9, 4, 2], [-1, 10, 3, 2**31 - 1], [-(2**31), 5, 11, 6]], np.int32)


def typed(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random bytes, NaN patterns included."""
    dtype = np.dtype(dtype)
    if dtype == E2M1:
        data = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] // 2))
        return bits.bytes_to_e2m1(jnp.asarray(data, jnp.uint8))
    size = (*shape[:-1], shape[-1] * dtype.itemsize)
    data = np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8)
    return jnp.asarray(data.view(dtype))


def expected(cache: np.ndarray, rows: np.ndarray, slots: np.ndarray) -> np.ndarray:
    out = cache.copy()
    for i, j in np.ndindex(*slots.shape):
        if 0 <= slots[i, j] < cache.shape[1]:
            out[i, slots[i, j]] = rows[i, j]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte(dtype: Any) -> None:
    """Rows land in their slots, rows outside are dropped, every other byte stays."""
    cache, rows = typed(0, (B, S, D), dtype), typed(1, (B, T, D), dtype)
    got = cache_write(cache, rows, jnp.asarray(SLOTS))
    assert got.dtype == cache.dtype
    np.testing.assert_array_equal(raw(got), expected(raw(cache), raw(rows), SLOTS))


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_rows_dropped(dtype: Any) -> None:
    cache, rows = typed(0, (B, S, D), dtype), typed(1, (B, T, D), dtype)
    got = cache_write(cache, rows, jnp.full((B, T), -1, jnp.int32))
    np.testing.assert_array_equal(raw(got), raw(cache))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype: Any) -> None:
    """A6."""
    cache = typed(0, (B, S, D), dtype)
    got = cache_write(cache, typed(1, (B, 0, D), dtype), jnp.zeros((B, 0), jnp.int32))
    np.testing.assert_array_equal(raw(got), raw(cache))


@pytest.mark.parametrize("dtype", DTYPES)
def test_donated_cache_keeps_its_pointer(dtype: Any) -> None:
    """B12, as far as XLA's scatter goes: the output is the donated buffer."""
    cache, rows = typed(0, (B, 4096, D), dtype), typed(1, (B, T, D), dtype)
    before = raw(cache).copy()
    pointer = cache.unsafe_buffer_pointer()
    write = jax.jit(lambda c, r, s: cache_write(c, r, s), donate_argnums=0)
    got = write(cache, rows, jnp.asarray(SLOTS))
    assert cache.is_deleted()
    assert got.unsafe_buffer_pointer() == pointer
    np.testing.assert_array_equal(raw(got), expected(before, raw(rows), SLOTS))


def test_used_after_donation() -> None:
    """B10: JAX's own error."""
    cache, rows = typed(0, (B, S, D), jnp.float32), typed(1, (B, T, D), jnp.float32)
    write = jax.jit(cache_write, donate_argnums=0)
    write(cache, rows, jnp.asarray(SLOTS))
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        write(cache, rows, jnp.asarray(SLOTS))


def test_not_donated_leaves_the_input_alone() -> None:
    """B11: without donation the op copies."""
    cache, rows = typed(0, (B, S, D), E4M3), typed(1, (B, T, D), E4M3)
    before = raw(cache).copy()
    cache_write(cache, rows, jnp.asarray(SLOTS)).block_until_ready()
    assert_same_bits(raw(cache), before)
