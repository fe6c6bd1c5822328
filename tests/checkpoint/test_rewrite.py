"""`dsv4 convert`: the result holds the bits that loading the source in that precision gives."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from dsv4_jax import cli
from dsv4_jax.checkpoint import from_checkpoint, requantize, rewrite, write
from dsv4_jax.checkpoint.convert import (
    Report,
    fp8_scales_on_host,
    fp8_scales_to_ue8m0,
    mxfp4_to_nvfp4,
    mxfp4_to_nvfp4_on_host,
)
from dsv4_jax.checkpoint.export import target_config
from dsv4_jax.checkpoint.load import load_params
from dsv4_jax.checkpoint.names import parameters
from dsv4_jax.checkpoint.read import Reader
from dsv4_jax.checkpoint.validate import resolve
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import PRESETS
from tests.checkpoint.test_load_official import same_tree
from tests.support import published, tiny


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many shards, slabs of 128 rows, chunks that end inside of tensors."""
    monkeypatch.setattr(rewrite, "SHARD_BYTES", 1_000_000)
    monkeypatch.setattr(requantize, "SLAB_VALUES", 128 * 128)
    monkeypatch.setattr(requantize, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(write, "CHUNK_BYTES", 3_000)


def read_all(path: Path) -> dict[str, tiny.Raw]:
    """All tensors by way of the index, which must agree with the shards."""
    weight_map = json.loads((path / tiny.INDEX).read_text())["weight_map"]
    shards = {file: tiny.read_shard(path / file) for file in sorted(set(weight_map.values()))}
    found = {name: shards[file][name] for name, file in weight_map.items()}
    assert len(found) == sum(map(len, shards.values()))
    return found


def _wide_expert() -> tuple[dict[str, Any], dict[str, tiny.Raw]]:
    """The official checkpoint with an expert of too many binades."""
    config, tensors = tiny.official()
    name = "layers.2.ffn.experts.1.w1.scale"
    scale = tensors[name].array(np.uint8).copy()
    scale[0, 0] -= 40
    return config, tensors | {name: tiny.raw("F8_E8M0", scale)}


def _floats() -> tuple[dict[str, Any], dict[str, tiny.Raw]]:
    config, tensors = tiny.official()
    return _plain(config), tiny.unquantised(tensors, "BF16")


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("quantization_config", "expert_dtype")}


