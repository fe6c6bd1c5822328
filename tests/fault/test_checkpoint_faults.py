"""Broken checkpoints, one test per row of the acceptance list, section C.

Every case must fail before an array is put on a device, but for the values of scales and tables.
"""

import errno
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv4_jax.checkpoint import CheckpointError, from_checkpoint
from dsv4_jax.checkpoint.names import official_name
from dsv4_jax.checkpoint.read import TensorInfo
from dsv4_jax.checkpoint.validate import resolve
from dsv4_jax.config import ModelConfig
from tests.support import broken, published, tiny
from tests.support.broken import CONFIG, EXPERT, TENSORS, WQ_A

FORMATS: dict[str, Callable[[], tuple[dict[str, Any], dict[str, tiny.Raw]]]] = {
    "official": tiny.official,
    "modelopt": published.modelopt,
    "compressed": published.compressed_tensors,
    "base": functools.partial(published.base, "F32"),
}

Break = Callable[[Path], None]


_fails, _write = broken.fails, broken.write


def _config(text: str | bytes) -> Break:
    def change(path: Path) -> None:
        (path / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def _json(**fields: Any) -> Break:
    return _config(json.dumps(CONFIG | fields))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        pytest.param(os.rmdir, ["no such directory"], id="C1-missing"),
        pytest.param(
            lambda p: (p.rmdir(), p.write_text("x")), ["must be a checkpoint dir"], id="C1-file"
        ),
        pytest.param(lambda p: None, ["config.json: no such file"], id="C2-no-config"),
        pytest.param(
            _config('{\n "a": 1,\n "b" 2}'), ["invalid JSON at line 3 column 6"], id="C2-invalid"
        ),
        pytest.param(_config("[1]"), ["must be a JSON object", "list"], id="C2-not-an-object"),
        pytest.param(_config(b"\xff\xfe{}"), ["config.json: invalid JSON"], id="C2-not-utf8"),
        pytest.param(_config('{"a": NaN}'), ["NaN is not JSON"], id="C2-nan"),
        pytest.param(_config("[" * 100000), ["config.json: invalid JSON"], id="C2-deep"),
        pytest.param(
            _json(architectures=["DeepseekV41ForCausalLM"], model_type="deepseek_v41"),
            ["unsupported architecture DeepseekV41ForCausalLM; this package loads deepseek_v4"],
            id="C3-v41",
        ),
        pytest.param(
            _json(architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3"),
            ["unsupported architecture DeepseekV3ForCausalLM"],
            id="C3-v3",
        ),
        pytest.param(
            _json(architectures=None, model_type="llama"),
            ["unsupported architecture llama"],
            id="C3-by-type",
        ),
        pytest.param(
            _json(architectures=["\ud800\x1b"]),
            [r"unsupported architecture '\ud800\x1b'"],
            id="C3-unprintable",
        ),
        pytest.param(_json(q_lora_rank="128"), ["config.json: q_lora_rank"], id="C4-type"),
        pytest.param(_json(compress_ratios=[0, 4]), ["compress_ratios"], id="C4-ratios"),
        pytest.param(
            _json(rope_scaling={"type": "dynamic"}), ["rope_scaling.type", "dynamic"], id="C5-rope"
        ),
    ],
)
def test_config(tmp_path: Path, change: Break, parts: list[str]) -> None:
    path = tmp_path / "model"
    path.mkdir()
    change(path)
    _fails(path, *parts)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_C1_unreadable(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    try:
        _fails(tmp_path, "cannot be read")
    finally:
        tmp_path.chmod(0o700)


def test_C1_unreadable_even_for_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "listdir", refuse)
    _fails(tmp_path, f"{tmp_path}: cannot be read: Permission denied")


def test_C4_missing_field(tmp_path: Path) -> None:
    tiny.write(tmp_path, {k: v for k, v in CONFIG.items() if k != "index_topk"}, TENSORS)
    _fails(tmp_path, str(tmp_path), "config.json: index_topk is missing")


