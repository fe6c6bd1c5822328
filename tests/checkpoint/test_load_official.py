"""The official release format: bytes in the tree are bytes of the file."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.checkpoint import from_checkpoint, load, place, scan
from dsv4_jax.checkpoint.convert import Report
from dsv4_jax.checkpoint.load import load_params
from dsv4_jax.checkpoint.names import expected_tree, parameters
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import PRESETS, Precision
from dsv4_jax.quant import bits
from dsv4_jax.typing import E2M1
from tests.support import tiny

CONFIG = ModelConfig.from_hf(tiny.official()[0])
TENSORS = tiny.official()[1]


def stored_bytes(leaf: jax.Array) -> bytes:
    """The bytes that the release would hold."""
    return np.asarray(bits.e2m1_to_bytes(leaf) if leaf.dtype == E2M1 else leaf).tobytes()


def at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def same_tree(a: Any, b: Any) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and stored_bytes(x) == stored_bytes(y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(scope="module")
def params() -> Any:
    return load_params(tiny.OFFICIAL, CONFIG, PRESETS["official"], mtp=True, report=Report())


def test_shapes_and_dtypes(params: Any) -> None:
    expected = expected_tree(CONFIG, PRESETS["official"], True)
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for found, struct in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert (found.shape, found.dtype) == (struct.shape, struct.dtype)


def test_every_byte(params: Any) -> None:
    for parameter in parameters(CONFIG, True):
        leaf = at(params, parameter.path)
        if not parameter.is_linear:
            raw = TENSORS[parameter.name]
            if raw.dtype == "I64":
                assert leaf.dtype == jnp.int32
                assert np.array_equal(leaf, raw.array(np.int64))
            else:
                assert stored_bytes(leaf) == raw.data
            continue
        for part in ("weight", "scale"):
            raw_bytes = b"".join(TENSORS[f"{name}.{part}"].data for name in parameter.names())
            assert stored_bytes(leaf[part]) == raw_bytes, (parameter.name, part)


@pytest.mark.parametrize("preset", ["float32", "bfloat16"])
def test_dequantised_equals_numpy(preset: str) -> None:
    report = Report()
    tree = load_params(tiny.OFFICIAL, CONFIG, PRESETS[preset], mtp=True, report=report)
    for parameter in parameters(CONFIG, True):
        if parameter.rule == "int32":
            continue
        leaf = at(tree, (*parameter.path, "weight") if parameter.is_linear else parameter.path)
        names = [f"{n}.weight" if parameter.is_linear else n for n in parameter.names()]
        values = [tiny.decode(TENSORS, name) for name in names]
        expected = np.stack(values) if parameter.experts else values[0]
        assert np.array_equal(np.asarray(leaf, np.float64), expected), parameter.name
    assert not report.errors
    assert set(report.exact) == {(a, preset) for a in ("fp8", "mxfp4", "bfloat16") if a != preset}


def test_shards_are_the_single_file(tmp_path: Path, params: Any) -> None:
    path = tiny.write(tmp_path, tiny.official()[0], TENSORS, shards=3)
    assert same_tree(load_params(path, CONFIG, PRESETS["official"], mtp=True), params)


@pytest.mark.parametrize("preset", ["official", "nvfp4", "float32"])
def test_small_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    whole = load_params(tiny.OFFICIAL, CONFIG, PRESETS[preset], report=Report())
    monkeypatch.setattr(scan, "SLAB_BYTES", 20_000)
    monkeypatch.setattr(place, "STAGING_BYTES", 40_000)
    monkeypatch.setattr(load, "SLAB_BYTES", 60_000)  # two experts of 26,112 bytes
    staged: list[int] = []
    put = place.Placer._put
    monkeypatch.setattr(
        place.Placer, "_put", lambda self, host: staged.append(host.nbytes) or put(self, host)
    )
    cut = load_params(tiny.OFFICIAL, CONFIG, PRESETS[preset], report=Report())
    assert same_tree(whole, cut)
    assert max(staged) <= 20_000


def test_mtp_is_left_out_unless_asked_for(caplog: pytest.LogCaptureFixture, params: Any) -> None:
    with caplog.at_level("INFO", logger="dsv4_jax"):
        tree = load_params(tiny.OFFICIAL, CONFIG, PRESETS["official"])
    assert set(params) - set(tree) == {"mtp_0"}
    assert [r.message for r in caplog.records if "mtp" in r.message] == [
        f"{tiny.OFFICIAL}: skipped {sum(n.startswith('mtp.') for n in TENSORS)} tensors of "
        "an MTP module (mtp.*)"
    ]


def test_progress_counts_every_byte() -> None:
    seen: list[tuple[int, int]] = []
    load_params(
        tiny.OFFICIAL,
        CONFIG,
        PRESETS["official"],
        mtp=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    total = sum(len(tensor.data) for tensor in TENSORS.values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_progress_bar_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    load_params(tiny.OFFICIAL, CONFIG, PRESETS["official"], progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "loading" in err


def test_from_checkpoint(capsys: pytest.CaptureFixture[str], params: Any) -> None:
    model, tree = from_checkpoint(tiny.OFFICIAL, mtp=True)
    assert same_tree(tree, params)
    assert model.config == CONFIG
    assert model.precision == Precision.preset("official")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f'dsv4: precision "official": {tiny.OFFICIAL} holds FP8 linears and MXFP4 experts'
    ]


def test_from_checkpoint_prints_the_errors(capsys: pytest.CaptureFixture[str]) -> None:
    from_checkpoint(tiny.OFFICIAL, precision="nvfp4")
    err = capsys.readouterr().err.splitlines()
    assert any(line.startswith("dsv4: attn.wq_b fp8 -> nvfp4: rel. L2 0.09") for line in err)
    assert "dsv4: mxfp4 -> nvfp4: exact (ffn.experts.w1, ffn.experts.w2, ffn.experts.w3)" in err


def test_from_checkpoint_arguments() -> None:
    with pytest.raises(ValueError, match="sharding: only None works"):
        from_checkpoint(tiny.OFFICIAL, sharding="x")
    with pytest.raises(ValueError, match="preset must be one of"):
        from_checkpoint(tiny.OFFICIAL, precision="int4")
