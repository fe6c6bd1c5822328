"""Files of a checkpoint: config, index, shard headers, and byte ranges read with ``pread``.

Headers go through a strict parse of our own, which also refuses duplicate keys, and then through
the safetensors library. Data never pass through its numpy interface: that has no FP8 and no FP4.
Nothing is mapped, so that a file that shrinks is an error and not a signal.
"""

import contextlib
import dataclasses
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import numpy as np
from safetensors import SafetensorError, safe_open

from dsv4_jax.checkpoint.errors import LISTED, CheckpointError, Problems, brief, shown

__all__ = ["DTYPE_BITS", "Reader", "TensorInfo", "open_regular", "read_config", "read_json"]

DTYPE_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip
_MAX_HEADER: Final = 100_000_000
_MAX_JSON: Final = 256 * 2**20
_CONFIG: Final = "config.json"
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_LFS: Final = b"version https://git-lfs"
_BLOB: Final = re.compile(r"\.\./\.\./blobs/(?!\.)([^/]+)")
_NO_BLOCKING: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW


Report = Callable[[CheckpointError], None]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes lie. ``raw`` is its name in the file ``file``."""

    raw: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    twice: list[str] = []
    for key, value in pairs:
        if key in out:
            twice.append(key)
        out[key] = value
    if twice:
        raise CheckpointError(f"duplicate key {_some(twice, quoted=True)}")
    return out


def _no_constant(text: str) -> Any:
    raise CheckpointError(f"{text} is not JSON")


def _parse_object(data: bytes | bytearray, file: str) -> dict[str, Any]:
    """Strict JSON object: UTF-8, no duplicate keys, no NaN."""
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}"
        raise CheckpointError(f"{file}: invalid JSON at {where}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: invalid JSON: {error}") from None
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise CheckpointError(f"{file}: must be a JSON object (line 1 column 1), got {kind}")
    return cast(dict[str, Any], value)


def _some(names: list[str], *, quoted: bool = False) -> str:
    listed = [brief(name) if quoted else shown(name) for name in names[:LISTED]]
    more = f" and {len(names) - len(listed)} more" if len(names) > len(listed) else ""
    return ", ".join(listed) + more


def _unfinished(root: Path) -> str:
    """How to go on with a download, where one was broken off."""
    places = [root, root / ".cache" / "huggingface" / "download"]
    if _is_snapshot(root):
        places.append(_repository(root) / "blobs")
    for place in places:
        for found in place.glob("*.incomplete"):
            return (
                f" ({found} is an unfinished download: repeat the `hf download` that began it, "
                "which goes on where it stopped)"
            )
    return ""


def _repository(root: Path) -> Path:
    return Path(os.path.realpath(root)).parents[1]


def _is_snapshot(root: Path) -> bool:
    """Whether ``root`` is a revision in the Hugging Face cache: ``REPO/snapshots/REVISION``."""
    return Path(os.path.realpath(root)).parent.name == "snapshots"


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "directory",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
        stat.S_IFLNK: "symlink",
        stat.S_IFCHR: "device",
        stat.S_IFBLK: "device",
    }
    return kinds.get(stat.S_IFMT(mode), "special file")


def _resolve_link(root: Path, name: str) -> Path:
    """The blob that a link of the Hugging Face cache stands for."""
    text = os.readlink(root / name)
    match = _BLOB.fullmatch(text)
    if match is None or not _is_snapshot(root):
        raise CheckpointError(
            f"{name}: must be a regular file or a link of the Hugging Face cache "
            f"(snapshots/REVISION/{name} -> ../../blobs/HASH), got a symlink to {brief(text)}"
        )
    blob = _repository(root) / "blobs" / match[1]
    if not os.path.lexists(blob):
        raise CheckpointError(
            f"{name}: its blob {text} does not exist{_unfinished(root) or '; download it again'}"
        )
    return blob


def open_regular(root: Path, name: str) -> tuple[int, int]:
    """Opens a file of a checkpoint directory for reading, without ever waiting for a writer.

    A symlink is followed where it is one of the Hugging Face cache, from ``snapshots/REVISION``
    to ``blobs``; the blob itself must be a regular file.

    Args:
        root: the directory.
        name: plain name of a file in it.

    Returns:
        File descriptor, which the caller closes, and size.

    Raises:
        CheckpointError: it cannot be opened, is no regular file or another kind of link.
    """
    path = root / name
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            path = _resolve_link(root, name)
            mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):  # not even opened: that alone can rewind or start a device
            raise CheckpointError(f"{name}: must be a regular file, got a {_kind(mode)}")
        descriptor = os.open(path, _NO_BLOCKING)
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read: {error.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{name}: must be a regular file, got a {_kind(status.st_mode)}")
    return descriptor, status.st_size


def _fill(descriptor: int, view: memoryview, position: int) -> int:
    """Reads at ``position`` until ``view`` is full or the file ends; the number of bytes."""
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], position + done)
        if count == 0:
            break
        done += count
    return done


def _read_start(descriptor: int, file: str, length: int, position: int = 0) -> bytearray:
    data = bytearray(length)
    try:
        done = _fill(descriptor, memoryview(data), position)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    if done < length:
        raise CheckpointError(
            f"{file}: the file ends at byte {position + done}, must have {position + length}"
        )
    return data


def _refuse_pointer(data: bytearray, file: str) -> None:
    if data.startswith(_LFS):
        raise CheckpointError(f"{file}: is a Git LFS pointer; fetch it with `git lfs pull`")


def read_json(root: Path, name: str) -> dict[str, Any]:
    """A JSON object in a file of a checkpoint directory; keys occur once.

    Raises:
        CheckpointError: it cannot be read (see `open_regular`), or is no JSON object.
    """
    descriptor, size = open_regular(root, name)
    try:
        if size > _MAX_JSON:
            raise CheckpointError(f"{name}: must be at most {_MAX_JSON} bytes, got {size}")
        data = _read_start(descriptor, name, size)
    finally:
        os.close(descriptor)
    _refuse_pointer(data, name)
    return _parse_object(data, name)


def _directory(path: str | os.PathLike[str]) -> Path:
    root = Path(path)
    try:
        if not root.exists():
            raise CheckpointError(f"{root}: no such directory")
        if not root.is_dir():
            raise CheckpointError(f"{root}: must be a checkpoint directory, got a file")
        os.listdir(root)
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read: {error.strerror}") from None
    return root


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``config.json`` of a checkpoint directory, parsed but not validated.

    Raises:
        CheckpointError: the directory or the file cannot be read, or is no JSON object.
    """
    root = _directory(path)
    if not os.path.lexists(root / _CONFIG):
        raise CheckpointError(f"{root / _CONFIG}: no such file")
    return read_json(root, _CONFIG)


