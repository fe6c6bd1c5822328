"""compressor of whole layers: CSA's two jobs and HCA's one; run with ``-m bench``, or as a program.

``python -m tests.bench.bench_compressor --rows csa --forms open closing --tokens 1``.
The sizes are those of Flash and Pro alike. A decoded token either only goes to the states or closes
its window, of which the slots are read and an entry is written; a prefill closes every window of
its chunk.
"""

import dataclasses
import functools
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.bench.weights import any_leaf
from dsv4_jax.ops.compressor import Compressed, CompressorJob, compressor
from dsv4_jax.quant import bits
from dsv4_jax.quant.kv import IndexRows, KvRows
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.bench import linears, timing
from tests.support.numerics import assert_same_bits, raw

pytestmark = [pytest.mark.bench, pytest.mark.gpu]

EPS = 1e-6
ROTARY = 64
MAIN, INDEX = 512, 128
FREQUENCIES = (160000.0 ** -(np.arange(ROTARY // 2) / (ROTARY // 2))).astype(np.float32)
RATIOS = {"csa": 4, "hca": 128}
ENTRY_BYTES = {MAIN: 448 + 7 + 128, INDEX: 64 + 4}
DECODE_US = 4.0
PREFILL_FRACTION = 0.55
"""Of the copy ceiling."""
MOST_TURNED = 1e-4
"""Of an entry's bytes: sine and cosine of CPU and GPU differ in their last bit."""


class Row(NamedTuple):
    """A kind of layer and a batch, for the command line."""

    model: str
    name: str


@dataclasses.dataclass(frozen=True)
class Case:
    """``b`` rows that hold ``start`` tokens and take ``t``."""

    layer: str
    b: int
    t: int
    start: int

    @property
    def name(self) -> str:
        """What the line is called."""
        kind = "" if self.t > 1 else f" {self.form}"
        return f"{self.layer} b={self.b} t={self.t}{kind}"

    @property
    def row(self) -> Row:
        return Row("v4", self.layer if self.b == 1 else f"{self.layer}-b{self.b}")

    @property
    def form(self) -> str:
        """Whether a decoded token closes its window."""
        return "chunk" if self.t > 1 else "closing" if self.windows else "open"

    @property
    def ratio(self) -> int:
        return RATIOS[self.layer]

    @property
    def windows(self) -> int:
        """That close, of a row."""
        return (self.start + self.t) // self.ratio - self.start // self.ratio

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the jobs."""
        return (MAIN, INDEX) if self.layer == "csa" else (MAIN,)

    @property
    def halves(self) -> int:
        return 2 if self.layer == "csa" else 1

    @property
    def ring(self) -> int:
        return self.halves * self.ratio

    @property
    def launch_bytes(self) -> float:
        """The chunk and older slots read once, states, entries and `ape` once."""
        total = 0.0
        for d in self.widths:
            row = 8 * self.halves * d  # of kv and gate
            slots = self.ring * 8 * d if self.windows and self.start else 0
            total += row * (self.t + min(self.t, self.ring)) + slots
            total += row / 2 * min(self.ratio, self.t) + self.windows * ENTRY_BYTES[d]
        return self.b * total

    @property
    def bars(self) -> tuple[float | None, float | None]:
        """us and fraction."""
        if self.b > 1:
            return None, None
        return (DECODE_US, None) if self.t == 1 else (None, PREFILL_FRACTION)


CASES = [
    Case("csa", 1, 1, 7),  # one thread block a job
    Case("csa", 1, 1, 8),
    Case("hca", 1, 1, 255),  # one cluster
    Case("hca", 1, 1, 256),
    Case("csa", 128, 1, 7),
    Case("hca", 128, 1, 255),
    Case("csa", 1, 4096, 0),  # memory bound
    Case("hca", 1, 4096, 0),
]


def pool(case: Case, d: int) -> KvRows | IndexRows:
    """Shapes."""
    lead = case.b, max((case.start + case.t) // case.ratio + 1, 64)
    if d == INDEX:
        return IndexRows(
            jax.ShapeDtypeStruct((*lead, d), E2M1), jax.ShapeDtypeStruct((*lead, d // 32), UE8M0)
        )
    nope = d - ROTARY
    return KvRows(
        jax.ShapeDtypeStruct((*lead, nope), E4M3),
        jax.ShapeDtypeStruct((*lead, nope // 64), UE8M0),
        jax.ShapeDtypeStruct((*lead, ROTARY), jnp.bfloat16),
    )


@functools.partial(jax.jit, static_argnums=0)
def make_set(case: Case, seed: int) -> tuple[list[Compressed], tuple[Any, ...]]:
    """What is written, and the rest; a launch with its own results has them again.

    One program on the device: of its parts a dozen would be compiled.
    """
    written: list[Compressed] = []
    rest: list[tuple[jax.Array, ...]] = []
    for i, d in enumerate(case.widths):
        columns = case.halves * d
        state, chunk, ape = (
            (*lead, columns) for lead in ((case.b, case.ring), (case.b, case.t), (case.ratio,))
        )
        shapes = state, state, chunk, chunk, ape, (d,)
        values = [any_leaf(10 * (2 * seed + i) + j, x, jnp.float32) for j, x in enumerate(shapes)]
        written.append(Compressed(values[0], values[1], timing.poisoned(pool(case, d))))
        norm = (1 + values[5] / 8).astype(jnp.bfloat16)
        rest.append((values[2], values[3], values[4], norm))
    start = jnp.full(case.b, case.start, jnp.int32)
    return written, (rest, start, jnp.full(case.b, case.t, jnp.int32))


def call(case: Case, written: list[Compressed], rest: Any, start: Any, count: Any) -> Any:
    """The op as the model calls it."""
    jobs = [CompressorJob(*(*r, *w)) for r, w in zip(rest, written, strict=True)]
    return compressor(jobs, start, count, FREQUENCIES, ratio=case.ratio, eps=EPS)


def check(case: Case, got: list[Compressed], seed: int) -> None:
    """As the CPU handler has it: states to the bit, entries but for the rotation's ties."""
    host = jax.device_put(make_set(case, seed), jax.devices("cpu")[0])
    want = call(case, host[0], *host[1])
    for mine, theirs in zip(got, want, strict=True):
        for name in ("kv_state", "gate_state"):
            assert_same_bits(
                jax.device_get(getattr(mine, name)), jax.device_get(getattr(theirs, name)), name
            )
        turned = total = 0
        for a, b in zip(jax.tree.leaves(mine.pool), jax.tree.leaves(theirs.pool), strict=True):
            a, b = (raw(bits.e2m1_to_bytes(x) if x.dtype == E2M1 else x) for x in (a, b))
            turned, total = turned + int((a != b).sum()), total + a.size
        if turned > MOST_TURNED * total + 1:
            raise AssertionError(f"{case.name}: {turned} of {total} bytes of a pool differ")


def measure(case: Case, **settings: Any) -> timing.Result:
    """One line."""
    max_us, min_fraction = case.bars
    return timing.measure(
        "compressor",
        case.name,
        functools.partial(call, case),
        lambda i: make_set(case, i),
        lambda i, written: check(case, written, i),
        target="compressor",
        launch_bytes=case.launch_bytes,
        max_us=max_us,
        min_fraction=min_fraction,
        **settings,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_time(case: Case) -> None:
    result = measure(case)
    result.append(timing.default_path())
    result.require()


if __name__ == "__main__":
    sys.exit(linears.program(CASES, CASES, measure))
