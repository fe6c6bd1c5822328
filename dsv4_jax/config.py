"""The architecture, as read from a checkpoint's ``config.json`` (model.md section 1).

Two spellings are read: the official release's and what transformers writes (model.md 7.2).
"""

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Final, NoReturn, Self, cast

from dsv4_jax.checkpoint.errors import LISTED, CheckpointError, brief, shown

__all__ = ["QUANTIZATION", "LayerKind", "ModelConfig"]

_log = logging.getLogger(__name__)


class LayerKind(Enum):
    """What a layer attends to besides its window; the value is the compression ratio."""

    SWA = 0
    CSA = 4
    HCA = 128


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Every field that changes the maths; hashable. Names follow the official ``config.json``.

    ``compress_ratios`` has one entry per main layer, then one per MTP module.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    compress_rope_theta: float
    rope_theta: float
    rope_factor: float
    rope_beta_fast: float
    rope_beta_slow: float
    rope_original_max_position_embeddings: int
    max_position_embeddings: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    num_nextn_predict_layers: int
    bos_token_id: int
    eos_token_id: int

    @property
    def nope_dim(self) -> int:
        """Width of the non-rotary part of a key (448)."""
        return self.head_dim - self.qk_rope_head_dim

    def layer_kind(self, layer: int) -> LayerKind:
        """Kind of main layer ``layer``; index ``num_hidden_layers`` is the MTP module."""
        return LayerKind(self.compress_ratios[layer])

    def is_hash_layer(self, layer: int) -> bool:
        """Whether the layer's experts are looked up by token id."""
        return layer < self.num_hash_layers

    @classmethod
    def from_hf(cls, data: Mapping[str, Any], *, source: str = "config.json") -> Self:
        """Reads and validates a ``config.json``, official or as transformers saves it.

        Ratios beyond the main layers and the MTP modules (newer drafters, model.md 6.4) are
        dropped. transformers keeps no ratio for the MTP modules; they are SWA.

        Args:
            data: the parsed JSON object.
            source: the file's name, for messages.

        Raises:
            CheckpointError: another architecture; a field is missing, malformed or has a value
                that this package does not implement; an unknown field that could change the maths.
        """
        return cls(**_Reader(data, source).read())

    @classmethod
    def flash(cls) -> Self:
        """DeepSeek-V4-Flash (model.md table 1.1)."""
        return cls.from_hf(_FLASH, source="V4-Flash")

    @classmethod
    def pro(cls) -> Self:
        """DeepSeek-V4-Pro (model.md table 1.1)."""
        return cls.from_hf(_PRO, source="V4-Pro")


_ARCHITECTURE: Final = "DeepseekV4ForCausalLM"
_MODEL_TYPE: Final = "deepseek_v4"
_REQUIRED: Final = object()

# Switches of which one state is implemented: field -> (accepted values, value when absent).
_SWITCHES: Final[dict[str, tuple[tuple[Any, ...], Any]]] = {
    "hidden_act": (("silu",), _REQUIRED),
    "scoring_func": (("sqrtsoftplus",), _REQUIRED),
    "norm_topk_prob": ((True,), _REQUIRED),
    "tie_word_embeddings": ((False,), _REQUIRED),
    "hc_mult": ((4,), _REQUIRED),
    "n_shared_experts": ((1,), _REQUIRED),
    "num_key_value_heads": ((1,), _REQUIRED),
    "topk_method": (("noaux_tc",), "noaux_tc"),
    "attention_bias": ((False,), False),
    "mlp_bias": ((False,), False),
    "expert_dtype": (("fp4", "fp8", "bf16"), "fp4"),
    "n_group": ((None, 1), None),
    "topk_group": ((None, 1), None),
    "moe_layer_freq": ((1,), 1),
    "first_k_dense_replace": ((0,), 0),
}
QUANTIZATION: Final[dict[str, Any]] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
"""``quantization_config`` of the release."""

