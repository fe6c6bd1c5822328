"""Published number formats: what their tensors are called, and which one a checkpoint is in.

The names decide, never the config alone; it is only asked whether it contradicts them. Beside the
release's ``X.weight`` and ``X.scale`` (model.md 7.1) these spellings of a linear ``X`` are known:

==================  =============================  =========================================
what                Model-Optimizer (7.3)          compressed-tensors
==================  =============================  =========================================
NVFP4 codes         ``weight`` (U8)                ``weight_packed`` (U8)
block scale         ``weight_scale``               ``weight_scale``
global scale        ``weight_scale_2``             ``weight_global_scale``: its reciprocal
activation scale    ``input_scale``                ``input_global_scale``: its reciprocal
FP8 scale           ``weight_scale_inv``           ``weight_scale``
==================  =============================  =========================================

Whatever the name, an FP8 scale multiplies; as FP32 or BF16 it need not be a power of two.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Final, cast

from dsv4_jax.checkpoint.errors import CheckpointError, Problems, shown
from dsv4_jax.checkpoint.names import FUSED, MTP, official_name
from dsv4_jax.checkpoint.read import TensorInfo
from dsv4_jax.precision import LINEAR_FORMATS, PRESETS, LinearFormat, Precision

__all__ = [
    "COMPRESSED_TENSORS",
    "MODEL_OPTIMIZER",
    "Detected",
    "Naming",
    "check_config",
    "detect",
    "own_leaves",
    "weight_only",
]

MODEL_OPTIMIZER: Final = "Model-Optimizer"
COMPRESSED_TENSORS: Final = "compressed-tensors"

_MODEL_OPTIMIZER_LEAVES: Final = frozenset({"weight_scale_2", "input_scale"})
_COMPRESSED_LEAVES: Final = frozenset(
    {"weight_packed", "weight_global_scale", "input_global_scale"}
)
_FP8_SCALES: Final = frozenset({"scale", "weight_scale", "weight_scale_inv"})
_LEAVES: Final = _MODEL_OPTIMIZER_LEAVES | _COMPRESSED_LEAVES | _FP8_SCALES | {"weight"}


@dataclasses.dataclass(frozen=True)
class Naming:
    """Whose names a checkpoint's NVFP4 tensors have.

    Attributes:
        convention: ``MODEL_OPTIMIZER``, ``COMPRESSED_TENSORS``, or ``None`` without NVFP4.
        witness: a tensor that shows it.
        static_scales: the activation scales in the files.
        other_scales: those of them that are not of routed experts: they are not among the leaves.
    """

    convention: str | None
    witness: str
    static_scales: tuple[str, ...]
    other_scales: tuple[str, ...] = ()

    @property
    def reciprocal(self) -> bool:
        """Whether the stored global scales divide."""
        return self.convention == COMPRESSED_TENSORS


def _module_leaves(
    module: str, found: Mapping[str, TensorInfo], problems: Problems
) -> tuple[dict[str, TensorInfo], str | None]:
    """Leaves of one linear under our names, and whose names they had."""
    leaves = set(found)
    optimizer, compressed = leaves & _MODEL_OPTIMIZER_LEAVES, leaves & _COMPRESSED_LEAVES
    scales = leaves & _FP8_SCALES
    clash: set[str] = set()
    if optimizer and compressed:
        clash = optimizer | compressed
    elif "weight_packed" in leaves and "weight" in leaves:
        clash = {"weight", "weight_packed"}
    elif len(scales) > 1:
        clash = scales
    elif scales - {"weight_scale"} and (compressed or "weight_scale_2" in leaves):
        clash = optimizer | compressed | scales
    if clash:
        names = " and ".join(shown(found[leaf].raw) for leaf in sorted(clash))
        problems.add(_AMBIGUOUS, f"{shown(module)}: {names}")
        return {}, None
    kept = dict(found)
    packed = compressed or "weight_scale_2" in leaves or found.get("weight", _NONE).dtype == "U8"
    if not packed:
        for leaf in scales:
            kept["scale"] = kept.pop(leaf)
        return kept, None
    rename = {"weight_packed": "weight", "weight_scale": "block_scale"}
    rename |= {"weight_scale_2": "global_scale", "weight_global_scale": "global_scale"}
    rename |= {"input_scale": "act_scale", "input_global_scale": "act_scale"}
    kept = {rename.get(leaf, leaf): tensor for leaf, tensor in found.items()}
    return kept, COMPRESSED_TENSORS if compressed else MODEL_OPTIMIZER


_EXPERT: Final = re.compile(r"(?:layers|mtp)\.\d+\.ffn\.experts\.\d+\.w[123]")
_AMBIGUOUS: Final = "ambiguous number format, a linear must follow one convention"
_NONE: Final = TensorInfo("", "", "", (), 0, 0)


def own_leaves(
    tensors: Mapping[str, TensorInfo], source: str
) -> tuple[dict[str, TensorInfo], Naming]:
    """Tensors by official names with our leaves, whatever convention the files follow.

    A linear ``X`` has ``X.weight``, and ``X.scale`` (FP8, MXFP4) or ``X.block_scale`` and
    ``X.global_scale`` (NVFP4) beside it. A routed expert has ``X.act_scale`` too where the files
    have static activation scales; those of other linears are counted and left out.

    Args:
        tensors: official name (the leaf as the file has it) -> tensor.
        source: the checkpoint's name, for messages.

    Raises:
        CheckpointError: names of both conventions, or two names for one thing.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    out: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module and leaf in _LEAVES:
            modules.setdefault(module, {})[leaf] = tensor
        else:
            out[name] = tensor
    problems = Problems(source)
    witnesses: dict[str, str] = {}
    static: list[str] = []
    other: list[str] = []
    for module, found in modules.items():
        kept, convention = _module_leaves(module, found, problems)
        if convention is not None:
            marks = _MODEL_OPTIMIZER_LEAVES | _COMPRESSED_LEAVES
            first = min(found, key=lambda leaf: leaf not in marks)
            witnesses.setdefault(convention, shown(found[first].raw))
            if "act_scale" in kept:
                static.append(kept["act_scale"].raw)
                if not _EXPERT.fullmatch(module):
                    other.append(kept.pop("act_scale").raw)
        out.update({f"{module}.{leaf}": tensor for leaf, tensor in kept.items()})
    if len(witnesses) > 1:
        both = " and ".join(f"{raw} ({whose})" for whose, raw in sorted(witnesses.items()))
        problems.add("ambiguous number format, both conventions", both)
    problems.raise_any()
    convention = next(iter(witnesses), None)
    witness = witnesses.get(convention or "", "")
    return out, Naming(convention, witness, tuple(static), tuple(other))


