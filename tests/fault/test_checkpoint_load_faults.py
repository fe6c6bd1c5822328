"""Faults that show while a checkpoint is read: values, files that change, memory, interruption.

Names are rows of the acceptance list, part C.
"""

import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from typer.testing import CliRunner

from dsv4_jax import cli
from dsv4_jax.checkpoint import CheckpointError, from_checkpoint, place, read, scan
from dsv4_jax.checkpoint.read import Reader, TensorInfo
from dsv4_jax.checkpoint.scan import Scan
from tests.support import tiny
from tests.support.broken import CONFIG, EXPERT, TENSORS, WQ_A, fails, write

TABLE = "layers.1.ffn.gate.tid2eid"
ROOT = Path(__file__).parents[2]


def _with(name: str, dtype: Any, at: Any, value: Any) -> tiny.Raw:
    """A tensor of the fixture with one other value."""
    array = TENSORS[name].array(dtype).copy()
    array[at] = value
    return tiny.raw(TENSORS[name].dtype, array)


# C18 and C19: values.


@pytest.mark.parametrize("name", [f"{WQ_A}.scale", f"{EXPERT}.scale"])
def test_C18_ue8m0_nan(tmp_path: Path, name: str) -> None:
    shape = TENSORS[name].shape
    changed = _with(name, np.uint8, (-1, -1), 255)
    path = write(tmp_path, **{name: changed})
    with Reader(path) as reader:
        info = reader.tensors[name]
    rule = f"{tiny.SINGLE}: {name}: scales must be finite, got NaN (byte 255)"
    last = info.offset + info.nbytes - 1
    fails(path, "scale (1)", f"{rule} at {[n - 1 for n in shape]} (byte {last} of the file)")


@pytest.mark.parametrize("entry", [4, -1, 2**32])
def test_C19_table_entry_is_no_expert(tmp_path: Path, entry: int) -> None:
    path = write(tmp_path, **{TABLE: _with(TABLE, np.int64, (7, 1), entry)})
    fails(path, "table (1)", f"{TABLE}: entries must be in [0, 4), got {entry} at [7, 1]")


def test_C18_C19_all_tensors_are_listed_and_cut_at_20(tmp_path: Path) -> None:
    scales = [name for name in TENSORS if name.endswith(".scale") and "mtp" not in name]
    bad = {name: _with(name, np.uint8, (0, 0), 255) for name in scales}
    path = write(tmp_path, **bad, **{TABLE: _with(TABLE, np.int64, (7, 1), 9)})
    message = fails(path, "21 problems", "scale (20)", "table (1)", "more were not looked for")
    assert len(message.splitlines()) == 1 + (1 + 20) + (1 + 1) + 1
    few = dict(list(bad.items())[3:6])
    message = fails(write(tmp_path, **few), "scale (3)")
    assert all(name in message for name in few)
    assert "not looked for" not in message


E4M3_RULE = "scales must be positive and finite (zero where all codes of the block are), got"
RULE = "scales must be positive and finite, got"