def test_C5_many_are_cut_at_20(tmp_path: Path) -> None:
    fields = {f"rope_{i}": True for i in range(25)}
    tiny.write(tmp_path, CONFIG | {"rope_\x1b": 500 * "x"} | fields, TENSORS)
    message = _fails(tmp_path, "26 problems: ", r"'rope_\x1b' is an unknown field", "and 6 more")
    assert "rope_18 " in message and "rope_19 " not in message
    assert "\x1b" not in message and len(message) < 20_000


@pytest.mark.usefixtures("nothing_placed")
class TestTensors:
    """Rows about names, shapes and dtypes."""

    def test_C13_missing_and_unexpected(self, tmp_path: Path) -> None:
        name = "layers.1.attn.wq_b.weight"
        path = _write(tmp_path, **{name: None, "layers.1.attn.wqb.weight": TENSORS[name]})
        message = _fails(path, "2 problems", "missing (1)", "unexpected (1)", tiny.SINGLE)
        assert f"{name} (closest: layers.1.attn.wqb.weight)" in message
        assert f"layers.1.attn.wqb.weight in {tiny.SINGLE} (closest: {name})" in message

    def test_C13_many_are_cut_at_20(self, tmp_path: Path) -> None:
        gone = [name for name in TENSORS if ".experts.1." in name and name.startswith("layers")]
        tiny.write(tmp_path, CONFIG, tiny.drop(TENSORS, gone))
        message = _fails(tmp_path, "missing (15)", "scale (15)")  # 5 layers of w1, w2, w3
        assert all(name in message for name in gone)
        gone = [name for name in TENSORS if ".experts." in name and name.startswith("layers")]
        tiny.write(tmp_path, CONFIG, tiny.drop(TENSORS, gone[8:]))
        message = _fails(tmp_path)
        assert message.count("... and ") == 2  # missing, scale
        assert len(message.splitlines()) == 1 + 2 * (1 + 20 + 1)

    def test_C13_hints_look_in_the_same_layer(self) -> None:
        """Among more names than are compared, one of the same layer and expert is found."""
        strangers = [f"layers.0.{i}" for i in range(600)]
        gone, near = (f"layers.3.ffn.{x}.2.w1.weight" for x in ("experts", "expert"))
        table = [
            TensorInfo(name, "f", "BF16", (1,), 0, 2)
            for name in (*strangers, *(name for name in TENSORS if name != gone), near)
        ]
        with pytest.raises(CheckpointError) as error:
            resolve(table, ModelConfig.from_hf(CONFIG))
        assert f"{gone} (closest: {near})" in str(error.value)

    def test_C13_absurdly_many_experts(self, tmp_path: Path) -> None:
        path = _write(tmp_path)
        _json(n_routed_experts=2**31 - 1)(path)
        _fails(path, f"the config has {5 * (2**31 - 1)} experts", "the files hold at most")

    def test_C13_mtp_rule(self, tmp_path: Path) -> None:
        stray = TENSORS["mtp.0.norm.weight"]
        tensors = TENSORS | {"mtp.1.norm.weight": stray, "mtp.2.markov.weight": stray}
        table = [
            TensorInfo(name, "f", raw.dtype, raw.shape, 0, len(raw.data))
            for name, raw in tensors.items()
        ]
        config = ModelConfig.from_hf(CONFIG)
        resolve(table, config)
        with pytest.raises(CheckpointError, match=r"mtp\.0, mtp\.1, mtp\.2"):
            resolve(table, config, mtp=True)
        with pytest.raises(CheckpointError, match=r"no mtp\.\* tensors"):
            resolve([t for t in table if "mtp" not in t.raw], config, mtp=True)

    def test_C13_module_number_that_is_none(self, tmp_path: Path) -> None:
        """Python turns no more than 4300 digits into a number."""
        name = f"mtp.{'9' * 5000}.norm.weight"
        _fails(_write(tmp_path, **{name: TENSORS["norm.weight"]}), "unexpected (1)", "mtp.999")

    def test_C13_one_parameter_under_two_names(self, tmp_path: Path) -> None:
        name = "layers.0.attn.kv_norm.weight"
        path = _write(tmp_path, **{"model.layers.0.attn.norm.weight": TENSORS[name]})
        _fails(path, "same parameter twice", name, "model.layers.0.attn.norm.weight")

    def test_C14_shape(self, tmp_path: Path) -> None:
        raw = TENSORS["embed.weight"]
        wrong = raw._replace(shape=raw.shape[::-1])
        path = _write(tmp_path, **{"embed.weight": wrong})
        _fails(path, f"embed.weight: expected [256, 128], found [128, 256] in {tiny.SINGLE}")

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            (f"{WQ_A}.weight", "F8_E4M3"),
            ("norm.weight", "BF16"),
            ("hc_head_fn", "F32"),
            (f"{EXPERT}.weight", "I8"),
        ],
    )
    def test_C15_dtype(self, tmp_path: Path, name: str, expected: str) -> None:
        shape = TENSORS[name].shape
        wrong = tiny.raw("F16", np.zeros(shape, np.float16))
        path = _write(tmp_path, **{name: wrong})
        _fails(path, f"{name}: expected {expected}, found F16 in {tiny.SINGLE}")

    @pytest.mark.parametrize("name", [WQ_A, EXPERT])
    def test_C16_scale_missing(self, tmp_path: Path, name: str) -> None:
        path = _write(tmp_path, **{f"{name}.scale": None})
        _fails(path, "scale (1)", f"{name}.scale must be F8_E8M0", f"{name}.weight", "found none")

    @pytest.mark.parametrize("name", [WQ_A, EXPERT])
    def test_C16_group_size(self, tmp_path: Path, name: str) -> None:
        wrong = tiny.raw("F8_E8M0", np.full((2, 2), 127, np.uint8))
        path = _write(tmp_path, **{f"{name}.scale": wrong})
        _fails(path, f"{name}.scale must be F8_E8M0", f"{name}.weight", "found F8_E8M0 [2, 2]")

    @pytest.mark.parametrize(
        ("leaf", "wrong", "rule"),
        [
            ("weight_scale", None, "block_scale must be F8_E4M3 [128, 8]"),
            ("weight_scale", ("F8_E4M3", (128, 4)), "found layers.2.ffn.experts.3.w2.weight_scale"),
            ("weight_scale", ("F32", (128, 8)), "found layers.2.ffn.experts.3.w2.weight_scale F32"),
            ("weight_scale_2", None, "global_scale must be F32 []"),
            ("weight_scale_2", ("F32", (2,)), "weight_scale_2 F32 [2]"),
            ("input_scale", None, f"{EXPERT}.input_scale must be F32 []"),
            ("input_scale", None, "found none (layers.4.ffn.experts.3.w3.input_scale is there)"),
            ("input_scale", ("BF16", ()), "found BF16 [] in"),
            ("input_scale", ("F32", (2,)), "found F32 [2] in"),
        ],
    )
    def test_C16_nvfp4_scales(
        self, tmp_path: Path, leaf: str, wrong: tuple[str, tuple[int, ...]] | None, rule: str
    ) -> None:
        config, tensors = published.modelopt()
        name = f"{EXPERT}.{leaf}"
        if wrong is None:
            del tensors[name]
        else:
            dtype, shape = wrong
            item = {"F8_E4M3": np.uint8, "BF16": np.uint16}.get(dtype, np.float32)
            tensors[name] = tiny.raw(dtype, np.ones(shape, item))
        _fails(tiny.write(tmp_path, config, tensors), "scale (1)", f"{EXPERT}.weight U8", rule)

    def test_C16_static_scales_of_some_experts(self, tmp_path: Path) -> None:
        """Of one layer: names of those that are missing, up to 20."""
        config, tensors = published.compressed_tensors()
        names = [n for n in tensors if n.endswith(".input_global_scale")]
        kept = [n for n in names if n.startswith("layers.2.")]
        tensors = {n: t for n, t in tensors.items() if n not in names or n in kept}
        path = tiny.write(tmp_path, config, tensors)
        missing = (
            f"scale ({len(names) - len(kept)})",
            "layers.0.ffn.experts.0.w1.input_global_scale",
        )
        _fails(path, *missing, f"{kept[-1]} is there", "... and 28 more")

    @pytest.mark.parametrize(
        ("source", "extra", "both"),
        [
            ("official", "weight_scale_2", (".scale", ".weight_scale_2")),
            ("modelopt", "weight_global_scale", (".weight_global_scale", ".weight_scale_2")),
            ("modelopt", "weight_packed", (".weight_packed", ".weight_scale_2")),
            ("modelopt", "scale", (".scale", ".weight_scale")),
            ("compressed", "weight_scale_2", (".weight_global_scale", ".weight_scale_2")),
            ("compressed", "input_scale", (".input_scale", ".weight_global_scale")),
            ("compressed", "weight", (".weight ", ".weight_packed")),
            ("base", "weight_scale_inv", (".scale", ".weight_scale_inv")),
        ],
    )
    def test_C17_two_names_of_one_thing(
        self, tmp_path: Path, source: str, extra: str, both: tuple[str, str]
    ) -> None:
        config, tensors = FORMATS[source]()
        tensors[f"{EXPERT}.{extra}"] = tiny.raw("F32", np.ones((), np.float32))
        path = tiny.write(tmp_path, config, tensors)
        _fails(path, "ambiguous number format", *(f"{EXPERT}{name}" for name in both))

    def test_C17_conventions_side_by_side(self, tmp_path: Path) -> None:
        """Every linear for itself is well-formed."""
        config, tensors = published.modelopt()
        other = published.compressed_tensors()[1]
        tensors = {k: v for k, v in tensors.items() if not k.startswith(f"{EXPERT}.")}
        tensors |= {k: v for k, v in other.items() if k.startswith(f"{EXPERT}.")}
        message = _fails(tiny.write(tmp_path, config, tensors), "ambiguous number format")
        assert "(Model-Optimizer)" in message and "(compressed-tensors)" in message
        assert f"{EXPERT}.weight_" in message

    def test_C17_many_are_cut_at_20(self, tmp_path: Path) -> None:
        config, tensors = published.compressed_tensors()
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            tensors[name.removesuffix("_packed")] = tensors[name]
        path = tiny.write(tmp_path, config, tensors)
        message = _fails(path, "one convention (60)", "... and 40 more")
        assert len(message.splitlines()) == 1 + 1 + 20 + 1

    @pytest.mark.parametrize(("tensors", "config"), [(0, 1), (1, 0)])
    def test_C17_config_of_the_other_convention(
        self, tmp_path: Path, tensors: int, config: int
    ) -> None:
        found = (published.modelopt(), published.compressed_tensors())
        path = tiny.write(tmp_path, found[config][0], found[tensors][1])
        names = ("Model-Optimizer", "compressed-tensors")
        message = f"config.json follows {names[config]} (quantization_config."
        for precision in (None, "official"):
            with pytest.raises(CheckpointError, match="ambiguous number format") as error:
                from_checkpoint(path, precision=precision)
            assert message in str(error.value)
            assert f"the tensors {names[tensors]} (layers.0.ffn.experts." in str(error.value)

    def test_C17_integers_of_compressed_tensors(self, tmp_path: Path) -> None:
        """Its W4A16 packs integers under the same name."""
        config, tensors = published.compressed_tensors()
        for name in [name for name in tensors if name.endswith(".weight_packed")]:
            tensors[name] = tiny.raw("I32", np.zeros((128, 16), np.int32))
        _fails(tiny.write(tmp_path, config, tensors), "no precision preset", "experts as I32")

    def test_C19_table_of_another_vocabulary(self, tmp_path: Path) -> None:
        wrong = tiny.raw("I64", np.zeros((255, 2), np.int64))
        path = _write(tmp_path, **{"layers.1.ffn.gate.tid2eid": wrong})
        _fails(path, "layers.1.ffn.gate.tid2eid: expected [256, 2], found [255, 2]")


