"""The table of parameters: official checkpoint name -> path in the params tree, shape and rule.

One table serves the expected tree, the checks and the loading; a second one maps the spellings
that transformers writes to the official names (model.md sections 7.1 and 7.2).
"""

import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.precision import ACT_SCALES, LINEAR_FORMATS, Precision, weight_format
from dsv4_jax.quant.bits import stored_bytes
from dsv4_jax.typing import E2M1, E4M3, UE8M0

__all__ = [
    "FUSED",
    "MTP",
    "Parameter",
    "expected_tree",
    "leaves",
    "official_name",
    "parameters",
    "set_path",
    "target_format",
    "tree_bytes",
    "uses_act_scales",
]

FUSED: Final = re.compile(r"(layers\.\d+\.ffn\.experts)\.(gate_up_proj|down_proj)")
"""Official spelling of the fused expert stacks of transformers."""

MTP: Final = re.compile(r"(?:model\.)?mtp\.(\d{1,6})\.")
"""Any spelling of a tensor of an MTP module."""


class _Row(NamedTuple):
    """A line of the table.

    ``rule``: a ``Precision`` field (a linear, stored as that field says), ``"dense"`` (unquantised,
    as ``Precision.dense`` says), ``"float32"`` or ``"int32"``. ``when``: the layers that have it.
    """

    name: str
    path: str
    shape: str
    rule: str
    when: str = "always"


