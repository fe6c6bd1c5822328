"""`dsv4 bench`: the weights it makes, the numbers it prints, the ways it is started."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dsv4_jax import ModelConfig, Precision, cli
from dsv4_jax.bench import __main__ as program
from dsv4_jax.bench import report, run
from dsv4_jax.bench.ceilings import Ceilings
from dsv4_jax.bench.floor import GROUPS, OUTSIDE, cut
from dsv4_jax.bench.measure import Loop, Times
from dsv4_jax.bench.plot import bars, draw
from dsv4_jax.bench.profile import Launch
from dsv4_jax.bench.weights import random_params
from dsv4_jax.checkpoint.names import expected_tree
from dsv4_jax.loop import STEPS
from dsv4_jax.quant import nvfp4
from tests.support.fake_model import FakeModel, fake_params
from tests.support.official import TINY, tiny_config

CEILINGS = Ceilings(read=1e9, copy=1e9, bf16=1e12, fp8=2e12)
CONFIG = ModelConfig.from_hf(tiny_config())


@pytest.fixture(autouse=True)
def ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "measured_ceilings", lambda **_: CEILINGS)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["bench", *map(str, arguments)])


@pytest.mark.parametrize("preset", ["official", "nvfp4"])
def test_weights_are_those_of_the_tree(preset: str) -> None:
    precision = Precision.preset(preset)
    params = random_params(CONFIG, precision)
    tree = expected_tree(CONFIG, precision, False)
    assert jax.tree.structure(params) == jax.tree.structure(tree)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(tree), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), name
        if found.dtype.itemsize > 1:
            assert np.isfinite(np.asarray(found, np.float32)).all(), name
    table = np.asarray(params["layers_0"]["ffn"]["gate"]["tid2eid"])
    assert ((table >= 0) & (table < CONFIG.n_routed_experts)).all()
    assert (table[:, 0] != table[:, 1]).all() and len(set(table[:, 0])) == 4
    if preset == "nvfp4":
        assert nvfp4.scales_are_powers_of_two(
            params["layers_0"]["ffn"]["experts"]["w1"]["block_scale"]
        )


@pytest.mark.parametrize("preset", ["official", "nvfp4", "bfloat16"])
def test_products_keep_their_size(preset: str) -> None:
    """Codes times scales have the size that a matrix of so many inputs must have."""
    layer = random_params(cut(CONFIG, [0]), Precision.preset(preset))["layers_0"]
    for leaves in (layer["attn"]["wq_b"], layer["ffn"]["experts"]["w2"]):
        values = leaves["weight"].astype(jnp.float32)
        for name in ("scale", "block_scale"):
            if name in leaves:
                scale = leaves[name].astype(jnp.float32)
                for axis in (-1, -2):
                    times = values.shape[axis] // scale.shape[axis]
                    scale = jnp.repeat(scale, times, axis=axis)
                values = values * scale
        if "global_scale" in leaves:
            values = values * leaves["global_scale"][..., None, None]
        assert 0.4 < float(jnp.std(values)) * np.sqrt(values.shape[-1]) < 1.6
    assert 0.9 < float(jnp.mean(layer["attn"]["q_norm"]["weight"].astype(jnp.float32))) < 1.1


def test_json_of_a_small_model() -> None:
    """A layer, compiled and run; the fields fit each other."""
    result = invoke(
        TINY, "--layers", 1, "--batch", 2, "--context", 40, "--tokens", 9, "--prefill", 8, "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["layers"], found["batch"], found["context"]) == (1, 2, 40)
    assert found["precision"] == "official"  # of the files
    decode, memory, prompt = found["decode"], found["memory"], found["prefill"]
    assert decode["tokens"] == 16
    assert decode["us_per_token"] * decode["tokens_per_s"] == pytest.approx(2e6)
    assert decode["floor_us"] == pytest.approx(decode["bytes_per_token"] / 1e3)
    assert decode["fraction"] == pytest.approx(decode["floor_us"] / decode["us_per_token"])
    (kind,) = decode["kinds"]
    assert (kind["kind"], kind["layers"], kind["launches"]) == ("SWA", 1, None)
    assert kind["bytes"] + decode["outside_bytes"] == pytest.approx(decode["bytes_per_token"])
    split = kind["us"] + decode["outside_us"] + decode["unexplained_us"]
    assert split == pytest.approx(decode["us_per_token"])
    assert decode["layers_from"] == "models" and found["profile"] is None
    assert memory["peak_bytes"] >= memory["weights_bytes"] > decode["bytes_per_token"]
    assert memory["peak_from"] == "compiled decode loop"
    assert memory["loop_bytes"] == memory["peak_bytes"]
    assert prompt["us"] * prompt["tokens_per_s"] == pytest.approx(2 * 8 * 1e6)
    assert prompt["fraction"] == pytest.approx(prompt["floor_us"] / prompt["us"])


@pytest.fixture
def fake_times(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Steps take 100 us, and 10 to 30 for a layer by kind, 7 more where there are many."""
    seen: list[Any] = []

    def us(model: Any) -> float:
        ratios = model.config.compress_ratios
        return 100 + sum({0: 10, 4: 30, 128: 20}[r] for r in ratios) + 7 * (len(ratios) > 1)

    class FakeLoop:
        compile_s, cache = 1.5, None

        class compiled:
            @staticmethod
            def memory_analysis() -> None:
                return None

    def time_decode(model: Any, params: Any, *_: Any) -> Any:
        names = {name for name in params if name.startswith("layers_")}
        assert names == {f"layers_{i}" for i in range(model.config.num_hidden_layers)}
        seen.append((model.config.compress_ratios, model.config.num_hash_layers))
        return Times(us(model), 0.0), FakeLoop()

    monkeypatch.setattr(report, "time_decode", time_decode)
    return seen


