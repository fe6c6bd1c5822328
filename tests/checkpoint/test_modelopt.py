"""NVFP4 checkpoints of Model-Optimizer: bytes are kept, and the values are the official ones."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.checkpoint import from_checkpoint
from dsv4_jax.checkpoint.convert import Report
from dsv4_jax.checkpoint.load import load_params
from dsv4_jax.checkpoint.memory import Plan
from dsv4_jax.checkpoint.names import expected_tree, parameters
from dsv4_jax.checkpoint.read import Reader
from dsv4_jax.checkpoint.validate import resolve
from dsv4_jax.cli.common import preset_name
from dsv4_jax.config import ModelConfig
from dsv4_jax.model.moe import MoE
from dsv4_jax.precision import PRESETS, Precision
from reference import model as reference
from reference.rounding import OFFICIAL
from tests.checkpoint.test_load_official import at, same_tree, stored_bytes
from tests.support import published, tiny
from tests.support.numerics import rel_l2
from tests.support.op_cases import normal

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
    count = 3 * len(published.experts(tiny.official()[1]))
    said = f"dsv4: {count} static activation scales of routed experts are used"
    assert lines[1:] == [said] * static
    assert model.precision == PRESETS["nvfp4_experts"]
    assert preset_name(model.precision) == "nvfp4_experts"
    held = {"experts"} if static else set[str]()
    expected = expected_tree(CONFIG, PRESETS["nvfp4_experts"], True, held)
    official = load_params(tiny.OFFICIAL, CONFIG, model.precision, mtp=True, report=Report())
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    assert [x.shape for x in _leaves(params)] == [x.shape for x in _leaves(expected)]
    scales = published.take_act_scales(params)
    assert len(scales) == 2 * CONFIG.num_hidden_layers * static
    for (layer, leaf), found in scales.items():
        weights = ("w1", "w3") if leaf == "up_act_scale" else ("w2",)
        for w in weights:
            name = layer.replace("_", ".")
            want = [published.act_scale(f"{name}.ffn.experts.{e}.{w}") for e in range(4)]
            assert np.array_equal(found, want)
    assert same_tree(params, official)


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree)


def _moe(params: Any, model: Any, layer: int, x: Any, tokens: Any) -> Any:
    moe = MoE(CONFIG, model.precision, model.precision.experts, CONFIG.is_hash_layer(layer))
    variables = {"params": params[f"layers_{layer}"]["ffn"]}
    return moe.apply(variables, x, None, tokens, jnp.ones(len(x), bool))


def test_static_scales_against_the_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`w1` and `w3` read the same: under the larger scale where theirs differ, with a line."""
    config, tensors = published.modelopt()
    for expert, w in enumerate(("w1", "w3")):
        name = f"layers.3.ffn.experts.{expert}.{w}.input_scale"
        tensors[name] = tiny.raw("F32", tensors[name].array(np.float32) * np.float32(0.25))
    model, params = from_checkpoint(_write(tmp_path, tensors))
    assert capsys.readouterr().err.splitlines()[1] == (
        "dsv4: static activation scales of w1 and w3 differ in 2 experts (layers.3.ffn.experts.0 "
        "...): the larger one is used for both"
    )
    weights = {
        name: tiny.decode(tiny.official()[1], name)
        for name in tiny.official()[1]
        if name.startswith("layers.3.ffn") and not name.endswith("scale")
    }
    scales = {n: t.array(np.float32) for n, t in tensors.items() if n.endswith(".input_scale")}
    rounding = dataclasses.replace(OFFICIAL, expert_nvfp4=True)
    x = normal(3, 21, CONFIG.hidden_size, dtype=jnp.bfloat16)
    tokens = jnp.arange(21, dtype=jnp.int32)
    got = _moe(params, model, 3, x, tokens)
    branch = jax.jit(lambda w, x: reference.moe_branch(w, config, x, tokens, rounding))

    def distance(found: dict[str, np.ndarray]) -> float:
        layer = reference.layer_weights(found, config, 3)
        layer = {name: jnp.asarray(w, jnp.float32) for name, w in layer.items()}
        return rel_l2(got, branch(layer, x.astype(jnp.float32)))

    assert distance(weights | scales) < 1e-3  # 0 measured
    assert distance(weights) > 0.1  # per token
    smaller = {n.replace("w3", "w1"): v for n, v in scales.items() if ".1.w3.input" in n}
    assert distance(weights | scales | smaller) > 0.1