def check_config(data: Mapping[str, Any], naming: Naming, source: str) -> None:
    """Refuses a ``config.json`` that names the convention which the tensors do not follow.

    The two differ in whether a global scale multiplies or divides, so neither may be believed.

    Raises:
        CheckpointError: it names both.
    """
    section = data.get("quantization_config")
    if naming.convention is None or not isinstance(section, Mapping):
        return
    fields = cast(Mapping[str, Any], section)
    method, algo = fields.get("quant_method"), fields.get("moe_quant_algo")
    named: str | None = None
    if method == "compressed-tensors":
        named, field = COMPRESSED_TENSORS, f"quant_method {method!r}"
    elif method == "modelopt" or algo is not None:
        named = MODEL_OPTIMIZER
        field = f"moe_quant_algo {algo!r}" if algo is not None else f"quant_method {method!r}"
    else:
        return
    if named != naming.convention:
        raise CheckpointError(
            f"{source}: ambiguous number format: config.json follows {named} "
            f"(quantization_config.{field}), the tensors {naming.convention} ({naming.witness})"
        )


def weight_only(data: Mapping[str, Any], naming: Naming) -> bool:
    """Whether the source multiplies its NVFP4 weights with activations that are not quantised.

    It does where compressed-tensors has no scales for activations, and where ``config.json`` has
    groups of 4-bit weights and none of them quantises activations. Without either nothing is said.
    """
    if naming.convention is None or naming.static_scales:
        return False
    section: Any = data.get("quantization_config")
    groups: Any = section.get("config_groups") if isinstance(section, Mapping) else None
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    four_bit = [group for group in found if _bits(group, "weights") == 4]
    if any(group.get("input_activations") for group in four_bit):
        return False  # scaled as they come: there is nothing of them in the files
    return naming.reciprocal or bool(four_bit)


def _bits(group: Any, part: str) -> Any:
    settings: Any = group.get(part) if isinstance(group, Mapping) else None
    return settings.get("num_bits") if isinstance(settings, Mapping) else None


@dataclasses.dataclass(frozen=True)
class Detected:
    """The number formats of a checkpoint.

    Attributes:
        precision: every linear as it is stored.
        preset: the preset that ``precision`` is, or that is closest to it.
        changes: the fields in which they differ, of ``precision``.
        holds: for people.
        naming: whose names the NVFP4 tensors have.
    """

    precision: Precision
    preset: str
    changes: dict[str, str]
    holds: str
    naming: Naming


