"""Checks names, shapes and dtypes of a whole checkpoint before anything is put on a device."""

import collections
import dataclasses
import difflib
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from dsv4_jax.checkpoint.errors import LISTED, CheckpointError, Problems, shown
from dsv4_jax.checkpoint.names import Parameter, official_name, parameters
from dsv4_jax.checkpoint.read import DTYPE_BITS, TensorInfo
from dsv4_jax.config import ModelConfig

__all__ = ["Resolved", "detect_precision", "resolve", "split_fused"]

_log = logging.getLogger(__name__)

_FLOATS: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_QUANTISED: Final = ("F8_E4M3", "F8_E8M0", "I8", "U8")
_CANDIDATES: Final = 500
_LONGEST: Final = 200
_MANY_EXPERTS: Final = 100_000
_NUMBER: Final = re.compile(r"\d+")
_MTP: Final = re.compile(r"(?:model\.)?mtp\.(\d+)\.")
_LINEAR: Final = re.compile(
    r"layers\.\d+\.(attn|ffn)\.(wq_a|wq_b|wkv|wo_a|wo_b|experts\.\d+\.w\d)\."
)
_FUSED: Final = re.compile(r"(layers\.\d+\.ffn\.experts)\.(gate_up_proj|down_proj)")


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A checked checkpoint.

    Attributes:
        parameters: everything to load.
        tensors: official tensor name -> where its bytes lie.
        stored: parameter name -> ``float32``, ``bfloat16``, ``float16``, ``fp8``, ``mxfp4`` or
            ``int64``: how the file stores it.
    """

    parameters: list[Parameter]
    tensors: dict[str, TensorInfo]
    stored: dict[str, str]


def _reject_other_formats(names: Iterable[str], source: str) -> None:
    for name in names:
        if name.endswith((".weight_scale", ".weight_scale_2", ".weight_packed")):
            raise CheckpointError(
                f"{source}: {name}: NVFP4 checkpoints cannot be loaded yet; this version loads "
                "the official FP8 + MXFP4 release and unquantised BF16 or FP32"
            )


def detect_precision(tensors: Mapping[str, TensorInfo], *, source: str = "checkpoint") -> str:
    """The preset that fits the number formats in a checkpoint (MTP modules aside).

    Most tensors decide; ``resolve`` names those that disagree.

    Args:
        tensors: name in the file -> ``TensorInfo``, as ``Reader.tensors``.
        source: the checkpoint's name, for messages.

    Raises:
        CheckpointError: a format without a preset.
    """
    _reject_other_formats(tensors, source)
    votes = {"attn": collections.Counter[str](), "ffn": collections.Counter[str]()}
    for name, tensor in tensors.items():
        official = official_name(name)
        match = _LINEAR.match(official)
        if _FUSED.fullmatch(official):
            votes["ffn"][tensor.dtype] += 1
        elif match and official.endswith(".weight"):
            votes[match[1]][tensor.dtype] += 1
    found = {part: counter.most_common(1)[0][0] for part, counter in votes.items() if counter}
    presets = {
        "official": {"attn": "F8_E4M3", "ffn": "I8"},
        "bfloat16": {"attn": "BF16", "ffn": "BF16"},
        "float32": {"attn": "F32", "ffn": "F32"},
    }
    for preset, formats in presets.items():
        if found and found.items() <= formats.items():
            return preset
    raise CheckpointError(
        f"{source}: no precision preset for attention weights stored as {found.get('attn')} and "
        f"experts as {found.get('ffn')}; presets exist for F8_E4M3 with I8, BF16 throughout, and "
        "F32 throughout (pass precision=...)"
    )


def split_fused(name: str, tensor: TensorInfo, config: ModelConfig) -> dict[str, TensorInfo] | None:
    """Cuts a fused expert stack of transformers into official tensors; they lie one by one.

    ``gate_up_proj [E, 2 I, D]`` holds ``w1`` (first ``I`` rows) and ``w3``; ``down_proj [E, D, I]``
    is ``w2`` (model.md 7.2).

    Returns:
        Official name -> byte range; ``None`` when ``name`` is no stack.

    Raises:
        CheckpointError: its shape is not that of the config.
    """
    match = _FUSED.fullmatch(name)
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
) -> list[TensorInfo]:
    """Drops ``mtp.*`` unless asked for; newer drafters (model.md 6.4) cannot be asked for."""
    kept: list[TensorInfo] = []
    modules: collections.Counter[int] = collections.Counter()
    for tensor in tensors:
        match = _MTP.match(tensor.raw)
        if match:
            modules[int(match[1])] += 1
        if mtp or not match:
            kept.append(tensor)
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
    return kept


def _formats(parameter: Parameter, quantised: bool) -> dict[str, str]:
    """Accepted stored dtype -> format name."""
    if parameter.rule == "int32":
        return {"I64": "int64"}
    if not quantised:
        return _FLOATS
    if parameter.rule == "float32":
        return {"F32": "float32"}
    if parameter.rule == "dense":
        return {"BF16": "bfloat16"}
    if parameter.experts:
        return {"I8": "mxfp4", "F8_E4M3": "fp8"}
    return {"F8_E4M3": "fp8"}


def _weight_name(parameter: Parameter, name: str) -> str:
    return f"{name}.weight" if parameter.is_linear else name


def _stored_dtypes(
    wanted: list[Parameter], tensors: Mapping[str, TensorInfo], quantised: bool
) -> dict[str, str]:
    """For each kind of linear the one dtype that most of its tensors have."""
    votes: dict[str, collections.Counter[str]] = {}
    for parameter in wanted:
        if parameter.is_linear:
            accepted = _formats(parameter, quantised)
            counter = votes.setdefault(
                parameter.rule, collections.Counter({next(iter(accepted)): 0})
            )
            for name in parameter.names():
                tensor = tensors.get(f"{name}.weight")
                if tensor is not None and tensor.dtype in accepted:
                    counter[tensor.dtype] += 1
    return {rule: counter.most_common(1)[0][0] for rule, counter in votes.items()}


def _describe(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


def _check_scale(
    name: str,
    weight: tuple[str, tuple[int, ...]],
    logical: tuple[int, ...],
    scale: TensorInfo | None,
    problems: Problems,
) -> None:
    rows, cols = logical
    shape = (rows, cols // 32) if weight[0] == "I8" else (-(-rows // 128), -(-cols // 128))
    rule = f"{name}.scale must be {_describe('F8_E8M0', shape)} for {name}.weight"
    rule += f" {_describe(*weight)}"
    if scale is None:
        problems.add("scale", f"{rule}, found none")
    elif (scale.dtype, scale.shape) != ("F8_E8M0", shape):
        problems.add(
            "scale", f"{rule}, found {_describe(scale.dtype, scale.shape)} in {scale.file}"
        )


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
        match = _FUSED.fullmatch(name)
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

    In a quantised file every tensor must have the dtype of model.md 7.1; in an unquantised one
    any float dtype will do, but linears of one kind must share theirs.

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
    kept = _take_mtp(tensors, config, mtp, source)
    _reject_other_formats((tensor.raw for tensor in kept), source)
    table = _canonical(kept, config, problems)
    quantised = any(tensor.dtype in _QUANTISED for tensor in table.values())
    wanted = parameters(config, mtp)
    dtypes = _stored_dtypes(wanted, table, quantised)
    expected: set[str] = set()
    missing: list[str] = []
    stored: dict[str, str] = {}
    hidden = _hidden(unread, config)

    for parameter in wanted:
        accepted = _formats(parameter, quantised)
        if parameter.is_linear:
            accepted = {dtypes[parameter.rule]: accepted[dtypes[parameter.rule]]}
        shape = parameter.shape
        if "I8" in accepted:
            if shape[1] % 32:
                problems.add(
                    "shape", f"{parameter.name}: MXFP4 needs a multiple of 32, got {shape}"
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
            if parameter.is_linear and quantised:
                expected.add(f"{name}.scale")
                weight = (dtypes[parameter.rule], shape)
                scale = table.get(f"{name}.scale")
                if scale is None and f"{name}.scale" in hidden:
                    continue
                _check_scale(name, weight, parameter.shape, scale, problems)

    unexpected = [name for name in table if name not in expected]
    strangers, absent = _Hints(unexpected), _Hints(missing)
    for i, name in enumerate(missing):  # hints are slow, and only the first are shown
        problems.add("missing", name + (strangers.closest(name) if i < LISTED else ""))
    for i, name in enumerate(unexpected):
        hint = absent.closest(name) if i < LISTED else ""
        text = f"{shown(table[name].raw)} in {table[name].file}{hint}"
        problems.add("unexpected", text)
    problems.raise_any()
    return Resolved(wanted, {name: table[name] for name in table if name in expected}, stored)
