"""Broken files of a checkpoint: shards, headers, index, links; rows of the acceptance list, part C.

Every case must fail before an array is put on a device.
"""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4_jax.checkpoint import CheckpointError, read
from dsv4_jax.checkpoint.read import Reader, open_regular, read_config
from dsv4_jax.checkpoint.validate import resolve
from dsv4_jax.config import ModelConfig
from tests.support import tiny
from tests.support.broken import CONFIG, TENSORS, fails, write

pytestmark = pytest.mark.usefixtures("nothing_placed")


def _config(path: Path) -> None:
    (path / "config.json").write_text(json.dumps(CONFIG))


def _as_snapshot(path: Path) -> Path:
    """The same files as ``hf download`` leaves them in its cache."""
    repo = path.parent / "models--some--model"
    snapshot = repo / "snapshots" / "rev"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, file in enumerate(sorted(path.iterdir())):
        file.rename(repo / "blobs" / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    return snapshot


def test_no_weights(tmp_path: Path) -> None:
    _config(tmp_path)
    fails(tmp_path, "neither model.safetensors nor model.safetensors.index.json")


def test_C6_missing_shards(tmp_path: Path) -> None:
    tiny.write(tmp_path, CONFIG, TENSORS, shards=4)
    for i in (1, 3):
        (tmp_path / tiny.shard_name(i, 4)).unlink()
    fails(tmp_path, "2 of 4 shards", tiny.shard_name(1, 4), tiny.shard_name(3, 4))


@pytest.mark.parametrize("keep", ["one-byte-less", "empty", "header-only", "half-header"])
def test_C7_truncated(tmp_path: Path, keep: str) -> None:
    tiny.write(tmp_path, CONFIG, TENSORS, shards=3)
    shard = tmp_path / tiny.shard_name(1, 3)
    blob = shard.read_bytes()
    header = 8 + int.from_bytes(blob[:8], "little")
    size = {"one-byte-less": -1, "empty": 0, "header-only": header, "half-header": header // 2}
    shard.write_bytes(blob[: size[keep]])
    fails(tmp_path, shard.name)


def test_C8_trailing_bytes(tmp_path: Path) -> None:
    shard = write(tmp_path) / tiny.SINGLE
    with shard.open("ab") as stream:
        stream.write(b"\0")
    size = shard.stat().st_size
    rule = f"has trailing bytes: must have {size - 1} bytes, got {size}"
    fails(tmp_path, f"model.safetensors: {rule}")


@pytest.mark.parametrize("length", [2**63 - 1, 2**64 - 1, 100_000_001])
def test_C9_huge_header(tmp_path: Path, length: int) -> None:
    shard = write(tmp_path) / tiny.SINGLE
    with shard.open("r+b") as stream:
        stream.write(length.to_bytes(8, "little"))
        stream.truncate(200_000_000)  # sparse
    tracemalloc.start()
    try:
        fails(tmp_path, "model.safetensors", f"header of {length} bytes", "limit 100000000")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_C10_duplicate_key(tmp_path: Path) -> None:
    _config(tmp_path)
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = f'{{"a":{entry},"a":{entry}}}'.encode()
    blob = len(header).to_bytes(8, "little") + header + b"\0"
    (tmp_path / tiny.SINGLE).write_bytes(blob)
    fails(tmp_path, "model.safetensors: header: duplicate key 'a'")


def test_C10_many_are_cut_at_20(tmp_path: Path) -> None:
    _config(tmp_path)
    header = b"{%s}" % b",".join(2 * [b'"%d":0' % i for i in range(25)])
    (tmp_path / tiny.SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    fails(tmp_path, "header: duplicate key '0', '1', ", "'19' and 5 more")


def test_C10_in_other_files(tmp_path: Path) -> None:
    path = tiny.write(tmp_path, CONFIG, TENSORS, shards=2)
    index = (path / tiny.INDEX).read_text()
    entry = f'"norm.weight": "{tiny.shard_name(0, 2)}"'
    (path / tiny.INDEX).write_text(index.replace('map": {', f'map": {{{entry}, ', 1))
    fails(path, f"{tiny.INDEX}: duplicate key 'norm.weight'")
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text.replace("{", '{"vocab_size": 8, ', 1))
    fails(path, "config.json: duplicate key 'vocab_size'")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "U8", "shape": [2], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [True], "data_offsets": [0, 1]},
        {"dtype": "Q7", "shape": [1], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "x": 1},
        {"dtype": "U8", "shape": [2**40, 2**40], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [0], "data_offsets": [1, 1]},
        [],
    ],
)
def test_malformed_entry(tmp_path: Path, entry: Any) -> None:
    _config(tmp_path)
    header = json.dumps({"a": entry}).encode()
    blob = len(header).to_bytes(8, "little") + header + b"\0"
    (tmp_path / tiny.SINGLE).write_bytes(blob)
    fails(tmp_path, "model.safetensors: ")