@pytest.mark.parametrize(
    ("source", "leaf", "value", "got"),
    [
        ("modelopt", "weight_scale", 0x7F, "got nan (byte 127) at [127, 7]"),
        ("modelopt", "weight_scale", 0xB8, "got -1.0 (byte 184) at [127, 7]"),
        ("modelopt", "weight_scale_2", 0.0, "got 0.0"),
        ("modelopt", "weight_scale_2", -1.0, "got -1.0"),
        ("modelopt", "weight_scale_2", np.nan, "got nan"),
        ("modelopt", "input_scale", 0.0, "got 0.0"),
        ("modelopt", "input_scale", -1.0, "got -1.0"),
        ("modelopt", "input_scale", np.inf, "got inf"),
        ("modelopt", "input_scale", np.nan, "got nan"),
        ("compressed", "input_global_scale", 0.0, "got 0.0"),
        ("compressed", "input_global_scale", np.nan, "got nan"),
        ("compressed", "input_global_scale", 1e-39, "so must their reciprocals"),
        ("compressed", "weight_global_scale", 0.0, "got 0.0"),
        ("compressed", "weight_global_scale", np.inf, "got inf"),
        ("compressed", "weight_global_scale", 1e-39, "so must their reciprocals"),
        ("base", "scale", np.nan, "got nan at [0, 0]"),
        ("base", "scale", -0.5, "got -0.5 at [0, 0]"),
    ],
)
def test_C18_scales_of_other_formats(
    tmp_path: Path, source: str, leaf: str, value: float, got: str
) -> None:
    config, tensors = FORMATS[source]()
    old = tensors[f"{EXPERT}.{leaf}"]
    array = old.array(np.uint8 if old.dtype == "F8_E4M3" else np.float32).copy()
    array[tuple(n - 1 for n in array.shape)] = value
    tensors[f"{EXPERT}.{leaf}"] = tiny.raw(old.dtype, array)
    _fails(tiny.write(tmp_path, config, tensors), f"{tiny.SINGLE}: {EXPERT}.{leaf}", got)


