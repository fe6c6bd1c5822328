"""mhc: against IEEE arithmetic in numpy, the reference and the chain of jnp ops it stands for.

Nothing here knows the platform: with JAX_PLATFORMS=cuda,cpu the same tests hold the kernels.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax.ops.mhc import Read, Write, mhc
from dsv4_jax.ops.mhc_head import mhc_head
from dsv4_jax.ops.mhc_post import mhc_post
from dsv4_jax.ops.mhc_pre import mhc_pre
from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.quant import fp8, nvfp4
from dsv4_jax.typing import E2M1, E4M3
from reference.mhc import mhc as reference_mhc
from tests.support.numerics import (
    assert_same_bits,
    assert_same_tree,
    bf16_ulp,
    cosine,
    f64,
    raw,
    row_of,
)

EPS = 1e-6
BF16 = ml_dtypes.bfloat16
SETTINGS = {"iters": 20, "hc_eps": EPS, "rms_eps": EPS}
FORMS = ("bfloat16", "nvfp4", "fp8")
# Sums in another order, and fused: relatively 1e-7 apart, so that a BF16 rounding (2^-9 apart)
# falls the other way now and then. y has such a chance and x another, and x goes the way of y: up
# to 5 in 10,000 measured on a CPU at d = 7168.
MAX_FLIPPED = 2e-3
# Of streams, which are 5 products each. Measured: 1 in 80,000.
MAX_FLIPPED_STREAMS = 2e-4
# Weights are near 1; the bound. Measured: 1.0e-6 for post, 4.8e-7 for comb.
WEIGHT_ABS = 1e-5

# (d, t) and what of the kernels and of the CPU handler they reach.
SHAPES = [
    pytest.param(128, 1, id="d128-t1"),  # one tile
    pytest.param(384, 130, id="d384-t130"),  # the last group of two tokens
    pytest.param(1024, 17, id="d1024-t17"),
    pytest.param(4096, 8, id="d4096-t8"),  # Flash; a group of 32 tiles
    pytest.param(4224, 1, id="d4224-t1"),  # a second group of one tile
    pytest.param(7168, 3, id="d7168-t3"),  # Pro
    pytest.param(16384, 2, id="d16384-t2"),  # the widest
]
SCALES = [pytest.param(None, id="dynamic"), pytest.param(0.0023, id="static")]


def normal(seed: int, *shape: int, scale: float = 1.0, dtype: Any = np.float32) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    return x.astype(np.float32).astype(dtype)


def streams_of(seed: int, t: int, d: int) -> np.ndarray:
    """Normal streams, each token at its own size from 2^-6 to 2^6."""
    size = np.exp2(np.random.default_rng(seed).uniform(-6, 6, (t, 1, 1)))
    return (normal(seed + 1, t, 4, d) * size).astype(BF16)


def write_of(seed: int, t: int, d: int) -> Write:
    return Write(
        normal(seed, t, d, dtype=BF16),
        1 + 0.3 * normal(seed + 1, t, 4),
        0.25 + 0.2 * normal(seed + 2, t, 4, 4),
    )


def read_of(seed: int, d: int, mixes: int = 24) -> Read:
    return Read(
        normal(seed, mixes, 4 * d, scale=d**-0.5),
        normal(seed + 1, mixes),
        np.array([0.7, 1.1, 0.9], np.float32)[: 3 if mixes == 24 else 1],
        (1 + 0.3 * normal(seed + 2, d)).astype(BF16),
    )


def problem(d: int, t: int, mixes: int = 24) -> tuple[np.ndarray, Write, Read]:
    return streams_of(d + t, t, d), write_of(d + t + 10, t, d), read_of(d + 20, d, mixes)


def mixed(streams: Any, write: Any, read: Any, scale: float | None = None, **changed: Any) -> Any:
    """The op on the host; quantised forms are there where there is a read."""
    s2 = None if scale is None else jnp.float32(scale)
    settings = SETTINGS | ({"forms": FORMS} if read is not None else {}) | changed
    args = jax.device_put((streams, write, read))
    return jax.tree.map(np.asarray, mhc(*args, s2, **settings))


def fma(a: Any, b: Any, c: Any) -> np.ndarray:
    """In FP64, where the product of BF16 and FP32 is exact; the sum then rounds twice, which only a
    tie of a tie would show."""
    return (f64(a) * f64(b) + f64(c)).astype(np.float32)


def written(streams: np.ndarray, write: Write) -> np.ndarray:
    """The write-back in the order of ffi/mhc/mhc.h."""
    branch = write.branch.astype(np.float32)
    out = []
    for k in range(4):
        total = write.post[:, k, None] * branch
        for j in range(4):
            total = fma(write.comb[:, j, k, None], streams[:, j], total)
        out.append(total.astype(BF16))
    return np.stack(out, axis=1)


def assert_few(flipped: np.ndarray, most: float, what: str) -> None:
    print(f"{what}: {flipped.sum()} of {flipped.size} fell the other way")
    assert flipped.mean() <= most, what


def assert_near_streams(got: Any, want: Any, streams: np.ndarray, write: Write) -> None:
    """Within a BF16 step; where the terms nearly cancel, within FP32 roundings of them."""
    terms = np.einsum("tjk,tjd->tkd", np.abs(f64(write.comb)), np.abs(f64(streams)))
    terms += np.abs(f64(write.post))[:, :, None] * np.abs(f64(write.branch))[:, None]
    apart = np.abs(f64(got) - f64(want))
    assert (apart <= bf16_ulp(f64(want)) + 2.0**-21 * terms).all()


@jax.jit
def forms_of(x: jax.Array, scale: jax.Array) -> Any:
    """By the formats of `quant`, with NVFP4 scales of the tokens' own where they are not given."""
    wide = x.astype(jnp.float32)
    s2 = jnp.where(scale > 0, scale, nvfp4.token_global_scale(wide))
    return nvfp4.quantize(wide, s2), fp8.quantize_act(wide, fp8.ACT_BLOCK)


