"""Checks names, shapes and dtypes of a whole checkpoint before anything is put on a device."""

import collections
import dataclasses
import difflib
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from dsv4_jax.checkpoint.errors import LISTED, CheckpointError, Problems, shown
from dsv4_jax.checkpoint.formats import (
    COMPRESSED_TENSORS,
    Naming,
    own_leaves,
)
from dsv4_jax.checkpoint.names import (
    FUSED,
    MTP,
    Parameter,
    official_name,
    parameters,
    uses_act_scales,
)
from dsv4_jax.checkpoint.read import DTYPE_BITS, Reader, TensorInfo
from dsv4_jax.checkpoint.scan import Scan
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import Precision

__all__ = ["Resolved", "resolve", "split_fused"]

_log = logging.getLogger(__name__)

_FLOATS: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_QUANTISED: Final = ("F8_E4M3", "F8_E8M0", "I8", "U8")
_PACKED: Final = {"I8": ("MXFP4", 32), "U8": ("NVFP4", 16)}
_SCALES: Final = ("F8_E8M0", "F32", "BF16")
_CANDIDATES: Final = 500
_LONGEST: Final = 200
_MANY_EXPERTS: Final = 100_000
_NUMBER: Final = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A checked checkpoint.

    Attributes:
        parameters: everything to load.
        tensors: official tensor name -> where its bytes lie.
        stored: parameter name -> ``float32``, ``bfloat16``, ``float16``, ``fp8``, ``fp8_float32``
            (scales in FP32 or BF16), ``mxfp4``, ``nvfp4`` or ``int64``: how the file stores it.
        naming: whose names the NVFP4 tensors have, and whether global scales are reciprocals.
        drafter: tensors of MTP modules that are not loaded.
        act_scales: which routed experts have static activation scales (``X.act_scale``): none,
            ``experts``, ``mtp_experts`` or both.
    """

    parameters: list[Parameter]
    tensors: dict[str, TensorInfo]
    stored: dict[str, str]
    naming: Naming
    drafter: list[TensorInfo]
    act_scales: frozenset[str]

    def static_scales(self, precision: Precision | None) -> tuple[list[str], list[str]]:
        """Names of the static activation scales that are used in ``precision``, and of the rest.

        ``None``: none is used.
        """
        used: list[str] = []
        unused: list[str] = []
        for name, tensor in self.tensors.items():
            if name.endswith(".act_scale"):
                rule = "mtp_experts" if name.startswith("mtp.") else "experts"
                takes = precision is not None and uses_act_scales(rule, precision)
                (used if takes else unused).append(tensor.raw)
        return used, unused + list(self.naming.other_scales)

    def scan(self, reader: Reader, experts: int, *, verify: bool = False) -> Scan:
        """What looks at its values; see `Scan`."""
        reciprocal = self.naming.reciprocal
        return Scan(reader, self.tensors, experts, reciprocal=reciprocal, verify=verify)


def split_fused(name: str, tensor: TensorInfo, config: ModelConfig) -> dict[str, TensorInfo] | None:
    """Cuts a fused expert stack of transformers into official tensors; they lie one by one.

    ``gate_up_proj [E, 2 I, D]`` holds ``w1`` (first ``I`` rows) and ``w3``; ``down_proj [E, D, I]``
    is ``w2`` (model.md 7.2).

    Returns:
        Official name -> byte range; ``None`` when ``name`` is no stack.

    Raises:
        CheckpointError: its shape is not that of the config.
    """
    match = FUSED.fullmatch(name)
    if match is None:
        return None
    prefix, which = match.groups()
    width, dim, experts = (
        config.moe_intermediate_size,
        config.hidden_size,
        config.n_routed_experts,
    )
    parts = ("w1", "w3") if which == "gate_up_proj" else ("w2",)
    shape = (width, dim) if which == "gate_up_proj" else (dim, width)
    expected = (experts, len(parts) * shape[0], shape[1])
    if tensor.shape != expected:
        raise CheckpointError(
            f"{tensor.raw}: expected {list(expected)}, found {list(tensor.shape)} in {tensor.file}"
        )
    out: dict[str, TensorInfo] = {}
    size = shape[0] * shape[1] * DTYPE_BITS[tensor.dtype] // 8
    offset = tensor.offset
    for expert in range(experts):
        for part in parts:
            out[f"{prefix}.{expert}.{part}.weight"] = dataclasses.replace(
                tensor, shape=shape, offset=offset, nbytes=size
            )
            offset += size
    return out


def _canonical(
    tensors: Iterable[TensorInfo], config: ModelConfig, problems: Problems
) -> dict[str, TensorInfo]:
    out: dict[str, TensorInfo] = {}
    for tensor in tensors:
        name = official_name(tensor.raw)
        try:
            pieces = split_fused(name, tensor, config)
        except CheckpointError as error:
            problems.add("shape", str(error))
            prefix, which = name.rsplit(".", 1)  # stand-ins, so that they are not missing too
            size = (config.moe_intermediate_size, config.hidden_size)
            parts = {"w1": size, "w3": size} if which == "gate_up_proj" else {"w2": size[::-1]}
            pieces = {
                f"{prefix}.{e}.{part}.weight": dataclasses.replace(tensor, shape=shape)
                for e in range(config.n_routed_experts)
                for part, shape in parts.items()
            }
        for piece, info in (pieces or {name: tensor}).items():
            other = out.setdefault(piece, info)
            if other is not info:
                problems.add(
                    "same parameter twice", f"{piece}: {shown(other.raw)} and {shown(info.raw)}"
                )
    return out


def _take_mtp(
    tensors: Iterable[TensorInfo], config: ModelConfig, mtp: bool, source: str
) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Parts ``mtp.*`` from the rest unless asked for; newer drafters (model.md 6.4) cannot be."""
    kept: list[TensorInfo] = []
    dropped: list[TensorInfo] = []
    modules: collections.Counter[int] = collections.Counter()
    for tensor in tensors:
        match = MTP.match(tensor.raw)
        if match:
            modules[int(match[1])] += 1
        (kept if mtp or not match else dropped).append(tensor)
    if mtp:
        if config.num_nextn_predict_layers < 1:
            raise CheckpointError(f"{source}: mtp=True, but num_nextn_predict_layers is 0")
        if set(modules) != {0}:
            found = ", ".join(f"mtp.{i}" for i in sorted(modules)) or "no mtp.* tensors"
            raise CheckpointError(
                f"{source}: mtp=True needs the module mtp.0 alone, found {found} "
                "(drafters of several stages are not supported)"
            )
    elif modules:
        what = "an MTP module" if set(modules) == {0} else "a newer drafter"
        _log.info("%s: skipped %d tensors of %s (mtp.*)", source, modules.total(), what)
    return kept, dropped