_HEAD: Final = (
    _Row("embed.weight", "embed/weight", "V D", "dense"),
    _Row("norm.weight", "norm/weight", "D", "dense"),
    _Row("hc_head_fn", "hc_head/fn", "n nD", "float32"),
    _Row("hc_head_base", "hc_head/base", "n", "float32"),
    _Row("hc_head_scale", "hc_head/scale", "1", "float32"),
    _Row("head.weight", "head/weight", "V D", "dense"),
)
_LAYER: Final = (
    _Row("attn_norm.weight", "attn_norm/weight", "D", "dense"),
    _Row("ffn_norm.weight", "ffn_norm/weight", "D", "dense"),
    _Row("hc_attn_fn", "hc_attn/fn", "mix nD", "float32"),
    _Row("hc_attn_base", "hc_attn/base", "mix", "float32"),
    _Row("hc_attn_scale", "hc_attn/scale", "3", "float32"),
    _Row("hc_ffn_fn", "hc_ffn/fn", "mix nD", "float32"),
    _Row("hc_ffn_base", "hc_ffn/base", "mix", "float32"),
    _Row("hc_ffn_scale", "hc_ffn/scale", "3", "float32"),
    _Row("attn.attn_sink", "attn/attn_sink", "H", "float32"),
    _Row("attn.wq_a", "attn/wq_a", "Rq D", "wq_a"),
    _Row("attn.q_norm.weight", "attn/q_norm/weight", "Rq", "dense"),
    _Row("attn.wq_b", "attn/wq_b", "Hd Rq", "wq_b"),
    _Row("attn.wkv", "attn/wkv", "d D", "wkv"),
    _Row("attn.kv_norm.weight", "attn/kv_norm/weight", "d", "dense"),
    _Row("attn.wo_a", "attn/wo_a", "GRo Hd/G", "wo_a"),
    _Row("attn.wo_b", "attn/wo_b", "D GRo", "wo_b"),
    _Row("attn.compressor.wkv.weight", "attn/compressor/wkv/weight", "cd D", "dense", "pool"),
    _Row("attn.compressor.wgate.weight", "attn/compressor/wgate/weight", "cd D", "dense", "pool"),
    _Row("attn.compressor.ape", "attn/compressor/ape", "m cd", "float32", "pool"),
    _Row("attn.compressor.norm.weight", "attn/compressor/norm/weight", "d", "dense", "pool"),
    _Row("attn.indexer.wq_b", "attn/indexer/wq_b", "Hidi Rq", "indexer_wq_b", "index"),
    _Row(
        "attn.indexer.weights_proj.weight",
        "attn/indexer/weights_proj/weight",
        "Hi D",
        "dense",
        "index",
    ),
    _Row(
        "attn.indexer.compressor.wkv.weight",
        "attn/indexer/compressor/wkv/weight",
        "cdi D",
        "dense",
        "index",
    ),
    _Row(
        "attn.indexer.compressor.wgate.weight",
        "attn/indexer/compressor/wgate/weight",
        "cdi D",
        "dense",
        "index",
    ),
    _Row("attn.indexer.compressor.ape", "attn/indexer/compressor/ape", "m cdi", "float32", "index"),
    _Row(
        "attn.indexer.compressor.norm.weight",
        "attn/indexer/compressor/norm/weight",
        "di",
        "dense",
        "index",
    ),
    _Row("ffn.gate.weight", "ffn/gate/weight", "E D", "dense"),
    _Row("ffn.gate.bias", "ffn/gate/bias", "E", "float32", "score"),
    _Row("ffn.gate.tid2eid", "ffn/gate/tid2eid", "V k", "int32", "hash"),
    _Row("ffn.experts.{e}.w1", "ffn/experts/w1", "I D", "experts"),
    _Row("ffn.experts.{e}.w2", "ffn/experts/w2", "D I", "experts"),
    _Row("ffn.experts.{e}.w3", "ffn/experts/w3", "I D", "experts"),
    _Row("ffn.shared_experts.w1", "ffn/shared_experts/w1", "I D", "shared_expert"),
    _Row("ffn.shared_experts.w2", "ffn/shared_experts/w2", "D I", "shared_expert"),
    _Row("ffn.shared_experts.w3", "ffn/shared_experts/w3", "I D", "shared_expert"),
)
_MTP: Final = (
    _Row("e_proj", "e_proj", "D D", "mtp_proj"),
    _Row("h_proj", "h_proj", "D D", "mtp_proj"),
    _Row("enorm.weight", "enorm/weight", "D", "dense"),
    _Row("hnorm.weight", "hnorm/weight", "D", "dense"),
    *(row for row in _HEAD if row.name not in ("embed.weight", "head.weight")),
)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a given model.

    Attributes:
        name: official name; of a linear without ``.weight``; ``{e}`` stands for the expert.
        path: keys in the params tree; of a linear without the leaf.
        shape: logical shape, ``[out, in]`` for a linear, without the expert axis.
        rule: see ``_Row``.
        experts: length of the leading expert axis, 0 without one.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    rule: str
    experts: int = 0

    @property
    def is_linear(self) -> bool:
        """Whether it has a number format of its own (``.weight`` and ``.scale``)."""
        return self.rule not in ("dense", "float32", "int32")

    @property
    def kind(self) -> str:
        """The name without layer and expert number: ``attn.wq_b``, ``mtp.e_proj``."""
        name = self.name.replace(".{e}", "").removesuffix(".weight")
        return re.sub(r"^layers\.\d+\.", "", re.sub(r"^mtp\.\d+\.", "mtp.", name))

    @property
    def module(self) -> str:
        """``layers.3``, ``mtp.0``, or the name itself outside the layers."""
        match = re.match(r"(layers|mtp)\.\d+", self.name)
        return match.group() if match else self.name

    def names(self) -> list[str]:
        """Official names, one per expert."""
        if not self.experts:
            return [self.name]
        return [self.name.replace("{e}", str(e)) for e in range(self.experts)]


def _sizes(config: ModelConfig, ratio: int) -> dict[str, int]:
    overlap = 2 if ratio == LayerKind.CSA.value else 1
    return {
        "1": 1,
        "3": 3,
        "V": config.vocab_size,
        "D": config.hidden_size,
        "n": config.hc_mult,
        "nD": config.hc_mult * config.hidden_size,
        "mix": (2 + config.hc_mult) * config.hc_mult,
        "H": config.num_attention_heads,
        "d": config.head_dim,
        "Hd": config.num_attention_heads * config.head_dim,
        "Hd/G": config.num_attention_heads * config.head_dim // config.o_groups,
        "GRo": config.o_groups * config.o_lora_rank,
        "Rq": config.q_lora_rank,
        "m": ratio,
        "cd": overlap * config.head_dim,
        "Hi": config.index_n_heads,
        "di": config.index_head_dim,
        "Hidi": config.index_n_heads * config.index_head_dim,
        "cdi": overlap * config.index_head_dim,
        "E": config.n_routed_experts,
        "k": config.num_experts_per_tok,
        "I": config.moe_intermediate_size,
    }