_RULES: Final = {
    "attn.wq_a": "wq_a",
    "attn.wq_b": "wq_b",
    "attn.wkv": "wkv",
    "attn.wo_a": "wo_a",
    "attn.wo_b": "wo_b",
    "attn.indexer.wq_b": "indexer_wq_b",
    "e_proj": "mtp_proj",
    "h_proj": "mtp_proj",
}
_LINEAR: Final = re.compile(
    r"(?P<at>layers|mtp)\.\d+\.(?:"
    r"(?P<plain>attn\.(?:wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|e_proj|h_proj)"
    r"|ffn\.(?P<ffn>experts\.\d+|shared_experts)\.w[123])\.weight"
)
_FORMATS: Final = {
    "F8_E4M3": "fp8",
    "I8": "mxfp4",
    "U8": "nvfp4",
    "BF16": "bfloat16",
    "F32": "float32",
}
_WORDS: Final = {
    "fp8": "FP8",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
    "bfloat16": "BF16",
    "float32": "FP32",
}
_MTP_FIELDS: Final = ("mtp_experts", "mtp_proj")


def _rule(name: str) -> str | None:
    """The ``Precision`` field that a tensor of weights falls under."""
    fused = FUSED.fullmatch(name)
    if fused:
        return "experts"
    match = _LINEAR.fullmatch(name)
    if match is None:
        return None
    if match["plain"]:
        return _RULES[match["plain"]]
    if match["ffn"] == "shared_experts":
        return "shared_expert"
    return "experts" if match["at"] == "layers" else "mtp_experts"


def _linear_format(rule: str, stored: str, naming: Naming) -> str:
    """How a linear is multiplied that is stored as ``stored``."""
    if stored in LINEAR_FORMATS:
        return stored
    if stored == "nvfp4":
        # Without scales for activations compressed-tensors means that they are not quantised;
        # Model-Optimizer's convention without them is ours (`dsv4 convert`): one per token.
        weight_only = naming.reciprocal and not naming.static_scales
        return "nvfp4_w4a16" if weight_only else "nvfp4_w4a4"
    if stored == "fp8":
        return "fp8_w8a16" if rule == "wo_a" else "fp8_w8a8"
    return "mxfp4_w4a8"


def detect(tensors: Mapping[str, TensorInfo], *, source: str = "checkpoint") -> Detected:
    """The number formats in a checkpoint; most tensors of a kind decide for it.

    ``resolve`` names those that disagree. MTP modules count where there is the one of the release.

    Args:
        tensors: name in the file -> ``TensorInfo``, as ``Reader.tensors``.
        source: the checkpoint's name, for messages.

    Raises:
        CheckpointError: ambiguous names, or a format without a preset.
    """
    own, naming = own_leaves({official_name(raw): t for raw, t in tensors.items()}, source)
    modules = {match[1] for raw in tensors if (match := MTP.match(raw))}
    votes: dict[str, collections.Counter[str]] = {}
    for name, tensor in own.items():
        rule = _rule(name)
        if rule is not None and (modules == {"0"} or not name.startswith("mtp.")):
            votes.setdefault(rule, collections.Counter())[tensor.dtype] += 1
    dtypes = {rule: counter.most_common(1)[0][0] for rule, counter in votes.items()}
    if not dtypes or not set(dtypes.values()) <= set(_FORMATS):
        attention, experts = dtypes.get("wq_a"), dtypes.get("experts")
        raise CheckpointError(
            f"{source}: no precision preset for attention weights stored as {attention} and "
            f"experts as {experts}; linears must be one of {', '.join(_FORMATS)} "
            "(pass precision=...)"
        )
    stored = {rule: _FORMATS[dtype] for rule, dtype in dtypes.items()}
    fields = {rule: _linear_format(rule, form, naming) for rule, form in stored.items()}
    uniform = set(fields.values())
    if len(uniform) == 1 and uniform <= {"bfloat16", "float32"}:
        candidates = sorted(uniform)  # the rest of the model follows
    else:
        candidates = [name for name in PRESETS if name not in ("bfloat16", "float32")]

    def changes(preset: str) -> dict[str, str]:
        return {k: v for k, v in fields.items() if getattr(PRESETS[preset], k) != v}

    def distance(preset: str) -> tuple[bool, int]:
        return "experts" in changes(preset), len(changes(preset))

    best = min(candidates, key=distance)
    different = cast(dict[str, LinearFormat], changes(best))
    precision = dataclasses.replace(PRESETS[best], **cast(dict[str, Any], different))
    return Detected(precision, best, dict(different), _holds(stored, naming), naming)


def _holds(stored: Mapping[str, str], naming: Naming) -> str:
    main = {rule: form for rule, form in stored.items() if rule not in _MTP_FIELDS}
    if len(set(main.values())) == 1:
        form = next(iter(main.values()))
        if form in ("bfloat16", "float32"):
            return f"unquantised {_WORDS[form]} weights"
    experts = main.pop("experts", None)
    common = collections.Counter(main.values()).most_common(1)
    parts = [f"{_WORDS[common[0][0]]} linears"] if common else []
    parts += [f"{_WORDS[experts]} experts"] if experts else []
    return " and ".join(parts) + (f" ({naming.convention})" if naming.convention else "")
