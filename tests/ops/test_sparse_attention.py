"""sparse_attention against FP64: masks, selections, sinks, large scores, hidden bytes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.sparse_attention import sparse_attention
from dsv4_jax.quant.kv import KvRows, kv_dequant, kv_quant
from tests.support.numerics import assert_near, assert_same_bits, f64
from tests.support.op_cases import normal

B, T, DIM, WINDOW, SLOTS = 2, 3, 96, 8, 256
INT32_MAX = 2**31 - 1
# FP32 scores of up to 80 carry absolute errors of 80 * 2^-22 into the exponent; sums of
# probabilities and keys add less. Relative to the largest key.
FLOAT32_ABS = 3e-5
# BF16 rounds each probability of the value product to 2^-9 of itself, independently; an average
# over keys of size 1 to 4 keeps at most that.
BF16_ABS = 2.0**-9


def exact(
    q: Any, keys: Any, positions: Any, sink: Any, pool: Any = None, n: Any = None, idx: Any = None
) -> np.ndarray:
    """One query at a time in FP64; ids may repeat."""
    q, keys, sink = f64(q), f64(keys), f64(sink)
    stored = None if pool is None else f64(kv_dequant(pool, jnp.dtype(jnp.float32)))
    window = keys.shape[1] - q.shape[1] + 1
    out = np.zeros(q.shape)
    for i, j in np.ndindex(*q.shape[:2]):
        position = int(positions[i, j])
        near = [u for u in range(window) if position >= 0 and position - (window - 1) + u >= 0]
        chosen = [keys[i, j + u] for u in near]
        if stored is not None:
            visible = int(n[i, j])
            ids = range(visible) if idx is None else np.asarray(idx)[i, j].tolist()
            chosen += [stored[i, u] for u in ids if 0 <= u < visible]
        if not chosen:
            continue
        k = np.stack(chosen)
        a = q[i, j] @ k.T * q.shape[-1] ** -0.5
        top = np.maximum(a.max(axis=-1), sink)[:, None]
        e = np.exp(a - top)
        out[i, j] = e @ k / (e.sum(axis=-1, keepdims=True) + np.exp(sink[:, None] - top))
    return out


class Case:
    """Random operands; ``args`` in the op's order."""

    def __init__(self, heads: int = 3, dtype: Any = jnp.float32, slots: int = SLOTS) -> None:
        self.q = normal(0, B, T, heads, DIM, dtype=dtype)
        self.keys = normal(1, B, WINDOW - 1 + T, DIM, dtype=dtype)
        self.positions = jnp.array([[0, 1, 2], [500, 501, 502]], jnp.int32)
        self.sink = normal(2, heads)
        form = "fp8" if dtype == jnp.bfloat16 else "float32"
        self.pool = kv_quant(normal(3, B, slots, DIM), 32, form)
        self.n = jnp.array([[0, 1, 7], [128, 129, 200]], jnp.int32)
        rng = np.random.default_rng(4)
        ids = [np.sort(rng.permutation(300)[:140]) - 50 for _ in range(B * T)]
        self.idx = jnp.asarray(np.stack(ids).reshape(B, T, 140), jnp.int32)

    def near(self) -> tuple[Any, ...]:
        return self.q, self.keys, self.positions, self.sink

    def args(self, kind: str) -> tuple[Any, ...]:
        far = {"window": (), "all": (self.pool, self.n), "topk": (self.pool, self.n, self.idx)}
        return *self.near(), *far[kind]