def test_C18_a_tiny_scale_that_multiplies(tmp_path: Path) -> None:
    """Only where the file holds the reciprocal must that be finite."""
    config, tensors = published.modelopt()
    tiny_one = np.asarray(1e-39, np.float32)
    tensors[f"{EXPERT}.weight_scale_2"] = tiny.raw("F32", tiny_one)
    _, params = from_checkpoint(tiny.write(tmp_path, config, tensors), progress=False)
    assert params["layers_2"]["ffn"]["experts"]["w2"]["global_scale"][3] == tiny_one


def test_unquantised_linears_of_one_kind_share_a_dtype(tmp_path: Path) -> None:
    tensors = tiny.unquantised(TENSORS, "F32")
    name = "layers.3.attn.wo_a.weight"
    tensors[name] = tiny.unquantised(TENSORS, "BF16")[name]
    config = {k: v for k, v in CONFIG.items() if k != "quantization_config"}
    path = tiny.write(tmp_path, config, tensors)
    _fails(path, f"{name}: expected F32, found BF16")


def test_formats_without_a_preset(tmp_path: Path) -> None:
    half = tiny.half(TENSORS)
    config = {k: v for k, v in CONFIG.items() if k != "quantization_config"}
    path = tiny.write(tmp_path, config, half)
    _fails(path, "no precision preset for attention weights stored as F16 and experts as F16")
    _, params = from_checkpoint(path, precision="float32")
    name = "layers.3.attn.wo_a.weight"
    found = params["layers_3"]["attn"]["wo_a"]["weight"]
    assert np.array_equal(found, half[name].array(np.float16).astype(np.float32))


def test_names_of_the_fixture_are_official() -> None:
    assert all(official_name(name) == name for name in TENSORS)
