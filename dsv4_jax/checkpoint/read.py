"""Files of a checkpoint: config, index, shard headers, and byte ranges read with ``pread``.

Headers go through the safetensors library and through a parse of our own, which also refuses
duplicate keys. Data never pass through its numpy interface: that has no FP8 and no FP4.
"""

import contextlib
import dataclasses
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast

import numpy as np
from safetensors import SafetensorError, safe_open

from dsv4_jax.checkpoint.errors import CheckpointError

__all__ = ["DTYPE_BITS", "Reader", "TensorInfo", "read_config"]

DTYPE_BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64,
}  # fmt: skip
_MAX_HEADER: Final = 100_000_000
_MAX_JSON: Final = 256 * 2**20
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_LISTED: Final = 20


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
    for key, value in pairs:
        if key in out:
            raise CheckpointError(f"duplicate key {key!r}")
        out[key] = value
    return out


def _no_constant(text: str) -> Any:
    raise CheckpointError(f"{text} is not JSON")


def _parse_object(data: bytes, file: str) -> dict[str, Any]:
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


def _regular_size(path: Path) -> int:
    """Size of a regular file; anything else (a FIFO would block) is refused before opening."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.name}: must be a regular file")
    return status.st_size


def _read_json(path: Path) -> dict[str, Any]:
    size = _regular_size(path)
    if size > _MAX_JSON:
        raise CheckpointError(f"{path.name}: must be at most {_MAX_JSON} bytes, got {size}")
    try:
        return _parse_object(path.read_bytes(), path.name)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from None


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
    file = _directory(path) / "config.json"
    if not file.exists():
        raise CheckpointError(f"{file}: no such file")
    return _read_json(file)


def _shard_of(name: str, value: Any) -> str:
    plain = isinstance(value, str) and value == os.path.basename(value) and value.isprintable()
    if not plain or "\\" in value or not value.endswith(".safetensors") or value.startswith("."):
        raise CheckpointError(
            f"{_INDEX}: weight_map[{name!r}] must be the plain name of a .safetensors file in the "
            f"directory, got {value!r}"
        )
    return value


def _find(root: Path, report: Report) -> tuple[list[str], dict[str, str] | None]:
    """Names of the shards that are there, and name -> shard when there is an index."""
    if not (root / _INDEX).exists():
        if not (root / _SINGLE).exists():
            raise CheckpointError(f"{root}: has neither {_SINGLE} nor {_INDEX}")
        return [_SINGLE], None
    weight_map = _read_json(root / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        kind = type(weight_map).__name__
        raise CheckpointError(f"{_INDEX}: weight_map must be a non-empty JSON object, got {kind}")
    mapping: dict[str, str] = {}
    for name, value in cast(dict[str, Any], weight_map).items():
        try:
            mapping[name] = _shard_of(name, value)
        except CheckpointError as error:
            report(error)
    shards = sorted(set(mapping.values()))
    absent = [shard for shard in shards if not (root / shard).exists()]
    if absent:
        report(
            CheckpointError(
                f"{_INDEX}: {len(absent)} of {len(shards)} shards are absent: {', '.join(absent)}"
            )
        )
    return [shard for shard in shards if shard not in absent], mapping


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _entry(file: str, name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{file}: {name}: must have dtype, shape, data_offsets, got {entry!r}"
        )
    fields = cast(dict[str, Any], entry)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(f"{file}: {name}: dtype must be a known one, got {dtype!r}")
    if not isinstance(shape, list) or not all(map(_is_count, cast(list[Any], shape))):
        raise CheckpointError(f"{file}: {name}: shape must be a list of sizes, got {shape!r}")
    if (
        not isinstance(offsets, list)
        or len(cast(list[Any], offsets)) != 2
        or not all(map(_is_count, cast(list[Any], offsets)))
    ):
        raise CheckpointError(f"{file}: {name}: data_offsets must be two sizes, got {offsets!r}")
    bits = DTYPE_BITS[dtype]
    for size in cast(list[int], shape):
        bits *= size
        if bits >= 2**63 and size:
            raise CheckpointError(f"{file}: {name}: shape overflows, got {shape!r}")
    begin, end = cast(list[int], offsets)
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{file}: {name}: data_offsets must span {bits // 8} bytes for {dtype} {shape}, "
            f"got {offsets}"
        )
    return TensorInfo(name, file, dtype, tuple(shape), start + begin, end - begin)


def _parse_shard(root: Path, file: str) -> list[TensorInfo]:
    """The header of one shard, checked against the size of the file."""
    path = root / file
    size = _regular_size(path)
    try:
        with path.open("rb") as stream:
            first = stream.read(8)
            length = int.from_bytes(first, "little")
            if first == b"version ":
                raise CheckpointError(f"{file}: is a Git LFS pointer; fetch it with `git lfs pull`")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    f"{file}: truncated or not safetensors: header of {length} bytes in a file of "
                    f"{size} (limit {_MAX_HEADER})"
                )
            header = _parse_object(stream.read(length), f"{file}: header")
        with safe_open(path, framework="numpy") as checked:
            known: set[str] = set(checked.keys())
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{file}: {error}") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: __metadata__ must be a JSON object, got {metadata!r}")
    start = 8 + length
    tensors = [_entry(file, name, entry, start) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            raise CheckpointError(
                f"{file}: {tensor.raw}: data must start at byte {end}, right after the tensor "
                f"before it, got {tensor.offset}"
            )
        end += tensor.nbytes
    if end != size:
        what = "truncated" if size < end else "has trailing bytes"
        raise CheckpointError(f"{file}: {what}: must have {end} bytes, got {size}")
    if known != set(header):
        raise CheckpointError(f"{file}: header reads differently in the safetensors library")
    return tensors


def _some(names: set[str]) -> str:
    listed = sorted(names)[:_LISTED]
    more = f" and {len(names) - len(listed)} more" if len(names) > len(listed) else ""
    return ", ".join(listed) + more


def _refuse(error: CheckpointError) -> None:
    raise error


class Reader(contextlib.AbstractContextManager["Reader"]):
    """The tensors of a checkpoint directory by their names in the files, and their bytes.

    Args:
        path: directory with ``model.safetensors`` or an index and its shards.
        report: is given each problem of index and shards, and what can be read is; by default the
            first one is raised.

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
        shards, index = _find(self._root, report)
        twice: list[str] = []
        read: set[str] = set()
        for shard in shards:
            try:
                tensors = _parse_shard(self._root, shard)
            except CheckpointError as error:
                report(error)
                continue
            read.add(shard)
            for tensor in tensors:
                other = self.tensors.setdefault(tensor.raw, tensor)
                if other is not tensor:
                    twice.append(f"{tensor.raw} in {other.file} and {shard}")
        if twice:
            text = f"{len(twice)} tensors in two shards: {'; '.join(twice[:_LISTED])}"
            report(CheckpointError(f"{self._root}: {text}", twice))
        self.unread = {name for name, shard in (index or {}).items() if shard not in read}
        if index is not None:
            self._agree(index, report)

    def _agree(self, index: Mapping[str, str], report: Report) -> None:
        found = {name: tensor.file for name, tensor in self.tensors.items()}
        problems: list[str] = []
        known = {n: s for n, s in index.items() if n not in self.unread}
        gone = {f"{n} ({s})" for n, s in known.items() if found.get(n) != s}
        extra = {f"{n} ({s})" for n, s in found.items() if index.get(n) != s}
        if gone:
            problems.append(f"in the index, not in its shard: {_some(gone)}")
        if extra:
            problems.append(f"in a shard, not so in the index: {_some(extra)}")
        if problems:
            text = f"{_INDEX}: disagrees with the shards; {'; '.join(problems)}"
            report(
                CheckpointError(
                    text,
                    [f"{_INDEX}: {n}: in the index, not in its shard" for n in sorted(gone)]
                    + [f"{_INDEX}: {n}: in a shard, not so in the index" for n in sorted(extra)],
                )
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __iter__(self) -> Iterator[TensorInfo]:
        return iter(self.tensors.values())

    def read_into(self, tensor: TensorInfo, out: np.ndarray, skip: int = 0) -> None:
        """Fills the contiguous array ``out`` with bytes ``skip ...`` of a tensor.

        Raises:
            CheckpointError: the file ends early (it changed while it was read).
        """
        descriptor = self._files.get(tensor.file)
        view = out.reshape(-1).view(np.uint8).data
        position, done = tensor.offset + skip, 0
        try:
            if descriptor is None:
                descriptor = os.open(self._root / tensor.file, os.O_RDONLY)
                self._files[tensor.file] = descriptor
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], position + done)
                if count == 0:
                    raise CheckpointError(
                        f"{tensor.file}: {tensor.raw}: the file ends at byte {position + done}, "
                        f"must have {position + len(view)}"
                    )
                done += count
        except OSError as error:
            raise CheckpointError(f"{tensor.file}: {tensor.raw}: {error.strerror}") from None