def _formats(parameter: Parameter, quantised: bool, naming: Naming) -> dict[str, str]:
    """Accepted stored dtype -> format name; the first one is what a quantised release has."""
    if parameter.rule == "int32":
        return {"I64": "int64"}
    if not quantised:
        return _FLOATS
    if not parameter.is_linear:
        # What a quantiser leaves alone has the dtype that the model was saved in.
        if naming.convention == COMPRESSED_TENSORS:
            return _FLOATS
        return {"F32": "float32"} if parameter.rule == "float32" else {"BF16": "bfloat16"}
    fp8, fp4 = {"F8_E4M3": "fp8"}, {"I8": "mxfp4", "U8": "nvfp4"}
    return (fp4 | fp8 if parameter.experts else fp8 | fp4) | _FLOATS


def _weight_name(parameter: Parameter, name: str) -> str:
    return f"{name}.weight" if parameter.is_linear else name


def _stored_dtypes(
    wanted: list[Parameter], tensors: Mapping[str, TensorInfo], quantised: bool, naming: Naming
) -> dict[str, tuple[str, str]]:
    """For each kind of linear the one dtype that most of its weights, and of their scales, have."""
    votes: dict[str, tuple[collections.Counter[str], collections.Counter[str]]] = {}
    for parameter in wanted:
        if parameter.is_linear:
            accepted = _formats(parameter, quantised, naming)
            weights, scales = votes.setdefault(
                parameter.rule,
                (
                    collections.Counter({next(iter(accepted)): 0}),
                    collections.Counter({"F8_E8M0": 0}),
                ),
            )
            for name in parameter.names():
                tensor, scale = tensors.get(f"{name}.weight"), tensors.get(f"{name}.scale")
                if tensor is not None and tensor.dtype in accepted:
                    weights[tensor.dtype] += 1
                if scale is not None and scale.dtype in _SCALES:
                    scales[scale.dtype] += 1
    return {
        rule: (weights.most_common(1)[0][0], scales.most_common(1)[0][0])
        for rule, (weights, scales) in votes.items()
    }


