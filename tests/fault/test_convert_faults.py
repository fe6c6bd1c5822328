"""What can go wrong while a checkpoint is converted (acceptance row C30), and what is left then."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from typer.testing import CliRunner

from dsv4_jax import cli
from dsv4_jax.checkpoint import CheckpointError, from_checkpoint, manifest, rewrite, write
from dsv4_jax.checkpoint.load import load_params
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import PRESETS
from tests.support import published, tiny

PRESET = "nvfp4_experts"


class Stopped(Exception):
    """Stands for anything that ends a conversion."""


@pytest.fixture(autouse=True)
def many_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "SHARD_BYTES", 1_000_000)


def _files(path: Path) -> dict[str, bytes]:
    return {found.name: found.read_bytes() for found in path.iterdir()}


def _shards(path: Path) -> list[str]:
    return sorted(name for name in _files(path) if name.endswith(".safetensors"))


def _stop_at(monkeypatch: pytest.MonkeyPatch, shard: int, error: BaseException) -> None:
    """The given shard is written to its last byte, and then something happens."""
    finish, count = write.ShardWriter.finish, 0

    def stop(self: write.ShardWriter) -> tuple[int, str]:
        nonlocal count
        count += 1
        if count == shard:
            raise error
        return finish(self)

    monkeypatch.setattr(write.ShardWriter, "finish", stop)


class Half(NamedTuple):
    """An unfinished conversion, and what a whole one would have been."""

    path: Path
    whole: dict[str, bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed conversion."""
    path = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite, "SHARD_BYTES", 1_000_000)
        rewrite.rewrite(tiny.OFFICIAL, path, PRESET)
    return _files(path)


@pytest.fixture
def half(tmp_path: Path, whole: dict[str, bytes]) -> Half:
    """Stopped in the third shard."""
    path = tmp_path / "result"
    with pytest.MonkeyPatch.context() as patch:
        _stop_at(patch, 3, Stopped())
        with pytest.raises(Stopped):
            rewrite.rewrite(tiny.OFFICIAL, path, PRESET)
    return Half(path, whole)


@pytest.fixture
def result(tmp_path: Path, whole: dict[str, bytes]) -> Path:
    """A whole conversion to be damaged."""
    path = tmp_path / "result"
    path.mkdir()
    for name, data in whole.items():
        (path / name).write_bytes(data)
    return path


def test_C30_what_a_stopped_conversion_leaves(half: Half) -> None:
    """Two shards under their names, the manifest, and nothing else."""
    names = _shards(half.path)
    assert sorted(_files(half.path)) == sorted([*names, manifest.MANIFEST])
    assert len(names) == 2
    assert all(_files(half.path)[name] == half.whole[name] for name in names)


@pytest.mark.parametrize("load", [from_checkpoint, None])
def test_C30_unfinished_is_not_loaded(half: Half, load: Any) -> None:
    config = ModelConfig.from_hf(tiny.official()[0])
    load = load or (lambda path: load_params(path, config, PRESETS[PRESET]))
    with pytest.raises(CheckpointError, match="its conversion is unfinished: run `dsv4 convert`"):
        load(half.path)
    with pytest.raises(CheckpointError, match="unfinished"):
        rewrite.rewrite(half.path, half.path.with_name("other"), PRESET)


