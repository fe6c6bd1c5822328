"""query_finish against its reference, FP64 and the ops that it takes the place of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.head_norm import head_norm
from dsv4_jax.ops.query_finish import query_finish
from dsv4_jax.ops.rope import rope
from reference.query_finish import query_finish as reference_query_finish
from tests.support.numerics import assert_same_bits, bf16_ulp, f64, raw
from tests.support.op_cases import normal

EPS = 1e-6
ROUNDINGS = ("bfloat16", "float32")
LAST = 1_048_575
# Values within an FP32 sum's or a sine's error of a tie of BF16 (measured: 4e-6 and 1.4e-5).
MOST_TURNED = 1e-4
# A mean that falls the other way moves a whole head by up to two ulps (measured: no head).
MOVED_HEADS = 0.01
# (heads, channels, rotary): the model's, one that a lane or half of them has, no rotation, all.
SIZES = [(64, 512, 64), (3, 96, 32), (5, 264, 64), (2, 512, 0), (4, 64, 64), (1, 8, 8)]


def table(rotary: int) -> np.ndarray:
    return (10000.0 ** -(np.arange(rotary // 2) / max(rotary // 2, 1))).astype(np.float32)


def operands(size: tuple[int, int, int], b: int = 2, t: int = 9) -> tuple[Any, Any, np.ndarray]:
    """Heads of magnitudes 2^-6 .. 2^6; positions up to the last."""
    h, d, rotary = size
    scale = np.exp2(np.round(np.asarray(normal(2, b, t, h, 1)) * 3))
    q = jnp.asarray((np.asarray(normal(0, b, t, h, d)) * scale).astype(jnp.bfloat16))
    positions = np.random.default_rng(1).integers(0, LAST + 1, (b, t))
    positions[0, :3] = 0, 1, LAST
    return q, jnp.asarray(positions, jnp.int32), table(rotary)


def plain(q: Any, positions: Any, frequencies: Any, rounding: Any) -> Any:
    """The ops that the call takes the place of."""
    normed = head_norm(q, EPS, rounding=rounding)
    return rope(normed, positions, frequencies) if len(frequencies) else normed


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_plain_ops(size: tuple[int, int, int], rounding: Any) -> None:
    """Bit for bit but for counted ties, none by more than an ulp of the pair's larger channel."""
    args = operands(size)
    got, want = query_finish(*args, EPS, rounding=rounding), plain(*args, rounding)
    turned = raw(got) != raw(want)
    print(f"{size} {rounding}: {turned.sum()} of {turned.size} values turned by ties")
    assert turned.mean() <= MOST_TURNED + 1 / turned.size
    pairs = np.abs(f64(want)).reshape(*want.shape[:-1], -1, 2).max(axis=-1)
    most = 2 * np.repeat(bf16_ulp(pairs), 2, axis=-1)
    assert (np.abs(f64(got) - f64(want)) <= most).all()


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_against_the_reference(rounding: Any) -> None:
    q, positions, frequencies = operands((8, 512, 64))
    wide = q.astype(jnp.float32)
    want = f64(
        reference_query_finish(wide, positions, jnp.asarray(frequencies), EPS, rounding=rounding)
    )
    got = f64(query_finish(q, positions, frequencies, EPS, rounding=rounding))
    moved = (got != want).mean(axis=-1) > 0.1
    assert moved.mean() <= MOVED_HEADS
    assert (got != want)[~moved].mean() <= MOST_TURNED * 2


def test_against_fp64_at_the_last_position() -> None:
    """B15: a unit vector per channel pair, turned by the FP32 product in FP64."""
    frequencies = table(64)
    position = np.array([[0, 1, 65_536, LAST - 1, LAST]], np.int32)
    q = np.zeros((1, 5, 1, 512), np.float32)
    q[..., 448::2] = 1.0
    got = f64(
        query_finish(
            jnp.asarray(q, jnp.bfloat16),
            jnp.asarray(position),
            frequencies,
            EPS,
            rounding="float32",
        )
    )[0, :, 0]
    one = f64(jnp.asarray(1 / np.sqrt(32 / 512 + EPS), jnp.bfloat16))
    angle = (position[0].astype(np.float32)[:, None] * frequencies).astype(np.float64)
    for actual, exact in ((got[:, 448::2], np.cos(angle)), (got[:, 449::2], np.sin(angle))):
        # Half an ulp of the rounding, and two units of FP32 of the sine.
        assert (np.abs(actual - one * exact) <= bf16_ulp(one * exact) / 2 + one * 2.4e-7).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_stays_in_its_head(bad: float) -> None:
    """A13."""
    q, positions, frequencies = operands((4, 512, 64))
    for rounding in ROUNDINGS:
        clean = np.array(query_finish(q, positions, frequencies, EPS, rounding=rounding))
        poisoned = q.at[1, 3, 2, 450].set(bad)
        got = np.array(query_finish(poisoned, positions, frequencies, EPS, rounding=rounding))
        assert np.isnan(got[1, 3, 2].astype(np.float32)).any()
        got[1, 3, 2] = clean[1, 3, 2]
        assert_same_bits(got, clean)


def test_heads_do_not_meet() -> None:
    """P2: a head alone, and a token alone."""
    q, positions, frequencies = operands((64, 512, 64))
    whole = np.asarray(query_finish(q, positions, frequencies, EPS, rounding="bfloat16"))
    for h in (0, 17, 63):
        alone = query_finish(q[:, :, h : h + 1], positions, frequencies, EPS, rounding="bfloat16")
        assert_same_bits(alone, whole[:, :, h : h + 1])
    alone = query_finish(q[1:, 4:5], positions[1:, 4:5], frequencies, EPS, rounding="bfloat16")
    assert_same_bits(alone, whole[1:, 4:5])


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape: tuple[int, int, int]) -> None:
    """A6."""
    q = jnp.zeros((*shape, 512), jnp.bfloat16)
    positions = jnp.zeros(shape[:2], jnp.int32)
    assert query_finish(q, positions, table(64), EPS, rounding="bfloat16").shape == q.shape


def test_zeros() -> None:
    """A15."""
    q = jnp.zeros((1, 1, 2, 512), jnp.bfloat16)
    got = query_finish(q, jnp.full((1, 1), LAST), table(64), EPS, rounding="bfloat16")
    assert not f64(got).any()


@pytest.mark.parametrize("size", [(3, 100, 32), (3, 520, 64), (3, 96, 12), (2, 256, 128)])
def test_other_sizes_are_plain_ops(size: tuple[int, int, int]) -> None:
    """What has no kernel is still right."""
    args = operands(size)
    text = str(jax.make_jaxpr(lambda *a: query_finish(*a, EPS, rounding="bfloat16"))(*args))
    assert "ffi_call" not in text
    assert_same_bits(
        query_finish(*args, EPS, rounding="bfloat16"),
        jax.jit(plain, static_argnums=3)(*args, "bfloat16"),
    )


def test_a_wrong_variant_fails() -> None:
    """Positions off by one would be seen."""
    q, positions, frequencies = operands((8, 512, 64))
    got = query_finish(q, positions + 1, frequencies, EPS, rounding="bfloat16")
    want = plain(q, positions, frequencies, "bfloat16")
    assert (raw(got) != raw(want)).mean() > 100 * MOST_TURNED