# Lists of modules and notes on how they were quantised: `checkpoint.formats` asks the tensors.
_COMPRESSED_TENSORS: Final = (
    "config_groups",
    "format",
    "global_compression_ratio",
    "ignore",
    "quantization_status",
    "version",
)
_MODEL_OPTIMIZER: Final = (
    "config_groups",
    "exclude_modules",
    "ignore",
    "producer",
    "quantized_layers",
)
_POSITIVE_INTS: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "max_position_embeddings",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "hc_mult",
    "hc_sinkhorn_iters",
)
_POSITIVE_FLOATS: Final = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps")
_LAYER_TYPES: Final = {
    "sliding_attention": LayerKind.SWA,
    "compressed_sparse_attention": LayerKind.CSA,
    "heavily_compressed_attention": LayerKind.HCA,
}
_COMPRESS_RATES: Final = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}

# Fields of steps that do not run where others are wrong.
_READ_LATE: Final = frozenset(
    "qk_rope_head_dim partial_rotary_factor rope_parameters rope_scaling rope_theta "
    "compress_rope_theta mlp_layer_types num_hash_layers layer_types compress_rates "
    "compress_ratios quantization_config".split()
)
# Fields that cannot change inference, although some sound as if they did.
_INERT: Final = frozenset(
    "architectures model_type attention_dropout initializer_range torch_dtype dtype use_cache "
    "transformers_version output_router_logits output_attentions output_hidden_states "
    "router_aux_loss_coef router_jitter_noise aux_loss_alpha seq_aux pad_token_id "
    "chunk_size_feed_forward _attn_implementation _experts_implementation auto_map".split()
)
_DRAFTER_PREFIXES: Final = ("mtp_", "dspark", "draft", "nextn", "speculative", "eagle")
_SOUNDS_LIKE_MATHS: Final = re.compile(
    r"rope|rotary|yarn|alibi|scal|attn|attention|norm|theta|window|bias|expert|moe|router|hc_|hyper"
    r"|index|compress|lora|swiglu|clip|softcap|score|top_?k|act$|activation|layer|head|quant|sparse"
    r"|group|sink|mlp|position|embed|hidden|vision|engram|text_config"
)
# What the model always does: switched off, it is another one. (A bias it does not have.)
_ALWAYS_ON: Final = re.compile(
    r"^(?!.*bias).*(rope|rotary|norm|sink|sliding|window|compress|index|hash|hyper|hc_|swiglu|clamp"
    r"|shared_expert)"
)
# Of these there is none at 0; a scale, an epsilon or a frequency of 0 is no less a number.
_ADDED: Final = re.compile(r"^(num|n)_|layers$|bias|dropout|jitter|loss|softcap")


def _off(field: str, value: Any) -> bool:
    """Whether an unknown field says that there is nothing of what it names, as here."""
    if value is None:
        return True
    if isinstance(value, bool):
        return not value and not _ALWAYS_ON.search(field)
    return isinstance(value, int | float) and value == 0 and bool(_ADDED.search(field))


