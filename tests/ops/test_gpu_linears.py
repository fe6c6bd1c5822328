"""CUDA kernels of the linears, the experts and the router: against FP64, and what they promise.

Under a minute on a GPU. Every regime is pinned in turn; `tests/bench` compares whole layers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv4_jax import library
from dsv4_jax.ops.dense_linear import dense_linear, dense_linears
from dsv4_jax.ops.fp8_linear import fp8_linear, fp8_linears
from dsv4_jax.ops.moe import moe
from dsv4_jax.ops.mxfp4_linear import mxfp4_linear
from dsv4_jax.ops.nvfp4_linear import nvfp4_linear, nvfp4_linears
from dsv4_jax.ops.router import router
from dsv4_jax.precision import act_format, weight_format
from dsv4_jax.quant import bits, fp8
from dsv4_jax.typing import E4M3, UE8M0
from tests.bench.timing import filled
from tests.support import products
from tests.support.numerics import assert_near, assert_same_bits, f64

pytestmark = pytest.mark.gpu

OPS: dict[str, Callable[..., jax.Array]] = {
    "bfloat16": dense_linear,
    "fp8": fp8_linear,
    "mxfp4": mxfp4_linear,
    "nvfp4": nvfp4_linear,
}
FORMS = [
    "bfloat16",
    "fp8_w8a8",
    "fp8_w8a16",
    "mxfp4_w4a8",
    "mxfp4_w4a16",
    "nvfp4_w4a4",
    "nvfp4_w4a8",
    "nvfp4_w4a16",
]
REGIMES = ("decode", "prefill", "exact")

SHAPES = {
    "one-block": (8, 32, 1),
    "edges": (200, 416, 1),  # no multiple of 128 anywhere
    "groups": (256, 512, 4),
    "flash-wkv": (512, 4096, 1),
    "pro-wo_b-inputs": (136, 16384, 1),
    "shared-inputs": (2048, 2048, 1),  # wide tiles whose inputs several thread blocks share
}
TOKENS = (1, 5, 40, 130)
"""One; less than eight; between; more than a tile of 128."""
MIXED = jnp.float32, jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.bfloat16
"""Dtypes of five results."""


def linear(form: str, x: Any, leaves: dict[str, jax.Array], **settings: Any) -> jax.Array:
    storage = weight_format(form)
    if storage != "bfloat16":
        settings["act"] = act_format(form)
    return OPS[storage](x, *(leaves[name] for name in products.leaves_of(storage)), **settings)


def exact(form: str, x: np.ndarray, leaves: dict[str, jax.Array], **settings: Any) -> np.ndarray:
    """``[t, n]`` of ``x [t, k]`` or ``[t, g, k]`` in FP64."""
    storage = weight_format(form)
    n = leaves["weight"].shape[0]
    wide = products.decoded_rows(storage, leaves, np.arange(n))
    grouped = x[:, None] if x.ndim == 2 else x
    parts = np.split(wide, grouped.shape[1])
    return np.concatenate(
        [
            products.product(grouped[:, g], part, act_format(form), **settings)
            for g, part in enumerate(parts)
        ],
        axis=1,
    )


def tokens(seed: int, t: int, k: int, groups: int = 1) -> np.ndarray:
    """Tokens of 2^-12 to 2^12; one of zeros."""
    x = products.normal_values(seed, t, *((groups,) if groups > 1 else ()), k).astype(np.float32)
    size = np.exp2(np.random.default_rng(seed).integers(-12, 13, t)).astype(np.float32)
    x *= size.reshape(t, *(1,) * (x.ndim - 1))
    x[3::16] = 0
    return x.astype(ml_dtypes.bfloat16)


def relative(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Rows over the size of their tokens, so that all count alike."""
    size = np.abs(x.astype(np.float64)).reshape(len(x), -1).max(axis=1)
    return y / np.where(size == 0, 1, size)[:, None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", FORMS)
def test_linear(form: str, shape: str) -> None:
    """Against FP64; and bit for bit: rows of any call of a regime, BF16 results, repeated calls."""
    n, k, groups = SHAPES[shape]
    most = max(TOKENS)
    leaves = products.random_weight(n + k, weight_format(form), (n, k))
    x = tokens(n, most, k, groups)
    want = relative(exact(form, x, leaves), x)
    y_shape = (most, groups, n // groups) if groups > 1 else (most, n)

    @functools.partial(jax.jit, donate_argnums=0, keep_unused=True)
    def run(_: jax.Array, x: jax.Array, leaves: dict[str, jax.Array]) -> Any:
        def call(t: int, dtype: Any, regime: str | None) -> jax.Array:
            return linear(form, x[:t], leaves, dtype=dtype, regime=regime)

        wide = {
            (t, regime or "auto"): call(t, jnp.float32, regime)
            for t in TOKENS
            for regime in (None, *REGIMES)
        }
        return wide, {r: call(most, jnp.bfloat16, r) for r in REGIMES}

    results = [run(filled(0xFF, y_shape, jnp.float32), x, leaves) for _ in range(3)]
    wide, narrow = jax.device_get(results[0])
    for again in jax.device_get(results[1:]):
        for key, y in wide.items():
            assert_same_bits(again[0][key], y, f"{key} again")
    for (t, regime), y in wide.items():
        what = f"{form} {shape} t={t} {regime}"
        fp8_sums = act_format(form) == "fp8" and regime != "exact"
        scaled = relative(f64(y).reshape(t, n), x[:t]).astype(np.float32)
        products.assert_product(scaled, want[:t], what, fp8=fp8_sums)
        if regime != "auto":
            assert_same_bits(y, wide[most, regime][:t], f"{what}: rows of {most} tokens")
        else:
            same = [np.array_equal(y, wide[t, r]) for r in REGIMES]
            assert any(same), f"{what} is neither regime"
    for regime, y in narrow.items():
        assert_same_bits(y, wide[most, regime].astype(y.dtype), f"{form} {shape} {regime}: BF16")


FEW = {
    # n, k, groups: what a stage holds once and an odd number of times, rows that end inside of a
    # block, inputs that two and eight thread blocks share.
    "a-stage": (8, 512, 1),
    "odd-stages": (200, 1536, 1),
    "fp8-stages": (136, 640, 1),
    "groups": (1536, 512, 4),
    "shared": (512, 4096, 1),
    "shared-by-two": (8192, 1024, 1),
}


@pytest.mark.parametrize("shape", FEW)
@pytest.mark.parametrize("form", [*FORMS, "nvfp4_w4a4_static"])
def test_few_tokens(form: str, shape: str) -> None:
    """Up to eight, whose kernel rounds ``x`` itself: the bits of the same rows of forty."""
    n, k, groups = FEW[shape]
    form, static = form.removesuffix("_static"), form.endswith("_static")
    leaves = products.random_weight(n + k, weight_format(form), (n, k))
    x = jnp.asarray(tokens(n, 40, k, groups))
    x = x.at[5].set(jnp.nan).at[6, ..., 3].set(-jnp.inf)
    ops = leaves | ({"act_scale": jnp.float32(0.01)} if static else {})

    @jax.jit
    def run(x: jax.Array, ops: dict[str, jax.Array]) -> Any:
        def call(t: int, regime: str, dtype: Any) -> jax.Array:
            if static:
                names = (*products.leaves_of("nvfp4"), "act_scale")
                return nvfp4_linear(x[:t], *(ops[i] for i in names), dtype=dtype, regime=regime)
            return linear(form, x[:t], ops, dtype=dtype, regime=regime)

        return {
            (t, regime, dtype): call(t, regime, dtype)
            for t in (1, 2, 3, 5, 8, 9, 40)
            for regime, dtype in (("decode", "float32"), ("exact", "bfloat16"))
        }

    for _ in range(3):
        results = jax.device_get(run(x, ops))
        for (t, regime, dtype), y in results.items():
            most = results[40, regime, dtype]
            assert_same_bits(y, most[:t], f"{form} {shape} t={t} {regime} {dtype}")


QUANTISED = {
    # As FEW, and rows and tokens enough for the kernel of many; rows that it does not take.
    "a-stage": (8, 128, 1),
    "odd-stages": (200, 640, 1),
    "not-of-8": (130, 384, 1),
    "groups": (1536, 512, 4),
    "shared": (512, 4096, 1),
    "wq_b": (32768, 1024, 1),
}


@pytest.mark.parametrize("shape", QUANTISED)
def test_quantised_x(shape: str) -> None:
    """Codes and scales, by every kernel: bit for bit what the BF16 array gives."""
    n, k, groups = QUANTISED[shape]
    weight = products.random_weight(n + k, "fp8", (n, k))
    other = products.random_weight(n, "fp8", (n, k))
    x = jnp.asarray(tokens(n, 300, k, groups))
    x = x.at[5].set(jnp.nan).at[6, ..., 3].set(-jnp.inf)

    def call(x: Any, pairs: Any, regime: str | None) -> Any:
        weights, scales = zip(*((p["weight"], p["scale"]) for p in pairs), strict=True)
        return fp8_linears(x, weights, scales, dtype=MIXED[: len(pairs)], regime=regime)

    @jax.jit
    def run(x: jax.Array, pairs: Any) -> Any:
        q = fp8.quantize_act(x.astype(jnp.float32), fp8.ACT_BLOCK)
        return {
            (t, regime or "auto", len(some)): (
                call(fp8.Fp8(q.code[:t], q.scale[:t]), some, regime),
                call(x[:t], some, regime),
            )
            for t in (1, 2, 8, 9, 40, 300)
            for regime in (None, *REGIMES)
            for some in (pairs, pairs[:1])
        }

    for _ in range(3):
        results = jax.device_get(run(x, (weight, other)))
        for key, (got, want) in results.items():
            for one, two in zip(got, want, strict=True):
                assert_same_bits(one, two, f"{shape} {key}")


def test_operands_of_the_kernel_ahead() -> None:
    """Weights and ``x`` that the launch just before has written."""
    weight = products.random_weight(1, "bfloat16", (4096, 4096))["weight"]

    @jax.jit
    def run(x: jax.Array, weight: jax.Array, size: jax.Array) -> tuple[jax.Array, ...]:
        return dense_linear(x, weight * size), dense_linear(x * size, weight)

    for seed in range(8):
        x, size = jnp.asarray(products.normal_values(seed, 3, 4096)), 2.0 ** (seed - 4)
        want = np.asarray(dense_linear(x, weight)) * size
        for got in run(x, weight, jnp.bfloat16(size)):
            assert_same_bits(got, want, f"times {size}")


@pytest.mark.parametrize("form", FORMS)
def test_float32_activations(form: str) -> None:
    """FP32 ``x`` that BF16 cannot hold; BF16 weights are taken to FP32 then."""
    leaves = products.random_weight(1, weight_format(form), (72, 160))
    x = np.random.default_rng(0).standard_normal((9, 160)).astype(np.float32)
    for regime in REGIMES:
        got = np.asarray(linear(form, jnp.asarray(x), leaves, regime=regime))
        if form == "bfloat16":
            want = f64(x) @ f64(leaves["weight"]).T
        else:
            want = exact(form, x, leaves)
        fp8_sums = act_format(form) == "fp8" and regime != "exact"
        products.assert_product(got, want, f"{form} {regime}", fp8=fp8_sums)


def test_static_activation_scale() -> None:
    """Of NVFP4 activations: one for all tokens, with values beyond its range."""
    leaves = products.random_weight(2, "nvfp4", (72, 160))
    x = products.normal_values(3, 9, 160)
    for scale in (2.0**-9, 1e-4):
        want = exact("nvfp4_w4a4", x, leaves, act_scale=scale)
        for regime in REGIMES:
            got = nvfp4_linear(
                jnp.asarray(x),
                *(leaves[name] for name in products.leaves_of("nvfp4")),
                jnp.float32(scale),
                regime=regime,
            )
            products.assert_product(got, want, f"{scale} {regime}")


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_bad_token_stays_alone(form: str, regime: str) -> None:
    """A13: NaN and Inf in one row of ``x`` change no bit of the others."""
    leaves = products.random_weight(3, weight_format(form), (72, 160))
    x = products.normal_values(4, 11, 160).copy()
    clean = np.asarray(linear(form, jnp.asarray(x), leaves, regime=regime))
    x[4, 7], x[5, 100] = np.nan, np.inf
    got = np.asarray(linear(form, jnp.asarray(x), leaves, regime=regime))
    others = np.delete(np.arange(11), [4, 5])
    assert_same_bits(got[others], clean[others])
    assert np.isnan(got[4]).all()


def every_pair(storage: str) -> tuple[dict[str, jax.Array], np.ndarray, np.ndarray]:
    """Rows with one code that is not zero each: leaves, its column, its value; all 16 x 256."""
    row, k = np.arange(4096), 256
    code, byte, column = (row % 16).astype(np.uint8), (row // 16).astype(np.uint8), row * 7 % k
    packed = np.zeros((4096, k // 2), np.uint8)
    packed[row, column // 2] = code << 4 * (column % 2)
    block, one, dtype = (32, 127, UE8M0) if storage == "mxfp4" else (16, 0x38, E4M3)
    scale = np.full((4096, k // block), one, np.uint8)
    scale[row, column // block] = byte
    leaves = {"weight": bits.bytes_to_e2m1(jnp.asarray(packed))}
    typed = jax.lax.bitcast_convert_type(jnp.asarray(scale), dtype)
    leaves |= {"scale": typed} if storage == "mxfp4" else {"block_scale": typed}
    if storage == "nvfp4":
        leaves["global_scale"] = jnp.float32(0.75)
    table = products.UE8M0_VALUES if storage == "mxfp4" else products.E4M3_VALUES
    with np.errstate(over="ignore"):
        value = products.E2M1_VALUES[code] * table[byte]
    return leaves, column, value * np.float32(leaves.get("global_scale", 1))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("form", [form for form in FORMS if "4_w" in form])
def test_every_code_and_scale(form: str, regime: str) -> None:
    """Each of 16 x 256 decodes to its value, at its place; NaN scales to NaN."""
    storage, act = weight_format(form), act_format(form)
    leaves, column, value = every_pair(storage)
    x = np.stack([np.ones(256), 1 + np.arange(256) % 4]).astype(np.float32)
    got = np.asarray(linear(form, jnp.asarray(x, jnp.bfloat16), leaves, regime=regime))
    with np.errstate(over="ignore"):
        want = value * x[:, column]
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    if act == "nvfp4":  # 1, 2, 3 and 4 of a token's own scale, which is no power of two
        wide, scale = products.activation(x, act)
        want = value * wide[:, column] * scale[:, None]
        np.testing.assert_allclose(got, want, rtol=1e-6)
        return
    if storage == "mxfp4" and act == "fp8":
        # Two powers of two meet, in either order; beyond 2^100 one of them may run over.
        inside = np.abs(np.arange(4096) // 16 - 127) <= 100
        got, want = got[:, inside], want[:, inside]
    np.testing.assert_array_equal(got, want)  # -0 is 0 in a sum


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("form", ["fp8_w8a8", "fp8_w8a16"])
def test_every_fp8_code_and_scale(form: str, regime: str) -> None:
    """256 codes under every scale of 2^-100 to 2^100: 128 a row tile, in two tiles of inputs."""
    byte = np.arange(27, 228, dtype=np.uint8)
    n = 128 * len(byte)
    code = np.zeros((n, 256), np.uint8)
    low = np.arange(n) % 128
    code[np.arange(n), low], code[np.arange(n), 255 - low] = low, 128 + low
    scale = jnp.asarray(np.stack([byte, byte[::-1]], axis=1))
    leaves = {
        "weight": jax.lax.bitcast_convert_type(jnp.asarray(code), E4M3),
        "scale": jax.lax.bitcast_convert_type(scale, UE8M0),
    }
    x = np.repeat(np.eye(2, dtype=np.float32), 128, axis=1)
    got = np.asarray(linear(form, jnp.asarray(x, jnp.bfloat16), leaves, regime=regime))
    tables = products.E4M3_VALUES[low], products.E4M3_VALUES[128 + low]
    sizes = products.UE8M0_VALUES[np.stack([byte, byte[::-1]])].repeat(128, axis=1)
    want = np.stack(tables) * sizes
    want[:, low == 127] = np.nan  # both codes of the row are
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("k", [416, 2048])
@pytest.mark.parametrize("t", (*TOKENS, 8))
def test_several_weights(t: int, k: int, groups: int) -> None:
    """Each result bit for bit that of a call of its own, whatever the numbers of rows.

    Where the inputs are a multiple of 128, one launch serves all weights whose inputs are shared
    alike: not the last one's.
    """
    x = jnp.asarray(tokens(1, t, k, groups))
    weights = [
        products.random_weight(n, "bfloat16", (n, k))["weight"] for n in (512, 512, 200, 4, 17408)
    ]
    for regime in (None, *REGIMES):
        for dtypes in ((jnp.float32,) * 5, (jnp.bfloat16,) * 5, MIXED):
            several = dense_linears(x, weights, dtype=dtypes, regime=regime)
            for y, weight, dtype in zip(several, weights, dtypes, strict=True):
                alone = dense_linear(x, weight, dtype=dtype, regime=regime)
                assert_same_bits(y, alone, f"{regime} {weight.shape}")


@pytest.mark.parametrize("act", ["fp8", "bfloat16"])
@pytest.mark.parametrize("k", [416, 2048])
@pytest.mark.parametrize("t", (*TOKENS, 8, 600))
def test_several_fp8_weights(t: int, k: int, act: Any) -> None:
    """The same; with many tokens some by the kernel for them, some not."""
    x = jnp.asarray(tokens(1, t, k))
    leaves = [products.random_weight(n, "fp8", (n, k)) for n in (512, 1024, 200, 4, 17408)]
    weights, scales = ([leaf[name] for leaf in leaves] for name in ("weight", "scale"))
    for regime in (None, *REGIMES):
        several = fp8_linears(x, weights, scales, act=act, dtype=MIXED, regime=regime)
        for y, weight, scale, dtype in zip(several, weights, scales, MIXED, strict=True):
            alone = fp8_linear(x, weight, scale, act=act, dtype=dtype, regime=regime)
            assert_same_bits(y, alone, f"{regime} {weight.shape}")


@pytest.mark.parametrize("act", ["nvfp4", "static", "fp8", "bfloat16"])
@pytest.mark.parametrize("k", [416, 2048])
@pytest.mark.parametrize("t", TOKENS)
def test_several_nvfp4_weights(t: int, k: int, act: Any) -> None:
    """The same; tiles of the large weight are wider than those of the others from 40 tokens on."""
    x = jnp.asarray(tokens(1, t, k))
    more = (jnp.float32(0.01),) if act == "static" else ()
    act = "nvfp4" if more else act
    names = products.leaves_of("nvfp4")
    leaves = [products.random_weight(n, "nvfp4", (n, k)) for n in (512, 1024, 200, 4, 17408)]
    stored = [[leaf[name] for leaf in leaves] for name in names]
    for regime in (None, *REGIMES):
        several = nvfp4_linears(x, *stored, *more, act=act, dtype=MIXED, regime=regime)
        for y, leaf, dtype in zip(several, leaves, MIXED, strict=True):
            own = [leaf[name] for name in names]
            alone = nvfp4_linear(x, *own, *more, act=act, dtype=dtype, regime=regime)
            assert_same_bits(y, alone, f"{regime} {leaf['weight'].shape}")


def test_more_rows_and_tokens_than_a_grid() -> None:
    """The head of a model, few inputs: 129,280 rows; a prefill of 4,100 tokens."""
    for n, t in ((129280, 3), (64, 4100)):
        leaves = products.random_weight(5, "bfloat16", (n, 64))
        x = products.normal_values(6, t, 64)
        want = f64(x) @ f64(leaves["weight"]).T
        for regime in REGIMES:
            got = linear("bfloat16", jnp.asarray(x), leaves, regime=regime)
            products.assert_product(got, want, f"n={n} t={t} {regime}")


@pytest.mark.parametrize("form", ["bfloat16", "fp8_w8a8", "fp8_w8a16"])
def test_tiles_that_thread_blocks_take_in_turn(form: str) -> None:
    """More tiles than a GPU holds at once, a few stages each, the last ones cut off."""
    n, k, t = 25_000, 384, 300
    leaves = products.random_weight(7, weight_format(form), (n, k))
    x = tokens(8, t, k)
    fp8_sums = act_format(form) == "fp8"
    got = linear(form, x, leaves, regime="prefill", dtype=jnp.float32)
    want = relative(exact(form, x, leaves), x)
    scaled = relative(f64(got), x)
    sample = np.r_[0:64, 12_736:12_864, n - 64 : n]  # single elements; the whole has too many
    products.assert_product(scaled[:, sample].astype(np.float32), want[:, sample], fp8=fp8_sums)
    for row in range(0, n, 128):  # every tile is the product that it should be
        tile = np.s_[:, row : row + 128]
        error = np.linalg.norm(scaled[tile] - want[tile], axis=1)
        size = np.linalg.norm(want[tile], axis=1)
        assert np.all(error <= (2 * products.FP8_SUMS) ** 0.5 * size), f"rows from {row}"
    narrow = linear(form, x, leaves, regime="prefill", dtype=jnp.bfloat16)
    assert_same_bits(narrow, got.astype(narrow.dtype), "BF16")
    for few in (1, 64, 128, 129):
        alone = linear(form, x[:few], leaves, regime="prefill", dtype=jnp.float32)
        assert_same_bits(alone, got[:few], f"rows of {few} tokens")


@pytest.mark.parametrize("form", ["bfloat16", "fp8_w8a16"])
def test_groups_of_many_tokens(form: str) -> None:
    """An odd number of row tiles in a group, and tokens that end inside of a tile."""
    groups, n, k = 3, 3 * 384, 256
    leaves = products.random_weight(9, weight_format(form), (n, k))
    x = tokens(10, 600, k, groups)
    want = relative(exact(form, x, leaves), x)
    for regime in (None, "prefill"):
        got = linear(form, x, leaves, regime=regime, dtype=jnp.float32)
        scaled = relative(f64(got).reshape(600, n), x).astype(np.float32)
        products.assert_product(scaled, want, f"{regime}")
        narrow = linear(form, x[:70], leaves, regime="prefill", dtype=jnp.bfloat16)
        assert_same_bits(narrow, got[:70].astype(narrow.dtype), f"{regime}: BF16, 70 tokens")


# Experts: [e, inter, d], picks of a token.
LAYERS = {
    "small": (5, 128, 256, 3),
    "odd": (7, 96, 160, 2),
    "flash-width": (6, 2048, 4096, 3),
    "many-tokens": (5, 512, 1024, 3),
}
MANY_TILES = {"many-tiles": (48, 512, 1024, 3)}
"""More blocks of rows than a GPU holds at once."""
EXPERT_FORMS = ["mxfp4_w4a8", "mxfp4_w4a16", "nvfp4_w4a4", "nvfp4_w4a8", "nvfp4_w4a16"]
LIMIT = 10.0


class Experts:
    """A stack on the device and the op on it; `nvfp4_w4a8` has scales that are powers of two."""

    def __init__(self, form: str, layer: str) -> None:
        e, inter, d, self.k = (LAYERS | MANY_TILES)[layer]
        self.form, self.experts, self.d = form, e, d
        storage, pow2 = weight_format(form), form == "nvfp4_w4a8"
        shapes = {"w1": (e, inter, d), "w2": (e, d, inter), "w3": (e, inter, d)}
        self.stacks = {
            name: products.random_weight(i, storage, shape, pow2=pow2)
            for i, (name, shape) in enumerate(shapes.items())
        }

    def inputs(self, t: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        idx, weight = products.routing(seed, t, self.k, self.experts)
        return products.normal_values(seed + 7, t, self.d), idx, weight

    def __call__(
        self, x: Any, idx: Any, weight: Any, valid: Any = None, shared: Any = None, **settings: Any
    ) -> np.ndarray:
        valid = np.ones(len(x), bool) if valid is None else valid
        arrays = jax.device_put((x, idx.astype(np.int32), weight, valid))
        stacks = settings.pop("stacks", self.stacks)
        settings.setdefault("power_of_two", self.form == "nvfp4_w4a8")
        shared = None if shared is None else jnp.asarray(shared)
        return np.asarray(
            moe(
                *arrays,
                *(stacks[name] for name in ("w1", "w2", "w3")),
                shared,
                linear=self.form,
                limit=LIMIT,
                **settings,
            )
        )

    def exact(self, x: Any, idx: Any, weight: Any, valid: Any = None) -> np.ndarray:
        return products.expected_experts(x, idx, weight, self.stacks, self.form, LIMIT, valid=valid)


@functools.lru_cache(maxsize=4)
def experts(form: str, layer: str) -> Experts:
    return Experts(form, layer)


@pytest.mark.parametrize("t", [1, 8, 40, 300])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", EXPERT_FORMS)
def test_experts(form: str, layer: str, t: int) -> None:
    """Against one expert after the other; padding; the BF16 result with a shared expert."""
    if layer == "flash-width" and (t in (1, 300) or form.endswith("a16")):
        pytest.skip("not for every contract at this size")
    run = experts(form, layer)
    x, idx, weight = run.inputs(t, seed=t)
    valid = np.arange(t) % 7 != 3
    got = run(x, idx, weight, valid)
    want = run.exact(x, idx, weight, valid)
    assert got.dtype == np.float32
    products.assert_experts(got, want, form, f"{form} {layer} t={t}")
    assert_same_bits(got[~valid], np.zeros_like(got[~valid]))
    shared = products.normal_values(99, t, run.d)
    narrow = run(x, idx, weight, valid, shared, dtype=jnp.bfloat16)
    assert_same_bits(narrow, (got + shared.astype(np.float32)).astype(narrow.dtype))
    assert_same_bits(run(x, idx, weight, valid), got, "again")


def test_scales_far_apart_of_many_tokens() -> None:
    """Blocks of 128 inputs far below and above the others of their row, in half of the rows; and
    the bits of fewer tokens."""
    run = Experts("mxfp4_w4a8", "many-tokens")
    rng = np.random.default_rng(3)
    for leaves in run.stacks.values():
        scale = np.asarray(leaves["scale"]).view(np.uint8)
        shape = (*scale.shape[:2], scale.shape[2] // 4, 1)
        shift = rng.choice([0, -13, 5], shape, p=[0.9, 0.05, 0.05])
        shift[:, : shape[1] // 2] = 0
        far = (scale.reshape(*shape[:3], 4) + shift).astype(np.uint8).reshape(scale.shape)
        leaves["scale"] = jnp.asarray(far.view(np.asarray(leaves["scale"]).dtype))
    x, idx, weight = run.inputs(300, seed=5)
    got = run(x, idx, weight)
    products.assert_experts(got, run.exact(x, idx, weight), run.form, run.form)
    for few in (1, 30, 100):
        alone = run(x[:few], idx[:few], weight[:few], regime="prefill")
        assert_same_bits(alone, got[:few], f"rows of {few} tokens")


def test_tiles_of_experts_that_thread_blocks_take_in_turn() -> None:
    """1,500 tokens: a hundred at a time have the same bits, the first ones are what they should."""
    run = Experts("mxfp4_w4a8", "many-tiles")
    x, idx, weight = run.inputs(1500, seed=6)
    picks = np.bincount(idx.ravel())
    for width in (80, 88, 96, 104, 112):  # of tiles
        assert ((picks > width - 8) & (picks <= width)).any(), width
    got = run(x, idx, weight)
    first = np.s_[:40]
    products.assert_experts(got[first], run.exact(x[first], idx[first], weight[first]), run.form)
    for start in range(0, 1500, 100):
        part = np.s_[start : start + 100]
        alone = run(x[part], idx[part], weight[part], regime="prefill")
        assert_same_bits(alone, got[part], f"tokens from {start}")


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("form", EXPERT_FORMS)
def test_experts_of_a_regime_have_the_same_bits(form: str, regime: str) -> None:
    """Any number of tokens: picks that are tiles of their own, and those that are sorted."""
    run = experts(form, "many-tokens")
    x, idx, weight = run.inputs(200, seed=11)
    most = run(x, idx, weight, regime=regime)
    for few in (1, 2, 3, 5, 8, 13, 40, 100):
        got = run(x[:few], idx[:few], weight[:few], regime=regime)
        assert_same_bits(got, most[:few], f"{few} tokens")


@pytest.mark.parametrize("form", EXPERT_FORMS)
def test_two_tokens_of_wide_experts_have_the_bits_of_one(form: str) -> None:
    """Of two, 192 tiles of 128 rows would leave some multiprocessors with twice the work of others:
    they are halved. Those of one are not."""
    run = experts(form, "flash-width")
    x, idx, weight = run.inputs(2, seed=3)
    for regime in REGIMES:
        both = run(x, idx, weight, regime=regime)
        for i in range(2):
            one = slice(i, i + 1)
            alone = run(x[one], idx[one], weight[one], regime=regime)
            assert_same_bits(both[one], alone, f"{regime}, token {i}")
    products.assert_experts(run(x, idx, weight), run.exact(x, idx, weight), form, form)


@pytest.mark.parametrize("form", EXPERT_FORMS)
def test_experts_equal_the_cpu_handler(form: str) -> None:
    run = experts(form, "small")
    x, idx, weight = run.inputs(21, seed=1)
    got = run(x, idx, weight)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        there = run(x, idx, weight, stacks=jax.device_put(run.stacks, cpu))
    products.assert_experts(got, f64(there), form, form)


ROUTINGS = {
    "all-to-one": lambda i, e: np.full_like(i, 2),
    "experts-with-none": lambda i, e: np.broadcast_to([0, 2, 4], i.shape),
    "duplicates": lambda i, e: np.sort(i // 2, axis=1),
    "outside": lambda i, e: np.sort(np.where(i % 2, i, e + i), axis=1),
    "negative": lambda i, e: np.sort(np.where(i % 2, i, -1 - i), axis=1),
    "int32-max": lambda i, e: np.where(i == e - 1, 2**31 - 1, i),
    "none-at-all": lambda i, e: np.full_like(i, -(2**31)),
}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("form", ["mxfp4_w4a8", "nvfp4_w4a4"])
def test_routings(form: str, routing: str) -> None:
    """B13."""
    run = experts(form, "small")
    for t in (1, 21, 150):
        x, idx, weight = run.inputs(t, seed=2)
        idx = np.ascontiguousarray(ROUTINGS[routing](idx, run.experts))
        got, want = run(x, idx, weight), run.exact(x, idx, weight)
        products.assert_experts(got, want, form, f"{form} {routing} t={t}")
        untouched = ~want.any(axis=1)
        assert_same_bits(got[untouched], np.zeros_like(got[untouched]))


@pytest.mark.parametrize("t", [8, 64])
@pytest.mark.parametrize("form", EXPERT_FORMS)
def test_a_token_depends_on_no_other(form: str, t: int) -> None:
    """Other tokens, their routing, NaN and padding in them: the first four keep every bit."""
    run = experts(form, "small")
    x, idx, weight = run.inputs(t, seed=3)
    clean = run(x, idx, weight)
    x2, idx2, weight2 = (
        np.concatenate([a[:4], b[4:]])
        for a, b in zip((x, idx, weight), run.inputs(t, seed=4), strict=True)
    )
    assert_same_bits(run(x2, idx2, weight2)[:4], clean[:4], "other tokens")
    x2[5] = np.nan
    assert_same_bits(run(x2, idx2, weight2)[:4], clean[:4], "NaN")
    x2[4:], idx2[4:], weight2[4:] = np.nan, 77, np.inf
    valid = np.arange(t) < 4
    assert_same_bits(run(x2, idx2, weight2, valid)[:4], clean[:4], "padding")


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("form", EXPERT_FORMS)
def test_experts_in_every_regime(form: str, regime: str) -> None:
    """Few and many tokens: the first three keep every bit."""
    run = experts(form, "small")
    x, idx, weight = run.inputs(300, seed=6)
    got = run(x, idx, weight, regime=regime)
    products.assert_experts(got, run.exact(x, idx, weight), form, f"{form} {regime}")
    assert_same_bits(run(x[:3], idx[:3], weight[:3], regime=regime), got[:3])


@pytest.mark.parametrize("form", ["mxfp4_w4a8", "nvfp4_w4a16"])
def test_experts_in_parts(form: str) -> None:
    """``first_expert``: the FP32 sums of two devices make the whole, but for the order."""
    run = experts(form, "small")
    x, idx, weight = run.inputs(33, seed=5)
    parts = []
    for first, last in ((0, 2), (2, run.experts)):
        stacks = jax.tree.map(lambda leaf, a=first, b=last: leaf[a:b], run.stacks)
        parts.append(run(x, idx, weight, stacks=stacks, first_expert=first))
    np.testing.assert_allclose(sum(parts), run(x, idx, weight), rtol=1e-5, atol=1e-6)
    assert all(part.any() for part in parts)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize(("e", "d"), [(12, 64), (256, 4096), (384, 7168)])
def test_router(e: int, d: int, hashed: bool) -> None:
    """Against FP64 and the CPU handler; scores are further apart than the sums are wrong."""
    for t in (1, 33, 700):
        x = products.normal_values(e + t, t, d)
        weight = products.normal_values(e, e, d).astype(np.float32) * np.float32(d**-0.5)
        weight = weight.astype(ml_dtypes.bfloat16)
        bias = np.random.default_rng(e).normal(0, 0.1, e).astype(np.float32)
        given = products.routing(t, t, 6, e)[0][:, ::-1].copy()
        given[t // 2, 1] = e  # outside
        selectors = (None, given) if hashed else (bias, None)
        args = (x, weight, *selectors)
        idx, got = jax.device_get(router(*jax.device_put(args), k=6, scale=1.5))
        score = np.sqrt(np.logaddexp(0, f64(x) @ f64(weight).T))
        ranked = np.argsort(-(score + bias), axis=-1, kind="stable")
        value = np.take_along_axis(score + bias, ranked, axis=-1)
        clear = np.ones(t, bool) if hashed else value[:, 5] - value[:, 6] > 1e-5
        best = np.sort(given if hashed else ranked[:, :6], axis=-1)
        np.testing.assert_array_equal(idx[clear], best[clear])
        inside = best < e
        picked = np.take_along_axis(score, np.minimum(best, e - 1), axis=-1) * inside
        want = picked / picked.sum(axis=-1, keepdims=True) * 1.5
        assert_near(got[clear], want[clear], 1e-5 * want[clear])
        cpu = jax.devices("cpu")[0]
        there = jax.device_get(router(*jax.device_put(args, cpu), k=6, scale=1.5))
        np.testing.assert_array_equal(idx[clear], there[0][clear])
        np.testing.assert_allclose(got[clear], there[1][clear], rtol=5e-6)


def test_router_rows_of_a_table() -> None:
    """The same bits as of the rows themselves; ids of tokens outside are held to the table."""
    t, e, v = 70, 256, 1000
    x = jnp.asarray(products.normal_values(0, t, 512))
    weight = jnp.asarray(products.normal_values(1, e, 512)) * jnp.bfloat16(0.05)
    table = jnp.asarray(products.routing(2, v, 6, e)[0], jnp.int32)
    tokens = np.random.default_rng(3).integers(-v // 2, 2 * v, t)
    tokens[:4] = [-(2**31), 2**31 - 1, v - 1, v]
    tokens = jnp.asarray(tokens, jnp.int32)
    rows = jnp.take(table, tokens, axis=0, mode="clip")
    got = router(x, weight, None, table, k=6, scale=1.5, tokens=tokens)
    want = router(x, weight, None, rows, k=6, scale=1.5)
    for part, expected in zip(got, want, strict=True):
        assert_same_bits(part, expected)


def test_router_ties_and_bad_scores() -> None:
    """B14: ties to the lower id; NaN is the largest and stays in its token."""
    x, weight = jnp.asarray(products.normal_values(0, 5, 64)), jnp.zeros((32, 64), jnp.bfloat16)
    idx, _ = router(x, weight, jnp.zeros(32), None, k=6, scale=1.0)
    np.testing.assert_array_equal(idx, np.tile(np.arange(6), (5, 1)))
    weight = jnp.asarray(products.normal_values(1, 32, 64))
    clean = jax.device_get(router(x, weight, jnp.zeros(32), None, k=6, scale=1.0))
    bad = x.at[2, 3].set(jnp.nan)
    idx, got = jax.device_get(router(bad, weight, jnp.zeros(32), None, k=6, scale=1.0))
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(idx[others], clean[0][others])
    assert_same_bits(got[others], clean[1][others])
    np.testing.assert_array_equal(idx[2], np.arange(6))
    assert np.isnan(got[2]).all()


def _calls() -> dict[str, Callable[[int, int], Any]]:
    """Every op of this module on ``t`` tokens of a seed."""
    calls: dict[str, Callable[[int, int], Any]] = {}
    for form in ("bfloat16", "fp8_w8a8", "mxfp4_w4a8", "nvfp4_w4a4"):
        leaves = products.random_weight(1, weight_format(form), (72, 160))

        def call(t: int, seed: int, form: str = form, leaves: Any = leaves) -> jax.Array:
            return linear(form, jnp.asarray(products.normal_values(seed, t, 160)), leaves)

        calls[f"dsv4.{OPS[weight_format(form)].__name__}"] = call
    run = experts("nvfp4_w4a4", "small")

    def run_experts(t: int, seed: int) -> jax.Array:
        x, idx, weight = (array[:t] for array in run.inputs(max(t, 1), seed))
        arrays = map(jnp.asarray, (x, idx, weight, np.ones(t, bool)))
        stacks = (run.stacks[name] for name in ("w1", "w2", "w3"))
        return moe(*arrays, *stacks, linear="nvfp4_w4a4", limit=LIMIT)

    def run_router(t: int, seed: int) -> Any:
        x = jnp.asarray(products.normal_values(seed, t, 64))
        weight = jnp.asarray(products.normal_values(1, 32, 64))
        return router(x, weight, jnp.zeros(32), None, k=6, scale=1.0)

    return calls | {"dsv4.moe": run_experts, "dsv4.router": run_router}


def test_empty_calls_launch_nothing() -> None:
    """A6."""
    before = library.launch_counts()
    for name, call in _calls().items():
        assert all(leaf.size == 0 for leaf in jax.tree.leaves(call(0, 0))), name
    assert library.launch_counts() == before


def test_calls_are_replayed_from_a_graph() -> None:
    """Captured, and afterwards no handler runs; bits as of a call alone."""
    for name, call in _calls().items():
        alone = jax.device_get([call(3, seed) for seed in range(6)])
        run = jax.jit(lambda call=call: [call(3, seed) for seed in range(6)])
        before = library.launch_counts()[name]
        many, quiet = None, False
        for _ in range(20):  # until buffers have come back to where a graph knows them
            warm = library.launch_counts()[name]
            many = jax.device_get(run())
            quiet = library.launch_counts()[name] == warm and warm[0] > before[0]
            if quiet:
                break
        assert quiet, f"{name}: still launched after 20 calls"
        for a, b in zip(*map(jax.tree.leaves, (many, alone)), strict=True):
            assert_same_bits(a, b, name)
