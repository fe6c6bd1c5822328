"""compressor against its reference and FP64, however the tokens of a row arrive."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops._compressor_jax import compressor_jax
from dsv4_jax.ops.compressor import Compressed, CompressorJob, compressor
from dsv4_jax.quant.kv import IndexRows, KvRows, kv_dequant
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from reference.compressor import compressor as reference_compressor
from tests.support.numerics import assert_near, assert_same_tree, f64, raw
from tests.support.stored import stored_entry

EPS = 1e-6
ROTARY = 64
FREQUENCIES = (160000.0 ** -(np.arange(ROTARY // 2) / (ROTARY // 2))).astype(np.float32)
SLOTS = 80
POISON = 0xA5
# Up to 128 exps, products and sums in FP32, a norm and a rotation, relative to the largest value.
REL = 4e-6
# Values that lie within an FP32 sum's error of a rounding boundary: BF16, then a code, seen rarely.
MOST_TURNED = 2e-4

WIDTH = {"kv": 512, "mxfp4": 128, "fp8": 128}
# Ratio, forms of the jobs: CSA's two, in both formats of index keys, and HCA's one.
LAYERS = {
    "csa": (4, ("kv", "mxfp4")),
    "csa-fp8": (4, ("kv", "fp8")),
    "csa-alone": (4, ("kv",)),
    "index-alone": (4, ("mxfp4",)),
    "hca": (128, ("kv",)),
}
CHUNKS = {
    4: [
        [(0, 21)],
        [(0, 3), (3, 4), (4, 5), (5, 12), (12, 21)],
        [(i, i + 1) for i in range(13)],
        [(0, 7), (7, 30)],
    ],
    128: [
        [(0, 300)],
        [(0, 127), (127, 128), (128, 129), (129, 257)],
        [(0, 100), (100, 300)],
        [(0, 1), (1, 256), (256, 257), (257, 384)],
    ],
}


def halves(ratio: int) -> int:
    return 2 if ratio == 4 else 1


def values(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Standard normal."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def poisoned(form: str, b: int, d: int, rotary: int = ROTARY) -> Any:
    """A pool of one byte over and over, in numpy: of JAX each shape would be compiled."""

    def full(n: int, dtype: Any) -> np.ndarray:
        byte = np.full((b, SLOTS, n * np.dtype(dtype).itemsize), POISON, np.uint8)
        return (byte & 0xF if dtype == E2M1 else byte).view(dtype)

    if form == "kv":
        nope = d - rotary
        return KvRows(full(nope, E4M3), full(-(-nope // 64), UE8M0), full(rotary, jnp.bfloat16))
    dtype, blocks = (E2M1, d // 32) if form == "mxfp4" else (E4M3, 1)
    return IndexRows(full(d, dtype), full(blocks, UE8M0))


def whole(
    form: str, ratio: int, b: int, t: int, seed: int, d: int | None = None, **settings: Any
) -> CompressorJob:
    """Rows of ``t`` tokens from their beginning on, over NaN states and a poisoned pool."""
    d = WIDTH[form] if d is None else d
    columns, ring = halves(ratio) * d, halves(ratio) * ratio
    state = np.full((b, ring, columns), np.nan, np.float32)
    return CompressorJob(
        values(seed, b, t, columns),
        values(seed + 1, b, t, columns, scale=3),
        values(seed + 2, ratio, columns, scale=0.5),
        (1 + values(seed + 3, d, scale=0.2)).astype(jnp.bfloat16),
        *(state, state.copy()),
        poisoned(form, b, d, **settings),
    )


def jobs_of(layer: str, b: int, t: int) -> tuple[int, list[CompressorJob]]:
    ratio, forms = LAYERS[layer]
    return ratio, [whole(form, ratio, b, t, 10 * i) for i, form in enumerate(forms)]


def run(jobs: Sequence[CompressorJob], start: Any, count: Any, **settings: Any) -> list[Compressed]:
    lengths = (jnp.asarray(x, jnp.int32) for x in (start, count))
    return compressor(jobs, *lengths, FREQUENCIES, **{"eps": EPS, **settings})


def after(job: CompressorJob, new: Compressed) -> CompressorJob:
    return CompressorJob(*job[:4], *new)


def part(job: CompressorJob, start: int, stop: int) -> CompressorJob:
    return job._replace(kv=job.kv[:, start:stop], gate=job.gate[:, start:stop])


def in_chunks(
    jobs: Sequence[CompressorJob], chunks: Sequence[tuple[int, int]], **settings: Any
) -> list[Compressed]:
    """The rows of all jobs, piece by piece."""
    jobs, b = list(jobs), jobs[0].kv.shape[0]
    new: list[Compressed] = []
    for start, stop in chunks:
        pieces = [part(job, start, stop) for job in jobs]
        new = run(pieces, [start] * b, [stop - start] * b, **settings)
        jobs = [after(job, each) for job, each in zip(jobs, new, strict=True)]
    return new


def in_bytes(pool: Any) -> Iterator[np.ndarray]:
    """Codes of every part, ``[b, s, n]``."""
    return map(raw, jax.tree.leaves(pool))


def check(jobs: Sequence[CompressorJob], got: Any, start: Any, count: Any, ratio: int) -> int:
    """States bitwise; entries too but for counted ties; whatever else is in a pool is untouched."""
    want = reference_compressor(jobs, start, count, FREQUENCIES, ratio=ratio, eps=EPS)
    turned = total = 0
    for job, new, (kv_state, gate_state, entries) in zip(jobs, got, want, strict=True):
        assert_same_tree((new.kv_state, new.gate_state), (kv_state, gate_state), "states")
        before, now = list(in_bytes(job.pool)), list(in_bytes(new.pool))
        others = np.ones(now[0].shape[:2], bool)
        for (i, w), entry in entries.items():
            if w >= SLOTS:
                continue
            others[i, w] = False
            fresh = in_bytes(stored_entry(entry, job.pool, ROTARY))
            for mine, theirs in zip(now, fresh, strict=True):
                turned += int((mine[i, w] != theirs[0, 0]).sum())
                total += mine[i, w].size
        for mine, old in zip(now, before, strict=True):
            np.testing.assert_array_equal(mine[others], old[others])
    assert turned <= MOST_TURNED * total + 1, f"{turned} of {total} bytes differ"
    return turned


@pytest.mark.parametrize("layer", LAYERS)
def test_against_reference(layer: str) -> None:
    """Ragged rows at any place of their windows; no, one and many that close; wild lengths."""
    t = 300 if layer == "hca" else 23
    ratio, jobs = jobs_of(layer, 8, t)
    start = np.array([0, 3, 2 * ratio - 1, 2 * ratio, -1, -(2**31), 2**31 - 400, 5 * ratio + 2])
    count = np.array([t, t - 3, 1, 0, t, t, t, 2**31 - 1])
    rings = [values(50 + i, *job.kv_state.shape) for i, job in enumerate(jobs)]
    jobs = [
        job._replace(kv_state=ring, gate_state=ring[:, ::-1])
        for job, ring in zip(jobs, rings, strict=True)
    ]
    got = run(jobs, start, count, ratio=ratio)
    print(f"{layer}: {check(jobs, got, start, count, ratio)} bytes turned by ties")


@pytest.mark.parametrize(
    ("layer", "chunks"),
    [
        pytest.param(layer, chunks, id=f"{layer}-{i}")
        for layer in ("csa", "csa-fp8", "hca")
        for i, chunks in enumerate(CHUNKS[LAYERS[layer][0]])
    ],
)
def test_chunks(layer: str, chunks: list[tuple[int, int]]) -> None:
    """P3: states and pools have the same bits however the tokens arrive, and the reference's.

    Rows that no window may read hold NaN.
    """
    total = chunks[-1][1]
    ratio, jobs = jobs_of(layer, 1, total)
    once = run(jobs, [0], [total], ratio=ratio)
    check(jobs, once, [0], [total], ratio)
    assert_same_tree(in_chunks(jobs, chunks, ratio=ratio), once)


@pytest.mark.parametrize("spare", [1, 3])
@pytest.mark.parametrize("layer", ["csa", "hca"])
def test_rings_with_room_for_drafts(layer: str, spare: int) -> None:
    """Longer rings hold more positions and change no entry."""
    ratio, forms = LAYERS[layer]
    total = 3 * ratio + 2
    jobs = [whole(form, ratio, 2, total, 10 * i) for i, form in enumerate(forms)]
    want = run(jobs, [0, 0], [total] * 2, ratio=ratio)
    longer = [
        job._replace(
            kv_state=np.pad(job.kv_state, ((0, 0), (0, spare), (0, 0)), constant_values=np.nan),
            gate_state=np.pad(job.gate_state, ((0, 0), (0, spare), (0, 0))),
        )
        for job in jobs
    ]
    chunks = [(0, ratio + 1), (ratio + 1, 2 * ratio + 3), (2 * ratio + 3, total)]
    got = in_chunks(longer, chunks, ratio=ratio)
    assert_same_tree([x.pool for x in got], [x.pool for x in want])
    ring = longer[0].kv_state.shape[1]
    for job, new in zip(longer, got, strict=True):
        for p in range(total - ring, total):
            np.testing.assert_array_equal(new.kv_state[:, p % ring], job.kv[:, p])


@pytest.mark.parametrize("layer", ["csa", "hca"])
def test_a_rejected_draft_is_overwritten(layer: str) -> None:
    """A row that goes back by one token and takes another equals one that never had the first."""
    ratio, forms = LAYERS[layer]
    total = 3 * ratio
    jobs = []
    for i, form in enumerate(forms):
        job = whole(form, ratio, 1, total, 10 * i)
        pad = ((0, 0), (0, 1), (0, 0))
        jobs.append(
            job._replace(kv_state=np.pad(job.kv_state, pad), gate_state=np.pad(job.gate_state, pad))
        )
    want = run(jobs, [0], [total], ratio=ratio)
    drafts = [job._replace(kv=-job.kv, gate=-job.gate) for job in jobs]
    mixed = run([part(job, 0, total - 1) for job in jobs], [0], [total - 1], ratio=ratio)
    for source in (drafts, jobs):  # the window closes twice
        last = [part(after(j, m), total - 1, total) for j, m in zip(source, mixed, strict=True)]
        mixed = run(last, [total - 1], [1], ratio=ratio)
    assert_same_tree(mixed, want)


@pytest.mark.parametrize("layer", ["csa", "hca"])
def test_padding_writes_nothing(layer: str) -> None:
    """``count`` decides; NaN behind it reaches no state and no entry (B9)."""
    ratio, jobs = jobs_of(layer, 3, 2 * ratio_of(layer) + 1)
    count = np.array([0, ratio + 1, 2 * ratio])
    real = np.arange(2 * ratio + 1)[None, :, None] < count[:, None, None]
    nan = np.float32(np.nan)
    bad = [
        job._replace(kv=np.where(real, job.kv, nan), gate=np.where(real, job.gate, nan))
        for job in jobs
    ]
    got = run(bad, [0, 0, 0], count, ratio=ratio)
    check(jobs, got, [0, 0, 0], count, ratio)
    for job, new in zip(jobs, got, strict=True):
        for mine, old in zip(in_bytes(new.pool), in_bytes(job.pool), strict=True):
            np.testing.assert_array_equal(mine[0], old[0])


def ratio_of(layer: str) -> int:
    return LAYERS[layer][0]


@pytest.mark.parametrize("layer", ["csa", "hca"])
def test_a_full_pool(layer: str) -> None:
    """B1: an entry beyond the pool is dropped, the states go on."""
    ratio, jobs = jobs_of(layer, 2, 2 * ratio_of(layer))
    start = [(SLOTS - 1) * ratio, 2**31 - 1 - 2 * ratio]
    zero = [
        job._replace(kv_state=np.zeros_like(job.kv_state), gate_state=np.zeros_like(job.gate_state))
        for job in jobs
    ]
    got = run(zero, start, [2 * ratio] * 2, ratio=ratio)
    check(zero, got, start, [2 * ratio] * 2, ratio)
    for job, new in zip(jobs, got, strict=True):
        changed = [
            (a != b).any(axis=-1)
            for a, b in zip(in_bytes(new.pool), in_bytes(job.pool), strict=True)
        ]
        want = np.zeros((2, SLOTS), bool)
        want[0, -1] = True
        np.testing.assert_array_equal(np.logical_or.reduce(changed), want)


@pytest.mark.parametrize("donate", [False, True], ids=["copied", "donated"])
@pytest.mark.parametrize("layer", ["csa", "hca"])
def test_in_place(layer: str, donate: bool) -> None:
    """B11, B12: donated states and pools keep their buffers, and nothing of their size is made."""
    ratio, jobs = jobs_of(layer, 2, ratio_of(layer) + 3)
    want = run(jobs, [0, ratio - 1], [ratio + 3, 2], ratio=ratio)
    rest = [CompressorJob(*job[:4], *[None] * 3) for job in jobs]  # type: ignore[arg-type]
    lengths = jnp.array([0, ratio - 1], jnp.int32), jnp.array([ratio + 3, 2], jnp.int32)

    def step(kept: Any, rest: Any, lengths: Any) -> Any:
        each = [CompressorJob(*r[:4], *k) for r, k in zip(rest, kept, strict=True)]
        return compressor(each, *lengths, FREQUENCIES, ratio=ratio, eps=EPS)

    jitted = jax.jit(step, donate_argnums=(0,) if donate else ())
    kept = jax.tree.map(jnp.copy, [Compressed(*job[4:]) for job in jobs])
    if donate:
        memory = jitted.lower(kept, rest, lengths).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4096
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(kept)]
    got = jitted(kept, rest, lengths)
    assert_same_tree(got, want)
    moved = [
        x.unsafe_buffer_pointer() != p for x, p in zip(jax.tree.leaves(got), pointers, strict=True)
    ]
    assert not any(moved) if donate else all(moved)


def test_jobs_do_not_meet() -> None:
    """Two in one call are those of a call each."""
    ratio, jobs = jobs_of("csa", 3, 21)
    start, count = [0, 5, 2], [21, 4, 9]
    both = run(jobs, start, count, ratio=ratio)
    assert_same_tree(both, [run([job], start, count, ratio=ratio)[0] for job in jobs])


@pytest.mark.parametrize("layer", ["csa", "csa-fp8", "hca"])
def test_rows_do_not_meet(layer: str) -> None:
    """P2: a row alone, whatever its neighbours are."""
    ratio, jobs = jobs_of(layer, 4, 2 * ratio_of(layer) + 3)
    start, count = np.array([0, 1, ratio, 3]), np.array([2 * ratio, 5, 0, 2 * ratio + 3])
    got = run(jobs, start, count, ratio=ratio)
    for i in range(4):
        rows = slice(i, i + 1)

        def row(x: Any, rows: slice = rows) -> np.ndarray:
            return np.asarray(x)[rows]

        alone = [
            after(job._replace(kv=row(job.kv), gate=row(job.gate)), jax.tree.map(row, written))
            for job, written in zip(jobs, (Compressed(*job[4:]) for job in jobs), strict=True)
        ]
        want = jax.tree.map(row, got)
        assert_same_tree(run(alone, start[rows], count[rows], ratio=ratio), want, f"row {i}")


@pytest.mark.parametrize(
    ("form", "ratio", "d", "rotary"),
    [
        pytest.param("kv", 4, 64, 64, id="no-codes"),
        pytest.param("kv", 4, 96, 32, id="part-of-a-tile"),
        pytest.param("kv", 128, 96, 32, id="hca-part-of-a-tile"),
        pytest.param("kv", 128, 512, 128, id="more-rotary"),
        pytest.param("kv", 8, 192, 64, id="ratio-8"),
        pytest.param("kv", 1, 128, 64, id="ratio-1"),
        pytest.param("mxfp4", 4, 32, 16, id="one-block"),
        pytest.param("mxfp4", 4, 64, 64, id="index-64"),
        pytest.param("fp8", 4, 64, 6, id="index-fp8-64"),
    ],
)
def test_other_sizes(form: str, ratio: int, d: int, rotary: int) -> None:
    """What the call serves besides the model's: as `jax.numpy` has it, but for counted ties."""
    total = 5 * ratio if ratio < 128 else 300
    job = whole(form, ratio, 2, total, 0, d, rotary=rotary)
    start, count = (jnp.asarray(x, jnp.int32) for x in ([0, 0], [total, total - 1]))
    frequencies = jnp.asarray(FREQUENCIES[:1]) * 0.9 ** jnp.arange(rotary // 2)
    settings: dict[str, Any] = {"ratio": ratio, "eps": EPS}
    operands = [job], start, count, frequencies
    call = functools.partial(compressor, **settings)
    assert "dsv4.compressor" in str(jax.make_jaxpr(call)(*operands))
    (got,) = call(*operands)
    in_jax = jax.jit(functools.partial(compressor_jax, **settings, dtype=jnp.bfloat16))
    states, pool = in_jax(*job[:4], job[4:6], job.pool, *operands[1:])
    assert_same_tree((got.kv_state, got.gate_state), states)
    pairs = list(zip(in_bytes(got.pool), in_bytes(pool), strict=True))
    turned = sum(int((a != b).sum()) for a, b in pairs)
    assert turned <= MOST_TURNED * sum(a[:, : total // ratio].size for a, _ in pairs) + 1
    assert any(a.any() for a, _ in pairs)


def exact(job: CompressorJob, ratio: int, row: int, length: int) -> np.ndarray:
    """model.md 3.5 in FP64: every closed window of a row from its beginning, before storage."""
    d = job.norm.shape[0]
    z = f64(job.kv[row, :length])
    g = f64(job.gate[row, :length] + job.ape[np.arange(length) % ratio])
    entries = []
    for w in range(length // ratio):
        own = slice(w * ratio, (w + 1) * ratio)
        zs, gs = z[own], g[own]
        if ratio == 4:
            zs, gs = zs[:, d:], gs[:, d:]
            if w > 0:
                before = slice((w - 1) * ratio, w * ratio)
                zs = np.concatenate([z[before, :d], zs])
                gs = np.concatenate([g[before, :d], gs])
        e = np.exp(gs - gs.max(axis=0))
        c = (e * zs).sum(axis=0) / e.sum(axis=0)
        y = f64(job.norm) * c / np.sqrt(np.mean(c * c) + EPS)
        angle = f64(np.float32(w * ratio) * FREQUENCIES)
        even, odd = y[-ROTARY::2].copy(), y[-ROTARY + 1 :: 2].copy()
        y[-ROTARY::2] = even * np.cos(angle) - odd * np.sin(angle)
        y[-ROTARY + 1 :: 2] = even * np.sin(angle) + odd * np.cos(angle)
        entries.append(y)
    return np.array(entries)


def unquantised(job: CompressorJob, dtype: Any) -> CompressorJob:
    b, s = job.kv.shape[0], SLOTS
    d = job.norm.shape[0]
    pool = KvRows(jnp.zeros((b, s, d - ROTARY), dtype), None, jnp.zeros((b, s, ROTARY), dtype))
    return job._replace(pool=pool)


@pytest.mark.parametrize("ratio", [4, 128])
def test_without_rounding(ratio: int) -> None:
    """FP32 throughout, against FP64, in chunks: softmax, norm, rotation and slots."""
    total = 5 * ratio if ratio == 4 else 300
    job = unquantised(whole("kv", ratio, 2, total, 0), jnp.float32)
    chunks = [(0, ratio - 1), (ratio - 1, ratio + 2), (ratio + 2, total)]
    (got,) = in_chunks([job], chunks, ratio=ratio, dtype=jnp.float32)
    values = kv_dequant(got.pool, jnp.float32)
    for row in (0, 1):
        want = exact(job, ratio, row, total)
        assert_near(values[row, : len(want)], want, REL * np.abs(want).max())
        assert not np.asarray(values[row, len(want) :]).any()


@pytest.mark.parametrize("ratio", [4, 128])
def test_rounded_against_exact(ratio: int) -> None:
    """The served form is within its roundings: three of BF16, one of E4M3."""
    total = 5 * ratio if ratio == 4 else 300
    job = whole("kv", ratio, 1, total, 0)
    (got,) = run([job], [0], [total], ratio=ratio)
    want = exact(job, ratio, 0, total)
    values = np.asarray(kv_dequant(got.pool, jnp.float32))[0, : len(want)]
    largest = np.abs(want).max()
    assert_near(values[:, :-ROTARY], want[:, :-ROTARY], 2.0**-4 * np.abs(want[:, :-ROTARY]) + 0.01)
    assert_near(values[:, -ROTARY:], want[:, -ROTARY:], 3 * 2.0**-8 * largest)


def _no_ape(job: CompressorJob) -> CompressorJob:
    return job._replace(ape=np.zeros_like(job.ape))


def _halves_swapped(job: CompressorJob) -> CompressorJob:
    d = job.norm.shape[0]
    swap = lambda x: np.concatenate([x[..., d:], x[..., :d]], axis=-1)  # noqa: E731
    return job._replace(kv=swap(job.kv), gate=swap(job.gate), ape=swap(job.ape))


def _no_norm_weight(job: CompressorJob) -> CompressorJob:
    return job._replace(norm=np.ones_like(job.norm))


def _ape_one_late(job: CompressorJob) -> CompressorJob:
    return job._replace(ape=np.roll(job.ape, 1, axis=0))


@pytest.mark.parametrize("wrong", [_no_ape, _halves_swapped, _no_norm_weight, _ape_one_late])
def test_wrong_variants_fail(wrong: Any) -> None:
    ratio, jobs = jobs_of("csa", 2, 21)
    got = run([wrong(job) for job in jobs], [0, 0], [21, 21], ratio=ratio)
    with pytest.raises(AssertionError):
        check(jobs, got, [0, 0], [21, 21], ratio)


def test_rotation_follows_the_window() -> None:
    """The same tokens a window later: the same codes, rotated by another position."""
    ratio, jobs = jobs_of("csa-alone", 1, 8)
    (got,) = run(jobs, [0], [8], ratio=ratio)
    (late,) = run(
        [jobs[0]._replace(kv_state=got.kv_state * 0, gate_state=got.gate_state * 0)],
        *([4], [8]),
        ratio=ratio,
    )
    np.testing.assert_array_equal(raw(late.pool.nope)[0, 2], raw(got.pool.nope)[0, 1])
    assert (raw(late.pool.rope)[0, 2] != raw(got.pool.rope)[0, 1]).any()


def test_large_gates_and_values() -> None:
    """A14: gates of +-1e4, values that saturate nothing; infinities become NaN entries, alone."""
    ratio, (job,) = jobs_of("csa-alone", 2, 12)
    large = job._replace(gate=job.gate * 1e4, kv=job.kv * 1e30)
    (got,) = run([large], [0, 0], [12, 12], ratio=ratio)
    assert np.isfinite(f64(kv_dequant(got.pool, jnp.float32))[:, :3]).all()
    broken = job._replace(kv=job.kv.copy())
    broken.kv[0, 5, 600] = np.inf
    (bad,), (good,) = (run([j], [0, 0], [12, 12], ratio=ratio) for j in (broken, job))
    nan = np.isnan(f64(kv_dequant(bad.pool, jnp.float32))[:, :3]).any(axis=-1)
    np.testing.assert_array_equal(nan, [[False, True, False], [False, False, False]])
    for mine, theirs in zip(in_bytes(bad.pool), in_bytes(good.pool), strict=True):
        np.testing.assert_array_equal(mine[1], theirs[1])


def test_zero_entries() -> None:
    """A15: a window of zeros has zero codes and the smallest scale."""
    ratio, jobs = jobs_of("csa", 1, 4)
    zero = [job._replace(kv=np.zeros_like(job.kv)) for job in jobs]
    keys, index = run(zero, [0], [4], ratio=ratio)
    assert not raw(keys.pool.nope)[0, 0].any() and not raw(keys.pool.rope)[0, 0].any()
    assert (raw(keys.pool.scale)[0, 0] == 127 - 22).all()
    assert not raw(index.pool.key)[0, 0].any() and (raw(index.pool.scale)[0, 0] == 1).all()


def test_no_tokens() -> None:
    """A6."""
    for b, t in ((2, 0), (0, 5)):
        ratio, jobs = jobs_of("csa", b, t)
        got = run(jobs, [0] * b, [t] * b, ratio=ratio)
        assert_same_tree(got, [Compressed(*job[4:]) for job in jobs])


def test_64_bit_lengths_do_not_wrap() -> None:
    """A row that would begin at 2^32 closes nothing of the pool."""
    ratio, jobs = jobs_of("csa", 1, 8)
    with jax.enable_x64(True):
        start, count = jnp.array([2**32]), jnp.array([2**32 + 8])
        got = compressor(jobs, start, count, FREQUENCIES, ratio=ratio, eps=EPS)
    for job, new in zip(jobs, got, strict=True):
        assert_same_tree(new.pool, job.pool)


def test_mixed_forms() -> None:
    """Keys by the call, index keys without quantisation beside it."""
    ratio, jobs = jobs_of("csa", 2, 9)
    index = jobs[1]._replace(pool=IndexRows(jnp.zeros((2, SLOTS, 128), jnp.bfloat16), None))
    keys, plain = run([jobs[0], index], [0, 3], [9, 6], ratio=ratio)
    assert_same_tree([keys], run([jobs[0]], [0, 3], [9, 6], ratio=ratio))
    want = reference_compressor([index], *([0, 3], [9, 6]), FREQUENCIES, ratio=ratio, eps=EPS)[0][2]
    for (i, w), entry in want.items():
        assert_near(plain.pool.key[i, w], f64(entry), 2.0**-7 * np.abs(f64(entry)))
