"""``dsv4_convert.json``: what a converted checkpoint was made of, and how far the writing came.

It is written before the first shard and after every one; the last writing says that all is there.
Every file appears under a temporary name, is synced, and then gets its own.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, Self, cast

from dsv4_jax.checkpoint.errors import CheckpointError, Problems, brief, shown
from dsv4_jax.checkpoint.read import Reader, open_regular, read_json

__all__ = [
    "MANIFEST",
    "TEMPORARY",
    "Manifest",
    "check_converted",
    "copy_atomic",
    "fingerprint",
    "sync_directory",
    "write_atomic",
]

MANIFEST: Final = "dsv4_convert.json"
TEMPORARY: Final = ".dsv4-tmp"
"""What the names of unfinished files end in."""
_FORMAT: Final = 1


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _atomic(path: Path, write: Callable[[BinaryIO], None]) -> None:
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a small file under a temporary name, syncs it and renames it."""

    def write(stream: BinaryIO) -> None:
        stream.write(data)

    _atomic(path, write)


def copy_atomic(source: Path, path: Path) -> None:
    """The same with the contents of a file of a checkpoint, which must be its own.

    Raises:
        CheckpointError: it is a link to somewhere else (see `open_regular`).
    """
    descriptor, _ = open_regular(source.parent, source.name)
    with open(descriptor, "rb") as found:
        _atomic(path, lambda stream: shutil.copyfileobj(found, stream))


def fingerprint(reader: Reader, root: Path) -> str:
    """Hash of a checkpoint's ``config.json``, of all headers, and of size and time of every shard.

    Not of the weights: reading them twice would cost as much as converting them.
    """
    digest = hashlib.sha256((root / "config.json").read_bytes())
    for name, tensor in sorted(reader.tensors.items()):
        row = (name, tensor.file, tensor.dtype, tensor.shape, tensor.offset)
        digest.update(repr(row).encode())
    for file in sorted({tensor.file for tensor in reader}):
        status = (root / file).stat()
        digest.update(repr((file, status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


@dataclasses.dataclass
class Manifest:
    """The contents of the file.

    Attributes:
        version: of the package that writes.
        preset: what was converted to.
        source: `fingerprint` of the source.
        source_bytes: of all its tensors.
        plan: hash of the headers of all shards to be.
        shards: those that are finished: name -> ``bytes``, ``sha256`` and ``report``.
        files: what else is written; they are listed before the first is there.
        complete: whether everything is there.
    """

    version: str
    preset: str
    source: str
    source_bytes: int
    plan: str
    shards: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    files: list[str] = dataclasses.field(default_factory=list)
    complete: bool = False

    def write(self, directory: Path) -> None:
        """Replaces the file in ``directory``."""
        fields: dict[str, Any] = {"format": _FORMAT, **dataclasses.asdict(self)}
        fields["sha256"] = _digest(fields)
        write_atomic(
            directory / MANIFEST, (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()
        )

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """That of ``directory``, ``None`` without one.

        Raises:
            CheckpointError: it is damaged, or of a version that writes it otherwise.
        """
        path = directory / MANIFEST
        if not os.path.lexists(path):
            return None
        try:
            fields = read_json(directory, MANIFEST)
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error}") from None
        if fields.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path}: format must be {_FORMAT}, got {brief(fields.get('format'))}: another "
                f"version of this package ({brief(fields.get('version'))}) has converted it"
            )
        if fields.pop("sha256", None) != _digest(fields):
            raise CheckpointError(f"{path}: does not match its own hash, it is damaged")
        del fields["format"]
        _check_fields(path, fields)  # anybody can make the hash fit
        return cls(**fields)


_SHARD_FIELDS: Final = {"bytes": int, "sha256": str, "report": dict}


def _check_fields(path: Path, fields: Mapping[str, Any]) -> None:
    made = Manifest("", "", "", 0, "")
    types = {field.name: type(getattr(made, field.name)) for field in dataclasses.fields(made)}
    if {name: type(value) for name, value in fields.items()} != types:
        raise CheckpointError(f"{path}: must have the fields {', '.join(types)}, and no others")
    for name, shard in fields["shards"].items():
        found = cast(dict[str, Any], shard) if isinstance(shard, dict) else {}
        if (
            name != os.path.basename(name)
            or not name.isprintable()
            or ({key: type(value) for key, value in found.items()} != _SHARD_FIELDS)
        ):
            raise CheckpointError(
                f"{path}: shards[{brief(name)}] must be the plain name of a file and have "
                f"{', '.join(_SHARD_FIELDS)}, got {brief(shard)}"
            )


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def check_converted(path: str | os.PathLike[str]) -> None:
    """Refuses what ``dsv4 convert`` has not finished, or what was changed since.

    A directory without a manifest is none of its; finished shards are told by their sizes, which
    costs nothing (converting again compares the hashes too).

    Raises:
        CheckpointError: the conversion is unfinished, or a shard is absent or of another size.
    """
    root = Path(path)
    manifest = Manifest.read(root)
    if manifest is None:
        return
    again = "run `dsv4 convert` again, it goes on where it stopped"
    if not manifest.complete:
        raise CheckpointError(f"{root}: its conversion is unfinished: {again}")
    problems = Problems(str(root))
    for name, shard in manifest.shards.items():
        try:
            found = (root / name).stat().st_size
        except OSError:
            problems.add("converted", f"{shown(name)} is absent")
            continue
        if found != shard["bytes"]:
            problems.add(
                "converted", f"{shown(name)} must have {shard['bytes']} bytes, got {found}"
            )
    problems.raise_any(again)
