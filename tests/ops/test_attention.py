"""attention against FP64 and the FP32 reference: masks, selections, sinks, sizes, hidden bytes.

On a GPU references are still made on the CPU, and a query in calls of different shapes is held to a
cosine instead of its bits, unless its regime is pinned.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv4_jax.ops._attention_jax import attention_jax
from dsv4_jax.ops._linear import REGIMES
from dsv4_jax.ops.attention import attention
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.rope import rope
from dsv4_jax.quant.fp8 import KV_BLOCK
from dsv4_jax.quant.kv import KvRows
from dsv4_jax.typing import E4M3, UE8M0
from reference.attention import attention as reference_attention
from tests.support.numerics import assert_near, assert_same_bits, bf16_ulp, f64

B, T, WINDOW, SLOTS, PICKS = 2, 3, 8, 256, 140
INT32_MAX = 2**31 - 1
# FP32 scores of up to 80 carry absolute errors of 80 * 2^-22 into the exponent; sums of
# probabilities and keys add less. Relative to the largest key.
FLOAT32_ABS = 3e-5
# BF16 rounds each probability of the value product to 2^-9 of itself, independently; an average
# over keys of size 1 to 4 keeps at most that.
BF16_ABS = 2.0**-9
# Of every (token, head); rounding o to BF16 alone leaves 0.9999990.
MIN_COSINE = 0.99999
LSE_REL = 1e-5
"""Of the log-sum-exp, or absolutely below 1."""

FORMS = {"fp8": jnp.bfloat16, "bfloat16": jnp.bfloat16, "float32": jnp.float32}
"""Of the keys, and the queries' dtype with them; only the first has a kernel."""
PATHS = ("fp8", "decode", pytest.param("prefill", marks=pytest.mark.gpu), "float32")
"""A kernel for any size; of Hopper's for the model's sizes, both ways; `jax.numpy`."""
MODEL = {"heads": 70, "nope": 448, "rotary": 64}
"""Two tiles of heads, one of them not full."""
KINDS = ["window", "all", "topk"]
OPERANDS = ("chunk", "start", "pool", "n_visible", "topk_idx", "frequencies")