def test_layers_by_kind(fake_times: list[Any], tmp_path: Path) -> None:
    """From models of one layer, a score-routed one where there is one."""
    found = run(model=str(TINY), tokens=8)
    assert fake_times == [((0, 128, 4, 128, 4), 2), ((), 0), ((0,), 1), ((4,), 0), ((128,), 0)]
    decode = found["decode"]
    assert decode["us_per_token"] == 10 + 2 * 20 + 2 * 30 + 107
    kinds = [(k["kind"], k["layers"], k["us"]) for k in decode["kinds"]]
    assert kinds == [("SWA", 1, 10), ("CSA", 2, 30), ("HCA", 2, 20)]
    assert (decode["outside_us"], decode["unexplained_us"]) == (100, 7)
    assert found["memory"]["peak_from"] == "not available"
    drawn = bars(found)
    assert sum(drawn["step"].values()) == decode["us_per_token"]
    assert sum(drawn["step, floor"].values()) == pytest.approx(decode["floor_us"])


def test_peak_of_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is one; the loop's own need stays beside it."""

    class Sizes:
        argument_size_in_bytes, output_size_in_bytes = 100, 30
        alias_size_in_bytes, temp_size_in_bytes = 20, 7

    class Compiled:
        memory_analysis = Sizes

    class Device:
        @staticmethod
        def memory_stats() -> dict[str, int]:
            return {"peak_bytes_in_use": 500, "bytes_limit": 1000}

    class FakeLoop:
        compiled = Compiled

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    found = report._memory(FakeLoop())
    assert (found["loop_bytes"], found["peak_bytes"]) == (117, 500)
    assert found["peak_from"].startswith("allocator")


def test_table(fake_times: list[Any]) -> None:
    result = invoke(TINY, "--layers", 3)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"CSA +│ +1 │ +30\.0 │", result.stdout)
    assert re.search(r"the step +│ +3 │ +167\.0 │", result.stdout)
    assert "5,988.0 tokens/s" in result.stdout and "peak not available" in result.stdout


def launches() -> list[Launch]:
    """Two steps of a layer of each kind that is idle for a microsecond before each launch."""
    root = "jit(decode_steps)/while/body/DeepseekV4/DeepseekV4._advance"
    paths = [f"{root}/take"]
    for layer in range(3):
        at = f"{root}/layer_{layer}/layers_{layer}.advance"
        paths += [
            f"{at}/attention/hc_attn/jit(mhc)/ffi_call",
            f"{at}/attention/attn/jit(attention)/ffi_call",
            f"{at}/attention/attn/jit(dense_linears)/ffi_call",
            f"{at}/attention/attn/indexer/jit(index_topk)/ffi_call",
            f"{at}/attention/attn/wo_b/jit(fp8_linear)/ffi_call",
            f"{at}/moe/ffn/gate/jit(router)/ffi_call",
            f"{at}/moe/ffn/experts/jit(moe)/ffi_call",
            f"{at}/moe/ffn/shared_experts/w2/jit(fp8_linear)/ffi_call",
        ]
    paths.append("jit(decode_steps)/while/body/jit(sample_next)/reduce")
    return [Launch(f"K{i % 26}", path, 3e3 * i, 2.0) for i, path in enumerate(paths * 2)]


