"""Operands of linears and experts at any size, made on the device, and their results in FP64.

What a storage format means is written here once more, in numpy and by tables, so that benchmarks
and GPU tests can compare a few rows of a large product without a second large product.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from dsv4_jax.precision import ActFormat, LinearFormat, act_format, weight_format
from dsv4_jax.quant import bits
from dsv4_jax.typing import E4M3, UE8M0
from tests.support.numerics import bf16_ulp, f64

__all__ = [
    "BLOCK",
    "BYTES",
    "activation",
    "assert_experts",
    "assert_product",
    "bf",
    "compiled_call",
    "decoded",
    "decoded_rows",
    "expected_experts",
    "leaves_of",
    "normal_values",
    "product",
    "product_problems",
    "random_weight",
    "routing",
]

BLOCK = {"fp8": 128, "mxfp4": 32, "nvfp4": 16}
"""Inputs under one scale."""
BYTES = {"bfloat16": 2.0, "fp8": 1 + 2.0**-14, "mxfp4": 0.5 + 1 / 32, "nvfp4": 0.5 + 1 / 16}
"""Of one weight, with its share of the scales."""

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1_VALUES = np.concatenate([E2M1_VALUES, -E2M1_VALUES])
E4M3_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
UE8M0_VALUES = np.ldexp(np.float32(1), np.minimum(np.arange(256), 254) - 127).astype(np.float32)
UE8M0_VALUES[255] = np.nan

SIMILAR = {"bfloat16": 5e-6, "float32": 1e-7}
"""1 - 2<x,y> / (<x,x> + <y,y>): the squared relative error over two. A BF16 rounding alone is
1.4e-6 of it, FP32 sums of exact products 1e-12."""
FP8_SUMS = 5e-6
"""The same for FP32 results of FP8 products, whose sums keep 14 bits within 128 inputs."""
BF16_ULPS = 2
ROW_RMS = 2e-3
"""Each element: within so many ulps, or so much of its token's root mean square."""
EXPERTS = {"fp8": 1e-2}
EXACT_EXPERTS = 1e-3
RARE = 5e-2
"""Relative L2 of a token's experts. A sum next to a rounding boundary of BF16 falls on the other
side of it than in FP64, and quantisation enlarges that: 1e-5 to 3e-4 for FP32 sums (see
tests/ops/test_moe.py); where products may be FP8, 1.3e-4 of a sum turn 2 % of the roundings and one
in four hundred E4M3 codes, 4e-3. Rarely it is a token's largest value that turns, and with it the
scale of all its codes."""
GAIN = 2e-3
"""What all tokens together may be too large or too small: turned roundings have no side."""
BF16_RESULT = 2e-3
"""Added by the rounding of a result to BF16; 1.7e-3 measured."""
PAIRS = 24
"""Experts' products are compiled for multiples of so many pairs of a token and a pick."""


def bf(x: np.ndarray) -> np.ndarray:
    """Rounded to BF16, as FP64."""
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


POOL = 1 << 22


@functools.cache
def _pool() -> np.ndarray:
    """Normal values twice over, from which every activation is cut."""
    values = np.random.default_rng(0).standard_normal(POOL, np.float32)
    return np.tile(values.astype(ml_dtypes.bfloat16), 2)


def normal_values(seed: int, *shape: int) -> np.ndarray:
    """BF16 ``shape``, standard normal; seeds are rotations of the same values."""
    count, start = int(np.prod(shape)), seed * 1_000_003 % POOL
    return np.resize(_pool()[start : start + min(count, POOL)], shape)


