"""What the four linears are held to, alike, and operands for them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax.ops.dense_linear import dense_linear
from dsv4_jax.ops.fp8_linear import fp8_linear
from dsv4_jax.ops.mxfp4_linear import mxfp4_linear
from dsv4_jax.ops.nvfp4_linear import nvfp4_linear
from dsv4_jax.ops.swiglu import swiglu
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from reference import dense_linear as reference_dense
from reference import fp8_linear as reference_fp8
from reference import mxfp4_linear as reference_mxfp4
from reference import nvfp4_linear as reference_nvfp4
from reference.linear import activations, exact_product
from tests.support.numerics import assert_near, assert_same_bits, f64, row_of
from tests.support.products import product_problems

__all__ = [
    "LIMIT",
    "OPS",
    "REGIMES",
    "SHAPES",
    "assert_product",
    "check_bad_rows",
    "check_empty",
    "check_gated_empty",
    "check_regimes",
    "check_rounding",
    "check_rows",
    "check_wrong_gated",
    "exact",
    "gated",
    "operands",
    "stored",
    "ungated",
]

# Of FP32 sums of exact products, and of the scales that follow: relative to the sum of magnitudes.
REL = 1e-6

REGIMES = (None, "decode", "prefill", "exact")
OPS: dict[str, Callable[..., jax.Array]] = {
    "dense_linear": dense_linear,
    "fp8_linear": fp8_linear,
    "mxfp4_linear": mxfp4_linear,
    "nvfp4_linear": nvfp4_linear,
}

Shape = tuple[int, int, int, int]
SHAPES: dict[str, Shape] = {
    "one-row": (1, 0, 32, 1),
    "small": (3, 0, 96, 40),
    "tile": (2, 0, 128, 128),
    "edges": (17, 0, 160, 200),
    "wide": (9, 0, 1024, 24),
    "tall": (40, 0, 64, 300),
    "many": (200, 0, 256, 48),
    "groups": (5, 4, 96, 40),
    "groups-of-tiles": (3, 2, 256, 256),
}
"""``(t, groups, k, n)``, 0 groups for no axis; tokens below, at and above those that a loop takes
at a time."""


def stored(op: str, n: int, k: int, seed: int = 1) -> tuple[Any, ...]:
    """Random weights ``[n, k]`` in the format of ``op``, as it takes them.

    Codes of every value, scales of seven binades.
    """
    rng = np.random.default_rng(seed)
    if op == "dense_linear":
        return (jax.device_put(rng.standard_normal((n, k)).astype(jnp.bfloat16)),)
    if op == "fp8_linear":
        code = rng.integers(0, 0x7F, (n, k), np.uint8) | rng.integers(0, 2, (n, k), np.uint8) << 7
        scale = rng.integers(117, 124, (-(-n // 128), -(-k // 128)), np.uint8)
        return jax.device_put((code.view(E4M3), scale.view(UE8M0)))
    byte = rng.integers(0, 256, (n, k // 2), np.uint8)
    code = np.stack([byte & 15, byte >> 4], axis=-1).reshape(n, k).view(E2M1)
    if op == "mxfp4_linear":
        scale = rng.integers(117, 124, (n, k // 32), np.uint8).view(UE8M0)
        return jax.device_put((code, scale))
    block_scale = rng.integers(0x28, 0x60, (n, k // 16), np.uint8).view(E4M3)
    return jax.device_put((code, block_scale, np.float32(0.0123)))


def operands(op: str, shape: Shape, dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    """``x`` and the weights; tokens of sizes from 0.01 to 100."""
    t, groups, k, n = shape
    lead = (t, groups) if groups else (t,)
    size = 10.0 ** np.random.default_rng(2).uniform(-2, 2, (*lead, 1))
    x = np.random.default_rng(0).standard_normal((*lead, k)) * size
    return (jax.device_put(x.astype(dtype)), *stored(op, n, k))


def _host(operand: Any) -> Any:
    """An operand as the reference takes it: bytes, or FP32 values."""
    if operand.dtype == jnp.float4_e2m1fn:
        code = np.asarray(operand).view(np.uint8) & 15
        return code[..., ::2] | code[..., 1::2] << 4
    if operand.dtype.itemsize == 1:
        return np.asarray(operand).view(np.uint8)
    return np.asarray(operand).astype(np.float32)


_REFERENCES: dict[str, Callable[..., np.ndarray]] = {
    "dense_linear": reference_dense.dense_linear,
    "fp8_linear": reference_fp8.fp8_linear,
    "mxfp4_linear": reference_mxfp4.mxfp4_linear,
    "nvfp4_linear": reference_nvfp4.nvfp4_linear,
}
_DECODE: dict[str, Callable[..., np.ndarray]] = {
    "dense_linear": lambda weight: weight,
    "fp8_linear": reference_fp8.decode,
    "mxfp4_linear": reference_mxfp4.decode,
    "nvfp4_linear": reference_nvfp4.decode,
}


def exact(op: str, *arguments: Any, **act: str) -> np.ndarray:
    """The reference's FP64 result for the operands of an op; quotients are inexact on a GPU."""
    with jax.default_device(jax.devices("cpu")[0]):
        return _REFERENCES[op](*map(_host, arguments), **act)


def _magnitude(op: str, *arguments: Any, act: str = "bfloat16") -> np.ndarray:
    """The sums of the magnitudes of the products that `exact` adds up."""
    x, *weights = map(_host, arguments)
    with jax.default_device(jax.devices("cpu")[0]):
        values = activations(x, act, *weights[3:])
    return exact_product(np.abs(values), np.abs(_DECODE[op](*weights[:3])))