def test_static_scales_are_of_their_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of W4A16 are the same without them, and reading ends at all bytes."""
    path = _write(tmp_path)
    progress: list[tuple[int, int]] = []
    precision = Precision(experts="nvfp4_w4a16")
    _, params = from_checkpoint(path, precision=precision, progress=lambda *at: progress.append(at))
    first = "layers.0.ffn.experts.0.w1.input_scale"
    assert capsys.readouterr().err.splitlines() == [
        f"dsv4: 60 static activation scales ({first} ...) are not used: only routed experts in "
        "nvfp4_w4a4 take them, other linears scale NVFP4 activations per token"
    ]
    assert published.take_act_scales(params) == {}
    assert progress[-1][0] == progress[-1][1]
    _, params = from_checkpoint(path, progress=lambda *at: progress.append(at))
    assert progress[-1][0] == progress[-1][1]
    assert len(published.take_act_scales(params)) == 10


def test_static_scales_of_other_linears(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are not used: one line for both kinds."""
    tensors = published.modelopt()[1]
    for name in [n for n in tensors if ".shared_experts." in n and n.startswith("layers.")]:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight":
            rows, cols = tensors[name].shape
            tensors[name] = tiny.raw("U8", np.full((rows, cols // 2), 0x22, np.uint8))
            block = np.full((rows, cols // 16), 0x38, np.uint8)
            tensors[f"{module}.weight_scale"] = tiny.raw("F8_E4M3", block)
            for scalar in ("weight_scale_2", "input_scale"):
                tensors[f"{module}.{scalar}"] = tiny.raw("F32", np.asarray(0.01, np.float32))
        else:
            del tensors[name]
    model, params = from_checkpoint(_write(tmp_path, tensors))
    assert model.precision.shared_expert == "nvfp4_w4a4"
    assert capsys.readouterr().err.splitlines()[1:] == [
        "dsv4: 60 static activation scales of routed experts are used",
        "dsv4: 15 static activation scales (layers.0.ffn.shared_experts.w1.input_scale ...) are "
        "not used: only routed experts in nvfp4_w4a4 take them, other linears scale NVFP4 "
        "activations per token",
    ]
    assert set(params["layers_0"]["ffn"]["shared_experts"]["w1"]) == {
        "weight", "block_scale", "global_scale",
    }  # fmt: skip


def test_static_scales_of_mtp_experts(tmp_path: Path) -> None:
    """They may be there alone."""
    tensors = published.modelopt(static=False)[1]
    for name in [n for n in tensors if n.startswith("mtp.0.ffn.experts.") and n.endswith(".scale")]:
        module = name.removesuffix(".scale")
        found = published.exact_nvfp4(tensors[f"{module}.weight"], tensors.pop(name), -1)
        found["input_scale"] = tiny.raw("F32", np.asarray(published.act_scale(module)))
        tensors |= {f"{module}.{leaf}": tensor for leaf, tensor in found.items()}
    model, params = from_checkpoint(_write(tmp_path, tensors), mtp=True)
    assert model.precision.mtp_experts == "nvfp4_w4a4"
    assert published.take_act_scales(params) == {}
    experts = params["mtp_0"]["ffn"]["experts"]
    want = [published.act_scale(f"mtp.0.ffn.experts.{e}.w2") for e in range(4)]
    assert np.array_equal(experts["down_act_scale"], want)
    expected = expected_tree(CONFIG, model.precision, True, {"mtp_experts"})
    assert jax.tree.structure(params) == jax.tree.structure(expected)


def test_static_scales_are_planned_for(tmp_path: Path) -> None:
    with Reader(_write(tmp_path)) as reader:
        resolved = resolve(reader, CONFIG)
    assert resolved.act_scales == {"experts"}
    for precision, nbytes in (
        (PRESETS["nvfp4_experts"], 5 * 2 * 4 * 4),
        (Precision(experts="nvfp4_w4a16"), 0),
    ):
        plan = Plan(CONFIG, precision)
        more = dataclasses.replace(plan, act_scales=resolved.act_scales)
        assert more.need().weights - plan.need().weights == nbytes


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
