"""ModelConfig.from_hf: both spellings, every refusal."""

import copy
import logging
from typing import Any

import pytest

from dsv4_jax.checkpoint import CheckpointError
from dsv4_jax.config import LayerKind, ModelConfig
from tests.support import tiny


def _official() -> dict[str, Any]:
    return tiny.official()[0]


def _transformers() -> dict[str, Any]:
    """What transformers 5.23 saves for the same model, by hand."""
    config = _official()
    for key in ("compress_ratios", "num_hash_layers", "rope_scaling", "quantization_config"):
        del config[key]
    names = {0: "sliding_attention", 4: "compressed_sparse_attention"}
    names[128] = "heavily_compressed_attention"
    config["layer_types"] = [names[r] for r in (0, 128, 4, 128, 4)]
    config["mlp_layer_types"] = ["hash_moe", "hash_moe", "moe", "moe", "moe"]
    config["compress_rates"] = {names[4]: 4, names[128]: 128}
    config["partial_rotary_factor"] = 0.125
    config["rope_parameters"] = {
        "main": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.125},
        "compress": {
            "rope_type": "yarn",
            "type": "yarn",
            "attention_factor": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "partial_rotary_factor": 0.125,
            "rope_theta": 160000,
        },
    }
    return config


def _set(config: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(config)
    *parents, last = field.split("/")
    at = config
    for parent in parents:
        at = at[parent]
    if value is _DELETE:
        del at[last]
    else:
        at[last] = value
    return config


_DELETE = object()


def test_both_spellings_agree() -> None:
    official = ModelConfig.from_hf(_official())
    assert ModelConfig.from_hf(_transformers()) == official
    assert official.compress_ratios == (0, 128, 4, 128, 4, 0)
    assert (official.rope_factor, official.compress_rope_theta) == (16.0, 160000.0)
    assert hash(official) == hash(ModelConfig.from_hf(_official()))


def test_transformers_writes_what_we_read(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = _official()
    del config["quantization_config"]
    saved = transformers.DeepseekV4Config(**config)
    assert ModelConfig.from_hf(saved.to_dict() | {"architectures": None}) == ModelConfig.from_hf(
        _official()
    )


def test_published_sizes() -> None:
    flash, pro = ModelConfig.flash(), ModelConfig.pro()
    kinds = [flash.layer_kind(i) for i in range(flash.num_hidden_layers)]
    assert [kinds.count(k) for k in LayerKind] == [2, 21, 20]
    kinds = [pro.layer_kind(i) for i in range(pro.num_hidden_layers)]
    assert [kinds.count(k) for k in LayerKind] == [0, 30, 31]
    assert flash.layer_kind(43) is pro.layer_kind(61) is LayerKind.SWA
    assert (flash.routed_scaling_factor, pro.routed_scaling_factor) == (1.5, 2.5)


def test_extra_ratios_of_newer_drafters_are_dropped() -> None:
    config = _set(_official(), "compress_ratios", [0, 128, 4, 128, 4, 0, 0, 0])
    assert ModelConfig.from_hf(config).compress_ratios == (0, 128, 4, 128, 4, 0)


def test_compress_rope_without_scaling_is_factor_one() -> None:
    config = _set(
        _transformers(), "rope_parameters/compress", {"rope_type": "default", "rope_theta": 160000}
    )
    assert ModelConfig.from_hf(config).rope_factor == 1.0


_BAD = [
    ("hidden_size", _DELETE, "hidden_size is missing"),
    ("hidden_size", "128", "hidden_size must be an integer"),
    ("hidden_size", -1, "hidden_size must be an integer"),
    ("hidden_size", True, "hidden_size must be an integer"),
    ("hidden_size", 128.0, "hidden_size must be an integer"),
    ("rms_norm_eps", 0, "rms_norm_eps must be a positive"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps must be a positive"),
    ("swiglu_limit", None, "swiglu_limit must be a positive"),
    ("hidden_act", "gelu", "hidden_act must be 'silu'"),
    ("scoring_func", "sigmoid", "scoring_func must be"),
    ("topk_method", "greedy", "topk_method must be"),
    ("norm_topk_prob", False, "norm_topk_prob must be True"),
    ("norm_topk_prob", 1, "norm_topk_prob must be True"),
    ("attention_bias", True, "attention_bias must be False"),
    ("tie_word_embeddings", True, "tie_word_embeddings must be False"),
    ("hc_mult", 2, "hc_mult must be 4"),
    ("n_shared_experts", 2, "n_shared_experts must be 1"),
    ("num_key_value_heads", 8, "num_key_value_heads must be 1"),
    ("qk_rope_head_dim", 512, "qk_rope_head_dim must be even and < head_dim"),
    ("head_dim", 500, "head_dim - qk_rope_head_dim must be a multiple of 64"),
    ("index_head_dim", 96, "index_head_dim must be a power of two"),
    ("o_groups", 3, "o_groups must divide"),
    ("num_hash_layers", 6, "num_hash_layers must be <="),
    ("num_experts_per_tok", 5, "num_experts_per_tok must be <="),
    ("compress_ratios", [0, 128, 4, 128, 4], "compress_ratios must have"),
    ("compress_ratios", [0, 128, 8, 128, 4, 0], r"compress_ratios\[2\] must be one of"),
    ("compress_ratios", [0, 128, 4, 128, 4, 4], "must be 0 for MTP"),
    ("compress_ratios", 4, "compress_ratios must be a list"),
    ("rope_scaling", _DELETE, "rope_scaling is missing"),
    ("rope_scaling/type", "linear", "rope_scaling.type must be 'yarn'"),
    ("rope_scaling/factor", _DELETE, "rope_scaling.factor is missing"),
    ("rope_scaling/mscale", 0.7, "rope_scaling.mscale is an unknown field"),
    ("rope_scaling/attention_factor", 1.2, "rope_scaling.attention_factor must be 1.0"),
    ("quantization_config/weight_block_size", [64, 64], "weight_block_size must be"),
    ("quantization_config/scale_fmt", _DELETE, "scale_fmt is missing"),
    ("quantization_config/moe_quant_algo", "INT4", "moe_quant_algo must be None or 'NVFP4'"),
    ("quantization_config/group_size", 32, "group_size must be None or 16"),
    ("quantization_config/kv_cache_quant_algo", "FP8", "kv_cache_quant_algo must be None"),
    ("quantization_config/smoothing", 0.5, "smoothing is an unknown field"),
    ("quantization_config", {"quant_method": "awq"}, "quant_method must be 'fp8' or"),
    (
        "quantization_config",
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}},
        "transform_config must be None",
    ),
    ("expert_dtype", "int4", "expert_dtype must be"),
    ("attn_logit_softcapping", 30.0, "attn_logit_softcapping is an unknown field"),
    ("rope_local_base_freq", 5.0, "rope_local_base_freq is an unknown field"),
    ("residual_scaling", 2.0, "residual_scaling is an unknown field"),
    ("residual_scaling", 0, "residual_scaling is an unknown field"),
    ("kv_norm_eps", 0.0, "kv_norm_eps is an unknown field"),
    ("use_sliding_window", False, "use_sliding_window is an unknown field"),
    ("attention_sinks", False, "attention_sinks is an unknown field"),
    ("index_hadamard", False, "index_hadamard is an unknown field"),
]


@pytest.mark.parametrize(("field", "value", "message"), _BAD)
def test_official_refusals(field: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        ModelConfig.from_hf(_set(_official(), field, value), source="dir/config.json")
    assert str(error.value).startswith("dir/config.json: ")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layer_types", ["full_attention"] * 5, "layer_types must be a list of"),
        ("layer_types", ["sliding_attention"] * 4, "layer_types must have"),
        ("mlp_layer_types", ["moe", "hash_moe", "moe", "moe", "moe"], "hash_moe layers first"),
        ("compress_rates/compressed_sparse_attention", 8, "must be 4"),
        ("partial_rotary_factor", 0.25, "qk_rope_head_dim must be head_dim"),
        ("rope_parameters/main/rope_type", "yarn", "main.rope_type must be 'default'"),
        ("rope_parameters/main/factor", 2, "main.factor is an unknown field"),
        ("rope_parameters/compress/rope_type", "longrope", "compress.rope_type must be"),
        ("rope_parameters/compress/attention_factor", _DELETE, "attention_factor is missing"),
        ("rope_parameters/compress/partial_rotary_factor", 0.5, "partial_rotary_factor must be"),
        ("rope_parameters/other", {}, "rope_parameters.other is an unknown"),
        ("rope_theta", 500000, "rope_theta must be 10000"),
        ("compress_rope_theta", 10000, "compress_rope_theta must be 160000"),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling must be absent"),
        ("num_hash_layers", 3, "num_hash_layers must agree"),
        ("compress_ratios", [4, 4, 4, 4, 4, 0], "compress_ratios must agree"),
        ("mlp_bias", True, "mlp_bias must be False"),
    ],
)
def test_transformers_refusals(field: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_hf(_set(_transformers(), field, value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_extra", None),
        ("use_vision", False),
        ("attention_gate", False),
        ("layer_norm_bias", False),
        ("num_dense_layers", 0),
        ("attn_output_dropout", 0.0),
        ("attn_logit_softcapping", 0.0),
    ],
)
def test_what_is_off_here_too(field: str, value: Any) -> None:
    assert ModelConfig.from_hf(_official() | {field: value}) == ModelConfig.from_hf(_official())


def test_inert_fields_are_listed_at_debug_level(caplog: pytest.LogCaptureFixture) -> None:
    config = _official() | {"my_note": "x", "dspark_block_size": 5, "rope_extra": None}
    with caplog.at_level(logging.DEBUG, logger="dsv4_jax.config"):
        ModelConfig.from_hf(config)
    for field in ("my_note", "dspark_block_size", "rope_extra", "initializer_range"):
        assert field in caplog.text
