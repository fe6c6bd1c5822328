"""The compressor's CUDA kernels against its CPU handler, bit for bit but for counted ties.

`test_compressor.py` is run on a GPU as well; here are more rows, longer chunks and what only a GPU
can show. Sines of the two sides may differ in their last bit, which turns a BF16 value now and
then, and that a code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.compressor import Compressed, CompressorJob, compressor
from tests.bench.timing import filled
from tests.ops.test_compressor import (
    EPS,
    FREQUENCIES,
    LAYERS,
    MOST_TURNED,
    SLOTS,
    halves,
    in_bytes,
    values,
    whole,
)
from tests.support.numerics import assert_same_bits, assert_same_tree, raw

pytestmark = pytest.mark.gpu

NAN = np.float32(np.nan)
POISON = 0xFF
"""NaN in every format that has one."""
SIZES = {
    **{
        name: (ratio, tuple((form, None) for form in forms))
        for name, (ratio, forms) in LAYERS.items()
    },
    "csa-narrow": (4, (("kv", 96), ("mxfp4", 64))),
    "hca-narrow": (128, (("kv", 96),)),
    "ratio-16": (16, (("kv", 192),)),
}
"""Ratio, then form and width of each job; the model's unless a number says otherwise."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Rows that hold ``start`` tokens and take ``count``."""

    t: int
    start: tuple[int, ...]
    count: tuple[int, ...]


def chunks(ratio: int) -> dict[str, Chunk]:
    """Lengths that reach each part of the kernels."""
    most = (SLOTS - 1) * ratio
    wild = (-1, -(2**31), 2**31 - 5, most + ratio - 1)
    return {
        "one-token": Chunk(
            1, (0, ratio - 1, 2 * ratio - 1, ratio, most - 1, most + ratio - 1), (1,) * 6
        ),
        "no-token": Chunk(3, (0, ratio - 1, 5), (0, 0, -3)),
        "less-than-a-window": Chunk(3, (0, ratio - 2, 2 * ratio - 3, 3 * ratio), (3, 2, 3, 1)),
        "ragged": Chunk(
            2 * ratio + 3, (0, 1, ratio - 1, ratio, 3), (2 * ratio + 3, 2 * ratio, 5, 0, 99)
        ),
        "many-windows": Chunk(20 * ratio + 1, (0, 3 * ratio - 1), (20 * ratio + 1, 20 * ratio)),
        "wild": Chunk(2 * ratio, wild, (2 * ratio, 3, 2**31 - 1, 2 * ratio)),
        "many-rows": Chunk(2, tuple(range(300)), (2,) * 300),
    }


def jobs_of(size: str, chunk: Chunk, spare: int = 0) -> tuple[int, list[CompressorJob]]:
    """Random rings, pools of 0xFF, NaN in what is padding."""
    ratio, forms = SIZES[size]
    b, jobs = len(chunk.start), list[CompressorJob]()
    real = np.arange(chunk.t) < np.asarray(chunk.count)[:, None]
    for i, (form, d) in enumerate(forms):
        job = whole(form, ratio, b, chunk.t, 10 * i, d)
        ring = b, halves(ratio) * ratio + spare, job.kv.shape[-1]
        jobs.append(
            job._replace(
                kv=np.where(real[..., None], job.kv, NAN),
                gate=np.where(real[..., None], job.gate, NAN),
                kv_state=values(50 + i, *ring),
                gate_state=values(60 + i, *ring),
                pool=jax.tree.map(lambda x: filled(POISON, x.shape, x.dtype), job.pool),
            )
        )
    return ratio, jobs


def call(jobs: list[CompressorJob], start: Any, count: Any, ratio: int) -> list[Compressed]:
    lengths = (jnp.asarray(x, jnp.int32) for x in (start, count))
    return compressor(jobs, *lengths, FREQUENCIES, ratio=ratio, eps=EPS)