def test_malformed_entries_are_cut_at_20(tmp_path: Path) -> None:
    _config(tmp_path)
    header = json.dumps({f"a{i}": 7 * [f"b{i}" * 200] for i in range(24)}).encode()
    (tmp_path / tiny.SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    message = fails(tmp_path, "header (24)", "safetensors: a19: must have", "... and 4 more")
    assert len(message) < 20 * 2000  # long values are cut too


def test_holes_and_overlaps_are_listed(tmp_path: Path) -> None:
    _config(tmp_path)
    spans = {"a": [0, 2], "b": [1, 3], "c": [4, 6]}
    header = json.dumps(
        {k: {"dtype": "U8", "shape": [2], "data_offsets": v} for k, v in spans.items()}
    ).encode()
    blob = len(header).to_bytes(8, "little") + header + bytes(6)
    (tmp_path / tiny.SINGLE).write_bytes(blob)
    start = 8 + len(header)
    fails(
        tmp_path,
        "header (2)",
        f"b: data must start at byte {start + 2}, right after the tensor before it, got "
        f"{start + 1}",
        f"c: data must start at byte {start + 3}",
    )


def test_broken_shards_are_listed_together(tmp_path: Path) -> None:
    tiny.write(tmp_path, CONFIG, TENSORS, shards=30)
    for i in range(2, 25):
        os.truncate(tmp_path / tiny.shard_name(i, 30), 7)
    opened = os.listdir("/proc/self/fd")
    message = fails(tmp_path, "file (23)", "... and 3 more")
    assert len(os.listdir("/proc/self/fd")) == len(opened)
    assert f"{tiny.shard_name(2, 30)}: truncated" in message


def test_C11_tensor_in_two_shards(tmp_path: Path) -> None:
    tiny.write(tmp_path, CONFIG, TENSORS, shards=2)
    second = tmp_path / tiny.shard_name(1, 2)
    first_name = next(iter(TENSORS))
    tiny.write_shard(second, tiny.read_shard(second) | {first_name: TENSORS[first_name]})
    where = f"{first_name} in {tiny.shard_name(0, 2)} and {tiny.shard_name(1, 2)}"
    fails(tmp_path, "in two shards (1)", where)


def test_C11_many_are_cut_at_20(tmp_path: Path) -> None:
    tiny.write(tmp_path, CONFIG, TENSORS, shards=2)
    second = tmp_path / tiny.shard_name(1, 2)
    twice = list(tiny.read_shard(tmp_path / tiny.shard_name(0, 2)).items())[:23]
    tiny.write_shard(second, tiny.read_shard(second) | dict(twice))
    message = fails(tmp_path, "in two shards (23)", "... and 3 more")
    assert len(message.splitlines()) == 1 + 1 + 20 + 1


def test_C12_index_and_shards_disagree(tmp_path: Path) -> None:
    tiny.write(tmp_path, CONFIG, TENSORS, shards=2)
    index = json.loads((tmp_path / tiny.INDEX).read_text())["weight_map"]
    del index["embed.weight"]
    index["ghost.weight"] = tiny.shard_name(0, 2)
    tiny.write_index(tmp_path, index)
    first = tiny.shard_name(0, 2)
    message = fails(tmp_path, "model.safetensors.index.json: 2 problems")
    assert f"in the index, not in its shard (1):\n  ghost.weight ({first})" in message
    assert f"in a shard, not so in the index (1):\n  embed.weight ({first})" in message


def test_C12_many_are_cut_at_20(tmp_path: Path) -> None:
    tiny.write(tmp_path, CONFIG, TENSORS, shards=2)
    index = json.loads((tmp_path / tiny.INDEX).read_text())["weight_map"]
    names = list(index)[:25]
    tiny.write_index(
        tmp_path,
        tiny.drop(index, names) | dict.fromkeys(map(str, range(30)), index["head.weight"]),
    )
    message = fails(tmp_path, "in the index, not in its shard (30)", "not so in the index (25)")
    assert "... and 10 more" in message
    assert "... and 5 more" in message
    assert len(message.splitlines()) == 1 + 2 * (1 + 20 + 1)


@pytest.mark.parametrize(
    "value",
    [
        "../../etc/x",
        "/etc/x.safetensors",
        "a\\b.safetensors",
        "a\0.safetensors",
        "sub/x.safetensors",
        "x.bin",
        "..",
        "",
        None,
        3,
    ],
)
def test_C20_shard_names(tmp_path: Path, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write(tmp_path, CONFIG, TENSORS, shards=2)
    index = json.loads((tmp_path / tiny.INDEX).read_text())["weight_map"]
    tiny.write_index(tmp_path, index | {"norm.weight": value})
    opened: list[str] = []
    monkeypatch.setattr(
        read, "open_regular", lambda root, name: opened.append(name) or open_regular(root, name)
    )
    fails(tmp_path, "weight_map['norm.weight'] must be the plain name", repr(value))
    assert opened == ["config.json", tiny.INDEX]


def test_C20_many_are_cut_at_20(tmp_path: Path) -> None:
    tiny.write(tmp_path, CONFIG, TENSORS, shards=2)
    tiny.write_index(tmp_path, {str(i): f"../{i}" for i in range(27)})
    fails(tmp_path, "shard name (27)", "weight_map['19']", "... and 7 more")


@pytest.mark.parametrize("files", [1, 2], ids=["single", "sharded"])
def test_C21_hub_cache(tmp_path: Path, files: int) -> None:
    path = _as_snapshot(tiny.write(tmp_path / "plain", CONFIG, TENSORS, files))
    assert all(entry.is_symlink() for entry in path.iterdir())
    config = ModelConfig.from_hf(read_config(path))
    with Reader(path) as reader:
        assert set(reader.tensors) == set(TENSORS)
        resolve(reader, config)
    other = tmp_path / "link"  # the directory that is asked for may be a link itself
    other.symlink_to(path)
    with Reader(other) as reader:
        assert set(reader.tensors) == set(TENSORS)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        pytest.param("../elsewhere/x", "got a symlink to '../elsewhere/x'", id="elsewhere"),
        pytest.param("other.safetensors", "got a symlink", id="neighbour"),
        pytest.param("../../blobs/abc", "got a symlink to '../../blobs/abc'", id="no-snapshot"),
        pytest.param("gone", "got a symlink", id="dangling"),
        pytest.param(tiny.SINGLE, "got a symlink", id="loop"),
        pytest.param("/dev/zero", "got a symlink to '/dev/zero'", id="device"),
        pytest.param("fifo", "got a symlink", id="fifo"),
    ],
)
def test_C22_links(tmp_path: Path, target: str, told: str) -> None:
    path = write(tmp_path / "a" / "b")
    shard = path / tiny.SINGLE
    for copy in ("a/elsewhere/x", "a/b/other.safetensors", "blobs/abc"):
        (tmp_path / copy).parent.mkdir(exist_ok=True)
        (tmp_path / copy).write_bytes(shard.read_bytes())
    os.mkfifo(path / "fifo")
    shard.unlink()
    shard.symlink_to(target)
    fails(path, f"{tiny.SINGLE}: must be a regular file or a link of the Hugging Face", told)


