"""attention of whole layers of Flash and Pro; run with ``-m bench``, or parts of it as a program.

``python -m tests.bench.bench_attention --models flash --rows csa640 --tokens 1 8``. Decode is a
batch of rows with a token and a cache each, prefill a chunk of one row at 32 k positions; the
number in a row's name is the keys that a query sees. The floor counts every distinct key once, with
queries and results, or the two products of all heads and keys, whichever takes longer. Beside it
what XLA makes of the same: gather, dequantise, two products and a softmax.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv4_jax.bench.weights import any_leaf
from dsv4_jax.ops._attention_jax import attention_jax
from dsv4_jax.ops.attention import attention
from dsv4_jax.quant.kv import KvRows
from dsv4_jax.typing import E4M3, UE8M0
from tests.bench import linears, timing
from tests.support.numerics import assert_near
from tests.support.stored import exact_attention

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

WINDOW, NOPE, ROTARY = 128, 448, 64
DIM = NOPE + ROTARY
KEY_BYTES = NOPE + NOPE // 64 + 2 * ROTARY
HEADS = {"flash": 64, "pro": 128}
CONTEXT = 32768
"""Positions that a prefill's chunk ends at."""
PREFILL = 1024
"""From here on tokens are a chunk of one row, below a batch of rows."""
CHECKED_TOKENS = 4
CHECK_ABS = 2.0**-8
"""Of values of size 1 to 4: probabilities are rounded to 2^-9 of themselves."""
FREQUENCIES = (10000.0 ** -(np.arange(ROTARY // 2) / (ROTARY // 2))).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Row:
    """What the queries of a layer see besides their window."""

    model: str
    name: str
    far: int  # entries of a query
    slots: int  # of the pool in decode
    chosen: bool  # by index (CSA); else all that are visible (HCA)


ROWS = [
    Row("flash", "csa160", 32, 128, True),
    Row("flash", "csa640", 512, 1024, True),
    Row("flash", "csa1152", 1024, 2048, True),
    Row("flash", "hca384", 256, 256, False),
    Row("pro", "csa160", 32, 128, True),
    Row("pro", "csa640", 512, 1024, True),
    Row("pro", "csa1152", 1024, 2048, True),
    Row("pro", "hca384", 256, 256, False),
    Row("pro", "hca8320", 8192, 8192, False),  # 1 M positions
]
BARS = {
    ("flash", "csa640"): {1: 8.5, 8: 12.0, 128: 31.0},
    ("pro", "csa640"): {1: 11.0, 8: 16.0},
    ("pro", "csa1152"): {1: 11.0, 8: 16.0, 128: 92.0},
    ("pro", "hca8320"): {1: 22.0},
    **{("flash", name): {1: 8.5, 8: 12.0} for name in ("csa160", "csa1152", "hca384")},
    **{("pro", name): {1: 11.0, 8: 16.0} for name in ("csa160", "hca384")},
}
"""us on an H200."""
PREFILL_BARS = {
    ("pro", "csa1152"): 595e12,
    ("flash", "csa640"): 530e12,
    ("flash", "hca384"): 530e12,
}
"""FLOP/s on an H200."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    row: Row
    form: str  # fp8, or xla_fp8
    t: int

    @property
    def name(self) -> str:
        """What the line is called."""
        return f"{self.row.model} {self.form} {self.row.name} t={self.t}"

    @property
    def id(self) -> str:
        """For pytest."""
        return self.name.replace(" ", "-").replace("=", "")

    @property
    def heads(self) -> int:
        return HEADS[self.row.model]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens of each."""
        return (1, self.t) if self.t >= PREFILL else (self.t, 1)

    @property
    def slots(self) -> int:
        """Of the pool of a row."""
        if self.t < PREFILL:
            return self.row.slots
        return CONTEXT // (4 if self.row.chosen else WINDOW)

    @property
    def positions(self) -> np.ndarray:
        b, t = self.shape
        start = CONTEXT - t if self.t >= PREFILL else 4 * self.slots + 3
        return np.tile(start + np.arange(t, dtype=np.int32), (b, 1))

    @property
    def visible(self) -> np.ndarray:
        """Entries of the pool that each query may see."""
        if self.t < PREFILL:
            return np.full(self.shape, self.slots, np.int32)
        return (self.positions + 1) // (4 if self.row.chosen else WINDOW)

    @property
    def keys(self) -> float:
        """Of a query, on the average."""
        return WINDOW + (self.row.far if self.row.chosen else float(self.visible.mean()))

    @property
    def flops(self) -> float:
        return 4.0 * self.t * self.heads * DIM * self.keys

    @property
    def launch_bytes(self) -> float:
        """Distinct keys, queries and results; of a chunk's choices nearly every entry is one."""
        b, t = self.shape
        far = min(t * self.row.far, self.slots) if self.row.chosen else self.slots
        ids = 4 * self.row.far * self.t if self.row.chosen else 0
        return b * (WINDOW + t - 1 + far) * KEY_BYTES + 4 * self.t * self.heads * DIM + ids

    @property
    def max_us(self) -> float | None:
        """The bar."""
        key = self.row.model, self.row.name
        if self.form.startswith("xla_"):
            return None
        if self.t >= PREFILL:
            return round(self.flops / PREFILL_BARS[key] * 1e6, 1) if key in PREFILL_BARS else None
        return BARS[key].get(self.t)


def _cases(rows: Iterable[Row], tokens: Iterable[int], form: str = "fp8") -> list[Case]:
    cases = [Case(row, form, t) for row in rows for t in tokens]
    return [case for case in cases if case.t < PREFILL or case.row.name != "hca8320"]


EVERY = _cases(ROWS, (1, 2, 4, 8, 16, 32, 64, 128, 4096))
CASES = [case for case in EVERY if case.max_us is not None]
BASELINES = _cases([row for row in ROWS if row.name != "csa160"], (1, 128), "xla_fp8")


def store(seed: jax.Array, b: int, s: int) -> KvRows:
    """Finite keys of size about 1, codes of any bits."""
    code = any_leaf(seed, (b, s, NOPE), jnp.uint8)
    code = jnp.where(code & 0x7F == 0x7F, code - 16, code)  # NaN
    exponent = 119 + (any_leaf(seed + 1, (b, s, NOPE // 64), jnp.uint8) & 1)
    return KvRows(
        lax.bitcast_convert_type(code, E4M3),
        lax.bitcast_convert_type(exponent, UE8M0),
        any_leaf(seed + 2, (b, s, ROTARY), jnp.bfloat16),
    )


@functools.partial(jax.jit, static_argnums=0)
def _values(case: Case, seed: int) -> tuple[Any, ...]:
    """Queries, sinks, ring, chunk and pool, made on the device."""
    (b, t), at = case.shape, 11 * seed
    return (
        any_leaf(at, (b, t, case.heads, DIM), jnp.bfloat16),
        any_leaf(at + 1, (case.heads,), jnp.float32),
        *(store(at + 2 + 3 * i, b, s) for i, s in enumerate((WINDOW, t, case.slots))),
    )


def inputs(case: Case, seed: int) -> tuple[Any, ...]:
    """Operands of one launch: ``q, ring, positions, sink, chunk, start, pool, n, idx``."""
    b, t = case.shape
    rng = np.random.default_rng(seed)
    positions, visible = case.positions, case.visible
    idx = None
    if case.row.chosen:
        # Any distinct ones: a random start and an odd step through a power of two.
        power = 1 << (int(visible.min()).bit_length() - 1)
        first, step = (rng.integers(0, power, (b, t, 1)) for _ in range(2))
        idx = (first + (2 * step + 1) * np.arange(case.row.far)) % power
        idx = jnp.asarray(idx, jnp.int32)
    q, sink, ring, chunk, pool = _values(case, seed)
    n, start = jnp.asarray(visible), jnp.asarray(positions[:, 0])
    return q, ring, jnp.asarray(positions), sink, chunk, start, pool, n, idx


def call(operands: tuple[Any, ...], **settings: Any) -> jax.Array:
    """The op as the model calls it."""
    q, ring, positions, sink, chunk, start, pool, n, idx = operands
    return attention(
        *(q, ring, positions, sink),
        window=WINDOW,
        chunk=chunk,
        start=start,
        pool=pool,
        n_visible=n,
        topk_idx=idx,
        frequencies=FREQUENCIES,
        **settings,
    )


def _baseline(zero: jax.Array, operands: tuple[Any, ...]) -> jax.Array:
    """`jax.numpy`; ``zero`` keeps it in the loop."""
    q, ring, positions, sink, chunk, start, pool, n, idx = operands
    view = lax.bitcast_convert_type(q, jnp.uint16) ^ zero.astype(jnp.uint16)
    o, _ = attention_jax(
        *(lax.bitcast_convert_type(view, jnp.bfloat16), ring, positions, sink),
        window=WINDOW,
        chunk=chunk,
        start=start,
        pool=pool,
        n_visible=n,
        topk_idx=idx,
        frequencies=jnp.asarray(FREQUENCIES),
    )
    return o


def check(case: Case, operands: tuple[Any, ...], o: jax.Array) -> None:
    """A few tokens against FP64."""
    b, t = case.shape
    for token in np.unique(np.linspace(0, b * t - 1, CHECKED_TOKENS).astype(int)):
        at = divmod(int(token), t)
        want = exact_attention(operands, at, WINDOW, FREQUENCIES)
        # The rotary channels are rounded once more before they are turned.
        bound = CHECK_ABS + 2.0**-8 * np.abs(want)
        assert_near(np.asarray(o[at]), want, bound, f"{case.name}, token {token}")


def measure(case: Case, **settings: Any) -> timing.Result:
    """One line. Every set has caches and queries of its own."""
    ours = not case.form.startswith("xla_")
    b, t = case.shape
    sets = settings.pop("sets", timing.set_count(case.launch_bytes))
    operands = [inputs(case, i) for i in range(sets)]

    def run(carry: jax.Array, *given: Any) -> jax.Array:
        return call(given) if ours else _baseline(timing.held(carry), given)

    shape = (b, t, case.heads, DIM)
    return timing.measure(
        "attention",
        case.name,
        run,
        lambda i: (linears.poisoned(shape, jnp.bfloat16), operands[i]),
        lambda i, o: check(case, operands[i], o),
        target="attention" if ours else None,
        launch_bytes=case.launch_bytes,
        bytes_at="read",
        flops=case.flops,
        flops_at="bf16",
        max_us=case.max_us,
        **{"sets": sets, "call_us": linears.CALL_US, "replays": linears.REPLAYS, **settings},
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_time(case: Case) -> None:
    result = measure(case)
    result.append(timing.default_path())
    result.require()


@pytest.mark.parametrize("case", BASELINES, ids=lambda case: case.id)
def test_baseline(case: Case) -> None:
    """No bar."""
    linears.skip_when_late()
    measure(case).append(timing.default_path())


if __name__ == "__main__":
    sys.exit(linears.program(CASES, EVERY, measure, BASELINES))