def _describe(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


def _check_scales(
    name: str,
    weight: tuple[str, tuple[int, ...]],
    logical: tuple[int, ...],
    scale_dtype: str,
    tensors: Mapping[str, TensorInfo],
    hidden: Collection[str],
    problems: Problems,
    act_scale: str = "",
) -> list[str]:
    """Checks the scales that a weight of this dtype has; returns their names.

    ``act_scale``: the name of another expert's static activation scale, if there is any.
    """
    rows, cols = logical
    tiles = (-(-rows // 128), -(-cols // 128))
    by_dtype: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
        "F8_E4M3": {"scale": (scale_dtype, tiles)},
        "I8": {"scale": ("F8_E8M0", (rows, cols // 32))},
        "U8": {"block_scale": ("F8_E4M3", (rows, cols // 16)), "global_scale": ("F32", ())},
    }
    expected = by_dtype.get(weight[0], {})
    if act_scale and weight[0] == "U8":
        expected["act_scale"] = ("F32", ())
    for leaf, (dtype, shape) in expected.items():
        # Of a leaf that may be absent altogether the name that it has in the files.
        spelt = act_scale.rpartition(".")[2] if leaf == "act_scale" else leaf
        rule = f"{name}.{spelt} must be {_describe(dtype, shape)} for {name}.weight"
        rule += f" {_describe(*weight)}"
        scale = tensors.get(f"{name}.{leaf}")
        if scale is None:
            if f"{name}.{spelt}" not in hidden:
                other = f" ({shown(act_scale)} is there)" if leaf == "act_scale" else ""
                problems.add("scale", f"{rule}, found none{other}")
        elif scale.dtype != dtype or scale.shape not in (shape, shape or (1,)):
            found = _describe(scale.dtype, scale.shape)
            raw = "" if scale.raw == f"{name}.{spelt}" else f"{shown(scale.raw)} "
            problems.add("scale", f"{rule}, found {raw}{found} in {scale.file}")
    return [f"{name}.{leaf}" for leaf in expected]


class _Hints:
    """The closest of some names; those with the same numbers (layer, expert) come first."""

    def __init__(self, names: list[str]) -> None:
        self._by_numbers: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            self._by_numbers.setdefault(self._numbers(name), []).append(name)
        self._first = names[:_CANDIDATES]

    @staticmethod
    def _numbers(name: str) -> tuple[str, ...]:
        return tuple(_NUMBER.findall(name))

    def closest(self, name: str) -> str:
        """As the end of a message, empty where nothing is close."""
        if len(name) > _LONGEST:  # difflib takes quadratic time
            return ""
        near = [*self._by_numbers.get(self._numbers(name), [])[:_CANDIDATES], *self._first]
        found = difflib.get_close_matches(
            name, [other for other in near if len(other) <= _LONGEST], n=1, cutoff=0.8
        )
        return f" (closest: {found[0]})" if found else ""


def _refuse_experts(tensors: list[TensorInfo], config: ModelConfig, source: str) -> None:
    """A config with absurdly many experts, before a name is made up for each of them."""
    held = len(tensors) + sum(t.shape[0] for t in tensors if len(t.shape) == 3 and t.nbytes)
    experts = config.n_routed_experts * config.num_hidden_layers
    if experts > max(held, _MANY_EXPERTS):
        raise CheckpointError(
            f"{source}: the config has {experts} experts (n_routed_experts * num_hidden_layers), "
            f"the files hold at most {held}"
        )


def _hidden(unread: Collection[str], config: ModelConfig) -> set[str]:
    """Official names of tensors in files that could not be read."""
    out: set[str] = set()
    for raw in unread:
        name = official_name(raw)
        match = FUSED.fullmatch(name)
        if match is None:
            out.add(name)
            continue
        parts = ("w1", "w3") if match[2] == "gate_up_proj" else ("w2",)
        out |= {
            f"{match[1]}.{expert}.{part}.weight"
            for expert in range(config.n_routed_experts)
            for part in parts
        }
    return out


def resolve(
    tensors: Iterable[TensorInfo],
    config: ModelConfig,
    *,
    mtp: bool = False,
    source: str = "checkpoint",
    unread: Collection[str] = (),
) -> Resolved:
    """Maps a checkpoint onto the parameters of ``config`` and checks all of it.

    Linears of one kind must share their format, whatever it is (`formats`). The rest must have the
    dtypes of model.md 7.1 beside quantised linears, and may be any float in an unquantised file.

    Args:
        tensors: all tensors of the files.
        config: the architecture.
        mtp: load ``mtp.0`` too; otherwise ``mtp.*`` is skipped with one log line.
        source: the checkpoint's name, for messages.
        unread: names in files that could not be read (`Reader.unread`): they are not missing.

    Raises:
        CheckpointError: lists every missing, unexpected, doubled or wrong tensor, by class.
    """
    problems = Problems(source)
    tensors = list(tensors)
    _refuse_experts(tensors, config, source)
    kept, drafter = _take_mtp(tensors, config, mtp, source)
    table, naming = own_leaves(_canonical(kept, config, problems), source)
    quantised = any(tensor.dtype in _QUANTISED for tensor in table.values())
    wanted = parameters(config, mtp)
    dtypes = _stored_dtypes(wanted, table, quantised, naming)
    expected: set[str] = set()
    missing: list[str] = []
    stored: dict[str, str] = {}
    hidden = _hidden(unread, config)
    act_scales = {
        parameter.rule: table[f"{name}.act_scale"].raw
        for parameter in wanted
        if parameter.experts
        for name in parameter.names()
        if f"{name}.act_scale" in table
    }

    for parameter in wanted:
        accepted = _formats(parameter, quantised, naming)
        dtype, scale_dtype = dtypes.get(parameter.rule, ("", ""))
        if parameter.is_linear:
            accepted = {dtype: accepted[dtype]}
            if dtype == "F8_E4M3" and scale_dtype != "F8_E8M0":
                accepted = {dtype: "fp8_float32"}
        shape = parameter.shape
        if dtype in _PACKED:
            form, block = _PACKED[dtype]
            if shape[1] % block:
                problems.add(
                    "shape", f"{parameter.name}: {form} needs a multiple of {block}, got {shape}"
                )
            shape = (shape[0], shape[1] // 2)
        for name in parameter.names():
            full = _weight_name(parameter, name)
            expected.add(full)
            tensor = table.get(full)
            if tensor is None and full not in hidden:
                missing.append(full)
            if tensor is not None:
                if tensor.dtype not in accepted:
                    text = f"{full}: expected {' or '.join(accepted)}, found {tensor.dtype}"
                    problems.add("dtype", f"{text} in {tensor.file}")
                elif tensor.shape != shape:
                    text = f"{full}: expected {list(shape)}, found {list(tensor.shape)}"
                    problems.add("shape", f"{text} in {tensor.file}")
                stored[parameter.name] = accepted.get(tensor.dtype, next(iter(accepted.values())))
            if parameter.is_linear:
                weight = (dtype, shape)
                names = _check_scales(
                    name,
                    weight,
                    parameter.shape,
                    scale_dtype,
                    table,
                    hidden,
                    problems,
                    act_scales.get(parameter.rule, ""),
                )
                expected.update(names)

    unexpected = [name for name in table if name not in expected]
    strangers, absent = _Hints(unexpected), _Hints(missing)
    for i, name in enumerate(missing):  # hints are slow, and only the first are shown
        problems.add("missing", name + (strangers.closest(name) if i < LISTED else ""))
    for i, name in enumerate(unexpected):
        hint = absent.closest(name) if i < LISTED else ""
        text = f"{shown(table[name].raw)} in {table[name].file}{hint}"
        problems.add("unexpected", text)
    problems.raise_any()
    found = {name: table[name] for name in table if name in expected}
    return Resolved(wanted, found, stored, naming, drafter, frozenset(act_scales))
