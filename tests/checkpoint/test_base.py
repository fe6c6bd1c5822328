"""FP8 throughout, as the ``-Base`` releases: scales as E8M0 or FP32, powers of two or not."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.checkpoint import from_checkpoint
from dsv4_jax.checkpoint.convert import Report, convert, fp8_scales_to_ue8m0
from dsv4_jax.checkpoint.load import load_params
from dsv4_jax.checkpoint.names import parameters
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import PRESETS
from tests.checkpoint.test_load_official import at, same_tree, stored_bytes
from tests.support import published, tiny

CONFIG = ModelConfig.from_hf(published.base("F32")[0])


def _write(path: Path, **kind: Any) -> Path:
    return tiny.write(path, *published.base(**kind))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tree of the checkpoint with E8M0 scales."""
    path = _write(tmp_path_factory.mktemp("e8m0"), scale="F8_E8M0")
    return load_params(path, CONFIG, PRESETS["fp8"], mtp=True, report=Report())


def test_e8m0_scales_are_kept(exact: Any) -> None:
    tensors = published.base("F8_E8M0")[1]
    for parameter in parameters(CONFIG, True):
        if parameter.is_linear:
            for part in ("weight", "scale"):
                raw = b"".join(tensors[f"{name}.{part}"].data for name in parameter.names())
                assert stored_bytes(at(exact, parameter.path)[part]) == raw


def test_fp32_powers_of_two_are_exact(
    exact: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path, scale="F32")
    model, params = from_checkpoint(path, mtp=True)
    assert model.precision == PRESETS["fp8"]
    assert same_tree(params, exact)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f'dsv4: precision "fp8": {path} holds FP8 linears and FP8 experts'
    assert len(lines) == 2 and lines[1].startswith("dsv4: fp8_float32 -> fp8: exact (")


def test_other_scales_are_requantised_and_said_so(tmp_path: Path) -> None:
    path = _write(tmp_path, scale="F32", power_of_two=False)
    report = Report()
    load_params(path, CONFIG, PRESETS["fp8"], report=report)
    # E4M3 rounded to another E4M3 grid: at most the error of Gaussian data, 0.026 (test_convert).
    for (_, stored, target), found in report.errors.items():
        assert (stored, target) == ("fp8_float32", "fp8")
        assert all(0.01 < error < 0.035 for error in found.values())
    note = "layers.0 attn.wq_a: scales are not powers of two, requantised"
    assert note in report.notes
    assert any("of 4 of 4 experts: scales are not" in line for line in report.notes)


def test_values_with_any_scale() -> None:
    """In FP32 nothing is lost but the last bit of a product."""
    tensors = published.base("F32", power_of_two=False)[1]
    name = "layers.2.ffn.experts.1.w3"
    code, scale = tensors[f"{name}.weight"], tensors[f"{name}.scale"]
    raw = {
        "weight": jnp.asarray(code.array(np.uint8)),
        "scale": jnp.asarray(scale.array(np.float32)),
    }
    out, _ = convert({"w": {**raw}}, stored="fp8_float32", target="float32", experts=False)
    tiles = scale.array(np.float32).astype(np.float64).repeat(128, 0).repeat(128, 1)
    rows, cols = code.shape
    value = tiny.e4m3(code.array(np.uint8)) * tiles[:rows, :cols]
    assert np.array_equal(out["w"]["weight"], value.astype(np.float32))


def test_one_odd_scale_changes_one_expert(exact: Any, tmp_path: Path) -> None:
    config, tensors = published.base("F32")
    name = "layers.1.ffn.experts.2.w2.scale"
    odd = tensors[name].array(np.float32).copy()
    odd[0, 0] *= np.float32(1.5)
    path = tiny.write(tmp_path, config, tensors | {name: tiny.raw("F32", odd)})
    report = Report()
    tree = load_params(path, CONFIG, PRESETS["fp8"], report=report)
    assert set(report.errors) == {("ffn.experts.w2", "fp8_float32", "fp8")}
    assert report.notes == [
        "layers.1 ffn.experts.w2 of 1 of 4 experts: scales are not powers of two, requantised"
    ]
    for leaf in ("weight", "scale"):
        for expert in range(4):
            found, wanted = (
                np.asarray(t["layers_1"]["ffn"]["experts"]["w2"][leaf][expert]).tobytes()
                for t in (tree, exact)
            )
            assert (found == wanted) == (expert != 2)


@pytest.mark.parametrize(
    ("value", "good"),
    [(2.0**-126, True), (2.0**127, True), (2.0**-127, False), (0.0, False), (0.75, False)],
)
def test_which_scales_are_powers_of_two(value: float, good: bool) -> None:
    raw = {"weight": jnp.zeros((2, 2), jnp.uint8), "scale": jnp.asarray([[value]], jnp.float32)}
    out, flags = fp8_scales_to_ue8m0({"w": raw}, experts=False)
    assert bool(flags["w"]) == good
    if good:
        assert 2.0 ** (int(out["w"]["scale"][0, 0]) - 127) == value


def test_as_nvfp4_on_demand(tmp_path: Path) -> None:
    report = Report()
    tree = load_params(
        _write(tmp_path, scale="F32"), CONFIG, PRESETS["nvfp4_experts"], report=report
    )
    assert tree["layers_0"]["ffn"]["experts"]["w1"]["global_scale"].shape == (4,)
    lost = {kind: found for (kind, _, target), found in report.errors.items() if target == "nvfp4"}
    # Random codes have more outliers than the Gaussian weights of test_convert (0.095).
    assert set(lost) == {f"ffn.experts.w{i}" for i in (1, 2, 3)}
    assert all(0.05 < e < 0.2 for found in lost.values() for e in found.values())