def stored(keys: np.ndarray, rotary: int, form: str) -> KvRows:
    """BF16 values as a cache holds them, `q8` in numpy; everything here is numpy until it is used:
    JAX compiles each step of a preparation for every shape."""
    keys = keys.astype(np.float32).astype(jnp.bfloat16).astype(np.float32)
    nope, rope = keys[..., : keys.shape[-1] - rotary], keys[..., keys.shape[-1] - rotary :]
    if form != "fp8":
        return KvRows(nope.astype(form), None, rope.astype(form))
    blocks = -(-nope.shape[-1] // KV_BLOCK)
    padded = np.pad(nope, [(0, 0), (0, 0), (0, blocks * KV_BLOCK - nope.shape[-1])])
    amax = np.abs(padded.reshape(*nope.shape[:2], blocks, KV_BLOCK)).max(axis=-1, initial=1e-4)
    exponent = np.ceil(np.log2(amax / 448))
    scale = np.repeat(np.exp2(exponent), KV_BLOCK, axis=-1)[..., : nope.shape[-1]]
    code = (nope / scale).astype(np.float32).astype(E4M3)
    return KvRows(code, (exponent + 127).astype(np.uint8).view(UE8M0), rope.astype(jnp.bfloat16))


def cut(rows: KvRows, index: Any) -> KvRows:
    """Slots of a store."""
    return jax.tree.map(lambda x: x[index], rows)


def put(rows: KvRows, slots: np.ndarray, new: KvRows) -> KvRows:
    """A copy with ``new [b, t]`` in ``slots [b, t]``; what is beyond the last slot is dropped."""

    def write(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        out = old.copy()
        for i, j in np.argwhere(slots < old.shape[1]):
            out[i, slots[i, j]] = new[i, j]
        return out

    return jax.tree.map(write, rows, new)


def poisoned(rows: KvRows, where: np.ndarray) -> KvRows:
    """0xFF bytes, NaN in every format, in the slots ``where [b, s]``."""

    def poison(part: np.ndarray) -> np.ndarray:
        out = part.copy()
        out.view(np.uint8)[where] = 0xFF
        return out

    dirty = jax.tree.map(poison, rows)
    assert np.isnan(f64(dirty.nope)).any() == where.any()
    return dirty


def values(rows: KvRows) -> np.ndarray:
    """Keys in FP64."""
    nope = f64(rows.nope)
    if rows.scale is not None:
        scale = np.ldexp(1.0, np.asarray(rows.scale).view(np.uint8).astype(int) - 127)
        nope = nope * np.repeat(scale, KV_BLOCK, axis=-1)[..., : nope.shape[-1]]
    return np.concatenate([nope, f64(rows.rope)], axis=-1)


class Case:
    """Random operands. Row ``i`` has held ``start[i]`` tokens and takes ``t`` more.

    A ``form`` of `FORMS`, or a regime: E4M3 keys of the model's sizes.
    """

    def __init__(
        self,
        form: str = "fp8",
        start: tuple[int, ...] = (0, 500),
        t: int = T,
        heads: int | None = None,
        nope: int | None = None,
        rotary: int | None = None,
        window: int = WINDOW,
        slots: int = SLOTS,
        picks: int = PICKS,
        spare: int = 2,
    ) -> None:
        self.regime = None if form in FORMS else form
        form = form if form in FORMS else "fp8"
        usual = {"heads": 3, "nope": 64, "rotary": 32} if self.regime is None else MODEL
        heads = usual["heads"] if heads is None else heads
        nope = usual["nope"] if nope is None else nope
        rotary = usual["rotary"] if rotary is None else rotary
        b, dim = len(start), nope + rotary
        self.form, self.heads, self.nope, self.rotary, self.dim = form, heads, nope, rotary, dim
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        self.window = window
        self.q = normal(b, t, heads, dim).astype(FORMS[form])
        self.sink = normal(heads)
        self.start = np.asarray(start, np.int32)
        self.positions = self.start[:, None] + np.arange(t, dtype=np.int32)
        # The keys of positions start - window + 1 .. start + t - 1; those below 0 are not written.
        self.keys = stored(normal(b, window - 1 + t, dim), rotary, form)
        self.chunk = cut(self.keys, np.s_[:, window - 1 :])
        empty = stored(np.zeros((b, window + spare, dim)), rotary, form)
        nothing = poisoned(empty, np.ones((b, window + spare), bool)) if b else empty
        before = self.start[:, None] - (window - 1) + np.arange(window - 1, dtype=np.int32)
        slot = np.where(before >= 0, before % (window + spare), window + spare)
        self.ring = put(nothing, slot, cut(self.keys, np.s_[:, : window - 1]))
        self.pool = stored(normal(b, slots, dim), rotary, form)
        n = [[0, 1, 7], [128, 129, 200]]
        known = (b, t, slots) == (B, T, SLOTS)
        self.n = np.asarray(n, np.int32) if known else np.full((b, t), slots, np.int32)
        spread = slots + max(slots // 5, 1)
        ids = np.tile(np.arange(spread, dtype=np.int32) - slots // 10, (b, t, 1))
        self.idx = rng.permuted(ids, axis=2)[..., :picks]
        self.frequencies: Any = None

    def operands(self, kind: str = "window") -> dict[str, Any]:
        """Keyword operands of the op."""
        found: dict[str, Any] = {"chunk": self.chunk, "start": self.start}
        if kind != "window":
            found |= {"pool": self.pool, "n_visible": self.n}
        if kind == "topk":
            found["topk_idx"] = self.idx
        return found | {"frequencies": self.frequencies}

    def with_(self, function: Callable[..., Any], kind: str, **changed: Any) -> Any:
        """``function`` on all operands."""
        operands = self.operands(kind) | {"window": self.window} | changed
        return function(self.q, self.ring, self.positions, self.sink, **operands)

    def __call__(self, kind: str = "window", **settings: Any) -> Any:
        return self.with_(attention, kind, **{"regime": self.regime, **settings})

    def stored(self, keys: np.ndarray) -> KvRows:
        """In this case's form."""
        return stored(keys, self.rotary, self.form)

    def rotate(self) -> None:
        """From here on with the inverse rotation."""
        half = self.rotary // 2
        self.frequencies = (10000.0 ** -(np.arange(half) / half)).astype(np.float32)

    def every_key(self) -> np.ndarray:
        """Of the window, by position from ``start - window + 1`` on, in FP64."""
        return values(self.keys)

    def size(self) -> float:
        """The largest value of a key."""
        return max(np.abs(values(x)).max(initial=0) for x in (self.keys, self.pool))

    def but(self, **changed: Any) -> "Case":
        """A copy with some operands replaced."""
        other = object.__new__(Case)
        other.__dict__ = self.__dict__ | changed
        return other

    def exact(
        self,
        kind: str = "window",
        value_of: Callable[[np.ndarray], np.ndarray] = lambda keys: keys,
        sink_value: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One query at a time in FP64; ids may repeat. The last two make wrong variants of it."""
        q, near, far = f64(self.q), self.every_key(), values(self.pool)
        sink = f64(self.sink)
        out, lse = np.zeros(q.shape), np.tile(sink, (*q.shape[:2], 1))
        for i, j in np.ndindex(*q.shape[:2]):
            position, visible = int(self.positions[i, j]), int(self.n[i, j])
            first = max(position - self.window + 1, 0)
            shift = int(self.start[i]) - (self.window - 1)
            chosen = [near[i, u - shift] for u in range(first, position + 1)]
            if kind != "window":
                ids = range(visible) if kind == "all" else np.asarray(self.idx)[i, j].tolist()
                chosen += [far[i, u] for u in ids if 0 <= u < min(visible, far.shape[1])]
            if not chosen:
                continue
            k = np.stack(chosen)
            a = q[i, j] @ k.T * q.shape[-1] ** -0.5
            top = np.maximum(a.max(axis=-1), sink)[:, None]
            e, extra = np.exp(a - top), np.exp(sink[:, None] - top)
            norm = e.sum(axis=-1, keepdims=True) + extra
            out[i, j] = (e @ value_of(k) + extra * sink_value) / norm
            lse[i, j] = (top + np.log(norm))[:, 0]
        return out, lse

    def check(self, kind: str, bound: float | None = None) -> None:
        """Against FP64."""
        got, lse = self(kind, return_lse=True)
        want, want_lse = self.exact(kind)
        assert got.dtype == self.q.dtype and lse.dtype == jnp.float32
        limit = FLOAT32_ABS if got.dtype == jnp.float32 else BF16_ABS
        assert_near(got, want, limit * self.size() if bound is None else bound)
        assert_near(lse, want_lse, LSE_REL * np.maximum(1, np.abs(want_lse)))


def assert_same_query(actual: Any, expected: Any, what: str = "") -> None:
    """Bitwise on the CPU; on a GPU, where a call of another shape may cut its keys, nearly."""
    if jax.default_backend() == "cpu":
        return assert_same_bits(actual, expected, what)
    assert cosines(actual, expected).min() >= MIN_COSINE, what


def cosines(a: Any, b: Any) -> np.ndarray:
    """Of the vectors along the last axis; 1 for two zeros."""
    a, b = f64(a), f64(b)
    size = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    both = (np.abs(a).max(axis=-1, initial=0) == 0) & (np.abs(b).max(axis=-1, initial=0) == 0)
    return np.where(both, 1, np.sum(a * b, axis=-1) / np.where(size == 0, 1, size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [1, 2, 64])
def test_against_fp64(kind: str, form: str, heads: int) -> None:
    """A8: any number of heads; ids below 0 and at or above ``n_visible`` among the picks."""
    Case(form, heads=heads).check(kind)


@pytest.mark.parametrize(("nope", "rotary"), [(128, 6), (448, 64), (64, 0), (40, 8), (2048, 32)])
def test_sizes_of_a_key(nope: int, rotary: int) -> None:
    """A8: the last two have no kernel: a block of scales that is not whole, too many channels."""
    Case(nope=nope, rotary=rotary).check("topk")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", PATHS)
def test_no_key_at_all(kind: str, form: str) -> None:
    """B4: padding (negative position, nothing visible) gives zeros, whatever the sink."""
    case = Case(form)
    case.positions = np.full((B, T), -1, np.int32)
    case.n = np.zeros((B, T), np.int32)
    case.sink = np.resize(np.array([-20, 0, 20], np.float32), case.heads)
    got, lse = case(kind, return_lse=True)
    assert_same_bits(np.abs(got), np.zeros(case.q.shape, got.dtype))
    assert_near(lse, np.tile(case.sink, (B, T, 1)), LSE_REL * np.maximum(1, np.abs(case.sink)))


@pytest.mark.parametrize("form", PATHS)
def test_sink_only_divides(form: str) -> None:
    """A sink far above every score drives the output to zero, one far below changes nothing."""
    case = Case(form)
    case.sink = np.full(case.heads, 200.0, np.float32)
    assert np.abs(f64(case())).max() < 1e-30
    case.sink = np.full(case.heads, -200.0, np.float32)
    first = case.every_key()[0, WINDOW - 1]  # position 0 sees itself alone
    np.testing.assert_allclose(case.exact()[0][0, 0], np.tile(first, (case.heads, 1)))
    case.check("window")
    case.sink = np.full(case.heads, -np.inf, np.float32)
    case.check("topk")


BAD_IDS = [
    pytest.param([-1] * 6, id="all-missing"),
    pytest.param([-1, -1, 3, -1, 5, -1], id="missing-between"),
    pytest.param([SLOTS, SLOTS + 1, 3, INT32_MAX, 5, -(2**31)], id="out-of-range"),
    pytest.param([3, 3, 3, 5, 5, 3], id="duplicates"),
    pytest.param([5, 3, 100, 7, 0, 1], id="unsorted"),
]


@pytest.mark.parametrize("ids", BAD_IDS)
@pytest.mark.parametrize("form", PATHS)
def test_ids(ids: list[int], form: str) -> None:
    """B3: ids that are no entry are skipped; one that is given twice counts twice."""
    case = Case(form)
    case.idx = np.tile(np.array(ids, np.int32), (B, T, 1))
    case.check("topk")


@pytest.mark.parametrize("at", [0, 63, 64, 127, 128, 299])
@pytest.mark.parametrize("form", PATHS)
def test_an_id_counts_wherever_it_stands(at: int, form: str) -> None:
    """One entry among 300 places, more places than a block and than visible entries (B5)."""
    case = Case(form)
    case.n = np.full((B, T), 10, np.int32)
    case.idx = np.full((B, T, 300), -1, np.int32)
    case.idx[..., at] = 5
    case.check("topk")


@pytest.mark.parametrize("n", [SLOTS + 1, INT32_MAX, 2**40])
@pytest.mark.parametrize("kind", ["all", "topk"])
@pytest.mark.parametrize("form", PATHS)
def test_more_visible_than_stored(kind: str, n: int, form: str) -> None:
    """Counted as all of them: no slot twice, none beyond the pool; 64 bits do not wrap round."""
    case = Case(form)
    case.n = np.full((B, T), SLOTS, np.int32)
    every = case(kind)
    with jax.enable_x64(n > INT32_MAX):
        case.n = np.full((B, T), n, np.int64 if n > INT32_MAX else np.int32)
        assert_same_bits(case(kind), every)


def test_ids_of_64_bits() -> None:
    """Ids beyond 32 bits are outside, not wrapped round onto an entry."""
    case = Case()
    case.idx = np.tile(np.array([-1, -1, 3, -1], np.int32), (B, T, 1))
    want = case("topk")
    with jax.enable_x64(True):
        for far in (3 + 2**32, 3 - 2**32):
            case.idx = np.tile(np.array([far, far, 3, far], np.int64), (B, T, 1))
            assert_same_bits(case("topk"), want)


@pytest.mark.parametrize("kind", ["all", "topk"])
@pytest.mark.parametrize("form", PATHS)
def test_longer_pool_changes_nothing(kind: str, form: str) -> None:
    """Blocks that hold no visible entry are never summed, hence bitwise."""
    case = Case(form)
    clean = case(kind)
    more = case.stored(np.ones((B, 384, case.dim)))
    case.pool = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), case.pool, more)
    case.idx = np.pad(case.idx, [(0, 0), (0, 0), (0, 200)], constant_values=-1)
    assert_same_query(case(kind), clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", PATHS)
def test_hidden_slots_do_not_matter(kind: str, form: str) -> None:
    """B9: NaN bytes in every slot to which no valid index points."""
    case = Case(form, start=(3, 500))
    clean = case(kind)
    assert np.isfinite(f64(clean)).all()
    chosen = np.zeros((B, SLOTS), bool)
    for i, j in np.ndindex(B, T):
        ids = case.idx[i, j] if kind == "topk" else np.arange(SLOTS)
        chosen[i, ids[(ids >= 0) & (ids < int(case.n[i, j]))]] = True
    case.pool = poisoned(case.pool, ~chosen)
    held = np.zeros((B, case.ring.nope.shape[1]), bool)
    for i, start in enumerate(case.start):
        held[i, [u % held.shape[1] for u in range(max(start - WINDOW + 1, 0), start)]] = True
    case.ring = poisoned(case.ring, ~held)
    assert_same_bits(case(kind), clean)


@pytest.mark.parametrize("form", PATHS)
def test_padding_of_a_chunk_does_not_matter(form: str) -> None:
    """Rows of the chunk behind a query's own are later tokens, or nothing at all."""
    case = Case(form)
    clean = case("all")
    case.chunk = poisoned(case.chunk, np.array([[False, False, True]] * B))
    assert_same_bits(case("all")[:, :2], clean[:, :2])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", PATHS)
@pytest.mark.parametrize("sink", [-20.0, 20.0])
def test_large_scores(kind: str, form: str, sink: float) -> None:
    """B16: scores to +-80 and beyond what BF16 resolves; finite and exact."""
    case = Case(form)
    case.q = (f64(case.q) * (80 / 3.5 / np.sqrt(96)) * 3).astype(case.q.dtype)
    case.sink = np.full(case.heads, sink, np.float32)
    scores = np.einsum("bthd,bsd->bths", f64(case.q), case.every_key()) * case.dim**-0.5
    assert np.abs(scores).max() > 15
    case.check(kind)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("form", PATHS)
def test_every_score_eighty(sign: int, form: str) -> None:
    """All keys alike: the output is that key over one plus the sink's share."""
    case = Case(form)
    ones = case.stored(np.ones((B, WINDOW - 1 + T, case.dim)))
    case.keys, case.chunk = ones, cut(ones, np.s_[:, WINDOW - 1 :])
    case.ring = case.stored(np.ones((B, WINDOW + 2, case.dim)))
    case.q = np.full(case.q.shape, sign * 80 / np.sqrt(case.dim)).astype(case.q.dtype)
    case.sink = np.resize(np.array([-20, 0, 20], np.float32), case.heads)
    got = case()
    assert np.isfinite(f64(got)).all()
    # A score of 80 +- 1e-5 in the exponent of the sink's share when the sink is the maximum.
    want = case.exact()[0]
    rel = 1e-4 + (0 if form == "float32" else BF16_ABS)
    assert_near(got, want, rel * np.abs(want) + 1e-37)


@pytest.mark.parametrize("form", PATHS)
def test_one_hot(form: str) -> None:
    """A query that points at one key alone takes that key, channel by channel."""
    case = Case(form, start=(500,), t=1, heads=8)
    basis = np.eye(case.dim)[None, :: case.dim // 8] * 4  # the last of them rotary
    case.keys = case.stored(basis)
    case.chunk = cut(case.keys, np.s_[:, WINDOW - 1 :])
    slot = (500 - WINDOW + 1 + np.arange(WINDOW - 1))[None] % (WINDOW + 2)
    case.ring = put(case.ring, slot, cut(case.keys, np.s_[:, : WINDOW - 1]))
    case.q = (basis[:, None] * 200).astype(case.q.dtype)  # head h at key h
    case.sink = jnp.full(8, -80.0)
    assert_near(case()[0, 0], basis[0], 1e-6)


def decoded(case: Case, kind: str, in_chunk: bool, **settings: Any) -> tuple[Any, Any]:
    """Token by token: the ring holds what came before, and the token itself if not ``in_chunk``."""
    slots = case.ring.nope.shape[1]
    ring, parts = case.ring, []
    for j in range(case.q.shape[1]):
        one = np.s_[:, j : j + 1]
        row, position = cut(case.chunk, one), case.positions[one]
        written = put(ring, position % slots, row)
        operands: dict[str, Any] = case.operands(kind)
        operands |= {"chunk": row, "start": position[:, 0]}
        if not in_chunk:
            operands |= {"chunk": None, "start": None}
        for name in ("n_visible", "topk_idx"):
            if name in operands:
                operands[name] = operands[name][one]
        read = ring if in_chunk else written
        settings |= {"window": case.window, "return_lse": True}
        parts.append(attention(case.q[one], read, position, case.sink, **operands, **settings))
        ring = written
    o, lse = zip(*parts, strict=True)
    return np.concatenate(o, axis=1), np.concatenate(lse, axis=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", PATHS)
def test_decode_is_prefill(kind: str, form: str) -> None:
    """P4, B6: a window that fills, one that wraps round the ring, a batch of unequal lengths.

    Without a regime: a GPU's for few tokens against that for many.
    """
    case = Case(form, start=(0, 4, 500), t=11, slots=128, picks=70)
    case.n = np.clip((case.positions + 1) // 4, 0, 128)
    case.rotate()
    case.regime = None
    whole = case(kind, return_lse=True)
    for in_chunk in (True, False) if case.form == "fp8" else (True,):
        for got, want in zip(decoded(case, kind, in_chunk), whole, strict=True):
            assert_same_query(got, want, f"{in_chunk}")


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("heads", [2, 64])
def test_a_query_has_its_bits_in_any_call_of_a_regime(regime: Any, heads: int) -> None:
    """P2, P3: alone, in parts of a chunk, beside other rows."""
    if regime is None and jax.default_backend() != "cpu":
        pytest.skip("chooses a regime by the number of queries")
    case = Case(start=(130, 700), t=40, heads=heads, nope=448, rotary=64, window=128, picks=71)
    case.n = np.minimum(case.positions // 3, SLOTS)
    whole = case("topk", regime=regime, return_lse=True)
    for got, want in zip(decoded(case, "topk", True, regime=regime), whole, strict=True):
        assert_same_bits(got, want, "token by token")
    for size in (1, 2, 33):
        part = np.s_[1:, 3 : 3 + size]
        operands = case.operands("topk")
        operands |= {name: operands[name][part] for name in ("n_visible", "topk_idx")}
        operands |= {name: cut(operands[name], np.s_[1:]) for name in ("chunk", "pool")}
        operands |= {"start": case.start[1:], "window": 128, "regime": regime, "return_lse": True}
        ring = cut(case.ring, np.s_[1:])
        alone = attention(case.q[part], ring, case.positions[part], case.sink, **operands)
        for got, want in zip(alone, whole, strict=True):
            assert_same_bits(got, np.asarray(want)[part], f"{size} queries")


@pytest.mark.parametrize("form", PATHS)
def test_inverse_rotation(form: str) -> None:
    """What `rope` makes of the rounded output, up to its cosine's last bit."""
    case = Case(form, start=(0, 1_048_573))
    plain, lse = case("all", return_lse=True)
    case.rotate()
    got, same_lse = case("all", return_lse=True)
    want = rope(plain, case.positions, case.frequencies, inverse=True)
    assert_same_bits(same_lse, lse)
    assert_same_bits(got[..., : case.nope], plain[..., : case.nope])
    last = 2.0**-22 if form == "float32" else bf16_ulp(f64(want))
    assert (np.abs(f64(got) - f64(want)) <= last * 1.001).all()
    assert np.mean(f64(got) != f64(want)) < 0.01 or form == "float32"


def test_rotation_at_the_last_position() -> None:
    """B15: at position 1,048,575 the FP32 product of position and frequency, its cosine exact."""
    case = Case(start=(1_048_573,), heads=64)
    plain = f64(case())
    case.rotate()
    got = f64(case())
    angle = case.positions.astype(np.float32)[..., None] * case.frequencies
    cos, sin = np.cos(f64(angle))[:, :, None], np.sin(f64(angle))[:, :, None]
    even, odd = plain[..., 64::2], plain[..., 65::2]
    want = np.stack([even * cos + odd * sin, odd * cos - even * sin], axis=-1)
    want = want.reshape(got[..., 64:].shape)
    # Half an ulp for the rounding and 3e-7 for cosine, sine, products and sum.
    assert (np.abs(got[..., 64:] - want) <= 0.5 * bf16_ulp(want) + 1e-6).all()


# The list. 448 + 64 channels, windows of 128.


@dataclasses.dataclass(frozen=True)
class Numerics:
    """``b`` rows of ``t`` queries that see ``keys`` keys, ``far`` of them in the pool."""

    t: int
    h: int
    b: int
    start: int
    far: int = 0
    kind: str = "window"

    @property
    def id(self) -> str:
        """For pytest."""
        return f"t{self.t}-h{self.h}-b{self.b}-from{self.start}-{self.kind}{self.far}"


NUMERICS = [
    Numerics(t=3, h=2, b=2, start=-3),  # no key
    Numerics(t=1, h=8, b=4, start=0),  # one
    Numerics(t=2, h=64, b=1, start=62),  # 63 and 64
    Numerics(t=1, h=1, b=2, start=64),  # 65
    Numerics(t=1000, h=2, b=1, start=0),  # 1 .. 128, more tokens than any tile
    Numerics(t=129, h=8, b=1, start=4096),  # a full window throughout
    Numerics(t=128, h=1, b=1, start=127),
    Numerics(t=1, h=8, b=128, start=3000),
    Numerics(t=31, h=2, b=1, start=3000, far=512, kind="topk"),  # 640
    Numerics(t=32, h=1, b=2, start=3000, far=512, kind="all"),
    Numerics(t=33, h=1, b=1, start=3000, far=512, kind="topk"),
    Numerics(t=2, h=128, b=1, start=9000, far=1024, kind="topk"),  # 1152
    Numerics(t=3, h=96, b=1, start=9000, far=1024, kind="topk"),
    Numerics(t=1, h=128, b=1, start=1_048_574, far=8192, kind="all"),  # 8320
    Numerics(t=2, h=1, b=2, start=1_048_574, far=8192, kind="all"),
]


# Every pair of values, nearly, where references are soon made.
NUMERICS += [
    pytest.param(Numerics(*sizes, start=start, far=far, kind=kind), marks=pytest.mark.gpu)
    for sizes, start, far, kind in (
        ((1, 2, 128), 9000, 1024, "topk"),
        ((1, 64, 4), 1_048_570, 8192, "all"),
        ((1, 128, 128), 3000, 512, "topk"),
        ((2, 8, 2), 1_048_570, 8192, "all"),
        ((2, 96, 4), 60, 0, "window"),
        ((3, 64, 2), 3000, 512, "topk"),
        ((31, 96, 2), 9000, 1024, "topk"),
        ((32, 64, 4), 9000, 1024, "topk"),
        ((33, 128, 4), 0, 512, "all"),
        ((128, 64, 2), 3000, 512, "topk"),
        ((129, 128, 1), 9000, 1024, "topk"),
        ((1000, 8, 1), 3000, 512, "topk"),
    )
]


def numerics_case(n: Numerics) -> Case:
    """Of its kind; more entries than are chosen, more slots than are visible."""
    slots = max(n.far * (2 if n.kind == "topk" else 1), 128)
    starts = tuple(n.start + i for i in range(n.b))
    case = Case("fp8", starts, n.t, n.h, 448, 64, 128, slots, n.far or 1)
    if n.start < 0:
        case.positions = np.full((n.b, n.t), -1, np.int32)
    rng = np.random.default_rng(9)
    case.n = np.full((n.b, n.t), slots if n.far else 0, np.int32)
    ids = np.tile(np.arange(slots, dtype=np.int32), (n.b, n.t, 1))
    case.idx = rng.permuted(ids, axis=2)[..., : n.far]
    return case


@functools.partial(jax.jit, static_argnames="window")
def exact_on_cpu(*operands: Any, **settings: Any) -> Any:
    return reference_attention(*operands, **settings, return_lse=True)


@functools.partial(jax.jit, static_argnames="window")
def plain_jnp(*operands: Any, window: int, **settings: Any) -> tuple[Any, Any]:
    """BF16 operands and an FP32 softmax."""
    absent = {name: settings.get(name) for name in OPERANDS}
    return attention_jax(*operands, window=window, **absent)


def on_cpu(function: Callable[..., Any], case: Case, kind: str) -> Any:
    """References, always by the same code."""
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(case.with_(function, kind))


def compare(got: Any, lse: Any, want: Any, want_lse: Any, plain: Any) -> None:
    """What the issue asks for; ``plain`` is what `jax.numpy` makes of the same operands."""
    assert cosines(got, want).min(initial=1) >= MIN_COSINE
    error, least = (np.abs(f64(x) - f64(want)).max(initial=0) for x in (got, plain))
    print(f"max error {error:.2e}, of plain jnp {least:.2e}")
    assert error <= 2 * least
    lse_error = np.abs(f64(lse) - f64(want_lse)) / np.maximum(1, np.abs(f64(want_lse)))
    assert lse_error.max(initial=0) <= LSE_REL


@pytest.mark.parametrize("n", NUMERICS, ids=lambda n: n.id)
def test_numerics(n: Numerics) -> None:
    case = numerics_case(n)
    want, want_lse = on_cpu(exact_on_cpu, case, n.kind)
    plain, _ = on_cpu(plain_jnp, case, n.kind)
    if n.start < 0:  # the reference divides by the sink alone
        assert not np.asarray(want).any()
    for regime in REGIMES if jax.default_backend() != "cpu" else (None,):
        got, lse = case(n.kind, return_lse=True, regime=regime)
        compare(got, lse, want, want_lse, plain)


WRONG = Numerics(t=3, h=8, b=2, start=3000, far=128, kind="all")


def transposed_tiles(keys: np.ndarray) -> np.ndarray:
    """Values whose tiles of 64 keys by 64 channels lie transposed."""
    wrong = keys.copy()
    for first in range(0, len(keys) - 63, 64):
        for channel in range(0, keys.shape[1] - 63, 64):
            tile = np.s_[first : first + 64, channel : channel + 64]
            wrong[tile] = keys[tile].T
    return wrong


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(None, id="right"),
        pytest.param({"n_visible": -1}, id="one-entry-late"),
        pytest.param({"n_visible": 1}, id="one-entry-early"),
        pytest.param({"window": -1}, id="window-too-narrow"),
        pytest.param({"window": 1}, id="window-too-wide"),
        pytest.param({"positions": -1}, id="without-itself"),
        pytest.param({"value_of": transposed_tiles}, id="transposed-tile"),
        pytest.param({"sink_value": 1.0}, id="sink-in-numerator"),
    ],
)
def test_a_wrong_variant_is_told_apart(wrong: dict[str, Any] | None) -> None:
    """The comparison above fails when its reference is wrong in one place."""
    case = numerics_case(WRONG)
    case.n = np.full((2, 3), 100, np.int32)
    got, lse = case("all", return_lse=True)
    plain, _ = on_cpu(plain_jnp, case, "all")
    if wrong is None:
        compare(got, lse, *case.exact("all"), plain)
        return
    if wrong.keys() & {"value_of", "sink_value"}:
        want, want_lse = case.exact("all", **wrong)
    else:
        names = {"n_visible": "n"}
        changed = {names.get(x, x): getattr(case, names.get(x, x)) + by for x, by in wrong.items()}
        want, want_lse = on_cpu(exact_on_cpu, case.but(**changed), "all")
    with pytest.raises(AssertionError):
        compare(got, lse, want, want_lse, plain)


@pytest.mark.parametrize("form", FORMS)
def test_stored_forms_agree(form: str) -> None:
    """The keys' format only changes their values: the same values in FP32 give the same result."""
    case = Case("fp8")
    clean = case("all")
    for name in ("ring", "chunk", "pool") if form != "fp8" else ():
        wide = values(getattr(case, name)).astype(form)
        setattr(case, name, KvRows(wide[..., :64], None, wide[..., 64:]))
    # Sums in another order, probabilities rounded relative to another maximum.
    error = np.abs(f64(case("all")) - f64(clean))
    assert (error <= BF16_ABS * case.size() + bf16_ulp(f64(clean))).all()


def test_in_a_scan_with_a_donated_cache() -> None:
    """B12, P4: ring and pool stay where they are, without copies of the pool; bits of one call."""
    steps, slots, written = 5, 8192, 4000
    case = Case("decode", (700, 3), steps, 8, slots=slots, window=128, spare=0, picks=64)
    case.n = np.full((B, steps), written, np.int32)
    whole = f64(case("topk"))
    cache = jax.tree.map(lambda x: jnp.array(x, copy=True), (case.ring, case.pool))

    def step(cache: Any, inputs: Any) -> Any:
        ring, pool = cache
        q, row, position, n, idx = jax.tree.map(lambda x: x[:, None], inputs)
        pool = cache_write(pool, row, position + written)
        far = {"pool": pool, "n_visible": n, "topk_idx": idx, "regime": "decode"}
        near = {"window": 128, "chunk": row, "start": position[:, 0]}
        o = attention(q, ring, position, case.sink, **near, **far)
        o, row = lax.optimization_barrier((o, row))
        return (cache_write(ring, row, position % 128), pool), o[:, 0]

    inputs = case.q, case.chunk, case.positions, case.n, case.idx
    inputs = jax.tree.map(lambda x: jnp.asarray(np.moveaxis(x, 1, 0)), inputs)
    run = jax.jit(lambda cache, inputs: lax.scan(step, cache, inputs), donate_argnums=0)
    memory = run.lower(cache, inputs).compile().memory_analysis()
    print(f"{memory.temp_size_in_bytes} bytes of temporaries")
    assert memory.temp_size_in_bytes < 1e6
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
    cache, o = run(cache, inputs)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)] == pointers
    assert_same_bits(np.moveaxis(f64(o), 0, 1), whole)


def test_no_queries() -> None:
    """A6, with every operand and result."""
    for b, t in ((0, 3), (2, 0)):
        case = Case(start=(5,) * b, t=t)
        got, lse = case("topk", return_lse=True)
        assert (got.shape, got.dtype) == ((b, t, 3, 96), jnp.bfloat16)
        assert (lse.shape, lse.dtype) == ((b, t, 3), jnp.float32)


def test_one_call() -> None:
    """E4M3 keys and BF16 queries are one foreign call that takes them as they are; else none."""
    for form, calls in (("fp8", 1), ("bfloat16", 0), ("float32", 0)):
        case = Case(form)
        jaxpr = str(jax.make_jaxpr(lambda case=case: case("topk"))())
        assert jaxpr.count("ffi_call[") == jaxpr.count("dsv4.attention") == calls
        assert ("dot_general" in jaxpr) == (calls == 0)
    for changed in ({"nope": 40, "rotary": 8}, {"nope": 2048}):
        case = Case(**changed)
        assert "ffi_call[" not in str(jax.make_jaxpr(lambda case=case: case("topk"))())