@pytest.mark.parametrize("kind", ["fifo", "link", "loop", "directory", "dangling"])
def test_C22_blobs(tmp_path: Path, kind: str) -> None:
    path = _as_snapshot(write(tmp_path / "plain"))
    blob = Path(os.path.realpath(path / tiny.SINGLE))
    moved = blob.rename(tmp_path / "moved")
    make: dict[str, Callable[[], object]] = {
        "fifo": lambda: os.mkfifo(blob),
        "link": lambda: blob.symlink_to(moved),
        "loop": lambda: blob.symlink_to(f"../snapshots/rev/{tiny.SINGLE}"),
        "directory": blob.mkdir,
        "dangling": lambda: None,
    }
    make[kind]()
    got = {"fifo": "got a FIFO", "directory": "got a directory", "dangling": "does not exist"}
    fails(path, f"{tiny.SINGLE}: ", got.get(kind, "got a symlink"))


@pytest.mark.parametrize("name", ["config.json", tiny.INDEX])
def test_C22_other_files(tmp_path: Path, name: str) -> None:
    path = tiny.write(tmp_path / "model", CONFIG, TENSORS, shards=2)
    moved = (path / name).rename(tmp_path / "moved")
    (path / name).symlink_to(moved)
    fails(path, f"{name}: must be a regular file or a link", "got a symlink")
    (path / name).unlink()
    (path / name).symlink_to("gone")  # not taken for a checkpoint without an index
    fails(path, f"{name}: must be a regular file or a link", "got a symlink")
    (path / name).unlink()
    os.mkfifo(path / name)
    fails(path, f"{name}: must be a regular file, got a FIFO")