def _expand(
    rows: tuple[_Row, ...], name: str, path: tuple[str, ...], config: ModelConfig, layer: int | None
) -> Iterator[Parameter]:
    kind = LayerKind.SWA if layer is None else config.layer_kind(layer)
    hashed = layer is not None and config.is_hash_layer(layer)
    has = {
        "always": True,
        "pool": kind is not LayerKind.SWA,
        "index": kind is LayerKind.CSA,
        "hash": hashed,
        "score": not hashed,
    }
    size = _sizes(config, kind.value)
    for row in rows:
        if has[row.when]:
            experts = config.n_routed_experts if "{e}" in row.name else 0
            rule = "mtp_experts" if experts and name.startswith("mtp.") else row.rule
            shape = tuple(size[symbol] for symbol in row.shape.split())
            yield Parameter(
                name + row.name, path + tuple(row.path.split("/")), shape, rule, experts
            )


def parameters(config: ModelConfig, mtp: bool) -> list[Parameter]:
    """Every parameter of the model, of its MTP module too when ``mtp``."""
    out = list(_expand(_HEAD, "", (), config, None))
    for i in range(config.num_hidden_layers):
        out += _expand(_LAYER, f"layers.{i}.", (f"layers_{i}",), config, i)
    if mtp:
        out += _expand(_LAYER + _MTP, "mtp.0.", ("mtp_0",), config, config.num_hidden_layers)
    return out


def target_format(parameter: Parameter, precision: Precision) -> str:
    """Its form in the tree: ``float32``, ``bfloat16``, ``int32``, ``fp8``, ``mxfp4``, ``nvfp4``."""
    if parameter.rule in ("float32", "int32"):
        return parameter.rule
    choice = getattr(precision, parameter.rule)
    return weight_format(choice) if choice in LINEAR_FORMATS else choice