def closed(chunk: Chunk, ratio: int) -> np.ndarray:
    """``[b, slots]``: entries that are written."""
    out = np.zeros((len(chunk.start), SLOTS), bool)
    for row, (start, count) in enumerate(zip(chunk.start, chunk.count, strict=True)):
        if start >= 0:
            end = (start + min(max(count, 0), chunk.t)) // ratio
            out[row, start // ratio : max(end, start // ratio)] = True
    return out


def compare(got: list[Compressed], want: list[Compressed], written: np.ndarray) -> int:
    """States to the bit, entries but for ties, all else as it was; bytes that ties turned."""
    turned = total = 0
    for mine, theirs in zip(got, want, strict=True):
        assert_same_bits(mine.kv_state, theirs.kv_state, "kv state")
        assert_same_bits(mine.gate_state, theirs.gate_state, "gate state")
        for x, y in zip(jax.tree.leaves(mine.pool), jax.tree.leaves(theirs.pool), strict=True):
            a, b, poison = raw(x), raw(y), raw(filled(POISON, (2,), x.dtype))[0]
            assert (a[~written] == poison).all(), "an entry that did not close was touched"
            assert (b[~written] == poison).all()
            turned += int((a[written] != b[written]).sum())
            total += a[written].size
    assert turned <= MOST_TURNED * total + 1, f"{turned} of {total} bytes differ"
    return turned


@pytest.mark.parametrize("kind", chunks(4))
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_cpu_handler(size: str, kind: str) -> None:
    """Ragged rows, padding, several windows at once, wild lengths, pools that hold NaN."""
    chunk = chunks(SIZES[size][0])[kind]
    ratio, jobs = jobs_of(size, chunk)
    got = call(jobs, chunk.start, chunk.count, ratio)
    with jax.default_device(jax.devices("cpu")[0]):
        want = call(jobs_of(size, chunk)[1], chunk.start, chunk.count, ratio)
    print(f"{size} {kind}: {compare(got, want, closed(chunk, ratio))} bytes turned by ties")


@pytest.mark.parametrize("size", ["csa", "csa-fp8", "hca"])
def test_a_long_prompt(size: str) -> None:
    """Every entry of the pool in one call, and in chunks of a length that divides nothing."""
    ratio = SIZES[size][0]
    total = SLOTS * ratio + 5
    chunk = Chunk(total, (0, 0), (total, total - 2 * ratio))
    ratio, jobs = jobs_of(size, chunk, spare=1)
    once = call(jobs, chunk.start, chunk.count, ratio)
    with jax.default_device(jax.devices("cpu")[0]):
        want = call(jobs_of(size, chunk, spare=1)[1], chunk.start, chunk.count, ratio)
    compare(once, want, closed(chunk, ratio))
    step = 3 * ratio - 1
    parts = jobs
    for at in range(0, total, step):
        stop = min(at + step, total)
        pieces = [x._replace(kv=x.kv[:, at:stop], gate=x.gate[:, at:stop]) for x in parts]
        count = np.clip(np.asarray(chunk.count) - at, 0, stop - at)
        start = np.minimum(at, chunk.count)
        new = call(pieces, start, count, ratio)
        parts = [CompressorJob(*x[:4], *y) for x, y in zip(jobs, new, strict=True)]
    assert_same_tree([Compressed(*x[4:]) for x in parts], once)


@pytest.mark.parametrize("size", ["csa", "hca"])
def test_a_row_alone(size: str) -> None:
    """Bit for bit, whatever the batch."""
    ratio = SIZES[size][0]
    rng = np.random.default_rng(0)
    t = ratio + 1
    chunk = Chunk(t, tuple(rng.integers(0, 3 * ratio, 40)), tuple(rng.integers(0, t + 1, 40)))
    ratio, jobs = jobs_of(size, chunk)
    got = call(jobs, chunk.start, chunk.count, ratio)
    taken = ("kv", "gate", "kv_state", "gate_state")
    for row in (0, 17, 39):
        at = slice(row, row + 1)
        one = [
            job._replace(
                pool=jax.tree.map(lambda x: filled(POISON, (1, *x.shape[1:]), x.dtype), job.pool),
                **{name: getattr(job, name)[at] for name in taken},
            )
            for job in jobs
        ]
        alone = call(one, chunk.start[at], chunk.count[at], ratio)
        for mine, theirs in zip(alone, got, strict=True):
            assert_same_bits(mine.kv_state[0], theirs.kv_state[row])
            assert_same_bits(mine.gate_state[0], theirs.gate_state[row])
            for a, b in zip(in_bytes(mine.pool), in_bytes(theirs.pool), strict=True):
                np.testing.assert_array_equal(a[0], b[row])


@pytest.mark.parametrize("size", ["csa", "hca"])
def test_steps_in_a_scan(size: str) -> None:
    """B12: donated states and pools stay where they are; replays give what one call does."""
    ratio = SIZES[size][0]
    steps = 2 * ratio + 3
    chunk = Chunk(steps, (0, ratio - 1, 5), (steps,) * 3)
    ratio, jobs = jobs_of(size, chunk)
    want = call(jobs, chunk.start, chunk.count, ratio)
    tokens = [(jnp.moveaxis(x.kv, 1, 0), jnp.moveaxis(x.gate, 1, 0)) for x in jobs]
    constants = [job[2:4] for job in jobs]

    def scanned(kept: Any, tokens: Any, constants: Any, start: jax.Array) -> Any:
        def body(carry: Any, token: Any) -> Any:
            kept, at = carry
            each = [
                CompressorJob(kv[:, None], gate[:, None], *constant, *state)
                for (kv, gate), constant, state in zip(token, constants, kept, strict=True)
            ]
            new = compressor(each, at, jnp.ones_like(at), FREQUENCIES, ratio=ratio, eps=EPS)
            return (new, at + 1), None

        return jax.lax.scan(body, (kept, start), tokens)[0]

    run = jax.jit(scanned, donate_argnums=0)
    start = jnp.asarray(chunk.start, jnp.int32)

    def fresh() -> list[Compressed]:
        return jax.tree.map(jnp.copy, [Compressed(*job[4:]) for job in jobs])

    memory = run.lower(fresh(), tokens, constants, start).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1e6
    for _ in range(3):  # the first may be without a graph
        kept = fresh()
        pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(kept)]
        got, at = run(kept, tokens, constants, start)
        assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(got)] == pointers
        assert_same_tree(got, want)
        np.testing.assert_array_equal(at, np.asarray(chunk.start) + steps)