def assert_forms(got: Any, scale: float | None) -> None:
    """Quantised forms are those of the op's own BF16, bit for bit."""
    # On the CPU: XLA divides inexactly on a GPU.
    with jax.default_device(jax.devices("cpu")[0]):
        want = jax.tree.map(np.asarray, forms_of(got.x, np.float32(scale or 0)))
    assert_same_tree((got.nvfp4, got.fp8), want)


@pytest.mark.parametrize(("d", "t"), SHAPES)
def test_write_back_bit_for_bit(d: int, t: int) -> None:
    streams, write, read = problem(d, t)
    want = written(streams, write)
    assert_same_bits(mixed(streams, write, None).streams, want, "alone")
    assert_same_bits(mixed(streams, write, read).streams, want, "before a read")


@jax.jit
def chain(streams: Any, write: Any, own: Any, read: Any) -> Any:
    fn, base, weights, norm = read
    branch, post, comb = write
    new = mhc_post(branch, streams, post, comb)
    y, post, comb = mhc_pre(own, fn, base, weights, **SETTINGS)
    return new, rmsnorm(y, norm, EPS), post, comb


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("d", "t"), SHAPES)
def test_against_the_jnp_ops(d: int, t: int, scale: float | None) -> None:
    """`mhc_post`, `mhc_pre`, `rmsnorm`, then the formats of `quant`."""
    streams, write, read = problem(d, t)
    got = mixed(streams, write, read, scale)

    with jax.default_device(jax.devices("cpu")[0]):
        # Of the op's own streams, so that one flip is not met twice.
        new, x, post, comb = chain(streams, tuple(write), got.streams, tuple(read))
    assert_few(raw(got.streams) != raw(new), MAX_FLIPPED_STREAMS, "streams")
    assert_near_streams(got.streams, new, streams, write)
    assert np.abs(got.post - post).max() <= WEIGHT_ABS
    assert np.abs(got.comb - comb).max() <= WEIGHT_ABS
    assert_few(raw(got.x) != raw(x), MAX_FLIPPED, "x")
    assert cosine(got.x, x) > 1 - 1e-6
    assert_forms(got, scale)


@pytest.mark.parametrize(("d", "t"), SHAPES)
def test_head_against_the_jnp_ops(d: int, t: int) -> None:
    streams, write, read = problem(d, t, 4)
    got = mixed(streams, write, read)
    assert got.post is None and got.comb is None
    assert_same_bits(got.streams, written(streams, write), "streams")

    @jax.jit
    def chain(streams: Any, read: Any) -> Any:
        fn, base, weights, norm = read
        return rmsnorm(mhc_head(streams, fn, base, weights, hc_eps=EPS, rms_eps=EPS), norm, EPS)

    with jax.default_device(jax.devices("cpu")[0]):
        want = chain(got.streams, tuple(read))
    assert_few(raw(got.x) != raw(want), MAX_FLIPPED, "x")
    assert_forms(got, None)