def test_C22_fifo_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _config(tmp_path)
    os.mkfifo(tmp_path / tiny.SINGLE)
    fails(tmp_path, "model.safetensors: must be a regular file, got a FIFO")
    # One that takes a file's place between the look and the opening.
    regular = os.lstat(tmp_path / "config.json")
    monkeypatch.setattr(os, "lstat", lambda path: regular)
    with pytest.raises(CheckpointError, match="must be a regular file, got a FIFO"):
        open_regular(tmp_path, tiny.SINGLE)


@pytest.mark.parametrize("name", [tiny.SINGLE, "config.json", tiny.INDEX])
def test_C23_lfs_pointer(tmp_path: Path, name: str) -> None:
    _config(tmp_path)
    (tmp_path / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 5\n"
    )
    fails(tmp_path, f"{name}: is a Git LFS pointer", "`git lfs pull`")


@pytest.mark.parametrize("place", ["beside", "local-dir", "cache"])
def test_C23_unfinished_download(tmp_path: Path, place: str) -> None:
    path = tiny.write(tmp_path / "plain", CONFIG, TENSORS, shards=3)
    name = tiny.shard_name(1, 3)
    if place == "cache":
        path = _as_snapshot(path)
        partial = path.parents[1] / "blobs" / "0123.incomplete"
    elif place == "local-dir":
        partial = path / ".cache/huggingface/download" / "x=.0123.incomplete"
    else:
        partial = path / f"{name}.incomplete"
    partial.parent.mkdir(parents=True, exist_ok=True)
    (path / name).rename(partial)
    fails(path, "1 of 3 shards", name, f"{partial} is an unfinished", "`hf download`")
    if place == "cache":
        (path / name).symlink_to("../../blobs/0123")
        fails(path, f"{name}: its blob", f"{partial} is an unfinished")
