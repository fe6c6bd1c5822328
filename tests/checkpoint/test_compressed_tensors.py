"""NVFP4 checkpoints of compressed-tensors: global scales are reciprocals, inverted once in FP32."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_jax.checkpoint import from_checkpoint
from dsv4_jax.checkpoint.convert import Report
from dsv4_jax.checkpoint.formats import MODEL_OPTIMIZER, Naming, weight_only
from dsv4_jax.checkpoint.load import load_params
from dsv4_jax.checkpoint.names import official_name, parameters
from dsv4_jax.checkpoint.rewrite import rewrite
from dsv4_jax.cli.common import preset_name
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import PRESETS
from tests.checkpoint.test_load_official import at, stored_bytes
from tests.support import published, tiny

CONFIG = ModelConfig.from_hf(published.compressed_tensors()[0])


@pytest.mark.parametrize("static", [True, False], ids=["w4a4", "w4a16"])
def test_loads_as_it_is(tmp_path: Path, static: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Without scales for activations the convention means that these are not quantised."""
    config, tensors = published.compressed_tensors(static)
    path = tiny.write(tmp_path, config, tensors)
    model, params = from_checkpoint(path)
    err = capsys.readouterr().err
    assert f"{path} holds FP8 linears and NVFP4 experts (compressed-tensors)" in err
    assert ("60 static activation scales of routed experts are used" in err) == static
    scales = published.take_act_scales(params)
    assert len(scales) == 10 * static
    for (layer, leaf), found in scales.items():
        w = {"up_act_scale": "w1", "down_act_scale": "w2"}[leaf]
        names = [f"{layer.replace('_', '.')}.ffn.experts.{e}.{w}" for e in range(4)]
        held = [tensors[f"{name}.input_global_scale"].array(np.float32)[0] for name in names]
        assert np.array_equal(found, np.float32(1) / np.asarray(held, np.float32))
        np.testing.assert_allclose(found, [published.act_scale(n) for n in names], rtol=1e-6)
    (line,) = [line for line in err.splitlines() if "-> fp8" in line]
    assert line.startswith("dsv4: fp8_float32 -> fp8: exact (") and "attn.indexer.wq_b" in line
    assert model.precision.experts == ("nvfp4_w4a4" if static else "nvfp4_w4a16")
    assert model.precision.shared_expert == "bfloat16"
    assert ", shared_expert=bfloat16" in err
    assert preset_name(model.precision) == "as stored"
    official = tiny.official()[1]
    for parameter in parameters(CONFIG, False):
        leaf = at(params, parameter.path)
        if parameter.experts:
            names = parameter.names()
            stored = [tensors[f"{n}.weight_global_scale"].array(np.float32)[0] for n in names]
            inverse = np.float32(1) / np.asarray(stored, np.float32)
            assert np.array_equal(leaf["global_scale"], inverse)
            for ours, name in (("weight", "weight_packed"), ("block_scale", "weight_scale")):
                raw = b"".join(tensors[f"{n}.{name}"].data for n in names)
                assert stored_bytes(leaf[ours]) == raw
        elif parameter.is_linear and "shared" not in parameter.name:
            for part in ("weight", "scale"):
                assert stored_bytes(leaf[part]) == official[f"{parameter.name}.{part}"].data


def _notes(report: Report) -> list[str]:
    return [note for note in report.notes if note.startswith("activations become NVFP4")]


def test_weight_only_that_becomes_w4a4_is_said(tmp_path: Path) -> None:
    """By loading in a preset, and by a conversion, whose result loads so."""
    config, tensors = published.compressed_tensors(static=False)
    path = tiny.write(tmp_path / "source", config, tensors)
    for preset, said in (("nvfp4_experts", 1), ("official", 0)):
        report = Report()
        load_params(path, CONFIG, PRESETS[preset], report=report)
        assert len(_notes(report)) == said, preset
    done = rewrite(path, tmp_path / "result", "nvfp4_experts")
    assert _notes(done.report) == [
        "activations become NVFP4 (nvfp4_w4a4: experts): the source has NVFP4 in its weights alone "
        "(nvfp4_w4a16)"
    ]


_WEIGHTS = {"num_bits": 4, "type": "float", "group_size": 16}
_ACTIVATIONS = {"num_bits": 4, "dynamic": "local"}


@pytest.mark.parametrize(
    ("group", "said"),
    [
        ({"weights": _WEIGHTS, "input_activations": None}, True),
        ({"weights": _WEIGHTS}, True),
        ({"weights": _WEIGHTS, "input_activations": _ACTIVATIONS}, False),
        ({"weights": _WEIGHTS | {"num_bits": 8}}, False),
        (None, False),
    ],
)
def test_weight_only_by_groups(group: Any, said: bool) -> None:
    """Of Model-Optimizer, where tensors without scales say nothing."""
    groups = {"quantization_config": {"config_groups": {"group_0": group}}}
    assert weight_only(groups, Naming(MODEL_OPTIMIZER, "a", ())) == said
    assert not weight_only(groups, Naming(MODEL_OPTIMIZER, "a", ("a.input_scale",)))
    assert not weight_only(groups, Naming(None, "", ()))
    assert not weight_only({}, Naming(MODEL_OPTIMIZER, "a", ()))


def test_values(tmp_path: Path) -> None:
    config, tensors = published.compressed_tensors()
    tree = load_params(
        tiny.write(tmp_path, config, tensors), CONFIG, PRESETS["float32"], report=Report()
    )
    for name in ("layers.0.ffn.experts.1.w1", "layers.3.ffn.experts.2.w2"):
        layer, expert = int(name[7]), int(name[-4])
        weight = tree[f"layers_{layer}"]["ffn"]["experts"][name[-2:]]["weight"][expert]
        value = published.decode_nvfp4(tensors, name)
        assert np.array_equal(weight, value.astype(np.float32))
        # As a factor the stored number gives something else by far.
        stored = tensors[f"{name}.weight_global_scale"].array(np.float32)[0]
        assert np.abs(value).max() * stored**2 > 1e4 * np.abs(value).max()


def test_names_of_modules(tmp_path: Path) -> None:
    """As transformers names them, experts taken apart."""
    names = {
        "model.layers.2.mlp.experts.3.gate_proj.weight_packed": "w1.weight_packed",
        "model.layers.2.mlp.experts.3.up_proj.weight_global_scale": "w3.weight_global_scale",
        "model.layers.2.mlp.experts.3.down_proj.input_global_scale": "w2.input_global_scale",
    }
    for name, end in names.items():
        assert official_name(name) == f"layers.2.ffn.experts.3.{end}"
    name = "model.layers.2.self_attn.q_a_proj.weight_scale"
    assert official_name(name) == "layers.2.attn.wq_a.weight_scale"
    assert official_name("model.layers.2.mlp.experts.3.router.weight") == (
        "layers.2.ffn.experts.3.router.weight"
    )