@jax.jit
def by_reference(streams: Any, write: Any, read: Any, scale: Any) -> Any:
    """With scales of the tokens' own, and with the given one; what both have, XLA computes once."""
    streams, write, read = jax.tree.map(lambda x: x.astype(jnp.float32), (streams, write, read))
    settings = SETTINGS | {"forms": FORMS}
    return [reference_mhc(streams, write, read, s2, **settings) for s2 in (None, scale)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("mixes", [24, 4])
@pytest.mark.parametrize(("d", "t"), [SHAPES[0], SHAPES[3], SHAPES[5]])
def test_against_reference(d: int, t: int, mixes: int, scale: float | None) -> None:
    streams, write, read = problem(d, t, mixes)
    got = mixed(streams, write, read, scale)
    given = np.float32(scale or 1)
    with jax.default_device(jax.devices("cpu")[0]):
        new, _ = by_reference(streams, tuple(write), None, given)
        # Of the op's own streams, so that one flip is not met twice.
        want = by_reference(got.streams, None, tuple(read), given)[scale is not None]
    assert_few(f64(got.streams) != f64(new.streams), MAX_FLIPPED_STREAMS, "streams")
    if mixes == 24:
        assert np.abs(got.post - want.post).max() <= WEIGHT_ABS
        assert np.abs(got.comb - want.comb).max() <= WEIGHT_ABS
    assert_few(f64(got.x) != f64(want.x), MAX_FLIPPED, "x")
    code, block_scale, token_scale = map(np.asarray, want.nvfp4)
    alike = got.nvfp4.global_scale == token_scale  # else the largest value flipped
    assert alike.mean() > 0.5
    assert_few((f64(got.nvfp4.code) != f64(code))[alike], MAX_FLIPPED, "codes")
    assert_few((f64(got.nvfp4.block_scale) != f64(block_scale))[alike], MAX_FLIPPED, "scales")
    decoded = f64(fp8.dequantize_act(got.fp8, fp8.ACT_BLOCK))
    assert_few(decoded != f64(want.fp8), MAX_FLIPPED, "fp8")


def exact_weights(streams: np.ndarray, read: Read, iters: int) -> tuple[np.ndarray, np.ndarray]:
    """post and comb in FP64."""
    flat = f64(streams).reshape(len(streams), -1)
    mix = flat @ f64(read.fn).T / np.sqrt(np.mean(flat**2, axis=-1, keepdims=True) + EPS)
    logits = mix * np.repeat(f64(read.scale), [4, 4, 16]) + f64(read.base)
    c = logits[:, 8:].reshape(-1, 4, 4)
    c = np.exp(c - c.max(axis=2, keepdims=True))
    c = c / c.sum(axis=2, keepdims=True) + EPS
    for i in range(iters):
        c = c / (c.sum(axis=2, keepdims=True) + EPS) if i else c
        c = c / (c.sum(axis=1, keepdims=True) + EPS)
    return 2 / (1 + np.exp(-logits[:, 4:8])), c


@pytest.mark.parametrize("iters", [1, 2, 20])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_weights_against_fp64(size: float, iters: int) -> None:
    """Large logits too: then comb is nearly a permutation."""
    streams, _, read = problem(1024, 17)
    read = read._replace(fn=read.fn * np.float32(size))
    got = mixed(streams, None, read, iters=iters)
    post, comb = exact_weights(streams, read, iters)
    # FP32 logits of up to `size` * 4 are 1e-7 of that from exact ones.
    assert np.abs(got.post - post).max() <= 2e-6 * size
    assert np.abs(got.comb - comb).max() <= 2e-6 * size
    assert_same_bits(got.streams, streams, "streams stay")


def test_wrong_variants_fail() -> None:
    """What public implementations got wrong (model.md 10.4) is beyond the bounds above."""
    streams, write, read = problem(4096, 8)
    got = mixed(streams, write, read)
    turned = write._replace(comb=write.comb.swapaxes(1, 2).copy())
    assert np.mean(raw(mixed(streams, turned, read).streams) != raw(got.streams)) > 0.5
    parts = np.r_[0:4, 20:24, 4:20]  # pre, comb, post
    moved = read._replace(fn=read.fn[parts], base=read.base[parts])
    assert np.abs(mixed(streams, write, moved).post - got.post).max() > 1e-2
    few = mixed(streams, write, read, iters=2)
    assert np.abs(few.comb - got.comb).max() > WEIGHT_ABS
    no_eps = mixed(streams, write, read, hc_eps=1e-2)
    assert np.mean(raw(no_eps.x) != raw(got.x)) > MAX_FLIPPED
    # The read must be of the rounded streams: of unrounded ones more values change.
    plain = mixed(written(streams, write), None, read)
    assert_same_bits(plain.x, got.x, "x of the rounded streams")


@pytest.mark.parametrize("regime", ["decode", "prefill", "exact"])
@pytest.mark.parametrize(("d", "t"), [SHAPES[1], SHAPES[3]])
def test_regimes(d: int, t: int, regime: str) -> None:
    """All but the order of the mixes' sums is the same; on the CPU that too."""
    streams, write, read = problem(d, t)
    want, got = (
        mixed(streams, write, read, regime="decode"),
        mixed(streams, write, read, regime=regime),
    )
    assert_same_bits(got.streams, want.streams, "streams")
    if regime != "prefill" or jax.default_backend() == "cpu":
        assert_same_tree(got, want, regime)
        return
    assert np.abs(got.post - want.post).max() <= WEIGHT_ABS
    assert np.abs(got.comb - want.comb).max() <= WEIGHT_ABS
    assert_few(raw(got.x) != raw(want.x), MAX_FLIPPED, "x")
    assert_forms(got, None)
    for start, stop in ((0, 1), (t // 2, t)):  # a token is the same in any batch here too
        rows = slice(start, stop)
        part = mixed(streams[rows], row_of(write, rows), read, regime=regime)
        assert_same_tree(part, row_of(got, rows), f"{start}..{stop}")


@pytest.mark.parametrize("regime", ["decode", "exact"])
@pytest.mark.parametrize(("d", "t"), [(256, 300), (4096, 20), (7168, 9), (16384, 3)])
def test_a_token_is_the_same_in_any_batch(d: int, t: int, regime: str) -> None:
    """P1, P2: again, alone, in another order, through every way that kernels are launched."""
    streams, write, read = problem(d, t)
    whole = mixed(streams, write, read, regime=regime)
    assert_same_tree(mixed(streams, write, read, regime=regime), whole, "again")
    order = np.random.default_rng(2).permutation(t)
    shuffled = mixed(streams[order], row_of(write, order), read, regime=regime)
    assert_same_tree(shuffled, row_of(whole, order), "shuffled")
    for start, stop in ((0, 1), (t // 2, t // 2 + 1), (t - 1, t), (1, min(9, t)), (1, t)):
        rows = slice(start, stop)
        part = mixed(streams[rows], row_of(write, rows), read, regime=regime)
        assert_same_tree(part, row_of(whole, rows), f"{start}..{stop}")


@pytest.mark.parametrize("mixes", [24, 4])
def test_write_and_read_apart_are_the_same(mixes: int) -> None:
    streams, write, read = problem(1024, 17, mixes)
    both = mixed(streams, write, read)
    alone = mixed(streams, write, None)
    assert alone[1:] == (None,) * 5
    assert_same_bits(alone.streams, both.streams, "streams")
    assert_same_tree(mixed(alone.streams, None, read), both, "read")


@pytest.mark.parametrize("forms", [("bfloat16",), ("nvfp4",), ("fp8",), ("fp8", "bfloat16")])
def test_every_form_alone(forms: Any) -> None:
    streams, write, read = problem(384, 5)
    whole, got = mixed(streams, write, read), mixed(streams, write, read, forms=forms)
    assert_same_bits(got.comb, whole.comb, "comb")
    for form, name in (("bfloat16", "x"), ("nvfp4", "nvfp4"), ("fp8", "fp8")):
        if form in forms:
            assert_same_tree(getattr(got, name), getattr(whole, name), name)
        else:
            assert getattr(got, name) is None


def test_donated_streams_stay_in_place() -> None:
    """B12: and are the same as others."""
    streams, write, read = problem(256, 5)
    run = jax.jit(lambda s, w, r: mhc(s, w, r, **SETTINGS), donate_argnums=0)
    own = jax.jit(lambda x: x + 0)(jnp.asarray(streams))
    place = own.unsafe_buffer_pointer()
    got = run(own, *jax.tree.map(jnp.asarray, (write, read)))
    assert got.streams.unsafe_buffer_pointer() == place and own.is_deleted()
    want = mixed(streams, write, read, forms=("bfloat16",))
    assert_same_tree(jax.tree.map(np.asarray, got), want, "in place")


@pytest.mark.parametrize("mixes", [24, 4])
@pytest.mark.parametrize("t", [0, 1, 2, 3])
def test_few_tokens(t: int, mixes: int) -> None:
    """A6, A7."""
    streams, write, read = problem(256, max(t, 1), mixes)
    rows = slice(0, t)
    got = mixed(streams[rows], row_of(write, rows), read)
    assert got.streams.shape == (t, 4, 256) and got.x.shape == (t, 256)
    assert (got.nvfp4.code.shape, got.nvfp4.code.dtype) == ((t, 256), E2M1)
    assert (got.nvfp4.block_scale.shape, got.nvfp4.block_scale.dtype) == ((t, 16), E4M3)
    assert got.fp8.scale.shape == (t, 2)
    if mixes == 24:
        assert got.post.shape == (t, 4) and got.comb.shape == (t, 4, 4)


BAD = {
    "nan-stream": lambda s, w: s.__setitem__((1, 2, 100), np.nan),
    "inf-stream": lambda s, w: s.__setitem__((1, 2, 100), -np.inf),
    "nan-branch": lambda s, w: w.branch.__setitem__((1, 100), np.nan),
    "nan-post": lambda s, w: w.post.__setitem__((1, 2), np.nan),
    "nan-comb": lambda s, w: w.comb.__setitem__((1, 2, 3), np.nan),
    "huge": lambda s, w: s.__setitem__(1, s[1] * BF16(1e37)),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("d", [256, 4096])
def test_a_bad_token_stays_alone(d: int, bad: Any) -> None:
    """A13, A14: others are bitwise unchanged, and what is not a number says so."""
    streams, write, read = problem(d, 3)
    clean = mixed(streams, write, read)
    bad(streams, write)
    got = mixed(streams, write, read)
    assert_same_tree(row_of(got, [0, 2]), row_of(clean, [0, 2]), "others")
    if np.isnan(f64(got.x[1])).any():
        assert np.isnan(f64(got.nvfp4.block_scale[1])).any()
        assert np.isnan(got.nvfp4.global_scale[1])
        assert np.isnan(f64(got.fp8.scale[1])).any()
    else:
        assert np.isfinite(f64(got.nvfp4.block_scale[1])).all()


@pytest.mark.parametrize("scale", SCALES)
def test_a_token_of_zeros(scale: float | None) -> None:
    """A15: zeros with finite scales, weights of the base alone."""
    streams, write, read = problem(256, 3)
    streams[1], write.branch[1] = 0, 0
    got = row_of(mixed(streams, write, read, scale), 1)
    assert not f64(got.x).any() and not f64(got.streams).any()
    assert (raw(got.nvfp4.code) & 7 == 0).all() and not f64(got.fp8.code).any()
    assert (f64(got.nvfp4.block_scale) == 1).all()
    assert got.nvfp4.global_scale == (1 if scale is None else np.float32(scale))
    assert (f64(got.fp8.scale) == 2.0**-22).all()
    assert np.isfinite(got.comb).all() and (got.post > 0).all()


def test_comb_is_nearly_doubly_stochastic() -> None:
    streams, write, read = problem(4096, 8)
    comb = f64(mixed(streams, write, read).comb)
    assert np.abs(comb.sum(axis=1) - 1).max() < 1e-5  # columns come last
    assert np.abs(comb.sum(axis=2) - 1).max() < 1e-2


def test_vmap_is_a_loop() -> None:
    """A19."""
    streams, write, read = problem(128, 6)
    batch = jax.tree.map(lambda x: jnp.asarray(x).reshape(2, 3, *x.shape[1:]), (streams, write))
    mapped = jax.vmap(lambda s, w: mhc(s, w, read, **SETTINGS))(*batch)
    whole = mixed(streams, write, read, forms=("bfloat16",))
    flat = jax.tree.map(lambda x: np.asarray(x).reshape(6, *x.shape[2:]), mapped)
    assert_same_tree(flat, whole, "mapped")
