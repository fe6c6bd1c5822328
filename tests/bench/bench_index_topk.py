"""index_topk of Flash (512 picks) and Pro (1024); run with ``-m bench``, or parts as a program.

``python -m tests.bench.bench_index_topk --models pro --rows n8192 --tokens 1 8``. Decode is a batch
of rows with a token and keys of their own, prefill a chunk of one row; the number in a row's name
is the entries that every query sees, all of the pool, so that times compare with those of kernels
that take a rectangle. The floor counts queries, keys and ids once, or the products of all heads on
FP8 tensor cores, whichever takes longer. Beside it what XLA makes of it: ``xla_topk`` is
`jax.lax.top_k` alone on scores that somebody else made, ``xla_mxfp4`` makes them too.
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
from dsv4_jax.ops.index_topk import index_topk
from dsv4_jax.quant import bits
from dsv4_jax.quant.kv import IndexRows, index_dequant
from dsv4_jax.typing import E4M3, UE8M0
from tests.bench import linears, timing
from tests.support.numerics import f64
from tests.support.stored import assert_best, exact_scores

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

HEADS, DIM = 64, 128
PICKS = {"flash": 512, "pro": 1024}
KEY_BYTES = {"mxfp4": DIM // 2 + DIM // 32, "fp8": DIM + 1}
PREFILL = 1024
"""From here on tokens are a chunk of one row, below a batch of rows."""
CHECKED_TOKENS = 2
CHECK_REL = 2e-4
"""Of sum_h |weight_h| |q_h| |key|: FP8 tensor cores."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A model and how many entries there are."""

    model: str
    slots: int

    @property
    def name(self) -> str:
        """For the command line."""
        return f"n{self.slots}"


ROWS = [Row(model, n) for model in PICKS for n in (1024, 8192, 32768, 262144)]
BARS = {
    ("pro", 1024): {1: 7.0, 8: 8.0},
    ("pro", 8192): {1: 8.0, 8: 10.0, 4096: 570.0},
    ("pro", 32768): {1: 12.0, 8: 19.0, 32: 50.0, 4096: 2100.0},
    ("pro", 262144): {1: 25.0, 8: 82.0, 32: 300.0},
    ("flash", 8192): {4096: 570.0},
    ("flash", 32768): {4096: 2100.0},
}
"""us on an H200, scores and selection together."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    row: Row
    form: str  # mxfp4 or fp8, or xla_...
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
    def picks(self) -> int:
        return min(PICKS[self.row.model], self.row.slots)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens of each."""
        return (1, self.t) if self.t >= PREFILL else (self.t, 1)

    @property
    def flops(self) -> float:
        return 0.0 if self.form == "xla_topk" else 2.0 * self.t * HEADS * DIM * self.row.slots

    @property
    def launch_bytes(self) -> float:
        ids = 4.0 * self.t * self.picks
        if self.form == "xla_topk":
            return 4.0 * self.t * self.row.slots + ids
        each = KEY_BYTES[self.form.removeprefix("xla_")]
        return (self.shape[0] * self.row.slots + self.t * HEADS) * each + 4 * self.t * HEADS + ids

    @property
    def max_us(self) -> float | None:
        """The bar, of either form."""
        if self.form.startswith("xla_"):
            return None
        return BARS.get((self.row.model, self.row.slots), {}).get(self.t)


def _cases(rows: Iterable[Row], forms: Iterable[str], tokens: Iterable[int]) -> list[Case]:
    return [Case(row, form, t) for row in rows for form in forms for t in tokens]


EVERY = _cases(ROWS, ("mxfp4", "fp8"), (1, 2, 4, 8, 16, 32, 64, 128, 256, 4096))
EVERY = [case for case in EVERY if case.t * case.row.slots <= 1 << 27]
CASES = [case for case in EVERY if case.max_us is not None]
BARRED = dict.fromkeys((case.row, case.t) for case in CASES)
BASELINES = [Case(row, "xla_topk", t) for row, t in BARRED]
BASELINES += [Case(row, "xla_mxfp4", t) for row, t in BARRED if t == 1]