SOURCES: dict[str, Callable[[], tuple[dict[str, Any], dict[str, tiny.Raw]]]] = {
    "official": tiny.official,
    "wide": _wide_expert,
    "bf16": _floats,
    "compressed-tensors": published.compressed_tensors,
}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("source", "preset"),
    [
        pytest.param("official", "nvfp4", id="attention-requantised"),
        pytest.param("wide", "nvfp4_experts", id="one-expert-requantised"),
        pytest.param("bf16", "official", id="quantised"),
        pytest.param("compressed-tensors", "nvfp4_experts", id="reciprocals"),
    ],
)
def test_converting_and_loading_is_loading_and_requantising(
    tmp_path: Path, source: str, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config_json, tensors = SOURCES[source]()
    first = tiny.write(tmp_path / "source", config_json, tensors, shards=3)
    config = ModelConfig.from_hf(config_json)
    mtp = config.num_nextn_predict_layers > 0
    report = Report()
    want = load_params(first, config, PRESETS[preset], mtp=mtp, report=report)
    done = rewrite.rewrite(first, tmp_path / "result", preset)
    model, found = from_checkpoint(tmp_path / "result", mtp=mtp)
    # But for static activation scales, which the result has none of; a line says so.
    dropped = published.take_act_scales(want)
    notes = [note for note in done.report.notes if "static activation scales" in note]
    assert len(notes) == bool(dropped) == (source == "compressed-tensors")
    assert all(note.startswith("dropped 60 static activation scales (layers.0.") for note in notes)
    assert same_tree(found, want)
    assert model.precision == PRESETS[preset] and model.config == config
    assert f'dsv4: precision "{preset}": ' in capsys.readouterr().err
    assert done.report.errors.keys() == report.errors.keys()
    for key, errors in report.errors.items():
        # FP32 sums of squares in another order.
        assert done.report.errors[key] == pytest.approx(errors, rel=1e-4)
    exact = {pair: set(kinds) for pair, kinds in done.report.exact.items()}
    # A kind that is exact in some layers and not in others is loaded as lossy alone.
    assert exact.keys() == report.exact.keys()


@pytest.mark.usefixtures("small")
def test_experts_are_those_of_model_optimizer(tmp_path: Path) -> None:
    """Codes, scales, names and dtypes against an independent cast; the rest byte by byte."""
    done = rewrite.rewrite(tiny.OFFICIAL, tmp_path / "a", "nvfp4_experts")
    config, tensors = published.modelopt(static=False)
    found = read_all(tmp_path / "a")
    assert found == tensors
    assert done.report.errors == {} and set(done.report.exact) == {("mxfp4", "nvfp4")}
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    section = written.pop("quantization_config")
    for key in ("quant_method", "moe_quant_algo", "quant_algo", "group_size", "ignore", "fmt"):
        assert section[key] == config["quantization_config"][key]
    assert list(section["quantized_layers"]) == [f"layers.{i}.ffn.experts" for i in range(5)]
    assert written == {k: v for k, v in config.items() if k != "quantization_config"}
    quantizer = json.loads((tmp_path / "a" / "hf_quant_config.json").read_text())
    assert quantizer["quantization"]["exclude_modules"] == section["ignore"]
    assert done.shards > 3 and done.written_bytes == done.total_bytes
    total = json.loads((tmp_path / "a" / tiny.INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(len(tensor.data) for tensor in tensors.values())


@pytest.mark.parametrize(
    ("preset", "expert_dtype", "dtype"),
    [
        ("official", "fp4", "bfloat16"),
        ("fp8", "fp8", "bfloat16"),
        ("nvfp4", "fp4", "bfloat16"),
        ("bfloat16", None, "bfloat16"),
        ("float32", None, "float32"),
    ],
)
def test_config_of_the_result(preset: str, expert_dtype: str | None, dtype: str) -> None:
    """From any source; it can be read again and changes nothing but formats."""
    for data in (tiny.official()[0], _floats()[0], published.compressed_tensors()[0]):
        config = ModelConfig.from_hf(data)
        table = parameters(config, config.num_nextn_predict_layers > 0)
        found = target_config(data, table, PRESETS[preset])
        assert ModelConfig.from_hf(found) == config
        assert found.get("expert_dtype") == expert_dtype
        assert found["torch_dtype"] == dtype
        section = found.get("quantization_config")
        assert (section is None) == (expert_dtype is None)
        if section is not None:
            assert section["quant_method"] == "fp8"
            layers = section.get("quantized_layers", {})
            assert ("moe_quant_algo" in section) == ("layers.0.ffn.experts" in layers)
            assert ("layers.0.attn.wq_b" in layers) == (preset == "nvfp4")


def test_companions_come_along(tmp_path: Path) -> None:
    first = tiny.write(tmp_path / "source", *tiny.official())
    (first / "tokenizer.json").write_text("{}")
    (first / "hf_quant_config.json").write_text("{}")
    (first / "pytorch_model.bin").write_text("x")
    rewrite.rewrite(first, tmp_path / "result", "official")
    names = {path.name for path in (tmp_path / "result").iterdir()}
    shard = tiny.shard_name(0, 1)
    assert names == {shard, tiny.INDEX, "config.json", "tokenizer.json", "dsv4_convert.json"}
    assert read_all(tmp_path / "result") == tiny.official()[1]
    assert json.loads((tmp_path / "result" / "config.json").read_text()) == tiny.official()[0]


def test_newer_drafter_is_copied(tmp_path: Path) -> None:
    config, tensors = tiny.official()
    drafter = {f"mtp.{i}.markov.weight": tiny.raw("F16", np.ones((3, 5), "f2")) for i in range(3)}
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("mtp.")}
    first = tiny.write(tmp_path / "source", config, kept | drafter)
    done = rewrite.rewrite(first, tmp_path / "result", "nvfp4_experts")
    found = read_all(tmp_path / "result")
    assert {name: found[name] for name in drafter} == drafter
    assert "skipped 3 tensors of a newer drafter (mtp.0, mtp.1, mtp.2)" not in done.report.notes
    assert "copied 3 tensors of a newer drafter (mtp.0, mtp.1, mtp.2)" in done.report.notes


def test_module_that_does_not_fit_is_copied(tmp_path: Path) -> None:
    """Quantisers leave MTP in BF16; such a checkpoint loads without it."""
    config, tensors = published.modelopt()
    wide = tiny.unquantised(tiny.official()[1], "BF16")
    drafter = {name: tensor for name, tensor in wide.items() if name.startswith("mtp.")}
    tensors = {k: v for k, v in tensors.items() if not k.startswith("mtp.")} | drafter
    first = tiny.write(tmp_path / "source", config, tensors)
    done = rewrite.rewrite(first, tmp_path / "result", "nvfp4_experts")
    found = read_all(tmp_path / "result")
    assert {name: found[name] for name in drafter} == drafter
    [note] = [note for note in done.report.notes if "mtp.0" in note]
    assert note.startswith("copied mtp.0 as it is, it cannot be loaded with this model (")
    assert "expected F32, found BF16" in note
    with Reader(tmp_path / "result") as reader:
        resolve(reader, ModelConfig.from_hf(config))


@pytest.mark.parametrize("top", [127, -100, 255 - 128])
@pytest.mark.parametrize("spread", [0, 9, 17, 18, 30])
def test_the_route_on_the_host_is_the_one_of_the_loader(top: int, spread: int) -> None:
    rng = np.random.default_rng(spread)

    def matrix(low: int, high: int) -> dict[str, np.ndarray]:
        scale = np.clip(rng.integers(low, high + 1, (4, 3)) + 127, 0, 254).astype(np.uint8)
        weight = rng.integers(0, 256, (4, 48), dtype=np.uint8)
        weight[1, 16:32] &= 0x88  # a block of zeros of both signs
        scale[1, 1] = 3
        return {"weight": weight, "scale": scale}

    group = {"w1": matrix(top - spread, top), "w3": matrix(top - 5, top - 2), "w2": matrix(-9, -9)}
    group["w2"]["weight"][:] &= 0x88
    want, flags = mxfp4_to_nvfp4(
        {k: {n: jnp.asarray(a) for n, a in raw.items()} for k, raw in group.items()}, experts=False
    )
    found, exact = mxfp4_to_nvfp4_on_host(group)
    assert exact == {key: bool(flag) for key, flag in flags.items()}
    for key, leaves in want.items():
        assert set(leaves) == set(found[key])
        for leaf, array in leaves.items():
            assert np.asarray(array).tobytes() == found[key][leaf].tobytes(), (key, leaf)


def test_fp8_scales_on_the_host_are_those_of_the_loader() -> None:
    values = [[1.0, 2.0**-126], [2.0**127, 0.25]]
    for odd in (None, 0.0, 0.75, 2.0**-127):
        scale = np.asarray(values, np.float32)
        if odd is not None:
            scale[1, 0] = odd
        raw = {"weight": np.zeros((2, 2), np.uint8), "scale": scale}
        device = {leaf: jnp.asarray(array) for leaf, array in raw.items()}
        want, flags = fp8_scales_to_ue8m0({"w": device}, experts=False)
        found, exact = fp8_scales_on_host({"w": raw})
        assert exact == {"w": odd is None} == {"w": bool(flags["w"])}
        assert np.array_equal(found["w"]["scale"], want["w"]["scale"])


def test_report_of_the_command(tmp_path: Path) -> None:
    arguments = ["convert", str(tiny.OFFICIAL), str(tmp_path / "a"), "--to", "nvfp4_experts"]
    runner = CliRunner()
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert "mxfp4 -> nvfp4: exact (ffn.experts.w1, ffn.experts.w2, ffn.experts.w3)" in lines
    assert lines[-1].startswith("1 shards, ") and lines[-1].endswith(" MB/s")
    result = runner.invoke(cli.app, [*arguments, "--json"])
    fields = json.loads(result.stdout)
    assert fields["lossless"] == [
        {"from": "mxfp4", "to": "nvfp4", "kinds": [f"ffn.experts.w{i}" for i in (1, 2, 3)]}
    ]
    assert fields["lossy"] == [] and "attn.wq_a" in fields["unchanged"]
    assert (fields["reused"], fields["written_bytes"], fields["read_bytes"]) == (1, 0, 0)


def test_nothing_lossy_is_called_lossless() -> None:
    report = Report()
    report.add_error("a", "layers.0", "fp8", "nvfp4", 0.0, 1.0)
    report.add_error("b", "layers.0", "fp8", "nvfp4", 0.01, 1.0)
    report.add_error("b", "layers.1", "fp8", "nvfp4", 0.0, 1.0)
    done = rewrite.Rewritten(report, [], 0, 0, 0, 0, 0, 1.0)
    fields = dataclasses.replace(done).fields()
    assert fields["lossless"] == [{"from": "fp8", "to": "nvfp4", "kinds": ["a"]}]
    (lossy,) = fields["lossy"]
    assert (lossy["kind"], lossy["max"], lossy["at"]) == ("b", 0.1, "layers.0")