def _is_shard_name(value: Any) -> bool:
    return (
        isinstance(value, str)
        and value == os.path.basename(value)
        and value.isprintable()
        and "\\" not in value
        and value.endswith(".safetensors")
        and not value.startswith(".")
    )


def _refuse(error: CheckpointError) -> None:
    raise error


def _tell(problems: Problems, report: Report) -> None:
    try:
        problems.raise_any()
    except CheckpointError as error:
        report(error)


def _find(root: Path, report: Report) -> tuple[list[str], dict[str, str] | None]:
    """Names of the shards that are there, and name -> shard when there is an index."""
    if not os.path.lexists(root / _INDEX):
        if not os.path.lexists(root / _SINGLE):
            raise CheckpointError(f"{root}: has neither {_SINGLE} nor {_INDEX}{_unfinished(root)}")
        return [_SINGLE], None
    weight_map = read_json(root, _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        kind = type(weight_map).__name__
        raise CheckpointError(f"{_INDEX}: weight_map must be a non-empty JSON object, got {kind}")
    mapping: dict[str, str] = {}
    problems = Problems(f"{root / _INDEX}")
    for name, value in cast(dict[str, Any], weight_map).items():
        if _is_shard_name(value):
            mapping[name] = value
        else:
            problems.add(
                "shard name",
                f"weight_map[{brief(name)}] must be the plain name of a .safetensors file in the "
                f"directory, got {brief(value)}",
            )
    _tell(problems, report)
    shards = sorted(set(mapping.values()))
    absent = [shard for shard in shards if not os.path.lexists(root / shard)]
    if absent:
        report(
            CheckpointError(
                f"{_INDEX}: {len(absent)} of {len(shards)} shards are absent: {', '.join(absent)}"
                f"{_unfinished(root)}"
            )
        )
    return [shard for shard in shards if shard not in absent], mapping


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _entry(file: str, name: str, entry: Any, start: int) -> TensorInfo:
    where = f"{file}: {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: must have dtype, shape, data_offsets, got {brief(entry)}")
    fields = cast(dict[str, Any], entry)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{where}: dtype must be a known one, got {brief(dtype)}")
    if not isinstance(shape, list) or not all(map(_is_count, cast(list[Any], shape))):
        raise CheckpointError(f"{where}: shape must be a list of sizes, got {brief(shape)}")
    if (
        not isinstance(offsets, list)
        or len(cast(list[Any], offsets)) != 2
        or not all(map(_is_count, cast(list[Any], offsets)))
    ):
        raise CheckpointError(f"{where}: data_offsets must be two sizes, got {brief(offsets)}")
    bits = DTYPE_BITS[dtype]
    for size in cast(list[int], shape):
        bits *= size
        if bits >= 2**63 and size:
            raise CheckpointError(f"{where}: shape overflows, got {brief(shape)}")
    begin, end = cast(list[int], offsets)
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where}: data_offsets must span {bits // 8} bytes for {dtype} {brief(shape)}, "
            f"got {offsets}"
        )
    return TensorInfo(name, file, dtype, tuple(shape), start + begin, end - begin)