@pytest.mark.parametrize(
    ("leaf", "dtype", "host", "bad", "told"),
    [
        pytest.param("scale", "F8_E8M0", np.uint8, 255, "got NaN (byte 255)", id="ue8m0-nan"),
        *(
            pytest.param("block_scale", "F8_E4M3", np.uint8, bad, told, id=f"e4m3-{bad}")
            for bad, told in (
                (0x7F, "got nan (byte 127)"),
                (0xB8, "got -1.0 (byte 184)"),
                (0x80, "got -0.0 (byte 128)"),
                (0, f"{E4M3_RULE} 0.0 (byte 0)"),
            )
        ),
        *(
            pytest.param(leaf, "F32", np.float32, bad, f"{RULE} {bad}", id=f"{leaf}-{bad}")
            for leaf in ("scale", "global_scale")
            for bad in (0.0, -0.0, -1.0, float("nan"), float("inf"))
        ),
        pytest.param("scale", "BF16", np.uint16, 0xFF80, f"{RULE} -inf", id="bf16-inf"),
        pytest.param("scale", "BF16", np.uint16, 0, f"{RULE} 0", id="bf16-0"),
    ],
)
def test_C18_every_kind_of_scale(
    tmp_path: Path, leaf: str, dtype: str, host: Any, bad: Any, told: str
) -> None:
    """Straight at the scan, which has our names of the leaves."""
    good = {np.uint8: 0x38, np.uint16: 0x3F80}.get(host, 1)
    shape = (4, 2) if dtype.startswith("F8") else (3, 1)
    codes = tiny.raw("U8", np.full((4, 16), 0x11, np.uint8))
    name = f"layers.0.ffn.experts.0.w1.{leaf}"

    def look(value: Any) -> None:
        array = np.full(shape, good, host)
        array[2, -1] = value
        tensors = {"layers.0.ffn.experts.0.w1.weight": codes, name: tiny.raw(dtype, array)}
        tiny.write(tmp_path, CONFIG, tensors)
        with Reader(tmp_path) as reader:
            tensor = reader.tensors[name]
            held = np.empty(shape, scan.HOST_DTYPE[dtype])
            reader.read_into(tensor, held)
            Scan(reader, reader.tensors, experts=4).check(tensor, held)

    look(good)
    with pytest.raises(scan.BadValueError) as error:
        look(bad)
    assert told in str(error.value)
    assert f"{tiny.SINGLE}: {name}: " in str(error.value)
    assert f" at [2, {shape[1] - 1}] (byte " in str(error.value)


