"""compressor against FP64 over a whole sequence, wherever chunks and rings meet."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.compressor import compressor
from tests.support.numerics import assert_near, assert_same_bits, f64
from tests.support.op_cases import normal

WIDTH = 16
# Up to 128 exps, products and sums in FP32, relative to the largest value in the window.
REL = 2e-6


def halves(ratio: int) -> int:
    return 2 if ratio == 4 else 1


def exact(kv: np.ndarray, gate: np.ndarray, ratio: int) -> np.ndarray:
    """model.md 3.5, every closed window of one sequence ``[t, c * width]``."""
    entries = []
    for w in range(len(kv) // ratio):
        own = slice(w * ratio, (w + 1) * ratio)
        z, g = kv[own], gate[own]
        if ratio == 4:
            z, g = z[:, WIDTH:], g[:, WIDTH:]
            if w > 0:
                before = slice((w - 1) * ratio, w * ratio)
                z = np.concatenate([kv[before, :WIDTH], z])
                g = np.concatenate([gate[before, :WIDTH], g])
        e = np.exp(g - g.max(axis=0))
        entries.append((e * z).sum(axis=0) / e.sum(axis=0))
    return np.array(entries)


def ring_of(x: np.ndarray, start: int, ring: int, poison: float) -> np.ndarray:
    """Rows ``position % ring`` of the last positions before ``start``, poison elsewhere."""
    out = np.full((ring, x.shape[1]), poison, np.float32)
    for position in range(max(0, start - ring), start):
        out[position % ring] = x[position]
    return out


CHUNKS = [
    pytest.param(4, [(0, 21)], id="csa-whole"),
    pytest.param(4, [(0, 3), (3, 4), (4, 5), (5, 12), (12, 21)], id="csa-ragged"),
    pytest.param(4, [(i, i + 1) for i in range(13)], id="csa-one-by-one"),
    pytest.param(128, [(0, 300)], id="hca-whole"),
    pytest.param(128, [(0, 127), (127, 128), (128, 129), (129, 257)], id="hca-ragged"),
    pytest.param(128, [(0, 100), (100, 300)], id="hca-straddling"),
]


@pytest.mark.parametrize("spare", [0, 3], ids=["ring-exact", "ring-with-drafts"])
@pytest.mark.parametrize(("ratio", "chunks"), CHUNKS)
def test_chunks(ratio: int, chunks: list[tuple[int, int]], spare: int) -> None:
    """Windows from chunk and ring; rows that no closed window may read hold NaN."""
    total, ring = chunks[-1][1], halves(ratio) * ratio + spare
    kv = np.array(normal(0, total, halves(ratio) * WIDTH))
    gate = np.array(normal(1, total, halves(ratio) * WIDTH, scale=3))
    want = exact(kv.astype(np.float64), gate.astype(np.float64), ratio)
    seen: dict[int, np.ndarray] = {}
    for start, stop in chunks:
        got = compressor(
            jnp.asarray(kv[None, start:stop]),
            jnp.asarray(gate[None, start:stop]),
            jnp.asarray(ring_of(kv, start, ring, np.nan)[None]),
            jnp.asarray(ring_of(gate, start, ring, np.nan)[None]),
            jnp.array([start], jnp.int32),
            jnp.array([stop - start], jnp.int32),
            ratio=ratio,
        )
        closing = range(start // ratio, stop // ratio)
        assert np.asarray(got.window)[np.asarray(got.closed)].tolist() == list(closing)
        for n, window in enumerate(closing):
            seen[window] = np.asarray(got.entry[0, n])
    assert sorted(seen) == list(range(total // ratio))
    entries = np.stack([seen[w] for w in sorted(seen)])
    assert_near(entries, want, REL * np.abs(kv).max())


@pytest.mark.parametrize(("ratio", "start", "t"), [(4, 6, 9), (128, 100, 160)])
def test_position_in_the_call_changes_no_bit(ratio: int, start: int, t: int) -> None:
    """The window that closes first comes out alike from ring and chunk and from one chunk."""
    ring, total = halves(ratio) * ratio, start + t
    kv, gate = (np.array(normal(s, total, halves(ratio) * WIDTH)) for s in (0, 1))

    def run(start: int) -> np.ndarray:
        got = compressor(
            *(jnp.asarray(x[None, start:]) for x in (kv, gate)),
            *(jnp.asarray(ring_of(x, start, ring, np.nan)[None]) for x in (kv, gate)),
            jnp.array([start], jnp.int32),
            jnp.array([total - start], jnp.int32),
            ratio=ratio,
        )
        return np.asarray(got.entry)[np.asarray(got.closed)]

    late, whole = run(start), run(0)
    assert_same_bits(late, whole[len(whole) - len(late) :])


def test_padding_closes_nothing() -> None:
    """``count`` decides; NaN behind it reaches no closed window. Rows are ragged."""
    kv, gate = normal(0, 3, 9, 2 * WIDTH), normal(1, 3, 9, 2 * WIDTH)
    state = jnp.full((3, 8, 2 * WIDTH), jnp.nan)
    count = np.array([0, 5, 8], np.int32)
    padded = jnp.where(np.arange(9)[None, :, None] < count[:, None, None], kv, jnp.nan)
    start = jnp.zeros(3, jnp.int32)
    got = compressor(padded, gate, state, state, start, jnp.asarray(count), ratio=4)
    assert np.asarray(got.closed).sum(axis=1).tolist() == [0, 1, 2]
    for row, n in ((1, 1), (2, 2)):
        want = exact(f64(kv[row]), f64(gate[row]), 4)[:n]
        assert_near(got.entry[row, :n], want, REL * np.abs(f64(kv)).max())


def test_large_gates() -> None:
    """Gates of +-1e4: the largest slot wins, nothing overflows."""
    kv = normal(0, 1, 8, 2 * WIDTH)
    gate = normal(1, 1, 8, 2 * WIDTH, scale=1e4)
    state = jnp.zeros((1, 8, 2 * WIDTH))
    zero = jnp.zeros(1, jnp.int32)
    got = compressor(kv, gate, state, state, zero, jnp.full(1, 8, jnp.int32), ratio=4)
    want = exact(f64(kv[0]), f64(gate[0]), 4)
    assert_near(got.entry[0], want, REL * np.abs(f64(kv)).max())