def _random_bytes(seed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Bytes of a counter through an integer hash (murmur3's last step)."""
    flat = int(np.prod(shape[:-2])), int(np.prod(shape[-2:]))  # each below 2^31
    word = lax.broadcasted_iota(jnp.uint32, flat, 1) * np.uint32(0x9E3779B1) + seed
    word += lax.broadcasted_iota(jnp.uint32, flat, 0) * np.uint32(0x632BE5AB)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ (word >> shift)) * np.uint32(factor)
    return (word >> 24).astype(jnp.uint8).reshape(shape)


def _random_leaf(seed: jax.Array, leaf: str, form: str, shape: tuple[int, ...]) -> jax.Array:
    *lead, n, k = shape
    if leaf == "global_scale":  # one per expert; weights of about 0.03
        spread = _random_bytes(seed, tuple(lead)).astype(jnp.float32)
        return (1 + spread / 256) * jnp.float32(2.0**-7)
    if leaf == "weight":
        if form in ("mxfp4", "nvfp4"):
            return bits.bytes_to_e2m1(_random_bytes(seed, (*lead, n, k // 2)))
        code = _random_bytes(seed, shape)
        if form == "fp8":  # never NaN
            code = jnp.where(code & 0x7F == 0x7F, code ^ 1, code)
            return lax.bitcast_convert_type(code, E4M3)
        value = (code.astype(jnp.float32) - 127.5) * jnp.float32(2.0**-12)
        return value.astype(jnp.bfloat16)
    block = BLOCK[form.removesuffix("-pow2")]
    if form == "fp8":
        code = _random_bytes(seed, (*lead, -(-n // block), -(-k // block)))
        return lax.bitcast_convert_type(jnp.uint8(112) + code % 5, UE8M0)
    code = _random_bytes(seed, (*lead, n, k // block))
    if form == "mxfp4":
        return lax.bitcast_convert_type(jnp.uint8(116) + code % 6, UE8M0)
    code = (jnp.uint8(3) + (code >> 3) % 6) << 3 | code & 7  # 2^-4 .. 2^1
    return lax.bitcast_convert_type(code & (0xF8 if form.endswith("-pow2") else 0xFF), E4M3)


_compiled: dict[Any, Any] = {}


def compiled_call(name: Any, fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(*args)``, compiled once for a name and shapes; `jax.clear_caches` does not undo it."""
    key = name, jax.tree.structure(args), *((x.shape, x.dtype) for x in jax.tree.leaves(args))
    if key not in _compiled:
        _compiled[key] = jax.jit(fn).lower(*args).compile()
    return _compiled[key](*args)


def leaves_of(form: str) -> tuple[str, ...]:
    """Names in the order of the ops' operands."""
    scales = {"bfloat16": (), "nvfp4": ("block_scale", "global_scale")}
    return ("weight", *scales.get(form, ("scale",)))


def random_weight(
    seed: int, form: str, shape: tuple[int, ...], *, pow2: bool = False, leaves: Any = None
) -> dict[str, jax.Array]:
    """Leaves of a weight ``[*lead, n, k]``: every code and scale of an ordinary range, no NaN.

    Args:
        pow2: block scales of NVFP4 that are powers of two.
        leaves: only these.
    """
    made: dict[str, jax.Array] = {}
    for j, leaf in enumerate(leaves_of(form)):
        if leaves is None or leaf in leaves:
            kind = f"{form}-pow2" if pow2 and leaf == "block_scale" else form
            key = kind if leaf != "weight" or form not in ("mxfp4", "nvfp4") else "nvfp4"
            made[leaf] = compiled_call(
                ("random", leaf, key, shape),
                functools.partial(_random_leaf, leaf=leaf, form=key, shape=shape),
                np.uint32((seed * 8 + j) * 0x01000193 & 0xFFFFFFFF),
            )
    return made


def decoded(form: str, codes: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    """FP32 values of bytes ``[n, k or k/2]`` and scale bytes ``[n, k/block]``; no global scale."""
    if form == "bfloat16":
        return codes.view(ml_dtypes.bfloat16).astype(np.float32)
    assert scales is not None
    scale = (E4M3_VALUES if form == "nvfp4" else UE8M0_VALUES)[scales]
    if form == "fp8":
        value = E4M3_VALUES[codes]
    else:
        value = E2M1_VALUES[np.stack([codes & 0xF, codes >> 4], axis=-1)]
        value = value.reshape(*codes.shape[:-1], -1)
    with np.errstate(over="ignore", invalid="ignore"):
        return value * np.repeat(scale, BLOCK[form], axis=-1)[..., : value.shape[-1]]


def decoded_rows(form: str, leaves: dict[str, jax.Array], rows: np.ndarray) -> np.ndarray:
    """FP64 values of rows of a weight ``[n, k]``, its global scale included."""

    def take(leaves: dict[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
        view = {name: bits.byte_view(leaf) for name, leaf in leaves.items()}
        at = dict.fromkeys(view, rows)
        if form == "fp8":
            at["scale"] = rows // BLOCK["fp8"]
        return {name: leaf[at[name]] if leaf.ndim else leaf for name, leaf in view.items()}

    taken = jax.device_get(compiled_call(("rows", form), take, leaves, np.asarray(rows, np.int32)))
    scales = taken.get("scale", taken.get("block_scale"))
    return decoded(form, taken["weight"], scales).astype(np.float64) * float(
        taken.get("global_scale", 1)
    )


def activation(
    x: np.ndarray, act: ActFormat, act_scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """``x [..., k]`` as it enters the product: FP32 values, exact in BF16; FP32 scale per row."""
    x = np.asarray(x).astype(np.float32)
    ones = np.ones(x.shape[:-1], np.float32)
    if act == "bfloat16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float32), ones
    k, block = x.shape[-1], BLOCK[act]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -k % block)])
    grouped = padded.reshape(*x.shape[:-1], -1, block)
    amax = np.abs(grouped).max(axis=-1, keepdims=True)
    if act == "fp8":
        mantissa, exponent = np.frexp(np.maximum(amax, np.float32(1e-4)) * np.float32(1 / 448))
        scale = np.ldexp(np.float32(1), exponent - (mantissa == 0.5)).astype(np.float32)
        code = (grouped / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        value = code.astype(np.float32) * scale
        return value.reshape(padded.shape)[..., :k], ones
    if act_scale is None:
        largest = amax.max(axis=-2, keepdims=True)
        s2 = np.maximum(largest * np.float32(1 / 2688), np.float32(2.0**-100))
        s2 = np.where(largest == 0, np.float32(1), s2)
    else:
        s2 = np.full((*x.shape[:-1], 1, 1), act_scale, np.float32)
    scale = np.clip(amax / (np.float32(6) * s2), np.float32(2.0**-9), np.float32(448))
    scale = np.where(amax == 0, np.float32(1), scale).astype(ml_dtypes.float8_e4m3fn)
    scale = scale.astype(np.float32)
    code = (grouped / (scale * s2)).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn)
    value = (code.astype(np.float32) * scale).reshape(x.shape)
    return value, s2[..., 0, 0]


def product(x: np.ndarray, weight: np.ndarray, act: ActFormat, **settings: Any) -> np.ndarray:
    """``act(x) . weight^T`` in FP64 of decoded weights ``[n, k]``."""
    value, scale = activation(x, act, **settings)
    return (value.astype(np.float64) @ weight.T) * scale[..., None].astype(np.float64)


def product_problems(actual: Any, exact: np.ndarray, *, fp8: bool = False) -> list[str]:
    """Where a linear's result misses its bars: similarity of the whole, and every element.

    Args:
        actual: ``[t, *g, n]``, BF16 or FP32.
        exact: the same in FP64.
        fp8: the products may be FP8, whose sums are kept in fewer bits.
    """
    actual = np.asarray(actual)
    wide = f64(actual)
    if wide.shape != exact.shape:
        return [f"{wide.shape} is not {exact.shape}"]
    if not np.isfinite(wide).all():
        return [f"{np.sum(~np.isfinite(wide))} are not finite"]
    problems: list[str] = []
    bar = FP8_SUMS if fp8 else SIMILAR[actual.dtype.name]
    size = float(np.sum(wide * wide) + np.sum(exact * exact))
    different = float(np.sum((wide - exact) ** 2)) / max(size, 1e-300)
    # Of a single element, its one rounding may be more.
    if exact.size > 1 and different > bar:
        problems.append(f"1 - similarity {different:.2e} is above {bar:g}")
    rms = np.sqrt(np.mean(exact * exact, axis=-1, keepdims=True))
    allowed = np.maximum(BF16_ULPS * bf16_ulp(exact), ROW_RMS * rms)
    over = np.abs(wide - exact) > allowed
    if over.any():
        problems.append(
            f"{over.sum()} of {over.size} elements are too far, first at "
            f"{np.argwhere(over)[0].tolist()}: {wide[over][0]!r} is not {exact[over][0]!r}"
        )
    return problems


def assert_product(actual: Any, exact: np.ndarray, what: str = "", *, fp8: bool = False) -> None:
    """No `product_problems`."""
    problems = product_problems(actual, exact, fp8=fp8)
    assert not problems, f"{what}: {'; '.join(problems)}"


def routing(
    seed: int, t: int, k: int, experts: int, zipf: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Distinct ids in ascending order and weights ``[t, k]``.

    Args:
        zipf: 0 for uniform; else an expert's share falls with this power of its rank. Which expert
            has which rank depends on the seed.
    """
    rng = np.random.default_rng(seed)
    share = -zipf * np.log(1 + rng.permutation(experts))
    keys = share + rng.gumbel(size=(t, experts))
    idx = np.sort(np.argpartition(-keys, k - 1, axis=-1)[:, :k], axis=-1).astype(np.int32)
    weight = rng.uniform(0.5, 1.5, (t, k))
    return idx, (weight / weight.sum(axis=-1, keepdims=True) * 1.5).astype(np.float32)


def _expert_products(
    stack: dict[str, jax.Array], expert: jax.Array, rows: jax.Array, form: str
) -> jax.Array:
    """``rows[p] . W_expert[p]^T``: exact products, FP32 sums over a tree; no global scale."""
    view = {name: bits.byte_view(leaf) for name, leaf in stack.items()}

    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        e, row = pair
        leaf = {
            name: lax.dynamic_index_in_dim(part, e, keepdims=False) for name, part in view.items()
        }
        if form == "mxfp4":
            wide = bits.decode_e2m1_bytes(leaf["weight"])
            scale = bits.decode_ue8m0(lax.bitcast_convert_type(leaf["scale"], UE8M0))
        elif form == "nvfp4":
            wide = bits.decode_e2m1_bytes(leaf["weight"])
            scale = bits.decode_e4m3(lax.bitcast_convert_type(leaf["block_scale"], E4M3))
        elif form == "fp8":
            wide = bits.decode_e4m3(lax.bitcast_convert_type(leaf["weight"], E4M3))
            scale = bits.decode_ue8m0(lax.bitcast_convert_type(leaf["scale"], UE8M0))
            scale = jnp.repeat(scale, BLOCK["fp8"], axis=0)[: wide.shape[0]]
        else:
            wide = bits.from_byte_view(leaf["weight"], jnp.bfloat16).astype(jnp.float32)
            return jnp.sum(wide * row, axis=-1)
        wide = wide * jnp.repeat(scale, BLOCK[form], axis=-1)[:, : wide.shape[1]]
        return jnp.sum(wide * row, axis=-1)

    return lax.map(one, (expert, rows))


def expected_experts(
    x: np.ndarray,
    expert_idx: np.ndarray,
    expert_weight: np.ndarray,
    stacks: dict[str, dict[str, jax.Array]],
    linear: LinearFormat,
    limit: float,
    *,
    valid: np.ndarray | None = None,
    first_expert: int = 0,
) -> np.ndarray:
    """The picks of every token one by one (model.md 5.2), with the rounding points; FP64 sums.

    Args:
        stacks: ``w1``, ``w2``, ``w3``, leaves ``[e, ...]`` on the device.
    """
    form, act = weight_format(linear), act_format(linear)
    experts = stacks["w1"]["weight"].shape[0]
    local = expert_idx.astype(np.int64) - first_expert
    taken = (local >= 0) & (local < experts)
    if valid is not None:
        taken &= valid[:, None]
    token, pick = np.nonzero(taken)
    total = np.zeros(x.shape)
    if not len(token):
        return total
    expert = local[token, pick].astype(np.int32)
    pad = -len(token) % PAIRS

    def products(name: str, rows: np.ndarray) -> np.ndarray:
        """Rounded to BF16."""
        value, scale = activation(rows, act)
        stack = stacks[name]
        y = compiled_call(
            ("experts", form),
            functools.partial(_expert_products, form=form),
            {leaf: part for leaf, part in stack.items() if leaf != "global_scale"},
            np.pad(expert, (0, pad)),
            np.pad(value, ((0, pad), (0, 0))),
        )
        if "global_scale" in stack:
            scale = scale * np.asarray(stack["global_scale"])[expert]
        return bf(np.asarray(y)[: len(token)].astype(np.float64) * scale[:, None])

    rows = np.asarray(x)[token]
    gate = np.minimum(products("w1", rows), limit)
    up = np.clip(products("w3", rows), -limit, limit)
    share = expert_weight[token, pick].astype(np.float64)[:, None]
    h = bf(share * (gate / (1 + np.exp(-gate)) * up))
    np.add.at(total, token, products("w2", h))
    return total


def assert_experts(actual: Any, exact: np.ndarray, linear: LinearFormat, what: str = "") -> None:
    """Sums of experts ``[t, d]`` against `expected_experts`: token by token, and as a whole."""
    actual = np.asarray(actual)
    wide = f64(actual)
    assert np.isfinite(wide).all(), f"{what}: {np.sum(~np.isfinite(wide))} are not finite"
    size = np.linalg.norm(exact, axis=-1)
    error = np.linalg.norm(wide - exact, axis=-1) / np.where(size == 0, 1, size)
    bar = EXPERTS.get(act_format(linear), EXACT_EXPERTS)
    bar += 0 if actual.dtype == np.float32 else BF16_RESULT
    t = len(exact)
    over = int(np.sum(error > bar))
    print(f"{what}: relative L2 {np.median(error):.2e}, at most {error.max():.2e}")
    assert over <= max(t // 20, min(t - 1, 1)) and error.max() <= RARE, (
        f"{what}: relative L2 of {over} of {t} tokens is above {bar:g}, at most {error.max():.2e}"
    )
    gain = np.sum(wide * exact) / max(np.sum(exact * exact), 1e-300)
    assert not size.any() or abs(gain - 1) <= GAIN, f"{what}: {gain} times too large"