KINDS = ["window", "all", "topk"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("heads", [1, 2, 64])
def test_against_fp64(kind: str, dtype: Any, heads: int) -> None:
    """A8: any number of heads; ids below 0 and at or above ``n_visible`` among the picks."""
    args = Case(heads, dtype).args(kind)
    got = sparse_attention(*args)
    assert got.dtype == dtype
    bound = FLOAT32_ABS if dtype == jnp.float32 else BF16_ABS
    assert_near(got, exact(*args), bound * np.abs(f64(args[1])).max())


@pytest.mark.parametrize("kind", KINDS)
def test_no_key_at_all(kind: str) -> None:
    """B4: padding (negative position, nothing visible) gives zeros, whatever the sink."""
    case = Case()
    case.positions = jnp.full((B, T), -1, jnp.int32)
    case.n = jnp.zeros((B, T), jnp.int32)
    case.sink = jnp.array([-20.0, 0.0, 20.0])
    got = sparse_attention(*case.args(kind))
    assert_same_bits(np.abs(got), np.zeros((B, T, 3, DIM), np.float32))


def test_sink_only_divides() -> None:
    """A sink far above every score drives the output to zero, one far below changes nothing."""
    case = Case()
    case.sink = jnp.full(3, 200.0)
    assert np.abs(f64(sparse_attention(*case.near()))).max() < 1e-30
    case.sink = jnp.full(3, -200.0)
    want = exact(*case.near())
    first = f64(case.keys)[0, WINDOW - 1]  # position 0 sees itself alone
    np.testing.assert_allclose(want[0, 0], np.tile(first, (3, 1)))
    got = sparse_attention(*case.near())
    assert_near(got, want, FLOAT32_ABS * np.abs(f64(case.keys)).max())


BAD_IDS = [
    pytest.param([-1] * 6, id="all-missing"),
    pytest.param([-1, -1, 3, -1, 5, -1], id="missing-between"),
    pytest.param([SLOTS, SLOTS + 1, 3, INT32_MAX, 5, -(2**31)], id="out-of-range"),
    pytest.param([3, 3, 3, 5, 5, 3], id="duplicates"),
    pytest.param([5, 3, 100, 7, 0, 1], id="unsorted"),
]


@pytest.mark.parametrize("ids", BAD_IDS)
def test_ids(ids: list[int]) -> None:
    """B3: ids that are no entry are skipped; one that is given twice counts twice."""
    case = Case()
    case.idx = jnp.tile(jnp.array(ids, jnp.int32), (B, T, 1))
    args = case.args("topk")
    got = sparse_attention(*args)
    assert_near(got, exact(*args), FLOAT32_ABS * np.abs(f64(case.keys)).max())


@pytest.mark.parametrize("at", [0, 127, 128, 299])
def test_an_id_counts_wherever_it_stands(at: int) -> None:
    """One entry among 300 places, more places than a block and than visible entries."""
    case = Case()
    case.n = jnp.full((B, T), 10, jnp.int32)
    case.idx = jnp.full((B, T, 300), -1, jnp.int32).at[..., at].set(5)
    args = case.args("topk")
    got = sparse_attention(*args)
    assert_near(got, exact(*args), FLOAT32_ABS * np.abs(f64(case.keys)).max())


@pytest.mark.parametrize("n", [SLOTS + 1, INT32_MAX])
@pytest.mark.parametrize("kind", ["all", "topk"])
def test_more_visible_than_stored(kind: str, n: int) -> None:
    """Counted as all of them: no slot twice, none beyond the pool."""
    case = Case()
    case.n = jnp.full((B, T), SLOTS, jnp.int32)
    every = sparse_attention(*case.args(kind))
    case.n = jnp.full((B, T), n, jnp.int32)
    assert_same_bits(sparse_attention(*case.args(kind)), every)


@pytest.mark.parametrize("kind", ["all", "topk"])
def test_longer_pool_changes_nothing(kind: str) -> None:
    """Blocks that hold no visible entry are never summed, hence bitwise."""
    case = Case(dtype=jnp.bfloat16)
    clean = sparse_attention(*case.args(kind))
    longer = Case(dtype=jnp.bfloat16, slots=SLOTS + 384).pool
    case.pool = jax.tree.map(lambda old, new: new.at[:, :SLOTS].set(old), case.pool, longer)
    case.idx = jnp.pad(case.idx, [(0, 0), (0, 0), (0, 200)], constant_values=-1)
    assert_same_bits(sparse_attention(*case.args(kind)), clean)


@pytest.mark.parametrize("kind", ["all", "topk"])
def test_hidden_slots_do_not_matter(kind: str) -> None:
    """B9: every slot beyond ``n_visible`` of its row filled with NaN bytes."""
    case = Case(dtype=jnp.bfloat16)
    clean = sparse_attention(*case.args(kind))
    hidden = jnp.arange(SLOTS)[None, :] >= jnp.max(case.n, axis=1, keepdims=True)

    def poison(part: jax.Array) -> jax.Array:
        raw = jax.lax.bitcast_convert_type(part, jnp.uint8 if part.dtype.itemsize == 1 else "int16")
        return jax.lax.bitcast_convert_type(
            jnp.where(hidden[..., None], jnp.asarray(-1).astype(raw.dtype), raw), part.dtype
        )

    case.pool = jax.tree.map(poison, case.pool)
    assert np.isnan(f64(case.pool.nope)).any()
    assert_same_bits(sparse_attention(*case.args(kind)), clean)


def test_keys_before_position_zero_do_not_matter() -> None:
    case = Case()
    clean = sparse_attention(*case.near())
    case.keys = case.keys.at[0, : WINDOW - 1].set(jnp.nan)  # row 0 starts at position 0
    assert_same_bits(sparse_attention(*case.near()), clean)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sink", [-20.0, 0.0, 20.0])
def test_large_scores(kind: str, sink: float) -> None:
    """B16: scores to +-80 and beyond what BF16 resolves; finite and exact."""
    case = Case()
    case.q = case.q * (80 / 3.5 / np.sqrt(DIM)) * 3
    case.sink = jnp.full(3, sink)
    args = case.args(kind)
    scores = np.einsum("bthd,bsd->bths", f64(case.q), f64(case.keys)) * DIM**-0.5
    assert np.abs(scores).max() > 15
    got = sparse_attention(*args)
    assert_near(got, exact(*args), FLOAT32_ABS * np.abs(f64(case.keys)).max())


@pytest.mark.parametrize("sign", [-1, 1])
def test_every_score_eighty(sign: int) -> None:
    """All keys alike: the output is that key over one plus the sink's share."""
    key = np.ones(DIM, np.float32)
    case = Case()
    case.keys = jnp.tile(jnp.asarray(key), (B, WINDOW - 1 + T, 1))
    case.q = jnp.full((B, T, 3, DIM), sign * 80 / np.sqrt(DIM), jnp.float32)
    case.sink = jnp.array([-20.0, 0.0, 20.0])
    args = case.near()
    got = sparse_attention(*args)
    assert np.isfinite(f64(got)).all()
    # A score of 80 +- 1e-5 in the exponent of the sink's share when the sink is the maximum.
    want = exact(*args)
    assert_near(got, want, 1e-4 * np.abs(want) + 1e-37)


def test_position_in_the_chunk_changes_no_bit() -> None:
    """A query alone, with its own window of keys, equals itself inside the chunk."""
    case = Case(dtype=jnp.bfloat16)
    whole = sparse_attention(*case.args("all"))
    for j in range(T):
        alone = sparse_attention(
            case.q[:, j : j + 1],
            case.keys[:, j : j + WINDOW],
            case.positions[:, j : j + 1],
            case.sink,
            case.pool,
            case.n[:, j : j + 1],
        )
        assert_same_bits(alone[:, 0], whole[:, j], f"query {j}")


def test_stored_forms_agree() -> None:
    """The pool's format only changes its values: the same values in FP32 give the same result."""
    case = Case(dtype=jnp.bfloat16)
    wide = kv_dequant(case.pool, jnp.dtype(jnp.float32))
    clean = sparse_attention(*case.args("all"))
    case.pool = KvRows(wide[..., :64], None, wide[..., 64:])
    assert_same_bits(sparse_attention(*case.args("all")), clean)
