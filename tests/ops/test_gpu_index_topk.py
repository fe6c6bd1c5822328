"""The indexer's CUDA kernels at sizes and shapes that reach each of them.

`test_index_topk.py` is run on a GPU as well, where pools of a length that is no multiple of 16 go
to the kernel for any size; here pools are longer than what is visible, so that Hopper's kernel
sees every count. Under a minute.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.bench.weights import any_leaf
from dsv4_jax.ops.index_topk import index_topk
from dsv4_jax.quant import bits
from dsv4_jax.quant.kv import IndexRows
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.ops.test_index_topk import (
    KERNEL_FORMS,
    LEVELS,
    SIZES,
    Case,
    assert_scaled,
    case,
    error_bound,
    simple,
    sorted_best,
    stored,
)
from tests.support.numerics import assert_near, assert_same_bits
from tests.support.stored import assert_best, exact_scores

pytestmark = pytest.mark.gpu

MODEL: dict[str, Any] = SIZES["model"]
SCORE_REL = 2e-4
"""Of sum_h |weight_h| |q_h| |key|: FP8 tensor cores."""
SHAPES = {"decode": (8, 1), "pairs": (4, 2), "eights": (1, 8)}
"""Rows and tokens: how many queries share decoded keys."""


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("topk", [1, 512, 1024, 2048])
@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_visible_counts(form: str, topk: int, shape: str) -> None:
    """1, 2, K - 1, K, K + 1 and 8191 to 8193 of 8208 entries; scores within the bound of FP64."""
    b, t = SHAPES[shape]
    n = np.array([1, 2, max(topk - 1, 0), topk, topk + 1, 8191, 8192, 8193]).reshape(b, t)
    given = case(form, b=b, t=t, slots=8208, n=n, **MODEL)
    _, scores = given.check_choice(topk)
    exact, sizes = given.exact()
    seen = np.arange(8208) < n[..., None]
    assert_near(np.where(seen, scores, 0), np.where(seen, exact, 0), SCORE_REL * sizes)


@pytest.mark.parametrize("topk", [512, 1024])
@pytest.mark.parametrize("t", [1, 200])
@pytest.mark.parametrize("slots", [1024, 8192, 16384, 32768, 65536, 131072, 262144, 524288])
def test_every_choice(slots: int, t: int, topk: int) -> None:
    """One query or more than a GPU has multiprocessors: one thread block each, or clusters of 16.

    Scores are those of a small integer head each, so that many are equal.
    """
    rng = np.random.default_rng(slots)
    levels = rng.integers(-20, 20, slots)
    given = simple(levels, t, **MODEL)
    n = rng.integers(0, slots + 1, (1, t)).astype(np.int32)
    n[0, 0] = slots
    idx = np.asarray(given.but(n=n)(topk))
    scores = np.exp2(levels.astype(np.float32))
    order = np.argsort(-scores, kind="stable")
    for j in np.unique(np.linspace(0, t - 1, 9).astype(int)):
        visible = order[order < n[0, j]]
        want = np.full(topk, -1, np.int32)
        best = np.sort(visible[:topk])
        want[: len(best)] = best
        np.testing.assert_array_equal(idx[0, j], want, f"query {j}, {n[0, j]} visible")


@pytest.mark.parametrize("form", KERNEL_FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (4, 1), (1, 2), (1, 8)], ids=str)
def test_a_million_positions(shape: tuple[int, int], form: str) -> None:
    """262,143 and 262,144 entries among the counts; the scores of the last query against FP64."""
    counts = [262144, 262143, 2049, 100000, 1, 1023, 1024, 262142][: shape[0] * shape[1]]
    n = np.array(counts[::-1]).reshape(shape)
    given = case(form, b=shape[0], t=shape[1], slots=262144, n=n, **MODEL)
    _, scores = given.check_choice(1024)
    one = given.query(shape[0] - 1, shape[1] - 1)
    assert_near(scores[-1:, -1:], one.exact()[0], error_bound(one))


@pytest.mark.parametrize("t", [1, 9])
@pytest.mark.parametrize("levels", LEVELS)
def test_adversarial_order_of_all_entries(levels: str, t: int) -> None:
    """All equal, sorted both ways, duplicates at the boundary, one bucket: at 262,144 entries."""
    level = LEVELS[levels](np.arange(262144))
    idx = np.asarray(simple(level, t, **MODEL)(1024))
    want = np.sort(np.argsort(-level, kind="stable")[:1024])
    for j in range(t):
        np.testing.assert_array_equal(idx[0, j], want)


@pytest.mark.parametrize("t", [1, 2, 9])
@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_nan_and_infinity_far_out(form: str, t: int) -> None:
    """Scales of 255 and 254 in an eighth of 40,000 entries each: fewer numbers than picks, too."""
    rng = np.random.default_rng(1)
    given = case(form, b=2, t=t, slots=40000, **MODEL)
    kinds = rng.integers(0, 8, (2, 40000))
    kinds[1, rng.permutation(40000)[:39500]] = 0  # 500 numbers at most
    assert given.keys.scale is not None
    scale = np.array(given.keys.scale).view(np.uint8)
    scale[kinds == 0], scale[kinds == 1] = 255, 254
    first = np.zeros(128, np.float32)
    first[0] = 1
    key = np.array(given.keys.key)
    key[kinds == 1] = (6 * first).astype(key.dtype)
    given = given.but(
        q=stored(np.tile(4 * first, (2, t, 64, 1)), form),
        weight=np.full((2, t, 64), 2, np.float32),
        keys=IndexRows(key, scale.view(UE8M0)),
    )
    _, scores = given.check_choice(512)
    assert np.isnan(scores).any(axis=-1).all() and np.isinf(scores).any(axis=-1).all()


@pytest.mark.parametrize("slots", [1024, 8192, 40000])
@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_a_query_alone_and_in_batches(form: str, slots: int) -> None:
    """Ids and scores of decoded tokens are the same alone and in batches of 8 and 32."""
    n = np.random.default_rng(2).integers(0, slots + 1, (32, 1))
    n[0], n[5] = slots, 0
    given = case(form, b=32, t=1, slots=slots, n=n, **MODEL)
    idx, scores = given(512, return_scores=True)

    def rows(at: slice) -> Case:
        keys = jax.tree.map(lambda x: x[at], given.keys)
        q = jax.tree.map(lambda x: x[at], given.q)
        return Case(q, given.weight[at], keys, given.n[at])

    for size in (1, 8):
        for first in range(0, 32, size):
            at = slice(first, first + size)
            part = rows(at)(512, return_scores=True)
            assert_same_bits(part[0], np.asarray(idx)[at], f"ids of rows {first} in {size}")
            assert_same_bits(part[1], np.asarray(scores)[at], f"scores of rows {first} in {size}")


@pytest.mark.parametrize("t", [2, 3, 6, 9])
@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_decode_is_prefill(form: str, t: int) -> None:
    """The same set wherever the K-th and the next score are further apart than the error."""
    given = case(form, b=2, t=t, slots=8192, n=[list(range(8192 - t, 8192))] * 2, **MODEL)
    idx, scores = (np.asarray(x) for x in given(512, return_scores=True))
    exact, bound = given.exact()[0], error_bound(given)
    differ = 0
    for i, j in np.ndindex(2, t):
        one = given.query(i, j)
        alone, one_scores = (np.asarray(x) for x in one(512, return_scores=True))
        n = int(given.n[i, j])
        assert_best(idx[i, j], exact[i, j, :n], bound[i, j, :n], 512)
        assert_best(alone[0, 0], exact[i, j, :n], bound[i, j, :n], 512)
        best = np.sort(exact[i, j, :n])[::-1]
        if best[511] - best[512] > 2 * bound[i, j, :n].max():
            np.testing.assert_array_equal(alone[0, 0], idx[i, j])
        differ += int((one_scores[0, 0] != scores[i, j]).sum())
    print(f"{form}, chunks of {t}: {differ} of {scores.size} scores differ from those alone")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_scaled_weights(form: str, shape: str) -> None:
    b, t = SHAPES[shape]
    assert_scaled(case(form, b=b, t=t, slots=1024, n=np.full((b, t), 1000), **MODEL), 512)


def test_same_bits_every_time() -> None:
    """P1, A21: eager, under jit, from a graph."""
    given = case("mxfp4", b=4, t=1, slots=32768, n=[[32768], [5], [20000], [1024]], **MODEL)
    operands = jax.device_put((given.q, given.weight, given.keys, given.n))
    eager = index_topk(*operands, topk=512, return_scores=True)

    @jax.jit
    def often(*operands: Any) -> Any:
        def body(_: Any, shift: jax.Array) -> Any:  # so that nothing is done once for all
            q, weight, keys, n = operands
            one = index_topk(q, weight, keys, n - shift, topk=512, return_scores=True)
            return None, one

        return jax.lax.scan(body, None, jnp.zeros(6, jnp.int32))[1]

    for _ in range(3):
        idx, scores = often(*operands)
        for i in range(6):
            assert_same_bits(idx[i], eager[0])
            assert_same_bits(scores[i], eager[1])


@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_codes_beyond_two_gigabytes(form: str) -> None:
    """A23: rows that begin past 2^31 bytes of codes, and 2^32 channels; 2.3 GB of keys."""
    b, slots, dtype = (130, 262144, E2M1) if form == "mxfp4" else (66, 262144, E4M3)
    width = 64 if form == "mxfp4" else 128
    assert (b - 1) * slots * width > 2**31
    blocks = 4 if form == "mxfp4" else 1

    @jax.jit
    def make() -> IndexRows:
        """Rows are turns of one."""
        one = bits.byte_view(any_leaf(1, (1, slots, 128), dtype))[0]
        turn = jnp.arange(b, dtype=jnp.uint8)[:, None, None] & jnp.uint8(0xBF)
        code = one[None] ^ turn
        code = bits.bytes_to_e2m1(code) if dtype == E2M1 else bits.from_byte_view(code & 0xBF, E4M3)
        return IndexRows(code, any_leaf(2, (b, slots, blocks), UE8M0))

    keys = make()
    q = IndexRows(any_leaf(3, (b, 1, 64, 128), dtype), any_leaf(4, (b, 1, 64, blocks), UE8M0))
    weight = any_leaf(5, (b, 1, 64), jnp.float32)
    n = np.full((b, 1), 3000, np.int32)
    n[[0, b // 2, b - 2, b - 1], 0] = slots, 100000, slots, slots - 1
    idx = np.asarray(index_topk(q, weight, keys, jnp.asarray(n), topk=1024))
    for row in (0, 1, b // 2, b - 3, b - 2, b - 1):
        scores, sizes = exact_scores(q, weight, keys, (row, 0), int(n[row, 0]))
        assert_best(idx[row, 0], scores, SCORE_REL * sizes, 1024, f"row {row}")


def test_the_sort_of_these_tests_is_the_rule() -> None:
    """`sorted_best` and a stable argsort choose alike."""
    scores = np.random.default_rng(0).integers(-3, 3, (1, 1, 50)).astype(np.float32)
    want = np.sort(np.argsort(-scores[0, 0], kind="stable")[:7])
    np.testing.assert_array_equal(sorted_best(scores, np.array([[50]]), 7)[0, 0], want)
