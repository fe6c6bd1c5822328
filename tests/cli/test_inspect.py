"""``dsv4 inspect``: what it shows of a whole checkpoint, and all that it finds in a broken one."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dsv4_jax import bundled_checkpoint, cli
from dsv4_jax.checkpoint.memory import Plan
from dsv4_jax.checkpoint.survey import parameter_counts, survey
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import PRESETS
from tests.support import published, tiny
from tests.support.tokenizer import byte_tokenizer

CONFIG, TENSORS = tiny.official()


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here may ask for one."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a device was asked for")

    for name in ("devices", "local_devices", "default_backend", "device_put"):
        monkeypatch.setattr(jax, name, refuse)


def _inspect(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)], env={"COLUMNS": "60"})


def _json(*arguments: object, code: int = 0) -> dict[str, Any]:
    result = _inspect(*arguments, "--json")
    assert result.exit_code == code, result.stderr
    return json.loads(result.stdout)


def test_model_in_the_package() -> None:
    result = _inspect("--max-len", 300)
    assert (result.exit_code, result.stderr) == (0, "")
    found = _json()
    assert found["checkpoint"] == str(bundled_checkpoint())
    assert (found["precision"], found["tokens"]) == ("official", 1536)
    assert found["layers"] == {"swa": 3, "csa": 1, "hca": 1}
    assert found["generation_config"]["temperature"] == 0.6
    assert (found["problems"], found["notes"]) == ([], [])
    assert found["config"]["index_topk"] == 64
    for shown in (
        f"{found['parameters']['total']:,}",
        f"{found['parameters']['active']:,}",
        "5: 3 swa, 1 csa, 1 hca",
        "temperature 0.6",
        "ffn.experts.w1 ",
        "I8, F8_E8M0",
    ):
        assert shown in result.stdout, shown
    assert "…" not in result.stdout


def test_tensors_are_those_of_the_files() -> None:
    found = _json(tiny.OFFICIAL)
    assert sum(group["nbytes"] for group in found["tensors"]) == sum(
        len(raw.data) for raw in TENSORS.values()
    )
    assert sum(group["tensors"] for group in found["tensors"]) == len(TENSORS)
    assert found["shards"] == {tiny.SINGLE: sum(len(raw.data) for raw in TENSORS.values())}
    groups = {(group["kind"], group["dtype"]): group for group in found["tensors"]}
    one = TENSORS["layers.0.ffn.experts.0.w1.weight"]
    layers, experts = CONFIG["num_hidden_layers"], CONFIG["n_routed_experts"]
    assert groups["ffn.experts.w1.weight", "I8"] == {
        "kind": "ffn.experts.w1.weight",
        "dtype": "I8",
        "tensors": layers * experts,
        "nbytes": layers * experts * len(one.data),
    }
    assert ("mtp.ffn.experts.w1.scale", "F8_E8M0") in groups
    assert found["notes"] == ["no tokenizer.json: token ids in, token ids out"]


def test_parameters_of_the_release() -> None:
    """model.md 1.2, in billions."""
    total, active = parameter_counts(ModelConfig.flash())
    assert (round(total / 1e9), round(active / 1e9)) == (284, 14)


def test_memory_of_every_combination() -> None:
    sizes = ("--max-len", 64, "--max-len", 5000, "--batch-size", 1, "--batch-size", 7)
    presets = ("--precision", "official", "--precision", "nvfp4")
    rows = _json(tiny.OFFICIAL, *sizes, *presets, "--mtp")["memory"]
    config = ModelConfig.from_hf(CONFIG)
    assert len(rows) == 8
    stored = survey(tiny.OFFICIAL, mtp=True).stored
    for row in rows:
        precision = PRESETS[row["precision"]]
        plan = Plan(config, precision, True, row["batch_size"], row["max_len"], stored=stored)
        need = plan.need()
        assert (row["weights"], row["cache"]) == (need.weights, need.cache)
        assert (row["staging"], row["total"]) == (need.staging, need.total)
    assert {(row["max_len"], row["batch_size"]) for row in rows} == {
        (64, 1), (64, 7), (5000, 1), (5000, 7),
    }  # fmt: skip
    [short, full] = _json(tiny.OFFICIAL)["memory"]
    assert (short["max_len"], full["max_len"]) == (4096, CONFIG["max_position_embeddings"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-len", "0"], "--max-len must be >= 1, got 0"),
        (["--batch-size", "-2"], "--batch-size must be >= 1, got -2"),
        (["--precision", "fp3"], "'fp3'"),
        (["--max-len", "70000"], "max_len must be 1..65536"),
    ],
)
def test_user_errors_are_one_line(arguments: list[str], message: str) -> None:
    for more in ([], ["--json"]):
        result = _inspect(*arguments, *more)
        assert (result.exit_code, result.stdout) == (2, "")
        [line] = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert message in line


# Broken checkpoints.


def _broken(path: Path) -> Path:
    """Something wrong at every level."""
    wrong = {
        "layers.1.attn.wqb.weight": TENSORS["layers.1.attn.wq_b.weight"],
        "norm.weight": tiny.raw("F32", TENSORS["norm.weight"].array("u2").astype("f4")),
        "embed.weight": TENSORS["embed.weight"]._replace(shape=TENSORS["embed.weight"].shape[::-1]),
    }
    tensors = tiny.drop(TENSORS, ["layers.1.attn.wq_b.weight"]) | wrong
    tiny.write(path, CONFIG, tensors, shards=4)
    (path / tiny.shard_name(1, 4)).unlink()
    with (path / tiny.shard_name(2, 4)).open("r+b") as stream:
        stream.truncate(1000)
    (path / "generation_config.json").write_text("{")
    byte_tokenizer().save(str(path / "tokenizer.json"))
    return path


def test_every_problem_is_listed(tmp_path: Path) -> None:
    path = _broken(tmp_path)
    report = _json(path, code=2)
    problems = report["problems"]
    expected = [
        "1 of 4 shards are absent: model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors: truncated",
        "token ids must be < 256 (vocab_size), got up to 261",
        "generation_config.json: not valid JSON",
    ]
    # A tensor of a shard that cannot be read is not missing; which shards those are in is up to
    # the order of the names.
    gone = {f"model-0000{i}-of-00004.safetensors" for i in (2, 3)}
    shards = json.loads((path / tiny.INDEX).read_text())["weight_map"]
    for name, text in (
        ("layers.1.attn.wqb.weight", "unexpected: layers.1.attn.wqb.weight in "),
        ("norm.weight", "dtype: norm.weight: expected BF16, found F32"),
        ("embed.weight", "shape: embed.weight: expected [256, 128], found [128, 256]"),
    ):
        if shards[name] not in gone:
            expected.append(text)
    expected.append("missing: layers.1.attn.wq_b.weight")
    for text in expected:
        assert sum(text in problem for problem in problems) == 1, (text, problems)
    assert len(problems) == len(expected), problems
    assert len(expected) >= 6

    result = _inspect(path)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines == [f"problem: {p}" for p in problems] + [
        f"error: {path}: {len(problems)} problems"
    ]
    assert "5: 1 swa, 2 csa, 2 hca" in result.stdout, "what can be read is shown"
    assert "Memory on one device" in result.stdout


def test_every_problem_of_a_config(tmp_path: Path) -> None:
    config = CONFIG | {
        "hidden_act": "gelu",
        "head_dim": "512",
        "num_hash_layers": 99,
        "quantization_config": CONFIG["quantization_config"] | {"fmt": "e5m2"},
        "attn_logit_softcapping": 30.0,
        "residual_scaling": 2.0,
    }
    del config["index_topk"]
    tiny.write(tmp_path, config, TENSORS)
    problems = _json(tmp_path, code=2)["problems"]
    fields = ["hidden_act", "head_dim", "index_topk", "num_hash_layers", "quantization_config.fmt"]
    fields += ["attn_logit_softcapping", "residual_scaling"]
    assert len(problems) == len(fields), problems
    for field, problem in zip(fields, problems, strict=True):
        assert re.search(rf"config\.json: {re.escape(field)} ", problem), problem


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such directory"),
        ({}, "config.json: no such file"),
        ({"config.json": "{"}, "config.json: invalid JSON at line 1"),
        ({"config.json": json.dumps(CONFIG)}, "has neither model.safetensors nor"),
        (
            {"config.json": json.dumps(CONFIG), tiny.SINGLE: "version https://git-lfs"},
            "is a Git LFS pointer",
        ),
    ],
)
def test_little_is_there(tmp_path: Path, files: dict[str, str] | None, message: str) -> None:
    path = tmp_path / "absent" if files is None else tmp_path
    for name, text in (files or {}).items():
        (path / name).write_text(text)
    assert any(message in problem for problem in _json(path, code=2)["problems"])
    result = _inspect(path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_widths_that_no_format_takes(tmp_path: Path) -> None:
    """The memory cannot be told; all else is."""
    tiny.write(tmp_path, CONFIG | {"moe_intermediate_size": 120}, TENSORS)
    problems = _json(tmp_path, code=2)["problems"]
    for text in ("MXFP4 needs a multiple of 32", "must be a multiple of 32 for mxfp4, got 120"):
        assert any(text in problem for problem in problems), problems
    assert "Tensors of the files" in _inspect(tmp_path).stdout


def test_hostile_text(tmp_path: Path) -> None:
    """No escape sequence reaches the terminal, and what UTF-8 cannot hold is printed somehow."""
    path = tiny.write(tmp_path, CONFIG, TENSORS | {"a\x1b[2J.weight": TENSORS["norm.weight"]})
    (path / "generation_config.json").write_text('{"\\u001b[2J": 1, "x": "\\ud800"}')
    assert _json(path, code=2)["generation_config"]["x"] == "\ud800"
    result = _inspect(path)
    assert result.exit_code == 2
    assert "Tensors of the files" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr
    assert "unexpected: 'a\\x1b[2J.weight' in" in result.stderr
    (path / "generation_config.json").write_text("[" * 100_000)
    assert "generation_config.json: not valid JSON" in _inspect(path).stderr


def test_static_scales_stand_with_their_weight(tmp_path: Path) -> None:
    path = tiny.write(tmp_path, *published.modelopt())
    result = _inspect(path)
    assert "ffn.experts.w1 " in result.stdout
    assert "input_scale" not in result.stdout
    assert re.search(r"static scales +.* 60 of routed experts, used", result.stdout)
    found = _json(path, "--max-len", 64)
    assert found["static_activation_scales"] == {"used": 60, "unused": 0}
    plan = Plan(ModelConfig.from_hf(published.modelopt()[0]), PRESETS["nvfp4_experts"])
    assert found["memory"][0]["weights"] == plan.need().weights + 5 * 2 * 4 * 4
    assert "static scales" not in _inspect(tiny.OFFICIAL).stdout


def test_bad_static_scales_when_asked(tmp_path: Path) -> None:
    config, tensors = published.modelopt()
    name = "layers.1.ffn.experts.2.w2.input_scale"
    tensors[name] = tiny.raw("F32", np.asarray(-1, np.float32))
    path = tiny.write(tmp_path, config, tensors)
    assert _inspect(path).exit_code == 0
    result = _inspect(path, "--verify")
    assert result.exit_code == 2
    assert f"{name}: scales must be positive and finite, got -1.0" in result.stderr


def test_json_and_table_name_the_same_precision(tmp_path: Path) -> None:
    """Formats that no preset has are "as stored" in both."""
    config, tensors = published.compressed_tensors()
    tiny.write(tmp_path, config, tensors)
    found = _json(tmp_path)
    assert found["precision"] == found["memory"][0]["precision"] == "as stored"
    result = _inspect(tmp_path)
    assert re.search(r"precision\W+as stored: FP8 linears and NVFP4 experts", result.stdout)


def test_values_are_looked_at_when_asked(tmp_path: Path) -> None:
    scale, table = "layers.0.attn.wq_a.scale", "layers.1.ffn.gate.tid2eid"
    bad = {name: bytearray(TENSORS[name].data) for name in (scale, table, "norm.weight")}
    bad[scale][0] = 255
    bad[table][:8] = (99).to_bytes(8, "little")
    bad["norm.weight"][:2] = b"\xc0\x7f"  # NaN
    wrong = {name: TENSORS[name]._replace(data=bytes(data)) for name, data in bad.items()}
    tiny.write(tmp_path, CONFIG, TENSORS | wrong)
    assert _json(tmp_path)["problems"] == []
    problems = _json(tmp_path, "--verify", code=2)["problems"]
    assert len(problems) == 3
    for name in bad:
        assert sum(f": {name}: " in problem for problem in problems) == 1


def test_preset_is_needed_unless_given(tmp_path: Path) -> None:
    half = tiny.half(TENSORS)
    config = {k: v for k, v in CONFIG.items() if k != "quantization_config"}
    tiny.write(tmp_path, config, half)
    [problem] = _json(tmp_path, code=2)["problems"]
    assert "no precision preset" in problem
    found = _json(tmp_path, "--precision", "bfloat16")
    assert any("no precision preset" in note for note in found["notes"])
    assert [row["precision"] for row in found["memory"]] == ["bfloat16"] * 2