def store(seed: int, shape: tuple[int, ...], form: str) -> IndexRows:
    """Finite codes of any bits with scales around 1."""
    per_byte, blocks = (2, DIM // 32) if form == "mxfp4" else (1, 1)
    code = any_leaf(seed, (*shape, DIM // per_byte), jnp.uint8)
    exponent = 125 + (any_leaf(seed + 1, (*shape, blocks), jnp.uint8) & 3)
    scale = lax.bitcast_convert_type(exponent, UE8M0)
    if form == "mxfp4":
        return IndexRows(bits.bytes_to_e2m1(code), scale)
    code = jnp.where(code & 0x7F == 0x7F, code - 16, code)  # NaN
    return IndexRows(lax.bitcast_convert_type(code, E4M3), scale)


@functools.partial(jax.jit, static_argnums=0)
def inputs(case: Case, seed: int) -> tuple[Any, ...]:
    """Operands of one launch: ``q, weight, keys, n_visible``, or scores for ``xla_topk``."""
    (b, t), slots = case.shape, case.row.slots
    if case.form == "xla_topk":
        return (any_leaf(seed, (b, t, slots), jnp.float32),)
    form = case.form.removeprefix("xla_")
    return (
        store(5 * seed, (b, t, HEADS), form),
        any_leaf(5 * seed + 2, (b, t, HEADS), jnp.float32),
        store(5 * seed + 3, (b, slots), form),
        jnp.full((b, t), slots, jnp.int32),
    )


def call(case: Case, operands: tuple[Any, ...], **settings: Any) -> jax.Array:
    """The op as the model calls it."""
    return index_topk(*operands, topk=case.picks, **settings)


def _baseline(case: Case, zero: jax.Array, operands: tuple[Any, ...]) -> jax.Array:
    """`jax.lax.top_k` of materialised scores; ``zero`` keeps it in the loop."""
    if case.form == "xla_topk":
        view = lax.bitcast_convert_type(operands[0], jnp.uint32) ^ zero
        scores = lax.bitcast_convert_type(view, jnp.float32)
    else:
        q, weight, keys, _ = operands
        code = bits.bytes_to_e2m1(bits.e2m1_to_bytes(keys.key) ^ zero)
        wide = [index_dequant(x).astype(jnp.bfloat16) for x in (q, IndexRows(code, keys.scale))]
        dot = jnp.einsum("bthd,bsd->bths", *wide, preferred_element_type=jnp.float32)
        scores = jnp.einsum("bths,bth->bts", jnp.maximum(dot, 0), weight)
    return jnp.sort(lax.top_k(scores, case.picks)[1].astype(jnp.int32), axis=-1)


def _scores(case: Case, operands: tuple[Any, ...], at: tuple[int, int]) -> Any:
    """Of one query, in FP64, and how far each may be off."""
    if case.form == "xla_topk":
        scores = f64(operands[0][at])
        return scores, np.zeros_like(scores)
    q, weight, keys, _ = operands
    scores, sizes = exact_scores(q, weight, keys, at, case.row.slots)
    return scores, CHECK_REL * sizes


def check(case: Case, operands: tuple[Any, ...], idx: jax.Array) -> None:
    """A few queries against FP64."""
    b, t = case.shape
    for token in np.unique(np.linspace(0, b * t - 1, CHECKED_TOKENS).astype(int)):
        at = divmod(int(token), t)
        scores, bound = _scores(case, operands, at)
        assert_best(idx[at], scores, bound, case.picks, f"{case.name}, token {token}")


def measure(case: Case, **settings: Any) -> timing.Result:
    """One line. Every set has keys and queries of its own."""
    ours = not case.form.startswith("xla_")
    sets = settings.pop("sets", timing.set_count(case.launch_bytes))
    operands = [inputs(case, i) for i in range(sets)]

    def run(carry: jax.Array, *given: Any) -> jax.Array:
        return call(case, given) if ours else _baseline(case, timing.held(carry), given)

    return timing.measure(
        "index_topk",
        case.name,
        run,
        lambda i: (linears.poisoned((*case.shape, case.picks), jnp.int32), operands[i]),
        lambda i, idx: check(case, operands[i], idx),
        target="index_topk" if ours else None,
        launch_bytes=case.launch_bytes,
        bytes_at="read",
        flops=case.flops,
        flops_at="fp8",
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
