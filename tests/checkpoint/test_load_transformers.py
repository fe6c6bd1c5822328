"""The three ways in which transformers saves a model (model.md 7.2) give one tree."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_jax.checkpoint import CheckpointError
from dsv4_jax.checkpoint.convert import Report
from dsv4_jax.checkpoint.formats import detect
from dsv4_jax.checkpoint.load import load_params
from dsv4_jax.checkpoint.names import official_name, parameters
from dsv4_jax.checkpoint.read import Reader, read_config
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import PRESETS
from tests.checkpoint.test_load_official import at, same_tree
from tests.support import tiny

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model, saved as 5.23 does by default, with module names, and as 5.9 does."""
    from tests.support import hf_tiny

    root = tmp_path_factory.mktemp("hf")
    model = hf_tiny.save(root / "default", save_original_format=True)
    model.save_pretrained(root / "modules", save_original_format=False)
    tensors = tiny.read_shard(root / "modules" / tiny.SINGLE)
    config = json.loads((root / "modules" / "config.json").read_text())
    tiny.write(root / "v5.9", config, _as_5_9(tensors, config))
    model.bfloat16().save_pretrained(root / "bf16")
    return {name: root / name for name in ("default", "modules", "v5.9", "bf16")}


def _as_5_9(tensors: dict[str, tiny.Raw], config: dict[str, Any]) -> dict[str, tiny.Raw]:
    out: dict[str, tiny.Raw] = {}
    width = config["moe_intermediate_size"]
    for name, tensor in tensors.items():
        name = name.replace("lm_head", "head").replace(".scorer.", ".")
        prefix, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            out[name] = tensor
            continue
        for e, matrix in enumerate(tensor.array(np.float32)):
            pieces = {"w1": matrix[:width], "w3": matrix[width:]}
            for part, piece in (pieces if last == "gate_up_proj" else {"w2": matrix}).items():
                out[f"{prefix}.{e}.{part}.weight"] = tiny.raw("F32", piece)
    return out


def _load(path: Path, preset: str) -> tuple[ModelConfig, Any]:
    config = ModelConfig.from_hf(read_config(path))
    return config, load_params(path, config, PRESETS[preset], report=Report())


def test_values(saved: dict[str, Path]) -> None:
    config, tree = _load(saved["default"], "float32")
    tensors = {
        official_name(name): tensor
        for name, tensor in tiny.read_shard(saved["default"] / tiny.SINGLE).items()
    }
    for parameter in parameters(config, False):
        leaf = at(tree, (*parameter.path, "weight") if parameter.is_linear else parameter.path)
        suffix = ".weight" if parameter.is_linear else ""
        dtype = np.int64 if parameter.rule == "int32" else np.float32
        arrays = [tensors[name + suffix].array(dtype) for name in parameter.names()]
        expected = np.stack(arrays) if parameter.experts else arrays[0]
        assert np.array_equal(leaf, expected), parameter.name


@pytest.mark.parametrize("other", ["modules", "v5.9"])
def test_all_formats_are_one_model(saved: dict[str, Path], other: str) -> None:
    config, tree = _load(saved["default"], "float32")
    config_other, tree_other = _load(saved[other], "float32")
    assert config == config_other
    assert same_tree(tree, tree_other)


@pytest.mark.parametrize(
    ("name", "preset"), [("default", "float32"), ("modules", "float32"), ("bf16", "bfloat16")]
)
def test_detected(saved: dict[str, Path], name: str, preset: str) -> None:
    with Reader(saved[name]) as reader:
        assert detect(reader.tensors).preset == preset


def test_bf16_is_kept_and_widened_exactly(saved: dict[str, Path]) -> None:
    _, narrow = _load(saved["bf16"], "bfloat16")
    _, wide = _load(saved["bf16"], "float32")
    for tree in (narrow, wide):
        weight = np.asarray(tree["layers_2"]["attn"]["wq_a"]["weight"], np.float32)
        raw = tiny.read_shard(saved["bf16"] / tiny.SINGLE)["model.layers.2.attn.wq_a.weight"]
        assert raw.dtype == "BF16"
        value = (raw.array(np.uint16).astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(weight, value)


def test_fused_stack_of_another_size(saved: dict[str, Path], tmp_path: Path) -> None:
    tensors = tiny.read_shard(saved["modules"] / tiny.SINGLE)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    array = tensors[name].array(np.float32)
    tensors[name] = tiny.raw("F32", array[:, :-1])
    path = tiny.write(tmp_path, read_config(saved["modules"]), tensors)
    with pytest.raises(CheckpointError, match=r"1 problem\n[^$]*gate_up_proj: expected \[8, 256"):
        _load(path, "float32")