def assert_product(op: str, arguments: tuple[Any, ...], dtype: Any, **act: str) -> None:
    """The op within the bars of the exact result, and within the rounding of FP32 sums."""
    got = OPS[op](*arguments, dtype=dtype, regime="exact", **act)
    want = exact(op, *arguments, **act)
    assert got.shape == want.shape
    assert got.dtype == dtype
    assert product_problems(got, want) == []
    assert_near(got, want, REL * _magnitude(op, *arguments, **act))


def check_rounding(op: str, **act: str) -> None:
    """A BF16 result is the FP32 result, rounded once to nearest even."""
    arguments = operands(op, SHAPES["edges"])
    wide = OPS[op](*arguments, regime="decode", **act)
    narrow = OPS[op](*arguments, regime="decode", dtype=jnp.bfloat16, **act)
    assert_same_bits(narrow, wide.astype(jnp.bfloat16))


def check_rows(op: str, **act: str) -> None:
    """A row is the same alone, among others, in another order and in another place.

    In one regime; on the CPU also without.
    """
    x, *weights = operands(op, SHAPES["many"])
    for regime in REGIMES[jax.default_backend() != "cpu" :]:
        whole = np.asarray(OPS[op](x, *weights, regime=regime, **act))
        order = np.random.default_rng(3).permutation(len(x))
        shuffled = OPS[op](x[order], *weights, regime=regime, **act)
        assert_same_bits(shuffled, whole[order], f"{regime}, shuffled")
        for start, stop in ((0, 1), (7, 9), (100, 103), (3, 20), (1, 130), (199, 200)):
            part = OPS[op](x[start:stop], *weights, regime=regime, **act)
            assert_same_bits(part, whole[start:stop], f"{regime}, {start}..{stop}")


def check_regimes(op: str, **act: str) -> None:
    """Every regime takes any call; on the CPU they are one."""
    for shape in ("one-row", "edges", "many", "groups"):
        arguments = operands(op, SHAPES[shape])
        want = exact(op, *arguments, **act)
        results = [OPS[op](*arguments, regime=regime, **act) for regime in REGIMES]
        on_cpu = jax.default_backend() == "cpu"
        fp8 = not on_cpu and act.get("act") == "fp8"
        for regime, got in zip(REGIMES, results, strict=True):
            assert product_problems(got, want, fp8=fp8 and regime != "exact") == [], regime
            if on_cpu:
                assert_same_bits(got, results[0], str(regime))


def check_empty(op: str, **act: str) -> None:
    """A6: no tokens, with and without groups."""
    for shape, want in (((0, 0, 96, 40), (0, 40)), ((0, 4, 96, 40), (0, 4, 10))):
        for dtype in (jnp.float32, jnp.bfloat16):
            got = OPS[op](*operands(op, shape), dtype=dtype, **act)
            assert (got.shape, got.dtype) == (want, dtype)


def check_bad_rows(op: str, bad: float, **act: str) -> jax.Array:
    """A13: one bad value in a token; the others keep their bits. Returns the bad row."""
    for shape in ("edges", "many", "groups"):
        x, *weights = operands(op, SHAPES[shape])
        at = (2, *(0,) * (x.ndim - 2))
        clean = OPS[op](x, *weights, regime="decode", **act)
        dirty = OPS[op](x.at[(*at, 33)].set(bad), *weights, regime="decode", **act)
        others = np.ones(clean.shape[:-1], bool)
        others[at] = False
        assert_same_bits(row_of(dirty, others), row_of(clean, others), shape)
        row = dirty[at]
        assert not np.isfinite(f64(row)).all() or np.isinf(bad)
    return row


LIMIT = 10.0
"""Of gates."""


def check_wrong_gated(op: str) -> None:
    """A comparison with `swiglu` and then the linear sees every operand and the clamps."""
    gate, up = gated(9, 384)
    weights = stored(op, 40, 384)
    want = np.asarray(OPS[op](ungated(gate, up), *weights))
    for wrong, limit in (((up, gate), LIMIT), ((gate, up[::-1]), LIMIT), ((gate, up), 9.0)):
        got = OPS[op](wrong[0], *weights, up=wrong[1], limit=limit)
        assert (np.asarray(got) != want).any()


def check_gated_empty(op: str) -> None:
    """No tokens."""
    x = jnp.zeros((0, 96), jnp.bfloat16)
    got = OPS[op](x, *stored(op, 40, 96), up=x, limit=LIMIT)
    assert got.shape == (0, 40)


def gated(t: int, k: int, groups: int = 0) -> tuple[jax.Array, jax.Array]:
    """Gates and up on both sides of every clamp, whose SwiGLU is near no tie of BF16.

    It then has the same bits however it is computed.
    """
    rng = np.random.default_rng(t * k)
    shape = (t, groups, k) if groups else (t, k)
    size = np.exp2(rng.integers(-6, 7, shape))
    gate, up = ((rng.standard_normal(shape) * size).astype(jnp.bfloat16) for _ in range(2))
    wide = np.minimum(gate.astype(np.float64), LIMIT)
    wide *= np.clip(up.astype(np.float64), -LIMIT, LIMIT) / (1 + np.exp(-wide))
    near, far = ((wide * by).astype(np.float32).astype(jnp.bfloat16) for by in (1 - 1e-5, 1 + 1e-5))
    gate = np.where(near == far, gate, 0).astype(jnp.bfloat16)
    assert (gate > LIMIT).any() and (up > LIMIT).any() and (up < -LIMIT).any()
    return jax.device_put((gate, up))


@jax.jit
def ungated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """`swiglu` of any shape."""
    flat = swiglu(*(x.reshape(x.shape[0], -1) for x in (gate, up)), limit=LIMIT)
    return flat.reshape(gate.shape)
