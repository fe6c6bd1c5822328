"""index_topk against FP64, a full sort in NumPy and the FP32 reference, on equal stored inputs.

On a GPU a query in calls of different shapes may have other bits: there its choice is held to the
scores that its call reports.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops import index_topk as module
from dsv4_jax.ops._index_topk_jax import index_topk_jax
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops.index_topk import SCRATCH_BUDGET, index_topk
from dsv4_jax.quant.kv import IndexRows
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from reference import indexer as reference
from reference.index_topk import index_topk as reference_index_topk
from reference.rounding import OFFICIAL
from tests.support.numerics import assert_near, assert_same_bits, f64

B, T, HEADS, DIM, SLOTS = 2, 3, 4, 32, 256
FORMS = ("mxfp4", "fp8", "bfloat16", "float32")
KERNEL_FORMS = ("mxfp4", "fp8")
BLOCK = {"mxfp4": 32, "fp8": 128}
REL = 1e-5
"""Of sum_h |weight_h| |q_h| |key|, for sums in FP32."""
FP8_REL = 2e-4
"""The same on FP8 tensor cores, which keep about 14 bits of a sum."""
SIZES = {"any": {"heads": 2, "dim": 32}, "model": {"heads": 64, "dim": 128}}
"""Of a kernel for any size, and those that Hopper's takes."""
INT32_MAX = 2**31 - 1
MIN_OVERLAP = 0.999


def stored(x: np.ndarray, form: str) -> IndexRows:
    """Values as a cache holds them, in numpy: JAX would compile each shape."""
    if form not in KERNEL_FORMS:
        return IndexRows(x.astype(form), None)
    dtype, most = (E2M1, 6.0) if form == "mxfp4" else (E4M3, 448.0)
    block = 32 if form == "mxfp4" else x.shape[-1]
    groups = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    amax = np.abs(groups).max(axis=-1, initial=1e-4)
    exponent = np.ceil(np.log2(amax / most))
    code = (groups / np.exp2(exponent)[..., None]).reshape(x.shape).astype(np.float32).astype(dtype)
    return IndexRows(code, (exponent + 127).astype(np.uint8).view(UE8M0))