def test_C18_zero_block_scale_over_zero_codes(tmp_path: Path) -> None:
    """Legal, with either sign of the zeros; not so over any other code, whatever its nibble."""
    base = "layers.0.ffn.experts.0.w1"
    codes = np.full((3, 16), 0x11, np.uint8)
    codes[1, 8:] = [0x80, 0x08, 0x88, 0, 0, 0, 0, 0]
    scale = np.full((3, 2), 0x38, np.uint8)
    scale[1, 1] = 0

    def look(skip: int = 0) -> None:
        weights = {f"{base}.weight": tiny.raw("U8", codes)}
        tiny.write(tmp_path, CONFIG, weights | {f"{base}.block_scale": tiny.raw("F8_E4M3", scale)})
        with Reader(tmp_path) as reader:
            looker = Scan(reader, reader.tensors, experts=4)
            looker.check(reader.tensors[f"{base}.block_scale"], scale[skip // 2 :], skip)

    look()
    for byte, code in ((8, 0x01), (15, 0x10), (15, 0x88 ^ 0x40)):
        before, codes[1, byte] = codes[1, byte], code
        for skip in (0, 2):  # also from the second row on
            with pytest.raises(scan.BadValueError, match=r"got 0\.0 \(byte 0\) at \[1, 1\]"):
                look(skip)
        codes[1, byte] = before
    look(2)


def test_C18_position_in_a_tensor_of_many_slabs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{EXPERT}.scale"
    shape = TENSORS[name].shape
    path = write(tmp_path, **{name: _with(name, np.uint8, (100, 2), 255)})
    monkeypatch.setattr(scan, "SLAB_BYTES", 9 * shape[1])
    with Reader(path) as reader, pytest.raises(CheckpointError, match=r"at \[100, 2\] \(byte"):
        Scan(reader, reader.tensors, experts=4).raise_all(str(path))


def test_C18_parameters_named_scale_are_none(tmp_path: Path) -> None:
    """Those of hyper-connections may have any sign."""
    name = "layers.0.hc_attn_scale"
    path = write(tmp_path, **{name: _with(name, np.float32, 1, -3.0)})
    _, params = from_checkpoint(path, progress=False, verify=True)
    assert float(params["layers_0"]["hc_attn"]["scale"][1]) == -3.0


@pytest.mark.parametrize(
    ("name", "dtype", "value", "told"),
    [
        (f"{WQ_A}.weight", np.uint8, 0xFF, "must not be NaN, got nan (byte 255)"),
        ("norm.weight", np.uint16, 0x7FC0, "must be finite, got nan"),
        ("layers.1.hc_ffn_fn", np.float32, np.inf, "must be finite, got inf"),
        ("layers.1.attn.attn_sink", np.float32, np.inf, "must be finite, got inf"),
    ],
)
def test_C18_verify(tmp_path: Path, name: str, dtype: Any, value: Any, told: str) -> None:
    at = tuple(n - 1 for n in TENSORS[name].shape)
    path = write(tmp_path, **{name: _with(name, dtype, at, value)})
    from_checkpoint(path, progress=False)  # weights are only looked at when asked for
    fails(path, "weight (1)", f"{name}: {told} at {list(at)}", verify=True)
    result = CliRunner().invoke(
        cli.app, ["generate", "--checkpoint", str(path), "--ids", "1", "--verify"]
    )
    assert result.exit_code == 2
    assert f"{name}: {told}" in result.stderr


def test_C18_verify_lets_an_absent_sink_be(tmp_path: Path) -> None:
    name = "layers.1.attn.attn_sink"
    path = write(tmp_path, **{name: _with(name, np.float32, 0, -np.inf)})
    from_checkpoint(path, progress=False, verify=True)


# C24: files that change.


def test_C24_file_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path)
    with Reader(path) as reader:
        tensor = max(reader, key=lambda t: t.offset)
        with (path / tiny.SINGLE).open("r+b") as stream:
            stream.truncate(tensor.offset + tensor.nbytes - 1)
        with pytest.raises(CheckpointError, match="the file ends at byte"):
            reader.read_into(tensor, np.empty(tensor.nbytes, np.uint8))


def test_C24_header_shrinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write(tmp_path) / tiny.SINGLE
    fstat = os.fstat

    def look_and_shrink(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        os.truncate(shard, 100)
        return status

    monkeypatch.setattr(os, "fstat", look_and_shrink)
    with pytest.raises(CheckpointError, match="safetensors: the file ends at byte 100, must have"):
        Reader(tmp_path)


@pytest.mark.parametrize("memfd", [True, False])
def test_C24_the_library_maps_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memfd: bool
) -> None:
    """A file that shrinks under a mapping would end the process with SIGBUS."""
    shard = write(tmp_path / "model") / tiny.SINGLE
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    if not memfd:
        monkeypatch.delattr(os, "memfd_create")
    opened = read.safe_open

    def shrink_and_open(*args: Any, **options: Any) -> Any:
        os.truncate(shard, 0)
        return opened(*args, **options)

    monkeypatch.setattr(read, "safe_open", shrink_and_open)
    with Reader(shard.parent) as reader:
        assert set(reader.tensors) == set(TENSORS)
        tensor = next(iter(reader))
        with pytest.raises(CheckpointError, match="the file ends at byte"):
            reader.read_into(tensor, np.empty(tensor.nbytes, np.uint8))
    assert not any((tmp_path / "tmp").iterdir())


def test_C24_a_file_that_takes_the_name_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "model")
    other = tiny.write(tmp_path / "other", CONFIG, dict(reversed(TENSORS.items())))
    with Reader(path) as reader:
        os.replace(other / tiny.SINGLE, path / tiny.SINGLE)
        for tensor in reader:
            data = np.empty(tensor.nbytes, np.uint8)
            reader.read_into(tensor, data)
            assert data.tobytes() == TENSORS[tensor.raw].data


# C27: out of memory; C28: Ctrl-C.


def _live() -> int:
    gc.collect()
    return len(jax.live_arrays())


