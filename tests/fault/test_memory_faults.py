"""Rows C26 and C27: what does not fit the device is refused, with need, have and a way out."""

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from jax.errors import JaxRuntimeError
from typer.testing import CliRunner

from dsv4_jax import cli
from dsv4_jax.checkpoint import CheckpointError, bundled_checkpoint, from_checkpoint, memory, place
from dsv4_jax.checkpoint.memory import OutOfMemory, Plan
from dsv4_jax.checkpoint.read import Reader
from dsv4_jax.cli.common import checkpoint_tokenizer, model_config
from dsv4_jax.compare import cache_copies
from dsv4_jax.config import ModelConfig
from dsv4_jax.evaluate import cache_size, read_document
from dsv4_jax.precision import PRESETS
from tests.support import tiny

CONFIG = ModelConfig.from_hf(tiny.official()[0])
OFFICIAL = PRESETS["official"]


def _plan(**changes: Any) -> Plan:
    return Plan(**{"config": CONFIG, "precision": OFFICIAL, "max_len": 4096} | changes)


@pytest.fixture(autouse=True)
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal comes before the first byte of a tensor and before the first array."""

    def refuse(*args: Any) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(Reader, "read_into", refuse)
    monkeypatch.setattr(place.Placer, "_put", refuse)


def _have(monkeypatch: pytest.MonkeyPatch, count: int | None) -> None:
    monkeypatch.setattr(memory, "available", lambda: count)


def test_C26_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _plan(max_len=None)
    total = plan.need().total
    _have(monkeypatch, total - 1)
    with pytest.raises(OutOfMemory) as caught:
        from_checkpoint(tiny.OFFICIAL, progress=False)
    error = caught.value
    assert isinstance(error, CheckpointError)
    assert isinstance(error, MemoryError)
    assert (error.need, error.have) == (plan.need(), total - 1)
    assert str(tiny.OFFICIAL) in str(error)
    assert f"need {memory.readable(total)}: weights " in str(error)
    assert f"{memory.readable(plan.need().staging)} more while loading, have " in str(error)
    _have(monkeypatch, 1000)
    with pytest.raises(OutOfMemory, match="no setting makes it fit this device"):
        from_checkpoint(tiny.OFFICIAL, progress=False)


def test_C26_what_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for have in (_plan().need().total, None):
        _have(monkeypatch, have)
        assert memory.check([_plan()], source="x") == have
        with pytest.raises(AssertionError, match="too late"):
            from_checkpoint(tiny.OFFICIAL, max_len=4096, progress=False)


def test_C26_advice_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lengths and batches it names are the largest that are not refused."""
    asked = _plan(batch_size=6, max_len=1_000_000)
    _have(monkeypatch, _plan(batch_size=3, max_len=1_000_000).need().total)
    with pytest.raises(OutOfMemory) as caught:
        memory.check([asked], source="x")
    found = re.search(
        r"lower max_len to (\d+) or less, or lower batch_size to (\d+) or less", str(caught.value)
    )
    assert found, str(caught.value)
    max_len, batch_size = map(int, found.groups())
    assert batch_size == 3
    for more in (0, 4):  # a closed window of CSA
        for plan in (
            _plan(batch_size=6, max_len=max_len + more),
            _plan(batch_size=batch_size + more, max_len=1_000_000),
        ):
            if more:
                with pytest.raises(OutOfMemory):
                    memory.check([plan], source="x")
            else:
                memory.check([plan], source="x")


def test_C26_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    _have(monkeypatch, _plan(max_len=None).need().total)
    with pytest.raises(OutOfMemory, match=r"; choose precision official$"):
        from_checkpoint(tiny.OFFICIAL, precision="float32", progress=False)


def test_C26_mtp(monkeypatch: pytest.MonkeyPatch) -> None:
    _have(monkeypatch, _plan(max_len=None).need().total)
    with pytest.raises(OutOfMemory, match=r"; (choose precision nvfp4, or )?leave out mtp$"):
        from_checkpoint(tiny.OFFICIAL, mtp=True, progress=False)


def test_C26_two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [_plan(), _plan(precision=PRESETS["nvfp4"])]
    _have(monkeypatch, plans[0].need().total)
    with pytest.raises(OutOfMemory, match="no setting"):
        memory.check(plans, source="x")