class _Reader:
    """Takes typed fields out of a JSON object and remembers which ones it has seen."""

    def __init__(self, data: Any, source: str, prefix: str = "") -> None:
        if not isinstance(data, Mapping):
            where = f"{source}: {prefix.rstrip('.')}: " if prefix else f"{source}: "
            raise CheckpointError(f"{where}must be a JSON object, got {type(data).__name__}")
        self.data = cast(Mapping[str, Any], data)
        self.source, self.prefix = source, prefix
        self.seen: set[str] = set()

    def fail(self, field: str, rule: str, actual: Any) -> NoReturn:
        where = f"{self.source}: {self.prefix}{shown(field)}"
        raise CheckpointError(f"{where} {rule}, got {brief(actual)}")

    def get(self, field: str, default: Any = _REQUIRED) -> Any:
        self.seen.add(field)
        if field in self.data:
            return self.data[field]
        if default is _REQUIRED:
            raise CheckpointError(f"{self.source}: {self.prefix}{field} is missing")
        return default

    def integer(self, field: str, minimum: int = 1) -> int:
        value = self.get(field)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**31:
            self.fail(field, f"must be an integer >= {minimum} (and < 2^31)", value)
        return value

    def number(self, field: str, default: Any = _REQUIRED) -> float:
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(field, "must be a positive number", value)
        if not 0 < value <= 1e38 or not math.isfinite(value):
            self.fail(field, "must be a positive, finite number", value)
        return float(value)

    def switch(self, field: str, accepted: Sequence[Any], default: Any = _REQUIRED) -> Any:
        value = self.get(field, default)
        if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in accepted):
            rule = f"must be {' or '.join(repr(a) for a in accepted)}"
            self.fail(field, rule, value)
        return value

    def sub(self, field: str) -> "_Reader":
        return _Reader(self.get(field), self.source, f"{self.prefix}{field}.")

    def strings(self, field: str, accepted: Sequence[str], length: int) -> list[str]:
        value = self.get(field)
        if not isinstance(value, list) or any(v not in accepted for v in cast(list[Any], value)):
            self.fail(field, f"must be a list of {list(accepted)}", value)
        if len(cast(list[str], value)) != length:
            self.fail(field, f"must have num_hidden_layers = {length} entries", len(value))
        return value

    def none_left(self) -> None:
        """Every key of a section that is all maths must be known."""
        for field in self.data:
            if field not in self.seen:
                self.fail(field, "is an unknown field that may change the maths", self.data[field])

    def read(self) -> dict[str, Any]:
        """All fields of ``ModelConfig``; problems are collected first."""
        self.architecture()
        out: dict[str, Any] = {}
        problems: list[str] = []

        def attempt(step: Callable[[], Any], *needed: str) -> None:
            """Runs a step where what it reads of ``out`` is known; keeps the fields it returns."""
            if all(field in out for field in needed):
                try:
                    found = step()
                except CheckpointError as error:
                    problems.extend(error.problems)
                else:
                    out.update(found if isinstance(found, dict) else {})

        for field, (accepted, default) in _SWITCHES.items():
            attempt(lambda f=field, a=accepted, d=default: self.switch(f, a, d))
        for field in _POSITIVE_INTS:
            attempt(lambda f=field: {f: self.integer(f)})
        for field in _POSITIVE_FLOATS:
            attempt(lambda f=field: {f: self.number(f)})
        for field in ("num_nextn_predict_layers", "bos_token_id", "eos_token_id"):
            attempt(lambda f=field: {f: self.integer(f, minimum=0)})
        layers, drafters = "num_hidden_layers", "num_nextn_predict_layers"
        rotary = "qk_rope_head_dim"
        attempt(lambda: {rotary: self.rotary_width(out["head_dim"])}, "head_dim")
        attempt(lambda: self.rope(out), "head_dim", rotary, "max_position_embeddings")
        attempt(lambda: {"num_hash_layers": self.hash_layers(out[layers])}, layers)
        attempt(
            lambda: {"compress_ratios": self.ratios(out[layers], out[drafters])}, layers, drafters
        )
        attempt(self.quantization)
        attempt(lambda: self.widths(out), *_POSITIVE_INTS, rotary)
        if problems:
            self.seen.update(_READ_LATE)
        attempt(self.unknown)
        if len(problems) > 1:
            text = f"{self.source}: {len(problems)} problems: " + "; ".join(problems[:LISTED])
            if len(problems) > LISTED:
                text += f"; ... and {len(problems) - LISTED} more"
            raise CheckpointError(text, problems)
        if problems:
            raise CheckpointError(problems[0])
        return out

    def architecture(self) -> None:
        names = self.get("architectures", None)
        kind = self.get("model_type", None)
        named = names[0] if isinstance(names, list) and names else None
        for found, ours in ((named, _ARCHITECTURE), (kind, _MODEL_TYPE)):
            if found is not None and found != ours:
                raise CheckpointError(
                    f"{self.source}: unsupported architecture {shown(str(found))}; "
                    f"this package loads {_MODEL_TYPE}"
                )
        if named is None and kind is None:
            self.fail("model_type", f"must be {_MODEL_TYPE!r}", kind)

    def rotary_width(self, head_dim: int) -> int:
        fraction = self.get("partial_rotary_factor", None)
        if fraction is None:
            return self.integer("qk_rope_head_dim")
        width = round(head_dim * self.number("partial_rotary_factor"))
        if "qk_rope_head_dim" in self.data and self.integer("qk_rope_head_dim") != width:
            rule = f"must be head_dim * partial_rotary_factor = {width}"
            self.fail("qk_rope_head_dim", rule, self.data["qk_rope_head_dim"])
        return width

    def rope(self, out: Mapping[str, Any]) -> dict[str, Any]:
        nested = self.get("rope_parameters", None)
        scaling = self.get("rope_scaling", None)
        if nested is None:
            yarn = _Reader(self.get("rope_scaling"), self.source, "rope_scaling.")
            result = yarn.yarn(types=("yarn",))
            result["rope_theta"] = self.number("rope_theta")
            result["compress_rope_theta"] = self.number("compress_rope_theta")
            return result
        if scaling is not None:
            self.fail("rope_scaling", "must be absent beside rope_parameters", scaling)
        both = self.sub("rope_parameters")
        main, compress = both.sub("main"), both.sub("compress")
        both.none_left()
        fraction = out["qk_rope_head_dim"] / out["head_dim"]
        for part in (main, compress):
            part.switch("partial_rotary_factor", (fraction,), fraction)
        main.rope_type(("default",))
        theta, compress_theta = main.number("rope_theta"), compress.number("rope_theta")
        main.none_left()
        self.switch("rope_theta", (theta,), theta)
        self.switch("compress_rope_theta", (compress_theta,), compress_theta)
        # transformers computes a magnitude factor unless the file says 1.0: no default here.
        if compress.rope_type(("yarn", "default")) == "yarn":
            compress.switch("attention_factor", (1.0,))
            result = compress.yarn(types=("yarn",))
        else:
            compress.none_left()
            result = {
                "rope_factor": 1.0,
                "rope_beta_fast": 32.0,
                "rope_beta_slow": 1.0,
                "rope_original_max_position_embeddings": out["max_position_embeddings"],
            }
        return result | {"rope_theta": theta, "compress_rope_theta": compress_theta}

    def rope_type(self, accepted: Sequence[str]) -> str:
        names = [name for name in ("type", "rope_type") if name in self.data]
        if not names:
            self.get("rope_type")
        for name in names:
            self.switch(name, accepted)
        if len({self.data[name] for name in names}) > 1:
            self.fail("rope_type", "must equal type", self.data["rope_type"])
        return self.data[names[0]]

    def yarn(self, types: Sequence[str]) -> dict[str, Any]:
        self.rope_type(types)
        self.switch("attention_factor", (1.0,), 1.0)
        original = "original_max_position_embeddings"
        result = {
            "rope_factor": self.number("factor"),
            "rope_beta_fast": self.number("beta_fast"),
            "rope_beta_slow": self.number("beta_slow"),
            "rope_original_max_position_embeddings": self.integer(original),
        }
        if result["rope_factor"] < 1:
            self.fail("factor", "must be >= 1", result["rope_factor"])
        if result["rope_beta_fast"] <= result["rope_beta_slow"]:
            self.fail("beta_fast", "must exceed beta_slow", result["rope_beta_fast"])
        self.none_left()
        return result

    def hash_layers(self, layers: int) -> int:
        found: set[int] = set()
        if "mlp_layer_types" in self.data:
            kinds = self.strings("mlp_layer_types", ("hash_moe", "moe"), layers)
            count = kinds.count("hash_moe")
            if "hash_moe" in kinds[count:]:
                self.fail("mlp_layer_types", "must list hash_moe layers first", kinds)
            found.add(count)
        if "num_hash_layers" in self.data or not found:
            count = self.integer("num_hash_layers", minimum=0)
            if count > layers:
                self.fail("num_hash_layers", f"must be <= num_hidden_layers = {layers}", count)
            found.add(count)
        if len(found) > 1:
            self.fail("num_hash_layers", "must agree with mlp_layer_types", sorted(found))
        return found.pop()

    def ratios(self, layers: int, drafters: int) -> tuple[int, ...]:
        typed: tuple[int, ...] | None = None
        if "layer_types" in self.data:
            kinds = self.strings("layer_types", tuple(_LAYER_TYPES), layers)
            typed = tuple(_LAYER_TYPES[kind].value for kind in kinds) + (0,) * drafters
            rates = self.sub("compress_rates")
            for name, rate in _COMPRESS_RATES.items():
                rates.switch(name, (rate,), rate)
            rates.none_left()
            if "compress_ratios" not in self.data:
                return typed
        self.get("compress_rates", None)
        value = self.get("compress_ratios")
        known = tuple(kind.value for kind in LayerKind)
        if not isinstance(value, list):
            self.fail("compress_ratios", "must be a list of integers", value)
        for i, ratio in enumerate(cast(list[Any], value)):
            if type(ratio) is not int or ratio not in known:
                self.fail(f"compress_ratios[{i}]", f"must be one of {list(known)}", ratio)
        need = layers + drafters
        result = tuple(cast(list[int], value)[:need])
        if len(result) < need:
            rule = f"must have num_hidden_layers + num_nextn_predict_layers = {need} entries"
            self.fail("compress_ratios", rule, len(result))
        if any(result[layers:]):
            self.fail(f"compress_ratios[{layers}:]", "must be 0 for MTP modules", result[layers:])
        if typed is not None and typed != result:
            self.fail("compress_ratios", f"must agree with layer_types {typed}", result)
        return result

    def quantization(self) -> None:
        if self.get("quantization_config", None) is None:
            return
        section = self.sub("quantization_config")
        method = section.switch("quant_method", ("fp8", "modelopt", "compressed-tensors"))
        if method == "fp8":
            for field, value in QUANTIZATION.items():
                section.switch(field, (value,))
            section.switch("expert_dtype", ("fp4", "fp8"), "fp4")
            for field in ("modules_to_not_convert", "dequantize"):
                section.get(field, None)
        if method == "compressed-tensors":
            for field in _COMPRESSED_TENSORS:
                section.get(field, None)
            # Rotations of activations and another cache would be other maths.
            for field in ("transform_config", "sparsity_config", "kv_cache_scheme"):
                section.switch(field, (None, {}), None)
        else:  # what Model-Optimizer adds; the tensors say what is quantised how
            section.switch("moe_quant_algo", (None, "NVFP4"), None)
            section.switch("quant_algo", (None, "MIXED_PRECISION", "NVFP4"), None)
            section.switch("group_size", (None, 16), None)
            for field in ("kv_cache_quant_algo", "kv_cache_scheme"):
                section.switch(field, (None,), None)
            for field in _MODEL_OPTIMIZER:
                section.get(field, None)
        section.none_left()

    def widths(self, out: Mapping[str, Any]) -> None:
        rotary, head, index = out["qk_rope_head_dim"], out["head_dim"], out["index_head_dim"]
        if rotary % 2 or rotary >= head:
            self.fail("qk_rope_head_dim", f"must be even and < head_dim = {head}", rotary)
        if (head - rotary) % 64:
            self.fail("head_dim", "- qk_rope_head_dim must be a multiple of 64", head - rotary)
        if index % 32 or index & (index - 1) or index < rotary:
            rule = f"must be a power of two, a multiple of 32 and >= qk_rope_head_dim = {rotary}"
            self.fail("index_head_dim", rule, index)
        groups, heads = out["o_groups"], out["num_attention_heads"]
        if heads % groups:
            self.fail("o_groups", f"must divide num_attention_heads = {heads}", groups)
        picks, experts = out["num_experts_per_tok"], out["n_routed_experts"]
        if picks > experts:
            self.fail("num_experts_per_tok", f"must be <= n_routed_experts = {experts}", picks)

    def unknown(self) -> None:
        inert: list[str] = []
        problems: list[str] = []
        for field in self.data:
            if field in self.seen:
                continue
            value = self.data[field]
            harmless = field in _INERT or field.startswith(_DRAFTER_PREFIXES) or _off(field, value)
            if not harmless and _SOUNDS_LIKE_MATHS.search(field):
                rule = "is an unknown field that may change the maths"
                problems.append(f"{self.source}: {shown(field)} {rule}, got {brief(value)}")
            else:
                inert.append(field)
        if problems:
            raise CheckpointError("; ".join(problems), problems)
        if inert:
            _log.debug("%s: ignored fields: %s", self.source, ", ".join(sorted(inert)))


_FLASH: Final[dict[str, Any]] = {
    "architectures": [_ARCHITECTURE],
    "model_type": _MODEL_TYPE,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "sliding_window": 128,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
    "compress_rope_theta": 160000,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "max_position_embeddings": 1048576,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "num_nextn_predict_layers": 1,
    "vocab_size": 129280,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "expert_dtype": "fp4",
    "quantization_config": QUANTIZATION,
}
_PRO: Final[dict[str, Any]] = _FLASH | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.5,
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4, 0],
    "index_topk": 1024,
}
