"""Conversions at load time against independent decodes."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.checkpoint import CheckpointError, from_checkpoint
from dsv4_jax.checkpoint.convert import Report, convert, mxfp4_to_nvfp4
from dsv4_jax.checkpoint.load import load_params
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import PRESETS, Precision
from tests.support import tiny
from tests.support.models import append, assert_same_bytes, golden_ids, three_layers
from tests.support.numerics import assert_same_bits

CONFIG = ModelConfig.from_hf(tiny.official()[0])
TENSORS = tiny.official()[1]


def _mxfp4(rng: np.random.Generator, exponents: np.ndarray, rows: int = 8) -> dict[str, Any]:
    """A random tensor ``[rows, 32 * len(exponents)]`` whose blocks have these exponents."""
    packed = rng.integers(0, 256, (rows, 16 * len(exponents)), dtype=np.uint8)
    scale = np.broadcast_to(exponents + 127, (rows, len(exponents))).astype(np.uint8)
    return {"weight": packed, "scale": scale}


def _mxfp4_value(raw: dict[str, Any]) -> np.ndarray:
    scale = np.exp2(raw["scale"].astype(np.float64) - 127)
    return tiny.e2m1(raw["weight"]) * scale.repeat(32, -1)


def _nvfp4_value(raw: dict[str, Any]) -> np.ndarray:
    block = tiny.e4m3(np.asarray(raw["block_scale"]))
    factor = np.asarray(raw["global_scale"], np.float64)[..., None, None]
    return tiny.e2m1(np.asarray(raw["weight"])) * block.repeat(16, -1) * factor


def _run(group: dict[str, Any], experts: bool) -> tuple[Any, Any]:
    device = {k: {n: jnp.asarray(a) for n, a in raw.items()} for k, raw in group.items()}
    return mxfp4_to_nvfp4(device, experts=experts)


@pytest.mark.parametrize("top", [0, -10, -110, 119, -127 + 17])
def test_mxfp4_to_nvfp4_is_exact_through_17_binades(top: int) -> None:
    rng = np.random.default_rng(0)
    raw = _mxfp4(rng, np.arange(top - 17, top + 1))
    out, exact = _run({"w": raw}, False)
    assert bool(exact["w"])
    assert np.array_equal(out["w"]["weight"], raw["weight"])
    assert np.array_equal(_nvfp4_value(out["w"]), _mxfp4_value(raw))


def test_mxfp4_to_nvfp4_refuses_18_binades() -> None:
    raw = _mxfp4(np.random.default_rng(0), np.array([0, -18]))
    out, exact = _run({"w": raw}, False)
    assert not bool(exact["w"])
    assert not np.array_equal(_nvfp4_value(out["w"]), _mxfp4_value(raw))


def test_all_zero_blocks_may_be_anywhere() -> None:
    raw = _mxfp4(np.random.default_rng(0), np.array([0, -90, 60]))
    raw["weight"][:, 16:] &= 0x88  # zeros of both signs
    out, exact = _run({"w": raw}, False)
    assert bool(exact["w"])
    assert float(out["w"]["global_scale"]) == 2.0**-8
    assert np.array_equal(_nvfp4_value(out["w"]), _mxfp4_value(raw))
    raw["weight"][:] = 0
    out, exact = _run({"w": raw}, False)
    assert bool(exact["w"]) and float(out["w"]["global_scale"]) == 1.0


def test_w1_and_w3_share_their_global_scale_per_expert() -> None:
    rng = np.random.default_rng(0)
    tops = {"w1": (0, -9), "w3": (-8, 3), "w2": (-20, 20)}
    group = {
        name: {
            leaf: np.stack([_mxfp4(rng, np.array([t, t - 5]))[leaf] for t in top])
            for leaf in ("weight", "scale")
        }
        for name, top in tops.items()
    }
    out, exact = _run(group, True)
    assert all(flags.shape == (2,) and bool(flags.all()) for flags in exact.values())
    assert np.array_equal(out["w1"]["global_scale"], [2.0**-8, 2.0**-5])
    assert np.array_equal(out["w1"]["global_scale"], out["w3"]["global_scale"])
    assert np.array_equal(out["w2"]["global_scale"], [2.0**-28, 2.0**12])
    for name in group:
        assert np.array_equal(_nvfp4_value(out[name]), _mxfp4_value(group[name]))


def test_spread_across_w1_and_w3_counts() -> None:
    rng = np.random.default_rng(0)
    _, exact = _run({"w1": _mxfp4(rng, np.array([0])), "w3": _mxfp4(rng, np.array([-18]))}, False)
    assert bool(exact["w1"]) and not bool(exact["w3"])


def test_one_wide_expert_is_requantised_and_said_so(tmp_path: Path) -> None:
    tensors = dict(TENSORS)
    name = "layers.2.ffn.experts.1.w1.scale"
    scale = tensors[name].array(np.uint8).copy()
    scale[0, 0], scale[0, 1] = 127, 127 - 40
    tensors[name] = tiny.raw("F8_E8M0", scale)
    path = tiny.write(tmp_path, tiny.official()[0], tensors)
    report = Report()
    tree = load_params(path, CONFIG, PRESETS["nvfp4"], report=report)
    for expert in range(4):
        for part in ("w1", "w2", "w3"):
            leaves = tree["layers_2"]["ffn"]["experts"][part]
            found = {
                "weight": np.asarray(_bytes(leaves["weight"][expert])),
                "block_scale": np.asarray(leaves["block_scale"][expert]).view(np.uint8),
                "global_scale": leaves["global_scale"][expert],
            }
            value = tiny.decode(tensors, f"layers.2.ffn.experts.{expert}.{part}.weight")
            kept = np.array_equal(_nvfp4_value(found), value)
            assert kept == (expert != 1 or part == "w2"), (expert, part)
    factors = tree["layers_2"]["ffn"]["experts"]
    assert np.array_equal(factors["w1"]["global_scale"], factors["w3"]["global_scale"])
    wide = ("ffn.experts.w1", "mxfp4", "nvfp4")
    assert set(report.errors[wide]) == {"layers.2"}
    assert 0 < report.errors[wide]["layers.2"] < 0.2
    assert any("layers.2 ffn.experts.w1 of 1 of 4 experts" in note for note in report.notes)


POWERS = Precision(experts="nvfp4_w4a8", mtp_experts="nvfp4_w4a8")
"""The formats that `Precision.experts_power_of_two` is of."""


@pytest.fixture(params=["layers.2", "mtp.0"])
def wide(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """The checkpoint with a byte changed, so that one expert has to be requantised; its name."""
    expert = f"{request.param}.ffn.experts.1.w1"
    scale = TENSORS[f"{expert}.scale"].array(np.uint8).copy()
    scale[0, 0] -= 40
    changed = {f"{expert}.scale": tiny.raw("F8_E8M0", scale)}
    return tiny.write(tmp_path, tiny.official()[0], TENSORS | changed), expert


def _powers(lines: str) -> list[str]:
    return [line for line in lines.splitlines() if "experts_power_of_two" in line]


@pytest.mark.parametrize("asked", [None, True])
def test_powers_of_two_are_found(asked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    precision = dataclasses.replace(POWERS, experts_power_of_two=asked)
    model, _ = from_checkpoint(tiny.OFFICIAL, precision=precision, mtp=True)
    assert model.precision == dataclasses.replace(POWERS, experts_power_of_two=True)
    assert _powers(capsys.readouterr().err) == [
        "dsv4: experts_power_of_two=True: all block scales of nvfp4_w4a8 experts are zero or "
        "powers of two"
    ]


def test_powers_of_two_change_nothing_on_the_cpu() -> None:
    ids = jnp.asarray(golden_ids(24))
    found = []
    for asked in (None, False):
        model, params = three_layers(experts="nvfp4_w4a8", experts_power_of_two=asked)
        assert model.precision.experts_power_of_two == (asked is None)
        cache = model.init_cache(len(ids), 24)
        found.append(append(model, params, ids, cache, jnp.full(len(ids), 24)))
    (logits, cache), (other, other_cache) = found
    assert_same_bits(logits, other)
    assert_same_bytes(cache, other_cache)


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(dataclasses.replace(POWERS, experts_power_of_two=False), id="forgone"),
        pytest.param(Precision(experts="nvfp4_w4a4"), id="other-experts"),
        pytest.param(Precision(shared_expert="nvfp4_w4a8"), id="not-routed"),
        pytest.param(Precision(mtp_experts="nvfp4_w4a8"), id="not-loaded"),
    ],
)
def test_powers_of_two_are_not_looked_for(
    precision: Precision, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = from_checkpoint(tiny.OFFICIAL, precision=precision)
    assert model.precision == precision
    assert _powers(capsys.readouterr().err) == []


def test_other_scales_turn_power_of_two_off(
    wide: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    path, name = wide
    model, params = from_checkpoint(path, precision=POWERS, mtp=True)
    assert model.precision == dataclasses.replace(POWERS, experts_power_of_two=False)
    (line,) = _powers(capsys.readouterr().err)
    layer = "mtp_0" if name.startswith("mtp") else "layers_2"
    block_scale = params[layer]["ffn"]["experts"]["w1"]["block_scale"]
    value = tiny.e4m3(np.asarray(block_scale).view(np.uint8))
    odd = np.argwhere((value != 0) & (np.frexp(value)[0] != 0.5))
    assert set(odd[:, 0]) == {1}
    assert line == (
        f"dsv4: experts_power_of_two=False: {name}: block scales must be zero or powers of two, "
        f"got {value[tuple(odd[0])]} at {odd[0, 1:].tolist()}"
    )
    # Nothing of the module is loaded without it.
    model, _ = from_checkpoint(path, precision=POWERS)
    assert model.precision.experts_power_of_two == name.startswith("mtp")


def test_other_scales_than_demanded(wide: tuple[Path, str]) -> None:
    path, name = wide
    precision = dataclasses.replace(POWERS, experts_power_of_two=True)
    rule = "block scales must be zero or powers of two for experts_power_of_two=True, got "
    with pytest.raises(CheckpointError, match=rf"^{tiny.SINGLE}: {name}: {rule}\d+\.\d+ at \[0, "):
        from_checkpoint(path, precision=precision, mtp=True)


def _bytes(leaf: Any) -> Any:
    from dsv4_jax.quant.bits import e2m1_to_bytes

    return e2m1_to_bytes(leaf)


@pytest.mark.parametrize(
    ("stored", "target", "low", "high"),
    [
        # model.md 9.1 measured 0.095 (NVFP4) and 0.1185 (MXFP4) on Gaussian data; E4M3 has a
        # relative step of 2^-3 to 2^-4, thus about 0.026.
        ("float32", "nvfp4", 0.090, 0.100),
        ("float32", "mxfp4", 0.112, 0.125),
        ("float32", "fp8", 0.024, 0.029),
        ("float32", "bfloat16", 0.0014, 0.0019),
    ],
)
def test_reported_error_is_the_error(stored: str, target: str, low: float, high: float) -> None:
    x = np.random.default_rng(0).standard_normal((3, 256, 256)).astype(np.float32)
    raw = {"w": {"weight": jnp.asarray(x)}}
    out, errors = convert(raw, stored=stored, target=target, experts=True)
    got = out["w"]
    if target == "nvfp4":
        value = _nvfp4_value(got)
    elif target == "mxfp4":
        value = _mxfp4_value({k: np.asarray(v) for k, v in got.items()})
    elif target == "fp8":
        scale = np.exp2(np.asarray(got["scale"], np.float64) - 127)
        value = tiny.e4m3(np.asarray(got["weight"])) * scale.repeat(128, -1).repeat(128, -2)
    else:
        value = np.asarray(got["weight"], np.float64)
    relative = np.sqrt(((value - x) ** 2).sum((1, 2)) / (x.astype(np.float64) ** 2).sum((1, 2)))
    reported = np.sqrt(np.asarray(errors["w"].error) / np.asarray(errors["w"].value))
    np.testing.assert_allclose(reported, relative, rtol=1e-4)  # FP32 sums of 65,536 terms
    assert np.all((low < relative) & (relative < high))


def test_shared_expert_shares_its_global_scale() -> None:
    precision = Precision(shared_expert="nvfp4_w4a8")
    tree = load_params(tiny.OFFICIAL, CONFIG, precision, report=Report())
    shared = tree["layers_0"]["ffn"]["shared_experts"]
    names = [f"layers.0.ffn.shared_experts.{w}.weight" for w in ("w1", "w3")]
    amax = max(np.abs(tiny.decode(TENSORS, name)).max() for name in names)
    assert float(shared["w1"]["global_scale"]) == np.float32(amax) / np.float32(6 * 448)
    assert float(shared["w1"]["global_scale"]) == float(shared["w3"]["global_scale"])


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_requantising_dequantised_weights_is_exact(tmp_path: Path, dtype: str) -> None:
    """MXFP4 values have their block maximum at code 4 or 6, so most scales come back as they were;
    whatever the scales, the values do."""
    path = tiny.write(tmp_path, tiny.official()[0], tiny.unquantised(TENSORS, dtype))
    report = Report()
    tree = load_params(path, CONFIG, PRESETS["official"], report=report)
    lossy = {key: max(e.values()) for key, e in report.errors.items()}
    assert lossy["attn.wq_b", {"F32": "float32", "BF16": "bfloat16"}[dtype], "fp8"] == 0
    assert "fp8: exact (" in "\n".join(report.lines())
    assert tree["layers_0"]["attn"]["wq_b"]["weight"].dtype == jnp.float8_e4m3fn


def test_report_lines() -> None:
    report = Report()
    report.add_error("attn.wq_b", "layers.0", "fp8", "nvfp4", 0.0081, 1.0)
    report.add_error("attn.wq_b", "layers.3", "fp8", "nvfp4", 0.01, 1.0)
    report.add_error("norm", "norm", "float32", "bfloat16", 0.0, 1.0)
    report.add_exact("ffn.experts.w1", "mxfp4", "nvfp4")
    assert report.lines() == [
        "attn.wq_b fp8 -> nvfp4: rel. L2 0.095 (mean over 2 layers, max 0.1 at layers.3)",
        "mxfp4 -> nvfp4: exact (ffn.experts.w1)",
        "float32 -> bfloat16: exact (norm)",
    ]
