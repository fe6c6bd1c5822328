"""The parameter table: totals of model.md 1.2, spellings, leaves per precision."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax.checkpoint.names import expected_tree, official_name, parameters, tree_bytes
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import PRESETS, Precision
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.support import tiny

INT32_TABLES = 9_308_160  # the release stores the three hash tables as int64


@pytest.mark.parametrize(
    ("config", "with_mtp", "without_mtp", "tensors"),
    [
        pytest.param(ModelConfig.flash(), 159_609_485_896, 156_015_698_140, 69_187, id="V4-Flash"),
        pytest.param(ModelConfig.pro(), 864_704_792_696, 850_748_205_004, 145_116, id="V4-Pro"),
    ],
)
def test_totals_of_the_release(
    config: ModelConfig, with_mtp: int, without_mtp: int, tensors: int
) -> None:
    official = PRESETS["official"]
    assert tree_bytes(expected_tree(config, official, True)) == with_mtp - INT32_TABLES
    assert tree_bytes(expected_tree(config, official, False)) == without_mtp - INT32_TABLES
    counts = (len(p.names()) * (2 if p.is_linear else 1) for p in parameters(config, True))
    assert sum(counts) == tensors


def test_table_is_the_file() -> None:
    config, tensors = tiny.official()
    names = set()
    for parameter in parameters(ModelConfig.from_hf(config), True):
        for name in parameter.names():
            names |= {f"{name}.weight", f"{name}.scale"} if parameter.is_linear else {name}
    assert names == set(tensors)


@pytest.mark.parametrize("preset", ["official", "nvfp4"])
def test_tree_is_what_the_model_initialises(preset: str) -> None:
    from dsv4_jax.model import DeepseekV4

    config = ModelConfig.from_hf(tiny.official()[0])
    model = DeepseekV4(config=config, precision=PRESETS[preset], mtp=True)

    def init() -> Any:
        cache = model.init_cache(batch_size=1, max_len=128)
        tokens = jnp.zeros((1, 2), jnp.int32)
        return model.init(jax.random.key(0), tokens, cache, num_tokens=jnp.array([2]))["params"]

    found, expected = jax.eval_shape(init), expected_tree(config, PRESETS[preset], True)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), found, expected)
    assert all(jax.tree.leaves(same))


def test_leaves_per_format() -> None:
    config = ModelConfig.from_hf(tiny.official()[0])
    tree = expected_tree(config, Precision(experts="nvfp4_w4a16", wq_a="float32"), True)
    w1 = tree["layers_0"]["ffn"]["experts"]["w1"]
    assert (w1["weight"].shape, w1["weight"].dtype) == ((4, 128, 128), E2M1)
    assert (w1["block_scale"].shape, w1["block_scale"].dtype) == ((4, 128, 8), E4M3)
    assert (w1["global_scale"].shape, w1["global_scale"].dtype) == ((4,), jnp.float32)
    assert set(tree["mtp_0"]["ffn"]["experts"]["w1"]) == {"weight", "scale"}
    assert tree["layers_0"]["attn"]["wq_a"]["weight"].dtype == jnp.float32
    assert tree["layers_0"]["attn"]["wq_b"]["scale"].dtype == UE8M0
    assert tree["layers_0"]["ffn"]["gate"]["tid2eid"].dtype == jnp.int32
    assert "tid2eid" not in tree["layers_2"]["ffn"]["gate"]
    assert "indexer" not in tree["layers_1"]["attn"]
    assert tree["layers_1"]["attn"]["compressor"]["ape"].shape == (128, 512)
    assert tree["layers_2"]["attn"]["compressor"]["ape"].shape == (4, 1024)


def test_width_that_does_not_fit_the_format() -> None:
    config = ModelConfig.from_hf(tiny.official()[0] | {"moe_intermediate_size": 48})
    with pytest.raises(ValueError, match=r"experts.*w2.*multiple of 32 for mxfp4, got 48"):
        expected_tree(config, PRESETS["official"], False)


@pytest.mark.parametrize(
    ("name", "official"),
    [
        ("model.embed_tokens.weight", "embed.weight"),
        ("lm_head.weight", "head.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.hc_head.hc_fn", "hc_head_fn"),
        ("model.layers.3.attn.norm.weight", "layers.3.attn.kv_norm.weight"),
        ("model.layers.3.attn.q_norm.weight", "layers.3.attn.q_norm.weight"),
        ("model.layers.3.attn_hc.fn", "layers.3.hc_attn_fn"),
        ("model.layers.3.self_attn.sinks", "layers.3.attn.attn_sink"),
        ("model.layers.3.self_attn.kv_norm.weight", "layers.3.attn.kv_norm.weight"),
        (
            "model.layers.3.self_attn.compressor.indexer.kv_norm.weight",
            "layers.3.attn.indexer.compressor.norm.weight",
        ),
        (
            "model.layers.3.self_attn.compressor.indexer.scorer.weights_proj.weight",
            "layers.3.attn.indexer.weights_proj.weight",
        ),
        (
            "model.layers.3.self_attn.compressor.indexer.weights_proj.weight",
            "layers.3.attn.indexer.weights_proj.weight",
        ),
        ("model.layers.3.self_attn.compressor.position_bias", "layers.3.attn.compressor.ape"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "layers.3.ffn.gate.bias"),
        ("model.layers.3.mlp.experts.7.w2.weight", "layers.3.ffn.experts.7.w2.weight"),
        (
            "model.layers.3.mlp.shared_experts.down_proj.weight",
            "layers.3.ffn.shared_experts.w2.weight",
        ),
        ("something.else", "something.else"),
    ],
)
def test_spellings(name: str, official: str) -> None:
    assert official_name(name) == official


def test_official_names_are_their_own_spelling() -> None:
    assert all(official_name(name) == name for name in tiny.official()[1])