def values(rows: IndexRows) -> np.ndarray:
    """In FP64."""
    wide = f64(rows.key)
    if rows.scale is None:
        return wide
    byte = np.asarray(rows.scale).view(np.uint8).astype(int)
    scale = np.where(byte == 255, np.nan, np.ldexp(1.0, byte - 127))
    return wide * np.repeat(scale, wide.shape[-1] // scale.shape[-1], axis=-1)


def sorted_best(scores: np.ndarray, n_visible: np.ndarray, k: int) -> np.ndarray:
    """Ascending ids of the best ``min(k, n)`` of the first ``n``, then -1; ties to the lower."""
    out = np.full((*n_visible.shape, k), -1, np.int32)
    for at in np.ndindex(*n_visible.shape):
        n = int(np.clip(n_visible[at], 0, scores.shape[-1]))
        row = scores[at][:n]
        number = np.where(np.isnan(row), 0, row) + 0.0  # -0 becomes 0
        best = np.sort(np.lexsort((np.arange(n), -number, np.isnan(row)))[:k])
        out[at][: len(best)] = best
    return out


def error_bound(given: "Case") -> np.ndarray:
    """Of every score."""
    sizes = {"heads": given.q.key.shape[2], "dim": given.q.key.shape[3]}
    fast = jax.default_backend() == "gpu" and sizes == SIZES["model"]
    return (FP8_REL if fast else REL) * given.exact()[1]


@functools.partial(jax.jit, static_argnames="topk")
def with_and_without_scores(*operands: Any, topk: int) -> Any:
    """Two calls, compiled at once."""
    one = index_topk(*operands, topk=topk, return_scores=True)
    return one, index_topk(*operands, topk=topk)


@dataclasses.dataclass(frozen=True)
class Case:
    """Operands of a call, in numpy."""

    q: IndexRows
    weight: np.ndarray
    keys: IndexRows
    n: np.ndarray

    def __call__(self, topk: int, **settings: Any) -> Any:
        return index_topk(self.q, self.weight, self.keys, self.n, topk=topk, **settings)

    def but(self, **changed: Any) -> "Case":
        """With other operands."""
        return dataclasses.replace(self, **changed)

    def query(self, i: int, j: int) -> "Case":
        """One query in a call of its own."""
        at = np.s_[i : i + 1, j : j + 1]
        q = jax.tree.map(lambda x: x[at], self.q)
        keys = jax.tree.map(lambda x: x[i : i + 1], self.keys)
        return Case(q, self.weight[at], keys, self.n[at])

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores in FP64 and ``sum_h |weight_h| |q_h| |key|``."""
        q, k, w = values(self.q), values(self.keys), f64(self.weight)
        b, t, h, d = q.shape
        dot = (q.reshape(b, t * h, d) @ k.swapaxes(1, 2)).reshape(b, t, h, -1)
        size = np.linalg.norm(k, axis=-1)[:, None]
        heads = np.sum(np.abs(w) * np.linalg.norm(q, axis=-1), axis=-1)[..., None]
        return np.einsum("bths,bth->bts", np.maximum(dot, 0), w), heads * size

    def check_choice(self, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids are those of a full sort of the scores that the call reports."""
        (idx, scores), alone = with_and_without_scores(
            self.q, self.weight, self.keys, self.n, topk=topk
        )
        idx, scores = np.asarray(idx), np.asarray(scores)
        k = min(topk, self.keys.key.shape[1])
        assert (idx.dtype, scores.dtype) == (np.int32, np.float32)
        np.testing.assert_array_equal(idx, sorted_best(scores, self.n, k))
        hidden = np.arange(scores.shape[-1]) >= np.clip(self.n, 0, INT32_MAX)[..., None]
        assert (scores[hidden] == -np.inf).all()
        assert_same_bits(alone, idx, "without scores")
        return idx, scores


def case(
    form: str,
    b: int = B,
    t: int = T,
    heads: int = HEADS,
    dim: int = DIM,
    slots: int = SLOTS,
    n: Any = None,
    seed: int = 0,
) -> Case:
    """Random operands; every entry is visible unless ``n`` says otherwise."""
    rng = np.random.default_rng(seed)
    shape = np.full((b, t), slots) if n is None else np.broadcast_to(n, (b, t))
    return Case(
        stored(rng.standard_normal((b, t, heads, dim), np.float32), form),
        rng.standard_normal((b, t, heads), np.float32),
        stored(rng.standard_normal((b, slots, dim), np.float32), form),
        shape.astype(np.int32),
    )


def simple(levels: np.ndarray, t: int = 2, heads: int = 1, dim: int = DIM) -> Case:
    """Scores of ``2^level``, entry by entry: of one head, the others weigh nothing."""
    slots = len(levels)
    key = np.zeros((1, slots, dim), np.float32)
    key[..., 0] = 1
    byte = np.repeat((levels + 127).astype(np.uint8)[None, :, None], dim // 32, axis=-1)
    q, weight = np.zeros((1, t, heads, dim), np.float32), np.zeros((1, t, heads), np.float32)
    q[..., 0] = 1
    weight[..., -1] = 1
    return Case(
        IndexRows(q.astype(E2M1), np.full((1, t, heads, dim // 32), 127, np.uint8).view(UE8M0)),
        weight,
        IndexRows(key.astype(E2M1), byte.view(UE8M0)),
        np.full((1, t), slots, np.int32),
    )


@pytest.mark.parametrize(("heads", "dim"), [(4, 32), (64, 128), (1, 128), (3, 96)])
@pytest.mark.parametrize("form", FORMS)
def test_scores_against_fp64(form: str, heads: int, dim: int) -> None:
    given = case(form, heads=heads, dim=dim)
    _, scores = given.check_choice(24)
    assert_near(scores, given.exact()[0], error_bound(given))


def assert_scaled(given: Case, topk: int) -> None:
    """Scaled weights, rounded if they are BF16, give the bits of those themselves."""
    size = 64**-0.5 * 128**-0.5
    for dtype in (jnp.bfloat16, jnp.float32):
        weight = jnp.asarray(given.weight).astype(dtype)
        scaled = round_to(weight.astype(jnp.float32) * jnp.float32(size), dtype)
        settings: dict[str, Any] = {"topk": topk, "return_scores": True}
        n = jnp.asarray(given.n)
        got = index_topk(given.q, weight, given.keys, n, weight_scale=size, **settings)
        want = index_topk(given.q, scaled.astype(jnp.float32), given.keys, n, **settings)
        for mine, theirs in zip(got, want, strict=True):
            assert_same_bits(mine, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_scaled_weights(form: str) -> None:
    assert_scaled(case(form), 10)


@pytest.mark.parametrize("form", KERNEL_FORMS)
def test_channels_in_any_number(form: str) -> None:
    """A8: wider than the kernel serves, and, of FP8, no multiple of anything."""
    for dim in (32, 1024, 1056) if form == "mxfp4" else (1, 37, 1024, 1030):
        given = case(form, heads=2, dim=dim)
        _, scores = given.check_choice(24)
        assert_near(scores, given.exact()[0], error_bound(given), f"{dim} channels")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("topk", [1, 24, 256, 1000])
def test_selection_is_a_full_sort(form: str, topk: int) -> None:
    """B5: with fewer visible entries than ``topk`` all of them, then -1."""
    case(form, n=[[0, 1, 23], [24, 129, 256]]).check_choice(topk)


@pytest.mark.parametrize("topk", [1, 512, 1024, 2048])
@pytest.mark.parametrize("t", [1, 9])
@pytest.mark.parametrize("size", SIZES)
def test_around_the_number_of_picks(size: str, topk: int, t: int) -> None:
    """Sizes 1, 2, K - 1, K, K + 1 and 8191 to 8193: few queries and a chunk."""
    for slots in (1, 2, topk - 1, topk, topk + 1, *((8191, 8192, 8193) if topk > 1 else ())):
        if slots > 0:
            case("mxfp4", b=1, t=t, slots=slots, **SIZES[size]).check_choice(topk)


@pytest.mark.parametrize(("slots", "size"), [(262143, "any"), (262144, "any"), (262144, "model")])
def test_a_million_positions(slots: int, size: str) -> None:
    """Entries of 2^20 positions; a visible count of its own for each query."""
    n = np.array([[slots, 2049, 100000]])
    case("mxfp4", b=1, slots=slots, n=n, **SIZES[size]).check_choice(1024)


LEVELS = {
    "all-equal": lambda w: 0 * w,
    "ascending": lambda w: w * 250 // len(w) - 125,
    "descending": lambda w: 125 - w * 250 // len(w),
    "two-of-each": lambda w: w % (len(w) // 2) * 250 // len(w) - 60,
    "one-above": lambda w: (w == len(w) - 1).astype(int),
    "one-below": lambda w: -(w == 0).astype(int),
}


@pytest.mark.parametrize("t", [1, 9])
@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("size", SIZES)
def test_ties_go_to_the_lower_id(size: str, levels: str, t: int) -> None:
    """B14: long runs of equal scores at the boundary, all in one bucket, both directions."""
    given = simple(LEVELS[levels](np.arange(5000)), t, **SIZES[size])
    for topk in (1, 700, 2048):
        idx, scores = given.check_choice(topk)
        if levels == "all-equal":
            np.testing.assert_array_equal(idx, np.tile(np.arange(topk), (1, t, 1)))
        elif levels == "two-of-each":
            assert_same_bits(scores[..., :2500], scores[..., 2500:], "the ties are real")


@pytest.mark.parametrize("form", KERNEL_FORMS)
@pytest.mark.parametrize("t", [1, 9])
def test_nearly_equal_scores(form: str, t: int) -> None:
    """All in one bucket but the last bits: one key for all entries, but for a few channels."""
    given = case(form, b=1, t=t, slots=3000, **SIZES["model"])
    key = np.array(given.keys.key)
    key[:, 1:, 2:] = key[:, :1, 2:]
    assert given.keys.scale is not None
    scale = np.broadcast_to(np.asarray(given.keys.scale)[:, :1], given.keys.scale.shape)
    given.but(keys=IndexRows(key, scale.copy())).check_choice(512)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", SIZES)
def test_nan_infinity_and_zeros(size: str, form: str, sign: int) -> None:
    """NaN after every number, -inf before it, -0 equal to 0; an entry that is visible counts."""
    rng = np.random.default_rng(3)
    heads, dim = SIZES[size]["heads"], SIZES[size]["dim"]
    given = case(form, heads=heads, dim=dim)
    kinds = rng.integers(0, 5, (B, SLOTS))
    largest = np.zeros(dim, np.float32)
    largest[0] = 1
    if form in KERNEL_FORMS:
        assert given.keys.scale is not None
        scale = np.array(given.keys.scale).view(np.uint8)
        key = np.array(given.keys.key)
        scale[kinds == 0] = 255
        scale[kinds == 1] = 254
        key[kinds == 1] = (6 * largest).astype(key.dtype)
        key[kinds == 2] = key[kinds == 2] * 0
        keys = IndexRows(key, scale.view(UE8M0))
    else:
        key = np.array(given.keys.key)
        key[kinds == 0] = np.nan
        key[kinds == 1] = (3e38 * largest).astype(key.dtype)
        key[kinds == 2] = 0
        keys = IndexRows(key, None)
    q = stored(np.tile(4 * largest, (B, T, heads, 1)), form)
    given = given.but(q=q, keys=keys, weight=np.full((B, T, heads), 2.0 * sign, np.float32))
    for topk in (10, 160, 256) if form in KERNEL_FORMS else (160,):  # each is compiled
        _, scores = given.check_choice(topk)
        assert np.isnan(scores).any() and (scores == sign * np.inf).any() and (scores == 0).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_stored_bytes_beyond_the_visible_do_not_matter(size: str, form: str) -> None:
    """B9: 0xFF bytes there change no id and no score."""
    given = case(form, **SIZES[size], n=[[0, 1, 23], [24, 129, 200]])
    hidden = np.arange(SLOTS)[None] >= given.n.max(axis=1, keepdims=True)

    def poison(part: np.ndarray) -> np.ndarray:
        if part.dtype == ml_dtypes.float4_e2m1fn:  # has no NaN: its scale does
            return np.where(hidden[..., None], -part, part)
        out = part.copy()
        out.view(np.uint8)[hidden] = 0xFF
        return out

    dirty = given.but(keys=jax.tree.map(poison, given.keys))
    assert np.isnan(values(dirty.keys)).any()
    for got, want in zip(dirty(24, return_scores=True), given(24, return_scores=True), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("form", ["mxfp4", "float32"])
def test_longer_pool_changes_nothing(form: str) -> None:
    given = case(form, n=[[0, 1, 23], [24, 129, 256]])
    pad = [(0, 0), (0, 256), (0, 0)]
    longer = given.but(keys=jax.tree.map(lambda x: np.pad(x, pad), given.keys))
    assert_same_bits(longer(24), given(24))
    assert_same_bits(
        longer(24, return_scores=True)[1][..., :SLOTS], given(24, return_scores=True)[1]
    )


@pytest.mark.parametrize("n", [SLOTS + 1, INT32_MAX, 2**40])
@pytest.mark.parametrize("form", ["mxfp4", "float32"])
def test_more_visible_than_stored(form: str, n: int) -> None:
    """Counted as all of them: a device value must not send the loop astray; 64 bits do not wrap."""
    every = case(form)
    with jax.enable_x64(True):
        more = every.but(n=np.full((B, T), n, np.int64 if n > INT32_MAX else np.int32))
        got = more(24)
    assert_same_bits(got, every(24))


@pytest.mark.parametrize("n", [-1, -(2**31), -(2**40)])
@pytest.mark.parametrize("form", ["mxfp4", "float32"])
def test_less_than_nothing_is_visible(form: str, n: int) -> None:
    given = case(form)
    with jax.enable_x64(True):
        idx, scores = given.but(n=np.full((B, T), n))(24, return_scores=True)
    assert_same_bits(idx, np.full((B, T, 24), -1, np.int32))
    assert_same_bits(scores, np.full((B, T, SLOTS), -np.inf, np.float32))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
def test_a_query_alone_in_a_batch_and_in_a_chunk(size: str, form: str) -> None:
    """P2, P4: decode = prefill; bitwise on the CPU."""
    rng = np.random.default_rng(5)
    given = case(form, b=3, t=11, n=rng.integers(0, SLOTS + 1, (3, 11)), **SIZES[size])
    idx, scores = given(40, return_scores=True)
    for i, j in np.ndindex(3, 11):
        one = given.query(i, j)
        if jax.default_backend() != "cpu":
            one.check_choice(40)
            continue
        one_idx, one_scores = one(40, return_scores=True)
        assert_same_bits(one_idx[0, 0], idx[i, j], f"query {i}, {j}")
        assert_same_bits(one_scores[0, 0], scores[i, j], f"query {i}, {j}")


@pytest.mark.parametrize("t", [1, 12])
def test_no_entries_and_no_queries(t: int) -> None:
    """A6, B4."""
    for rows, queries, slots in ((2, t, 0), (0, t, 100), (2, 0, 100)):
        idx, scores = case("mxfp4", b=rows, t=queries, slots=slots)(24, return_scores=True)
        assert idx.shape == (rows, queries, min(24, slots))
        assert scores.shape == (rows, queries, slots)


def test_more_queries_than_scratch_holds() -> None:
    """On a GPU they are chosen for in turns; the bound is the handler's (tests/fault)."""
    assert module._scratch_bytes(3, 100) == 3 * 4 * (100 + 8)
    row = module._scratch_bytes(1, 262144)
    assert row == 4 * (262144 + 262144 // 16)
    assert module._scratch_bytes(4096, 262144) == SCRATCH_BUDGET // row * row
    assert module._scratch_bytes(1, 1 << 30) == 4 * 17 << 26
    assert 70 * row > SCRATCH_BUDGET
    given = case("mxfp4", b=1, t=70, heads=1, slots=262144, n=3000)
    idx, _ = given.check_choice(512)
    for j in (0, 63, 64, 69):
        one, _ = given.query(0, j).check_choice(512)
        if jax.default_backend() == "cpu":
            assert_same_bits(idx[0, j], one[0, 0])


@pytest.mark.parametrize("slots", [1024, 8192, 32768])
def test_overlap_with_the_reference(slots: int) -> None:
    """The reference's set, up to entries whose scores differ by less than both errors."""
    given = case("mxfp4", b=1, t=2, slots=slots, **SIZES["model"])
    idx, _ = given.check_choice(512)
    want = np.asarray(
        reference_index_topk(given.q, given.weight, given.keys, jnp.asarray(given.n), topk=512)
    )
    scores, bounds = given.exact()[0][0], error_bound(given)[0]
    for got, ref, score, bound in zip(idx[0], want[0], scores, bounds, strict=True):
        overlap = np.intersect1d(got, ref)
        print(f"{slots} entries: overlap {len(overlap) / 512:.4f}")
        assert len(overlap) >= MIN_OVERLAP * 512
        kth = np.sort(score)[-512]
        for other in np.setxor1d(got, ref):
            assert abs(score[other] - kth) <= 2 * bound[other]


@pytest.mark.parametrize("form", FORMS)
def test_reference_agrees_on_ties_and_nan(form: str) -> None:
    """Scores that both compute exactly: small integers, zeros, NaN."""
    rng = np.random.default_rng(2)
    given = case(form, heads=2, n=[[0, 1, 23], [24, 129, 256]])
    small = lambda *shape: rng.integers(-2, 3, shape).astype(np.float32)  # noqa: E731
    q, key = stored(small(B, T, 2, DIM), form), stored(small(B, SLOTS, DIM), form)
    weight = rng.integers(-1, 3, (B, T, 2)).astype(np.float32)
    weight[0, 2] = np.nan
    given = given.but(q=q, keys=key, weight=weight)
    for topk in (1, 24, 100):
        operands = given.q, given.weight, given.keys, jnp.asarray(given.n)
        want = reference_index_topk(*operands, topk=topk, return_scores=True)
        got = given(topk, return_scores=True)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])


def test_bf16_rounding_points_are_the_reference() -> None:
    """Up to a sum that crosses a rounding boundary: at most 1 % of the scores, by one ulp each."""
    given = case("mxfp4")
    given = given.but(weight=given.weight.astype(jnp.bfloat16).astype(np.float32))
    got = f64(given(24, rounding="bfloat16", return_scores=True)[1])
    q, wide = values(given.q).astype(np.float32), values(given.keys).astype(np.float32)
    want = np.stack(
        [f64(reference.indexer(q[i], wide[i], given.weight[i], OFFICIAL)) for i in range(B)]
    )
    assert np.mean(got != want) < 0.01
    # BF16 has 8 significant bits; the terms of the sum are a few times larger than it.
    assert np.abs(got - want).max() <= 2.0**-6 * np.abs(want).max()


# Wrong variants: what the comparisons above must see.


def _truncated(scores: np.ndarray) -> np.ndarray:
    """Scores in BF16, as some select by."""
    return scores.astype(jnp.bfloat16).astype(np.float32)


WRONG = {
    "bf16-scores": lambda s, n, k: sorted_best(_truncated(s), n, k),
    "ties-to-the-higher": lambda s, n, k: (
        s.shape[-1] - 1 - sorted_best(s[..., ::-1], n, k)[..., ::-1]
    ),
    "local-lists": lambda s, n, k: np.sort(
        np.concatenate([sorted_best(s[..., i::2], n // 2, k // 2) * 2 + i for i in (0, 1)], -1), -1
    ),
    "largest-magnitude": lambda s, n, k: sorted_best(np.abs(s), n, k),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_choices_fail(wrong: str) -> None:
    """On random scores, and where they tie, the choice is no other than a full sort's."""
    tied = simple(LEVELS["two-of-each"](np.arange(3000)), T)
    same: list[bool] = []
    for given in (case("mxfp4", b=1, slots=3000), tied):
        idx, scores = given.check_choice(512)
        same.append(np.array_equal(WRONG[wrong](scores, given.n, 512), idx))
    assert not all(same)


@pytest.mark.parametrize("wrong", ["no-relu", "no-weight", "q-unscaled"])
def test_wrong_scores_fail(wrong: str) -> None:
    given = case("mxfp4")
    _, scores = given.check_choice(24)
    q, k, w = values(given.q), values(given.keys), f64(given.weight)
    if wrong == "q-unscaled":
        q = f64(given.q.key)
    dot = np.einsum("bthd,bsd->bths", q, k)
    terms = dot if wrong == "no-relu" else np.maximum(dot, 0)
    want = np.einsum("bths,bth->bts", terms, np.ones_like(w) if wrong == "no-weight" else w)
    with pytest.raises(AssertionError, match="elements too far"):
        assert_near(scores, want, error_bound(given))


def test_the_two_paths_choose_alike() -> None:
    """`jax.numpy` on the stored forms, wherever scores are not closer than their errors."""
    given = case("mxfp4", dim=128, slots=1024)
    settings: dict[str, Any] = {"topk": 100, "rounding": "float32"}
    got = np.asarray(given(100))
    want = np.asarray(
        jax.jit(lambda *x: index_topk_jax(*x, **settings))(
            given.q, jnp.asarray(given.weight), given.keys, jnp.asarray(given.n)
        )
    )
    assert np.mean(got == want) > 0.98