@contextmanager
def _nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Arrays, threads, open files and files on disk are what they were."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    jax.device_put(np.ones(1))  # starts what JAX starts

    def state() -> tuple[Any, ...]:
        files = sorted(tmp_path.rglob("*"))
        return _live(), threading.enumerate(), len(os.listdir("/proc/self/fd")), files

    before = state()
    yield
    assert state() == before


OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."


@pytest.mark.parametrize("error", [lambda: JaxRuntimeError(OUT_OF_MEMORY), MemoryError])
def test_C27_out_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]
) -> None:
    placed: list[int] = []
    put = place.Placer._put

    def no_room(self: place.Placer, host: np.ndarray) -> jax.Array:
        if len(placed) > 60 and self._pending:  # arrays in the tree, and one on its way
            raise error()
        placed.append(host.nbytes)
        return put(self, host)

    path = write(tmp_path / "model")
    with _nothing_left(tmp_path, monkeypatch):
        monkeypatch.setattr(place.Placer, "_put", no_room)
        with pytest.raises(CheckpointError) as caught:
            from_checkpoint(path, progress=False, mtp=True)
        message = str(caught.value)  # it lives on, and with it the frames that it has
    assert message.startswith(f"{path}: the device ran out of memory; need "), message
    assert message.endswith("; leave out mtp"), message


def test_C27_other_errors_of_the_device_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise JaxRuntimeError("INTERNAL: broken")

    monkeypatch.setattr(place.Placer, "_put", fail)
    with pytest.raises(JaxRuntimeError, match="INTERNAL: broken"):
        from_checkpoint(write(tmp_path), progress=False)


def test_C28_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGINT during the 60th read, with the progress bar and its thread."""
    path = write(tmp_path / "model")
    reads: list[TensorInfo] = []
    read_into = Reader.read_into

    def interrupted(self: Reader, tensor: TensorInfo, *args: Any) -> None:
        reads.append(tensor)
        if len(reads) == 60:
            assert threading.active_count() > 1  # the bar's
            signal.raise_signal(signal.SIGINT)
        read_into(self, tensor, *args)

    with _nothing_left(tmp_path, monkeypatch):
        monkeypatch.setattr(Reader, "read_into", interrupted)
        try:
            from_checkpoint(path, progress=True)
        except KeyboardInterrupt:
            pass
        else:
            pytest.fail("not interrupted")
    assert len(reads) == 60


def test_C28_interrupted_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Reader, "read_into", interrupted)
    arguments = ["generate", "--checkpoint", str(write(tmp_path)), "--ids", "1"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"


# C29: two processes.

OTHER_PROCESS = """
import hashlib, sys
import numpy as np
from dsv4_jax.checkpoint.read import Reader

with Reader(sys.argv[1]) as reader:
    print("open", flush=True)
    sys.stdin.readline()
    found = hashlib.sha256()
    for tensor in reader:
        data = np.empty(tensor.nbytes, np.uint8)
        reader.read_into(tensor, data)
        found.update(data)
    print(found.hexdigest())
"""


def test_C29_two_processes(tmp_path: Path) -> None:
    """Each opens before the other reads; nobody may write."""
    path = write(tmp_path)
    for entry in (*path.iterdir(), path):
        entry.chmod(entry.stat().st_mode & ~0o222)
    before = {entry: entry.stat().st_mtime_ns for entry in (*path.iterdir(), path)}
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    with process, Reader(path) as reader:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        _, params = from_checkpoint(path, progress=False)
        output, _ = process.communicate("go\n", timeout=60)
        data = b"".join(TENSORS[tensor.raw].data for tensor in reader)
    assert output.strip() == hashlib.sha256(data).hexdigest()
    sink = params["layers_0"]["attn"]["attn_sink"]
    assert np.asarray(sink).tobytes() == TENSORS["layers.0.attn.attn_sink"].data
    assert {entry: entry.stat().st_mtime_ns for entry in before} == before
    assert set(before) == {*path.iterdir(), path}
    assert json.loads((path / "config.json").read_text()) == CONFIG