def test_profile(fake_times: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "profiled", lambda *_: (launches(), 2))
    monkeypatch.setattr(report, "_is_gpu", lambda: True)
    found = run(model=str(TINY), layers=3, profile=True)
    decode, profile = found["decode"], found["profile"]
    assert len(fake_times) == 1 and decode["layers_from"] == "profile"
    assert [(k["kind"], k["launches"], k["us"]) for k in decode["kinds"]] == [
        (kind, 8, 16) for kind in ("SWA", "CSA", "HCA")
    ]
    assert decode["outside_us"] == 4 and decode["unexplained_us"] == 167 - 52
    assert profile["CSA"]["gap_us"] == 8
    groups = profile["CSA"]["groups_us"]
    assert groups == {group: 2 if group != "rest" else 0 for group in GROUPS}
    assert [op["op"] for op in profile["CSA"]["ops"]][:2] == ["hc_attn mhc", "attn attention"]
    assert [op["op"] for op in profile["outside"]["ops"]] == ["take", "sample_next"]
    drawn = bars(found)
    assert drawn["step"]["experts"] == 6 and drawn["step"]["between launches"] == 167 - 52
    assert drawn["step"][OUTSIDE] == 4
    assert list(drawn)[:2] == ["SWA, floor", "SWA"]
    pytest.importorskip("matplotlib")
    draw(found, tmp_path / "docs" / "step.svg")
    assert "between launches" in (tmp_path / "docs" / "step.svg").read_text("utf-8")


def test_profile_of_a_prefill(fake_times: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its first call, beside that of a step."""
    asked: list[tuple[int, int]] = []

    def profiled_prefill(model: Any, params: Any, rows: int, tokens: int) -> list[Launch]:
        asked.append((rows, tokens))
        return launches()

    monkeypatch.setattr(report, "profiled", lambda *_: (launches(), 2))
    monkeypatch.setattr(report, "profiled_prefill", profiled_prefill)
    monkeypatch.setattr(report, "time_prefill", lambda *_: (Times(100.0, 0.0), 1.0))
    monkeypatch.setattr(report, "_is_gpu", lambda: True)
    found = run(model=str(TINY), layers=3, batch=2, prefill=40, chunk=16, profile=True)
    assert asked == [(2, 16)]
    profile = found["prefill"]["profile"]
    assert {name: place["launches"] for name, place in profile.items()} == {
        "SWA": 16,
        "CSA": 16,
        "HCA": 16,
        "outside": 4,
    }
    result = invoke(TINY, "--layers", 3, "--prefill", 8, "--profile")
    assert result.exit_code == 0, result.stderr
    assert "prefill, CSA: 32.0 us in launches" in result.stdout
    assert run(model=str(TINY), layers=3, prefill=8)["prefill"]["profile"] is None


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"dsv4_jax\[train\]"):
        draw({}, tmp_path / "step.png")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers must be >= 1, got 0"),
        ({"batch": 0}, "batch must be >= 1, got 0"),
        ({"layers": 6}, "layers must be <= 5 "),
        ({"context": 1 << 20}, r"context: 1048\d+ positions are needed, the model has 1048576"),
        ({"profile": True}, "launches can be seen on a GPU only, got the backend cpu"),
        ({"precision": "fp3"}, "preset must be one of"),
        ({"model": "nowhere"}, r"model must be one of \['flash', 'pro', 'bundled'\].*'nowhere'"),
        ({"model": "pro"}, r"61 layers take \d+\.\d GB, cpu has 40\.0 GB .* layers must be <= 2 "),
    ],
)
def test_settings_are_checked_first(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "random_params", lambda *_: pytest.fail("weights were made"))
    monkeypatch.setattr(report, "available", lambda: 40 * 10**9)
    with pytest.raises(ValueError, match=message):
        run(**{"model": str(TINY)} | settings)


def test_loop_refuses_invalid_logits() -> None:
    model = FakeModel(poison_row=0, poison_at=STEPS + 3)
    cache = model.init_cache(batch_size=2, max_len=64)
    loop = Loop(model, fake_params(), cache)
    assert len(loop.seconds(1)) == 1
    assert loop.cache.lengths.tolist() == [STEPS] * 2
    with pytest.raises(ValueError, match="logits must be finite"):
        loop.seconds(2)


def test_as_a_program(fake_times: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([str(TINY), "layers=2", "precision=nvfp4"]) is None
    found = json.loads(capsys.readouterr().out)
    assert (found["layers"], found["precision"]) == (2, "nvfp4")
    assert program.main(["layers=0"]) == "bench: layers must be >= 1, got 0"
    assert "unexpected keyword argument 'layer'" in str(program.main(["layer=1"]))
