"""NVFP4 checkpoints of Model-Optimizer: bytes are kept, and the values are the official ones."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.checkpoint import from_checkpoint
from dsv4_jax.checkpoint.convert import Report
from dsv4_jax.checkpoint.load import load_params
from dsv4_jax.checkpoint.names import expected_tree, parameters
from dsv4_jax.cli.common import preset_name
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import PRESETS
from tests.checkpoint.test_load_official import at, same_tree, stored_bytes
from tests.support import published, tiny

CONFIG = ModelConfig.from_hf(published.modelopt()[0])
LEAVES = {"weight": "weight", "block_scale": "weight_scale", "global_scale": "weight_scale_2"}


def _write(path: Path, tensors: dict[str, tiny.Raw] | None = None, static: bool = True) -> Path:
    config, found = published.modelopt(static)
    return tiny.write(path, config, found if tensors is None else tensors)


@pytest.mark.parametrize("static", [True, False])
def test_loads_as_it_is(tmp_path: Path, static: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path, static=static)
    model, params = from_checkpoint(path, mtp=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        f'dsv4: precision "nvfp4_experts": {path} holds FP8 linears and NVFP4 experts '
        "(Model-Optimizer)"
    )
    scales = 3 * len(published.experts(tiny.official()[1]))
    said = [line for line in lines[1:] if f"{scales} static activation scales" in line]
    assert len(said) == len(lines) - 1 == static
    assert model.precision == PRESETS["nvfp4_experts"]
    assert preset_name(model.precision) == "nvfp4_experts"
    expected = expected_tree(CONFIG, PRESETS["nvfp4_experts"], True)
    official = load_params(tiny.OFFICIAL, CONFIG, model.precision, mtp=True, report=Report())
    assert same_tree(params, official)
    assert [x.shape for x in _leaves(params)] == [x.shape for x in _leaves(expected)]


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)


def test_any_scales_byte_by_byte(tmp_path: Path) -> None:
    """``w1`` and ``w3`` may have global scales of their own: every expert's product has one."""
    tensors = published.any_nvfp4(published.modelopt()[1])
    path = _write(tmp_path, tensors)
    tree = load_params(path, CONFIG, PRESETS["nvfp4_experts"], report=Report())
    wide = load_params(path, CONFIG, PRESETS["float32"], report=Report())
    for parameter in parameters(CONFIG, False):
        if not parameter.experts:
            continue
        found = at(tree, parameter.path)
        for leaf, name in LEAVES.items():
            raw = b"".join(tensors[f"{n}.{name}"].data for n in parameter.names())
            assert stored_bytes(found[leaf]) == raw, (parameter.name, leaf)
        values = np.stack([published.decode_nvfp4(tensors, n) for n in parameter.names()])
        assert np.array_equal(at(wide, parameter.path)["weight"], values.astype(np.float32))
    first = tree["layers_0"]["ffn"]["experts"]
    assert (first["w1"]["global_scale"] != first["w3"]["global_scale"]).all()


def test_requantised_on_demand(tmp_path: Path) -> None:
    """NVFP4 that was MXFP4 once goes back without loss, and says so."""
    report = Report()
    tree = load_params(_write(tmp_path), CONFIG, PRESETS["official"], report=report)
    pairs = {key[1:]: max(found.values()) for key, found in report.errors.items()}
    assert pairs == {("nvfp4", "mxfp4"): 0}
    assert tree["layers_0"]["ffn"]["experts"]["w1"]["scale"].dtype == jnp.float8_e8m0fnu


def test_newer_drafter_is_skipped_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = published.modelopt(static=False)[1]
    drafter = {
        f"mtp.{i}.{name}": tensor
        for i in range(3)
        for name, tensor in {
            "markov.weight": tiny.raw("BF16", np.zeros((4, 4), np.uint16)),
            "ffn.experts.0.w1.weight": tiny.raw("I8", np.zeros((4, 16), np.uint8)),
        }.items()
    }
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    path = _write(tmp_path, kept | drafter)
    _, params = from_checkpoint(path)
    assert "mtp_0" not in params
    assert capsys.readouterr().err.splitlines()[1:] == [
        "dsv4: skipped 6 tensors of a newer drafter (mtp.0, mtp.1, mtp.2)"
    ]