def test_C26_sizes_that_no_cache_can_have() -> None:
    with pytest.raises(ValueError, match=r"max_len must be 1\.\.1048576"):
        from_checkpoint(tiny.OFFICIAL, max_len=2**21, progress=False)


def _device(platform: str, stats: dict[str, int] | None) -> Any:
    return SimpleNamespace(platform=platform, memory_stats=lambda: stats)


@pytest.mark.parametrize(
    ("device", "have"),
    [
        pytest.param(_device("gpu", {"bytes_limit": 90, "bytes_in_use": 30}), 60, id="gpu"),
        pytest.param(_device("gpu", None), None, id="platform-allocator"),
        pytest.param(_device("gpu", {"bytes_in_use": 30}), None, id="no-limit"),
        pytest.param(_device("cpu", None), 5 * 1024, id="cpu"),
    ],
)
def test_available(monkeypatch: pytest.MonkeyPatch, device: Any, have: int | None) -> None:
    text = "MemTotal:       9 kB\nMemAvailable:       5 kB\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    monkeypatch.setattr(memory, "devices", lambda: [device])
    assert memory.available() == have


def test_available_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With /proc/meminfo, without it, and where nobody knows."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with jax.default_device(jax.devices("cpu")[0]):
        assert 0 < (memory.available() or 0) <= total

        def gone(self: Path, encoding: str) -> str:
            raise FileNotFoundError

        monkeypatch.setattr(Path, "read_text", gone)
        assert 0 < (memory.available() or 0) <= total

        def unknown(name: str) -> int:
            raise ValueError("unrecognized configuration name")

        monkeypatch.setattr(os, "sysconf", unknown)
        assert memory.available() is None


def test_C27_exhausted() -> None:
    plans = [_plan(batch_size=2)]
    total = memory.need(plans).total
    real = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")
    error = memory.exhausted(real, plans, source="DIR", have=2 * total)
    assert isinstance(error, OutOfMemory)
    assert str(error).startswith(
        f"DIR: the device ran out of memory; need {memory.readable(total)}"
    )
    assert "lower max_len, or lower batch_size, or choose precision" in str(error)
    assert isinstance(memory.exhausted(MemoryError(), plans, source="DIR"), OutOfMemory)
    assert memory.exhausted(JaxRuntimeError("INTERNAL: oops"), plans, source="DIR") is None


# The commands name their own options.


def _refused(*arguments: object) -> str:
    """The last line of what a command says of the model in the package."""
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "60"})
    assert (result.exit_code, result.stdout) == (2, "")
    *others, last = result.stderr.strip().splitlines()
    assert last.startswith(f"error: {bundled_checkpoint()}: need ")
    assert not any(line.startswith("error") for line in others)
    return last


def test_C26_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("some text and more of it " * 400, encoding="utf-8")
    config = model_config(bundled_checkpoint())

    def plan(max_len: int, **changes: Any) -> Plan:
        return Plan(**{"config": config, "precision": OFFICIAL, "max_len": max_len} | changes)

    _have(monkeypatch, plan(2048).need().total)
    error = _refused("generate", "--ids", "1 2", "--max-len", 60_000)
    assert "60000 positions)" in error
    assert error.endswith("; lower --max-len to 2048 or less")

    _have(monkeypatch, plan(512, batch_size=2).need().total)
    for batch_size, context in ((2, "--context"), (8, "--batch-size to 2 and --context")):
        arguments = ("--text", text, text, "--batch-size", batch_size, "--precision", "official")
        error = _refused("eval", *arguments)
        ways = f"; lower {context} to 512 or less, or lower --batch-size to 1 or less"
        assert ways in error
    # What it says does: the same check passes.
    size = cache_size(
        [read_document(checkpoint_tokenizer(bundled_checkpoint()), text)] * 2,
        config,
        context=512,
        batch_size=2,
    )
    memory.check([plan(size.max_len, batch_size=size.batch_size)], source="x")

    copies = cache_copies(config.num_hidden_layers)
    plans = [
        plan(512, precision=PRESETS[name], layer_copies=counts)
        for name, counts in zip(("official", "nvfp4"), copies, strict=True)
    ]
    _have(monkeypatch, memory.need(plans).total)
    error = _refused("compare", "--precision", "official", "nvfp4", "--text", text)
    assert error.endswith("; lower --max-tokens to 512 or less")