def _library_names(header: bytearray, size: int) -> set[str]:
    """Names that the safetensors library finds in a header; it checks all of it.

    It maps what it opens, and a file that shrinks then kills the process. So it gets the header
    and a hole for the data.
    """
    with contextlib.ExitStack() as stack:
        if hasattr(os, "memfd_create"):
            copy = os.memfd_create("safetensors-header")
            stack.callback(os.close, copy)
        else:
            copy = stack.enter_context(tempfile.TemporaryFile()).fileno()
        view = memoryview(header)
        while view:
            view = view[os.write(copy, view) :]
        os.ftruncate(copy, size)
        checked = stack.enter_context(safe_open(f"/dev/fd/{copy}", framework="numpy"))
        return set(checked.keys())


def _parse_shard(file: str, descriptor: int, size: int, problems: Problems) -> list[TensorInfo]:
    """The header of one shard, checked against the size of the file.

    Problems of several tensors go to ``problems``; one of the whole file is raised.
    """
    first = _read_start(descriptor, file, min(size, len(_LFS)))
    _refuse_pointer(first, file)
    length = int.from_bytes(first[:8], "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"{file}: truncated or not safetensors: header of {length} bytes in a file of "
            f"{size} (limit {_MAX_HEADER})"
        )
    start = 8 + length
    whole = _read_start(descriptor, file, start)
    header = _parse_object(whole[8:], f"{file}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: __metadata__ must be a JSON object, got {brief(metadata)}")
    tensors: list[TensorInfo] = []
    for name, entry in header.items():
        try:
            tensors.append(_entry(file, name, entry, start))
        except CheckpointError as error:
            problems.add("header", str(error))
    if len(tensors) < len(header):
        return []
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end, in_order = start, True
    for tensor in tensors:
        if tensor.offset != end:
            in_order = False
            problems.add(
                "header",
                f"{file}: {shown(tensor.raw)}: data must start at byte {end}, right after the "
                f"tensor before it, got {tensor.offset}",
            )
        end = tensor.offset + tensor.nbytes
    if end != size:
        what = "truncated" if size < end else "has trailing bytes"
        raise CheckpointError(f"{file}: {what}: must have {end} bytes, got {size}")
    if not in_order:
        return []
    try:
        known = _library_names(whole, size)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be checked: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{file}: {error}") from None
    if known != set(header):
        raise CheckpointError(f"{file}: header reads differently in the safetensors library")
    return tensors


class Reader(contextlib.AbstractContextManager["Reader"]):
    """The tensors of a checkpoint directory by their names in the files, and their bytes.

    The files stay open until it is closed, so that all bytes are of the files that were checked
    even where others take their names.

    Args:
        path: directory with ``model.safetensors`` or an index and its shards.
        report: is given the problems of index and shards, and what can be read is; by default the
            first of these errors is raised.

    Attributes:
        tensors: name in the file -> where its bytes lie.
        unread: names that the index puts into shards that cannot be read.

    Raises:
        CheckpointError: unreadable, malformed or truncated files; absent shards; a tensor in two
            shards; index and shards disagree.
    """

    def __init__(self, path: str | os.PathLike[str], report: Report = _refuse) -> None:
        self._root = _directory(path)
        self._files: dict[str, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            self._open(report)
        except BaseException:
            self.close()
            raise

    def _open(self, report: Report) -> None:
        shards, index = _find(self._root, report)
        problems = Problems(str(self._root))
        read: set[str] = set()
        for shard in shards:
            try:
                self._files[shard], size = open_regular(self._root, shard)
                tensors = _parse_shard(shard, self._files[shard], size, problems)
            except CheckpointError as error:
                problems.add("file", str(error))
                continue
            # None: entries of its header are listed as problems.
            read.update([shard] if tensors else [])
            for tensor in tensors:
                other = self.tensors.setdefault(tensor.raw, tensor)
                if other is not tensor:
                    text = f"{shown(tensor.raw)} in {other.file} and {shard}"
                    problems.add("in two shards", text)
        _tell(problems, report)
        self.unread = {name for name, shard in (index or {}).items() if shard not in read}
        if index is not None:
            self._agree(index, report)

    def _agree(self, index: Mapping[str, str], report: Report) -> None:
        found = {name: tensor.file for name, tensor in self.tensors.items()}
        problems = Problems(f"{self._root / _INDEX}")
        read = {name: shard for name, shard in index.items() if name not in self.unread}
        for kind, these, others in (
            ("in the index, not in its shard", read, found),
            ("in a shard, not so in the index", found, index),
        ):
            for name, shard in sorted(these.items()):
                if others.get(name) != shard:
                    problems.add(kind, f"{shown(name)} ({shard})")
        _tell(problems, report)

    def close(self) -> None:
        """Closes the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())

    def read_into(self, tensor: TensorInfo, out: np.ndarray, skip: int = 0) -> None:
        """Fills the contiguous array ``out`` with bytes ``skip ...`` of a tensor.

        Raises:
            CheckpointError: the file ends early (it changed while it was read).
        """
        view = out.reshape(-1).view(np.uint8).data
        position = tensor.offset + skip
        try:
            done = _fill(self._files[tensor.file], view, position)
        except OSError as error:
            raise CheckpointError(f"{tensor.file}: {tensor.raw}: {error.strerror}") from None
        if done < len(view):
            raise CheckpointError(
                f"{tensor.file}: {tensor.raw}: the file ends at byte {position + done}, "
                f"must have {position + len(view)}"
            )