def test_C30_commands_say_what_is_the_matter(half: Half) -> None:
    arguments = ["generate", "--checkpoint", str(half.path), "--ids", "1"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert "its conversion is unfinished: run `dsv4 convert` again" in result.stderr


def test_C30_it_goes_on_where_it_stopped(half: Half) -> None:
    before = {name: (half.path / name).stat().st_mtime_ns for name in _shards(half.path)}
    (half.path / f"model-00003-of-00005.safetensors{manifest.TEMPORARY}").write_text("a SIGKILL")
    done = rewrite.rewrite(tiny.OFFICIAL, half.path, PRESET)
    assert done.reused == 2
    assert _files(half.path) == half.whole
    assert all((half.path / name).stat().st_mtime_ns == t for name, t in before.items())
    assert set(done.report.exact) == {("mxfp4", "nvfp4")}  # of the reused shards too


def test_C30_killed(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """A real SIGKILL at an arbitrary moment, then a second run."""
    path = tmp_path / "result"
    code = (
        "import time\n"
        "from dsv4_jax.checkpoint import rewrite\n"
        "rewrite.SHARD_BYTES = 1_000_000\n"
        f"rewrite.rewrite({str(tiny.OFFICIAL)!r}, {str(path)!r}, {PRESET!r},\n"
        "                progress=lambda done, total: time.sleep(0.01))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while not path.exists() or len(_shards(path)) < 2:  # so the manifest has the first
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with pytest.raises(CheckpointError, match="unfinished"):
        from_checkpoint(path)
    done = rewrite.rewrite(tiny.OFFICIAL, path, PRESET)
    assert done.reused >= 1
    assert _files(path) == whole


@pytest.fixture
def finishing(tmp_path: Path) -> tuple[Path, Path]:
    """Source and target of a conversion that was killed between the small files."""
    source = tiny.write(tmp_path / "source", *tiny.official())
    for name in ("LICENSE", "notes.txt"):
        (source / name).write_text(name)
    target = tmp_path / "result"

    def stop(path: Path, copy: Path) -> None:
        if path.name == "notes.txt":
            (target / f"{path.name}{manifest.TEMPORARY}").write_text("n")
            raise Stopped
        manifest.copy_atomic(path, copy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite, "copy_atomic", stop)
        with pytest.raises(Stopped):
            rewrite.rewrite(source, target, PRESET)
    assert (target / "LICENSE").is_file() and not (target / "config.json").exists()
    return source, target


def test_C30_killed_between_small_files(
    finishing: tuple[Path, Path], whole: dict[str, bytes]
) -> None:
    """What the source has no longer goes, be the conversion resumed or replaced."""
    source, target = finishing
    own = {name for name in whole if name.endswith((".safetensors", ".json"))}
    stopped = target.with_name("stopped")
    shutil.copytree(target, stopped)
    done = rewrite.rewrite(source, target, PRESET)
    assert done.reused == done.shards
    copied = {name: name.encode() for name in ("LICENSE", "notes.txt")}
    assert set(_files(target)) == own | set(copied)
    assert copied.items() <= _files(target).items()

    (source / "LICENSE").unlink()
    for path in (stopped, target):  # unfinished, and whole
        rewrite.rewrite(source, path, PRESET)
        assert set(_files(path)) == own | {"notes.txt"}
        found = manifest.Manifest.read(path)
        assert found is not None and found.complete and "LICENSE" not in found.files


def test_C30_killed_between_small_files_then_replaced(
    finishing: tuple[Path, Path], whole: dict[str, bytes]
) -> None:
    _, target = finishing
    (target / "mine.txt").write_text("of the user")
    rewrite.rewrite(tiny.OFFICIAL, target, PRESET, overwrite=True)
    assert _files(target) == whole | {"mine.txt": b"of the user"}


@pytest.mark.parametrize("damage", ["byte", "truncated", "absent"])
def test_C30_a_damaged_shard_is_written_again(
    result: Path, whole: dict[str, bytes], damage: str
) -> None:
    shard = result / _shards(result)[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    if damage == "absent":
        shard.unlink()
    else:
        shard.write_bytes(data if damage == "byte" else data[:-1])
    if damage != "byte":  # the contents are compared by `dsv4 convert` alone
        with pytest.raises(CheckpointError, match=f"{shard.name} (is absent|must have)"):
            from_checkpoint(result)
    done = rewrite.rewrite(tiny.OFFICIAL, result, PRESET)
    assert done.reused == done.shards - 1
    assert _files(result) == whole


def _edit(path: Path, **fields: Any) -> None:
    """Changes the manifest as another version would write it, hash and all."""
    found = manifest.Manifest.read(path)
    assert found is not None
    for name, value in fields.items():
        setattr(found, name, value)
    found.write(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": "0.0.1"}, r"conversion of another version \(0\.0\.1, this is "),
        ({"preset": "nvfp4"}, "conversion of another precision .'nvfp4', now 'nvfp4_experts'"),
        ({"source": "0" * 64}, "another source, or one that was changed since"),
        ({"plan": "0" * 64}, "conversion of other shards"),
    ],
)
def test_C30_another_conversion(
    result: Path, whole: dict[str, bytes], fields: dict[str, str], message: str
) -> None:
    (result / "notes.txt").write_text("of the user")
    _edit(result, **fields)
    before = _files(result)
    with pytest.raises(CheckpointError, match=message):
        rewrite.rewrite(tiny.OFFICIAL, result, PRESET)
    assert _files(result) == before
    done = rewrite.rewrite(tiny.OFFICIAL, result, PRESET, overwrite=True)
    assert done.reused == 0
    assert _files(result) == whole | {"notes.txt": b"of the user"}


def _other_format(text: str) -> str:
    return text.replace('"format": 1', '"format": 2')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_format, "format must be 1, got 2: another version of this package"),
        (lambda text: text.replace('"bytes": 1', '"bytes": 2'), "does not match its own hash"),
        (lambda text: text[: len(text) // 2], f"{manifest.MANIFEST}: invalid JSON"),
        (lambda text: "[" * 100_000, f"{manifest.MANIFEST}: invalid JSON"),
        (lambda text: "[]", "must be a JSON object"),
    ],
)
def test_C30_damaged_manifest(
    result: Path, whole: dict[str, bytes], change: Callable[[str], str], message: str
) -> None:
    path = result / manifest.MANIFEST
    path.write_text(change(path.read_text()))
    for run in (from_checkpoint, lambda p: rewrite.rewrite(tiny.OFFICIAL, p, PRESET)):
        with pytest.raises(CheckpointError, match=message):
            run(result)
    rewrite.rewrite(tiny.OFFICIAL, result, PRESET, overwrite=True)
    assert _files(result) == whole


def test_C30_manifest_is_no_file(result: Path) -> None:
    """Nothing waits for a writer, and no link is followed."""
    path = result / manifest.MANIFEST
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="must be a regular file, got a FIFO"):
        from_checkpoint(result)
    path.unlink()
    path.symlink_to("gone")
    with pytest.raises(CheckpointError, match=f"{manifest.MANIFEST}: must be a regular file or a"):
        from_checkpoint(result)


@pytest.mark.parametrize(
    "fields",
    [
        {"shards": []},
        {"files": None},
        {"complete": 1},
        {"shards": {"a": {}}},
        {"shards": {"../a": {"bytes": 1, "sha256": "", "report": {}}}},
        {"shards": {"a\0": {"bytes": 1, "sha256": "", "report": {}}}},
    ],
)
def test_C30_forged_manifest(result: Path, fields: dict[str, Any]) -> None:
    """Its hash fits, its fields do not."""
    _edit(result, **fields)
    with pytest.raises(CheckpointError, match=f"{manifest.MANIFEST}: (must have|shards)"):
        from_checkpoint(result)


def test_C30_all_bad_shards_are_listed(result: Path) -> None:
    first, second, *_ = _shards(result)
    (result / first).unlink()
    os.truncate(result / second, 7)
    with pytest.raises(CheckpointError) as error:
        from_checkpoint(result)
    assert f"{first} is absent" in str(error.value)
    assert f"{second} must have " in str(error.value)
    assert len(error.value.problems) == 2


def test_C30_killed_at_its_very_start(tmp_path: Path, whole: dict[str, bytes]) -> None:
    (tmp_path / f"{manifest.MANIFEST}{manifest.TEMPORARY}").write_text("{")
    rewrite.rewrite(tiny.OFFICIAL, tmp_path, PRESET)
    assert _files(tmp_path) == whole


def test_C22_foreign_links_are_not_copied(tmp_path: Path) -> None:
    """What lies beside the weights of a hostile source may be a link to a file of the user."""
    source = tiny.write(tmp_path / "source", *tiny.official())
    (tmp_path / "secret").write_text("of the user")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="LICENSE: must be a regular file or a link of the"):
        rewrite.rewrite(source, tmp_path / "result", PRESET)
    assert not (tmp_path / "result").exists()


def test_nothing_of_others_is_touched(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(CheckpointError, match="must be empty or hold an earlier conversion"):
            rewrite.rewrite(tiny.OFFICIAL, tmp_path, PRESET, overwrite=overwrite)
    with pytest.raises(CheckpointError, match="must be a directory, got a file"):
        rewrite.rewrite(tiny.OFFICIAL, tmp_path / "precious", PRESET)
    assert _files(tmp_path) == {"precious": b"x"}
    source = tiny.write(tmp_path / "source", *tiny.official())
    before = _files(source)
    with pytest.raises(CheckpointError, match="must not be the source itself"):
        rewrite.rewrite(source, tmp_path / "." / "source", PRESET, overwrite=True)
    assert _files(source) == before


def test_disk_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=70_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.01 GB more, its disk has 0\.07 GB free"):
        rewrite.rewrite(tiny.OFFICIAL, tmp_path / "result", PRESET)
    assert _files(tmp_path / "result") == {}


def test_disk_fills_up(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the thread writes: the caller gets the error, the file goes."""
    real, written = os.write, 0

    def full(descriptor: int, data: Any) -> int:
        nonlocal written
        written += len(data)
        if written > 300_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    before = _files(half.path)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        rewrite.rewrite(tiny.OFFICIAL, half.path, PRESET)
    monkeypatch.undo()
    monkeypatch.setattr(rewrite, "SHARD_BYTES", 1_000_000)
    assert _files(half.path) == before
    rewrite.rewrite(tiny.OFFICIAL, half.path, PRESET)
    assert _files(half.path) == half.whole


def test_sync_fails(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the thread that writes, so that Ctrl-C need not wait for the disk."""
    real = os.fsync

    def broken(descriptor: int) -> None:
        if threading.current_thread().name == "dsv4-write":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    before = _files(half.path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output error"):
        patch.setattr(os, "fsync", broken)
        rewrite.rewrite(tiny.OFFICIAL, half.path, PRESET)
    assert _files(half.path) == before


def test_two_at_once(half: Half) -> None:
    descriptor = os.open(half.path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another conversion is writing to it"):
            rewrite.rewrite(tiny.OFFICIAL, half.path, PRESET)
    finally:
        os.close(descriptor)


def test_source_changes_while_it_is_read(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", *tiny.official())
    touched = False

    def touch(done: int, total: int) -> None:
        nonlocal touched
        if not touched:
            os.utime(source / tiny.SINGLE)
            touched = True

    with pytest.raises(CheckpointError, match="was changed while it was converted"):
        rewrite.rewrite(source, tmp_path / "result", PRESET, progress=touch)
    with pytest.raises(CheckpointError, match="unfinished"):
        from_checkpoint(tmp_path / "result")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layers.1.ffn.gate.tid2eid", 4, r"entries must be in \[0, 4\), got 4 at \[0, 0\]"),
        ("layers.0.attn.wq_a.scale", 255, r"scales must be finite, got NaN \(byte 255\)"),
        ("layers.0.ffn.experts.0.w1.scale", 255, r"scales must be finite, got NaN"),
    ],
)
def test_bad_values_are_found_while_copying(
    tmp_path: Path, name: str, value: int, message: str
) -> None:
    config, tensors = tiny.official()
    array = tensors[name].array(np.int64 if name.endswith("eid") else np.uint8).copy()
    array[0, 0] = value
    changed = {name: tiny.raw(tensors[name].dtype, array)}
    source = tiny.write(tmp_path / "source", config, tensors | changed)
    with pytest.raises(CheckpointError, match=f"{name}: {message}"):
        rewrite.rewrite(source, tmp_path / "result", PRESET)
    assert not any(path.name.endswith(manifest.TEMPORARY) for path in tmp_path.rglob("*"))


def test_ambiguous_source(tmp_path: Path) -> None:
    source = tiny.write(
        tmp_path / "source", published.compressed_tensors()[0], published.modelopt()[1]
    )
    with pytest.raises(CheckpointError, match="ambiguous number format"):
        rewrite.rewrite(source, tmp_path / "result", PRESET)
    assert not (tmp_path / "result").exists()


def _command(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["convert", *map(str, arguments)])


def test_command_errors_are_one_line(tmp_path: Path, half: Half) -> None:
    for arguments, message in (
        ((tmp_path / "gone", tmp_path / "a", "--to", PRESET), "no such directory"),
        ((tiny.OFFICIAL, tmp_path / "a", "--to", "int4"), "preset must be one of"),
        ((tiny.OFFICIAL, half.path, "--to", "official"), "(--overwrite)"),
    ):
        result = _command(*arguments)
        assert result.exit_code == 2 and result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        assert message in result.stderr


def test_ctrl_c(half: Half, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _stop_at(patch, 1, KeyboardInterrupt())
        result = _command(tiny.OFFICIAL, half.path, "--to", PRESET)
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert len(_shards(half.path)) == 2
    assert not list(half.path.glob(f"*{manifest.TEMPORARY}"))
    result = _command(tiny.OFFICIAL, half.path, "--to", PRESET, "--json")
    assert json.loads(result.stdout)["reused"] == 2
    assert _files(half.path) == half.whole