def leaves(parameter: Parameter, precision: Precision) -> dict[tuple[str, ...], Any]:
    """Path -> ``jax.ShapeDtypeStruct`` of each leaf of a parameter.

    Raises:
        ValueError: the input width is no multiple of the format's block.
    """
    form = target_format(parameter, precision)
    lead = (parameter.experts,) if parameter.experts else ()
    shape = (*lead, *parameter.shape)

    def struct(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    if form in ("float32", "bfloat16", "int32"):
        path = (*parameter.path, "weight") if parameter.is_linear else parameter.path
        return {path: struct(shape, jnp.dtype(form))}
    rows, cols = parameter.shape
    block = {"fp8": 1, "mxfp4": 32, "nvfp4": 16}[form]
    if cols % block:
        raise ValueError(
            f"{parameter.name}: input width must be a multiple of {block} for {form}, got {cols}"
        )
    if form == "fp8":
        scale = (*lead, -(-rows // 128), -(-cols // 128))
        found = {"weight": struct(shape, E4M3), "scale": struct(scale, UE8M0)}
    elif form == "mxfp4":
        scale = (*lead, rows, cols // 32)
        found = {"weight": struct(shape, E2M1), "scale": struct(scale, UE8M0)}
    else:
        found = {
            "weight": struct(shape, E2M1),
            "block_scale": struct((*lead, rows, cols // 16), E4M3),
            "global_scale": struct(lead, jnp.float32),
        }
    return {(*parameter.path, leaf): value for leaf, value in found.items()}


def uses_act_scales(rule: str, precision: Precision) -> bool:
    """Whether a linear takes the static scales of its activations, where the files have some."""
    return rule in ("experts", "mtp_experts") and getattr(precision, rule) == "nvfp4_w4a4"


def set_path(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Stores ``value`` under the nested keys ``path``."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def expected_tree(
    config: ModelConfig, precision: Precision, mtp: bool, act_scales: Collection[str] = ()
) -> dict[str, Any]:
    """The params tree as nested ``jax.ShapeDtypeStruct``; equals ``jax.eval_shape(model.init)``.

    But for the static activation scales of experts in ``act_scales`` (`Resolved.act_scales`).
    """
    tree: dict[str, Any] = {}
    for parameter in parameters(config, mtp):
        for path, struct in leaves(parameter, precision).items():
            set_path(tree, path, struct)
        *parent, key = parameter.path
        if key in ACT_SCALES and parameter.rule in act_scales:
            if uses_act_scales(parameter.rule, precision):
                struct = jax.ShapeDtypeStruct((parameter.experts,), jnp.float32)
                set_path(tree, (*parent, ACT_SCALES[key]), struct)
    return tree


def tree_bytes(tree: Mapping[str, Any]) -> int:
    """Bytes that the tree occupies on a device; a ``float4_e2m1fn`` counts one half."""
    return sum(stored_bytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


_TOP: Final = {
    "embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "hc_head.hc_fn": "hc_head_fn",
    "hc_head.hc_base": "hc_head_base",
    "hc_head.hc_scale": "hc_head_scale",
}
_COMPRESSOR: Final = {
    "kv_proj": "wkv",
    "gate_proj": "wgate",
    "kv_norm": "norm",
    "position_bias": "ape",
}
# Module of a transformers layer -> official; the longest match at a dot wins.
_MODULES: Final[dict[str, str]] = {
    "attn.norm": "attn.kv_norm",
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj": "attn.wq_a",
    "self_attn.q_a_norm": "attn.q_norm",
    "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_proj": "attn.wkv",
    "self_attn.kv_norm": "attn.kv_norm",
    "self_attn.o_a_proj": "attn.wo_a",
    "self_attn.o_b_proj": "attn.wo_b",
    "self_attn.compressor.indexer.q_b_proj": "attn.indexer.wq_b",
    "self_attn.compressor.indexer.scorer.weights_proj": "attn.indexer.weights_proj",
    "self_attn.compressor.indexer.weights_proj": "attn.indexer.weights_proj",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.shared_experts.gate_proj": "ffn.shared_experts.w1",
    "mlp.shared_experts.down_proj": "ffn.shared_experts.w2",
    "mlp.shared_experts.up_proj": "ffn.shared_experts.w3",
    "mlp": "ffn",
}
_MODULES.update(
    {f"self_attn.compressor.{k}": f"attn.compressor.{v}" for k, v in _COMPRESSOR.items()}
)
_MODULES.update(
    {
        f"self_attn.compressor.indexer.{k}": f"attn.indexer.compressor.{v}"
        for k, v in _COMPRESSOR.items()
    }
)

_PROJECTIONS: Final = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_EXPERT: Final = re.compile(r"mlp\.experts\.(\d{1,6})\.(gate_proj|down_proj|up_proj)\.(.+)")


def official_name(name: str) -> str:
    """The official spelling of a tensor's name; a name that no table knows comes back as it is.

    The fused stacks of transformers become ``layers.N.ffn.experts.{gate_up_proj,down_proj}``, which
    the release does not have; ``validate.split_fused`` cuts them into experts.
    """
    short = name.removeprefix("model.")
    if short in _TOP:
        return _TOP[short]
    match = re.fullmatch(r"(layers\.\d{1,6}\.)(.+)", short)
    if match is None:
        return short
    layer, rest = match.groups()
    expert = _EXPERT.fullmatch(rest)
    if expert is not None:  # fused stacks that a quantiser took apart
        return f"{layer}ffn.experts.{expert[1]}.{_PROJECTIONS[expert[2]]}.{expert[3]}"
    parts = rest.split(".")
    for end in range(len(parts), 0, -1):
        module = _MODULES.get(".".join(parts[:end]))
        if module is not None:
            return layer + ".".join([module, *parts[end:]])
    return short
