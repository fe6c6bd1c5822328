"""Stored number format -> the format of the params tree, on the device, jitted.

``Raw`` arrays are what the files hold: ``float32``, ``bfloat16``, ``float16`` typed, everything
else as bytes (uint8); packed arrays leave this module as bytes too, so that stacks of experts can
be written slice by slice, and ``typed`` gives them their dtype once (model.md 4.5, 7.1, 9).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from dsv4_jax.quant import bits, fp8, mxfp4, nvfp4
from dsv4_jax.typing import E4M3, UE8M0, Array

__all__ = [
    "EXACT",
    "EXACT_ROUTES",
    "Errors",
    "Loss",
    "Report",
    "byte_type",
    "convert",
    "fp8_scales_on_host",
    "fp8_scales_to_ue8m0",
    "largest",
    "mxfp4_to_nvfp4",
    "mxfp4_to_nvfp4_on_host",
    "typed",
]

Raw = dict[str, Array]
Group = dict[str, Raw]

EXACT: Final = frozenset(
    [(form, form) for form in ("float32", "bfloat16", "fp8", "mxfp4", "nvfp4")]
    + [(form, "float32") for form in ("bfloat16", "float16", "fp8", "mxfp4")]
    + [("fp8", "bfloat16"), ("mxfp4", "bfloat16")]
)
"""(stored, target) pairs that keep every value."""

_TYPES: Final = {
    "fp8": {"weight": E4M3, "scale": UE8M0},
    "mxfp4": {"weight": "e2m1", "scale": UE8M0},
    "nvfp4": {"weight": "e2m1", "block_scale": E4M3},
}


class Errors(NamedTuple):
    """Sums of squares per expert (or of the one tensor): of the error, and of the values."""

    error: Array
    value: Array


def _u8(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint8)


def _decode(raw: Raw, form: str) -> Array:
    """The values in FP32."""
    weight = raw["weight"]
    if form == "fp8":
        code = lax.bitcast_convert_type(weight, E4M3)
        return fp8.dequantize_weight(fp8.Fp8(code, bits.ue8m0_from_exponent(raw["scale"])))
    if form == "fp8_float32":
        code = lax.bitcast_convert_type(weight, E4M3)
        return fp8.dequantize_scaled_weight(code, raw["scale"].astype(jnp.float32))
    if form == "mxfp4":
        code = bits.bytes_to_e2m1(weight)
        return mxfp4.dequantize(mxfp4.Mxfp4(code, bits.ue8m0_from_exponent(raw["scale"])))
    if form == "nvfp4":
        code, block = bits.bytes_to_e2m1(weight), lax.bitcast_convert_type(raw["block_scale"], E4M3)
        return nvfp4.dequantize(nvfp4.Nvfp4(code, block, raw["global_scale"][..., None]))
    return weight.astype(jnp.float32)


def _encode(x: Array, form: str, global_scale: Array | None) -> tuple[Raw, Array]:
    """Stored leaves of ``x`` and the values they stand for."""
    if form == "fp8":
        q8 = fp8.quantize_weight(x)
        raw = {"weight": _u8(q8.code), "scale": _u8(q8.scale)}
    elif form == "mxfp4":
        q4 = mxfp4.quantize(x)
        raw = {"weight": bits.e2m1_to_bytes(q4.code), "scale": _u8(q4.scale)}
    elif form == "nvfp4" and global_scale is not None:
        q = nvfp4.quantize(x, global_scale[..., None])
        block = _u8(q.block_scale)
        code = bits.e2m1_to_bytes(q.code)
        raw = {"weight": code, "block_scale": block, "global_scale": global_scale}
    elif form == "bfloat16":
        return {"weight": x.astype(jnp.bfloat16)}, bits.round_bf16(x)
    else:
        return {"weight": x}, x
    return raw, _decode(raw, form)


def _matrix_sum(x: Array, experts: bool) -> Array:
    """Sum over all axes but the expert axis, rows first: one long FP32 sum would stagnate."""
    rows = jnp.sum(x, axis=-1)
    return jnp.sum(rows, axis=tuple(range(int(experts), rows.ndim)))


def _partners(group: Mapping[str, object], name: str) -> tuple[str, ...]:
    """The tensors that share a global scale: ``w1`` and ``w3`` of an expert (model.md 7.3)."""
    return ("w1", "w3") if name in ("w1", "w3") and "w3" in group else (name,)


def _global_scale(values: list[Array], experts: bool) -> Array:
    if experts:
        return jax.vmap(nvfp4.tensor_global_scale)(*values)
    return nvfp4.tensor_global_scale(*values)


@functools.partial(jax.jit, static_argnames=("stored", "target", "experts"))
def convert(
    group: Group, *, stored: str, target: str, experts: bool, amax: Array | None = None
) -> tuple[Group, dict[str, Errors]]:
    """Converts tensors that belong together (``w1``, ``w2``, ``w3``; or a single one).

    Args:
        group: name -> stored arrays, with a leading expert axis when ``experts``.
        stored: ``float32``, ``bfloat16``, ``float16``, ``fp8``, ``fp8_float32``, ``mxfp4`` or
            ``nvfp4``.
        target: ``float32``, ``bfloat16``, ``fp8``, ``mxfp4`` or ``nvfp4``.
        experts: whether there is an expert axis; global scales are per expert.
        amax: for slices of one tensor without an expert axis: `largest` of all of it and of its
            partner, which decides the global scale of NVFP4.

    Returns:
        Leaves as bytes (see the module), and the errors of a lossy pair (none for an exact one).
    """
    if stored == target:
        return group, {}
    values = {name: _decode(raw, stored) for name, raw in group.items()}
    out: Group = {}
    errors: dict[str, Errors] = {}
    for name, value in values.items():
        shared = None
        if target == "nvfp4":
            of = [values[n] for n in _partners(group, name)] if amax is None else [amax]
            shared = _global_scale(of, experts)
        out[name], result = _encode(value, target, shared)
        if (stored, target) not in EXACT:
            difference = _matrix_sum((result - value) ** 2, experts)
            errors[name] = Errors(difference, _matrix_sum(value**2, experts))
    return out, errors


@functools.partial(jax.jit, static_argnames=("stored",))
def largest(raw: Raw, *, stored: str) -> Array:
    """``max |w|`` of a tensor, or of a slice of one."""
    return jnp.max(jnp.abs(_decode(raw, stored)))


@functools.partial(jax.jit, static_argnames=("experts",))
def fp8_scales_to_ue8m0(group: Group, *, experts: bool) -> tuple[Group, dict[str, Array]]:
    """The exact route for FP8 with scales in FP32 or BF16: same codes, scales as exponents.

    Returns:
        Leaves as bytes, and per tensor (per expert) whether all scales are powers of two from
        2^-126 to 2^127; where not, the leaves are wrong and ``convert`` must be used.
    """
    out: Group = {}
    exact: dict[str, Array] = {}
    for name, raw in group.items():
        word = lax.bitcast_convert_type(raw["scale"].astype(jnp.float32), jnp.uint32)
        exponent = word >> 23  # with the sign, which must be 0
        power = ((word & 0x7FFFFF) == 0) & (exponent > 0) & (exponent < 255)
        exact[name] = jnp.all(power, axis=tuple(range(int(experts), power.ndim)))
        out[name] = {"weight": raw["weight"], "scale": exponent.astype(jnp.uint8)}
    return out, exact


@functools.partial(jax.jit, static_argnames=("experts",))
def mxfp4_to_nvfp4(group: Group, *, experts: bool) -> tuple[Group, dict[str, Array]]:
    """The exact route of model.md 9.3: same codes, block scales by an exponent shift.

    ``global_scale = 2^(e_max - 8)``, ``block_scale = 2^(e - e_max + 8)``, where ``e_max`` is the
    largest exponent of a block that is not all zero, joint for ``w1`` and ``w3``.

    Returns:
        Leaves as bytes, and per tensor (per expert) whether all blocks are within the 17 binades
        that E4M3 can hold; where not, the leaves are wrong and ``convert`` must be used.
    """
    lead = int(experts)
    exponents: dict[str, Array] = {}
    used: dict[str, Array] = {}
    for name, raw in group.items():
        blocks = raw["weight"].reshape(*raw["scale"].shape, mxfp4.BLOCK // 2)
        used[name] = jnp.any(blocks & 0x77, axis=-1)  # bits other than the two signs
        exponents[name] = raw["scale"].astype(jnp.int32) - 127

    def top(name: str) -> Array:
        masked = jnp.where(used[name], exponents[name], -1000)
        return jnp.max(masked, axis=tuple(range(lead, masked.ndim)))

    out: Group = {}
    exact: dict[str, Array] = {}
    for name, raw in group.items():
        e_max = functools.reduce(jnp.maximum, [top(n) for n in _partners(group, name)])
        # All zero: global scale 1. Below 2^-118 the global scale stays a normal FP32 number.
        shift = jnp.where(e_max < -127, 0, jnp.maximum(e_max - 8, -126))
        block = exponents[name] - shift.reshape((*shift.shape, 1, 1))
        fits = (block >= -9) | ~used[name]
        exact[name] = jnp.all(fits, axis=tuple(range(lead, fits.ndim)))
        block = jnp.where(used[name], jnp.clip(block, -9, 8), 0)
        # E4M3 bits of 2^k: normal from k = -6, subnormal powers below.
        code = jnp.where(block >= -6, (block + 7) << 3, 1 << jnp.maximum(block + 9, 0))
        scale = jnp.repeat(code.astype(jnp.uint8), 2, axis=-1)
        factor = lax.bitcast_convert_type((shift + 127) << 23, jnp.float32)
        out[name] = {"weight": raw["weight"], "block_scale": scale, "global_scale": factor}
    return out, exact


def mxfp4_to_nvfp4_on_host(
    group: Mapping[str, Mapping[str, np.ndarray]],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, bool]]:
    """`mxfp4_to_nvfp4` of one expert or linear by numpy: bitwise the same leaves and flags.

    It only looks at bytes, so that a disk and not the CPU limits a conversion.
    """
    used: dict[str, np.ndarray | None] = {}  # None: all blocks
    ends: dict[str, tuple[int, int]] = {}  # smallest and largest exponent of a block in use
    for name, raw in group.items():
        words = raw["weight"].view(np.uint64).reshape(*raw["scale"].shape, 2)
        nonzero = (words[..., 0] | words[..., 1]) & np.uint64(0x7777777777777777) != 0
        whole = bool(nonzero.all())
        scale = raw["scale"] if whole else raw["scale"][nonzero]
        used[name] = None if whole else nonzero
        ends[name] = (int(scale.min()) - 127, int(scale.max()) - 127) if scale.size else (0, -1000)
    out: dict[str, dict[str, np.ndarray]] = {}
    exact: dict[str, bool] = {}
    for name, raw in group.items():
        e_max = max(ends[n][1] for n in _partners(group, name))
        shift = 0 if e_max < -127 else max(e_max - 8, -126)
        exact[name] = ends[name][1] < -127 or ends[name][0] - shift >= -9
        block = np.clip(np.arange(256) - 127 - shift, -9, 8)
        code = np.where(block >= -6, (block + 7) << 3, 1 << np.maximum(block + 9, 0))
        # Both halves of a block of 32 in one look-up.
        pair = np.take(code.astype(np.uint16) * 0x101, raw["scale"])
        blocks = used[name]
        if blocks is not None:
            pair = np.where(blocks, pair, np.uint16((7 << 3) * 0x101))
        factor = np.asarray((shift + 127) << 23, np.uint32).view(np.float32)
        leaves = {"block_scale": pair.view(np.uint8), "global_scale": factor}
        out[name] = {"weight": raw["weight"], **leaves}
    return out, exact


def fp8_scales_on_host(
    group: Mapping[str, Mapping[str, np.ndarray]],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, bool]]:
    """`fp8_scales_to_ue8m0` of one expert or linear by numpy: bitwise the same."""
    out: dict[str, dict[str, np.ndarray]] = {}
    exact: dict[str, bool] = {}
    for name, raw in group.items():
        word = raw["scale"].astype(np.float32).view(np.uint32)
        exponent = word >> 23
        power = ((word & 0x7FFFFF) == 0) & (exponent > 0) & (exponent < 255)
        exact[name] = bool(power.all())
        out[name] = {"weight": raw["weight"], "scale": exponent.astype(np.uint8)}
    return out, exact


EXACT_ROUTES: Final[dict[tuple[str, str], tuple[Callable[..., Any], str]]] = {
    ("mxfp4", "nvfp4"): (mxfp4_to_nvfp4, "block exponents span more than 17 binades"),
    ("fp8_float32", "fp8"): (fp8_scales_to_ue8m0, "scales are not powers of two"),
}
"""(stored, target) -> a function of (group, experts) that is exact where its flags say so, and what
is the matter where they do not."""


@functools.partial(jax.jit, static_argnames=("kind",))
def _bitcast(x: Array, *, kind: str) -> Array:
    return bits.bytes_to_e2m1(x) if kind == "e2m1" else lax.bitcast_convert_type(x, jnp.dtype(kind))


def byte_type(leaf: str, form: str) -> DTypeLike | None:
    """The 8-bit dtype of ``leaf`` in ``form``; ``None``: none, or two values a byte."""
    dtype = _TYPES.get(form, {}).get(leaf)
    return None if isinstance(dtype, str) else dtype


def typed(leaf: str, array: Array, form: str) -> Array:
    """Gives an array of bytes the dtype that ``leaf`` has in ``form``; others pass through."""
    dtype = _TYPES.get(form, {}).get(leaf)
    if dtype is None or array.dtype != jnp.uint8:
        return array
    return _bitcast(array, kind=dtype if isinstance(dtype, str) else jnp.dtype(dtype).name)


class Loss(NamedTuple):
    """The relative L2 error of a kind of parameter: over how many layers, mean, most, and where."""

    kind: str
    stored: str
    target: str
    layers: int
    mean: float
    most: float
    worst: str


@dataclasses.dataclass
class Report:
    """What loading did to the numbers, per kind of parameter; ``lines`` is for people.

    ``errors``: (kind, stored, target) -> layer -> relative L2 error. ``exact``: (stored, target)
    -> kinds whose values were all kept. ``notes``: exact routes that were not possible, and what
    ``Precision.experts_power_of_two`` became.
    """

    errors: dict[tuple[str, str, str], dict[str, float]] = dataclasses.field(default_factory=dict)
    exact: dict[tuple[str, str], list[str]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add_exact(self, kind: str, stored: str, target: str) -> None:
        """Records a conversion that keeps all values."""
        kinds = self.exact.setdefault((stored, target), [])
        if kind not in kinds:
            kinds.append(kind)

    def add_error(
        self, kind: str, module: str, stored: str, target: str, error: float, value: float
    ) -> None:
        """Records a lossy conversion by its sums of squares."""
        relative = math.sqrt(error / value) if value > 0 else math.sqrt(error)
        self.errors.setdefault((kind, stored, target), {})[module] = relative

    def summary(self) -> tuple[list[Loss], dict[tuple[str, str], list[str]]]:
        """Lossy conversions by kind, and ``exact`` with those whose error turned out to be none."""
        exact = {pair: list(kinds) for pair, kinds in self.exact.items()}
        losses: list[Loss] = []
        for (kind, stored, target), found in self.errors.items():
            worst = max(found, key=lambda module: found[module])
            if found[worst] == 0:
                exact.setdefault((stored, target), []).append(kind)
                continue
            mean = sum(found.values()) / len(found)
            losses.append(Loss(kind, stored, target, len(found), mean, found[worst], worst))
        return losses, {pair: list(dict.fromkeys(kinds)) for pair, kinds in exact.items()}

    def lines(self) -> list[str]:
        """A line per kind for lossy conversions, one per pair of formats for exact ones."""
        losses, exact = self.summary()
        out: list[str] = []
        for loss in losses:
            text = f"{loss.kind} {loss.stored} -> {loss.target}: rel. L2 {loss.mean:.3g}"
            if loss.layers > 1:
                text += f" (mean over {loss.layers} layers, max {loss.most:.3g} at {loss.worst})"
            out.append(text)
        out += [
            f"{stored} -> {target}: exact ({', '.join(kinds)})"
            for (stored, target), kinds in exact.items()
        ]
        return out + self.notes
