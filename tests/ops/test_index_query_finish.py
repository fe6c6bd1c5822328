"""index_query_finish against its reference and the ops that it takes the place of."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.hadamard import hadamard
from dsv4_jax.ops.index_query_finish import index_query_finish
from dsv4_jax.ops.query_finish import query_finish
from dsv4_jax.ops.rope import rope
from dsv4_jax.quant.kv import IndexRows, index_dequant, index_quant
from reference.index_query_finish import index_query_finish as reference_index_query_finish
from tests.support.numerics import assert_same_tree, f64, raw
from tests.support.op_cases import normal

FORMS = ("mxfp4", "fp8")
LAST = 1_048_575
# Only sines differ, in their last bit: now and then a BF16 value, and a code of its head (measured:
# 8e-6 of E4M3 codes, no E2M1 code).
MOST_TURNED = 1e-4
# (heads, channels, rotary): the model's, the other widths, no rotation, all channels.
SIZES = [(64, 128, 64), (5, 64, 32), (3, 32, 8), (2, 128, 0)]


def table(rotary: int) -> np.ndarray:
    return (160000.0 ** -(np.arange(rotary // 2) / max(rotary // 2, 1))).astype(np.float32)


def operands(size: tuple[int, int, int], b: int = 2, t: int = 9) -> tuple[Any, Any, np.ndarray]:
    """Heads of magnitudes 2^-6 .. 2^6; positions up to the last."""
    h, d, rotary = size
    scale = np.exp2(np.round(np.asarray(normal(2, b, t, h, 1)) * 3))
    q = jnp.asarray((np.asarray(normal(0, b, t, h, d)) * scale).astype(jnp.bfloat16))
    positions = np.random.default_rng(1).integers(0, LAST + 1, (b, t))
    positions[0, :3] = 0, 1, LAST
    return q, jnp.asarray(positions, jnp.int32), table(rotary)


@functools.partial(jax.jit, static_argnames="form")
def plain(q: Any, positions: Any, frequencies: Any, form: Any) -> IndexRows:
    """The ops that the call takes the place of."""
    turned = rope(q, positions, frequencies) if len(frequencies) else q
    return index_quant(hadamard(turned) if form in FORMS else turned, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_plain_ops(size: tuple[int, int, int], form: Any) -> None:
    """Bit for bit but for counted ties; without a rotation bit for bit."""
    args = operands(size)
    got, want = index_query_finish(*args, form=form), plain(*args, form)
    if size[2] == 0:
        assert_same_tree(got, want)
    for name, mine, theirs in zip(IndexRows._fields, got, want, strict=True):
        turned = raw(mine) != raw(theirs)
        print(f"{size} {form} {name}: {turned.sum()} of {turned.size} turned by ties")
        assert turned.mean() <= MOST_TURNED + 1 / turned.size


@pytest.mark.parametrize("form", ["mxfp4", "fp8", "float32"])
@pytest.mark.parametrize(
    ("size", "n", "c"),
    [((64, 128, 64), 3, 512), ((5, 64, 32), 2, 96), ((3, 128, 64), 2, 516), ((2, 64, 32), 0, 96)],
)
def test_heads_have_the_bits_of_their_own_op(
    size: tuple[int, int, int], n: int, c: int, form: Any
) -> None:
    """In the call, and where one of the two has none: 516 channels, an unquantised form."""
    args = operands(size, 2, 3)
    heads = normal(7, 2, 3, n, c, dtype=jnp.bfloat16)
    for rounding in ("bfloat16", "float32"):
        settings: dict[str, Any] = {"eps": 1e-3, "rounding": rounding}
        got = index_query_finish(*args, form=form, heads=heads, **settings)
        want = query_finish(heads, *args[1:], 1e-3, rounding=rounding)
        assert_same_tree(got, (index_query_finish(*args, form=form), want))


def test_heads_against_the_reference() -> None:
    q, positions, frequencies = operands((2, 128, 64), 1, 5)
    heads = normal(7, 1, 5, 3, 512, dtype=jnp.bfloat16)
    settings: dict[str, Any] = {"form": "mxfp4", "eps": 1e-6, "rounding": "bfloat16"}
    _, got = index_query_finish(q, positions, frequencies, heads=heads, **settings)
    q, wide = (x.astype(jnp.float32) for x in (q, heads))
    _, want = reference_index_query_finish(q, positions, frequencies, heads=wide, **settings)
    assert (f64(got) != f64(want)).mean() <= 10 * MOST_TURNED


def test_against_the_reference() -> None:
    q, positions, frequencies = operands((16, 128, 64))
    wide = q.astype(jnp.float32)
    reference = jax.jit(functools.partial(reference_index_query_finish, form="mxfp4"))
    want = reference(wide, positions, frequencies)
    got = index_dequant(index_query_finish(q, positions, frequencies, form="mxfp4"))
    differ = (f64(got) != f64(want)).mean()
    # A matrix product sums in another order: BF16 ties, then codes.
    assert differ <= 1e-3, differ


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_value_stays_in_its_head(bad: float, form: Any) -> None:
    """A13, A14: NaN in the scales of its head: of a pair's infinities a difference too."""
    q, positions, frequencies = operands((4, 128, 64))
    clean = index_query_finish(q, positions, frequencies, form=form)
    got = index_query_finish(q.at[1, 3, 2, 100].set(bad), positions, frequencies, form=form)
    assert (raw(got.scale)[1, 3, 2] == 255).all()
    for mine, theirs in zip(got, clean, strict=True):
        mine, theirs = raw(mine).copy(), raw(theirs)
        mine[1, 3, 2] = theirs[1, 3, 2]
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_heads_do_not_meet(form: Any) -> None:
    """P2."""
    q, positions, frequencies = operands((64, 128, 64))
    whole = index_query_finish(q, positions, frequencies, form=form)
    alone = index_query_finish(q[1:, 4:5, 17:18], positions[1:, 4:5], frequencies, form=form)
    assert_same_tree(alone, jax.tree.map(lambda x: np.asarray(x)[1:, 4:5, 17:18], whole))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(shape: tuple[int, int, int], form: Any) -> None:
    """A6."""
    q = jnp.zeros((*shape, 128), jnp.bfloat16)
    got = index_query_finish(q, jnp.zeros(shape[:2], jnp.int32), table(64), form=form)
    assert got.key.shape == q.shape
    assert got.scale is not None and got.scale.shape == (*shape, 4 if form == "mxfp4" else 1)


@pytest.mark.parametrize("form", FORMS)
def test_zeros(form: Any) -> None:
    """A15: codes 0 and the least scale."""
    got = index_query_finish(
        jnp.zeros((1, 1, 2, 128), jnp.bfloat16), jnp.full((1, 1), LAST), table(64), form=form
    )
    assert not f64(got.key).any()
    assert (raw(got.scale) == (1 if form == "mxfp4" else 127 - 22)).all()


@pytest.mark.parametrize("form", ["bfloat16", "float32"])
def test_unquantised_forms(form: Any) -> None:
    """No transform."""
    args = operands((3, 128, 64))
    assert_same_tree(index_query_finish(*args, form=form), plain(*args, form))


def test_a_wrong_variant_fails() -> None:
    """Positions off by one would be seen."""
    q, positions, frequencies = operands((8, 128, 64))
    got = index_query_finish(q, positions + 1, frequencies, form="mxfp4")
    want = plain(q, positions, frequencies, "mxfp4")
    assert (raw(got.key) != raw(want.key)).mean() > 100 * MOST_TURNED
