"""One checkpoint into another number format, shard by shard (`dsv4 convert`).

Loading the result gives the bits that loading the source in the same precision gives: what is exact
is done on bytes, everything else by the jitted conversions of `convert`, slab by slab. Static
activation scales are dropped. The memory needed does not depend on the size of the checkpoint.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from dsv4_jax.checkpoint.convert import Report
from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.checkpoint.export import quantizer_config, target_config
from dsv4_jax.checkpoint.formats import check_config
from dsv4_jax.checkpoint.load import leftovers
from dsv4_jax.checkpoint.manifest import (
    MANIFEST,
    TEMPORARY,
    Manifest,
    check_converted,
    copy_atomic,
    fingerprint,
    write_atomic,
)
from dsv4_jax.checkpoint.names import MTP, leaves
from dsv4_jax.checkpoint.read import Reader, open_regular, read_config
from dsv4_jax.checkpoint.requantize import Converter, Sums, Unit, units_of
from dsv4_jax.checkpoint.scan import BadValueError
from dsv4_jax.checkpoint.validate import Resolved, resolve
from dsv4_jax.checkpoint.write import CHUNK_BYTES, Output, ShardWriter, header
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import Precision
from dsv4_jax.version import __version__

__all__ = ["SHARD_BYTES", "Rewritten", "rewrite"]

SHARD_BYTES: Final = 4 * 2**30
"""About the size of a shard: what a resumed conversion may have to do again."""

_FREE_BYTES: Final = 64 * 2**20
_SHARD: Final = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json")
_OWN: Final = ("config.json", "hf_quant_config.json", "model.safetensors.index.json", MANIFEST)
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """What a conversion did.

    Attributes:
        report: what became of the numbers, as when they are loaded.
        kept: kinds of parameters whose bytes did not change.
        read_bytes, written_bytes: of tensors and of shards; of this run alone.
        total_bytes: of all shards.
        shards, reused: how many there are, and how many of them were there already.
        seconds: wall time of this run.
    """

    report: Report
    kept: list[str]
    read_bytes: int
    written_bytes: int
    total_bytes: int
    shards: int
    reused: int
    seconds: float

    def lines(self) -> list[str]:
        """For people."""
        out = self.report.lines()
        if self.kept:
            out.append(f"unchanged: {len(self.kept)} other kinds of parameters")
        rate = f", {self.written_bytes / 1e6 / self.seconds:.0f} MB/s" if self.written_bytes else ""
        out.append(
            f"{self.shards} shards, {self.total_bytes / 1e9:.3f} GB; {self.reused} were there "
            f"already; wrote {self.written_bytes / 1e9:.3f} GB in {self.seconds:.1f} s{rate}"
        )
        return out

    def fields(self) -> dict[str, Any]:
        """For programs."""
        losses, exact = self.report.summary()
        names = ("read_bytes", "written_bytes", "total_bytes", "shards", "reused", "seconds")
        return {
            "lossless": [
                {"from": stored, "to": target, "kinds": sorted(kinds)}
                for (stored, target), kinds in exact.items()
            ],
            "lossy": [
                {
                    "kind": loss.kind,
                    "from": loss.stored,
                    "to": loss.target,
                    "mean": loss.mean,
                    "max": loss.most,
                    "at": loss.worst,
                }
                for loss in losses
            ],
            "unchanged": self.kept,
            "notes": self.report.notes,
            **{name: getattr(self, name) for name in names},
        }


def _shards(units: list[Unit]) -> dict[str, list[Unit]]:
    """Shard name -> what it holds, in the order of the source."""
    shards: list[list[Unit]] = []
    size = SHARD_BYTES
    for unit in units:
        nbytes = sum(output.nbytes for output in unit.outputs)
        if size + nbytes > SHARD_BYTES or not shards:
            shards.append([])
            size = 0
        shards[-1].append(unit)
        size += nbytes
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, 1)}


def _outputs(units: list[Unit]) -> list[Output]:
    return [output for unit in units for output in unit.outputs]


@contextlib.contextmanager
def _locked(directory: Path) -> Generator[None]:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CheckpointError(f"{directory}: another conversion is writing to it") from None
    finally:
        os.close(descriptor)


def _check_target(source: Path, target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target}: must be a directory, got a file")
    if target.exists() and source.samefile(target):
        raise CheckpointError(f"{target}: must not be the source itself")
    if not target.exists() or os.path.lexists(target / MANIFEST):
        return
    # A conversion that is killed at its very start leaves this and no more.
    if {path.name for path in target.iterdir()} - {MANIFEST + TEMPORARY}:
        raise CheckpointError(
            f"{target}: must be empty or hold an earlier conversion, has no {MANIFEST}"
        )


def _clear(target: Path) -> None:
    """Removes what an earlier conversion wrote."""
    try:
        files = [*(Manifest.read(target) or Manifest("", "", "", 0, "")).files]
    except CheckpointError:
        files = []
    for path in list(target.iterdir()):
        ours = _SHARD.fullmatch(path.name) or path.name in (*_OWN, *files)
        if ours or path.name.endswith(TEMPORARY):
            path.unlink()


def _earlier(target: Path, wanted: Manifest) -> Manifest | None:
    """The manifest of an earlier run of the same conversion.

    Raises:
        CheckpointError: it is of another one.
    """
    found = Manifest.read(target)
    if found is None:
        return None
    for field in ("version", "preset", "source", "plan"):
        old, new = getattr(found, field), getattr(wanted, field)
        if old != new:
            what = {
                "version": f"another version ({old}, this is {new})",
                "preset": f"another precision ({old!r}, now {new!r})",
                "source": "another source, or one that was changed since",
                "plan": "other shards",
            }[field]
            raise CheckpointError(
                f"{target}: holds a conversion of {what}; name another directory, or let it be "
                "replaced (--overwrite)"
            )
    return found


def _sha256(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _finished(
    target: Path, found: Manifest | None, names: Mapping[str, Any], advance: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """Shards of an earlier run that are whole: size and hash are those of the manifest."""
    out: dict[str, dict[str, Any]] = {}
    for name, shard in (found.shards if found else {}).items():
        path = target / name
        if name in names and path.is_file() and path.stat().st_size == shard["bytes"]:
            done = 0

            def count(nbytes: int) -> None:
                nonlocal done
                done += nbytes
                advance(nbytes)

            if _sha256(path, count) == shard["sha256"]:
                out[name] = shard
            else:
                advance(-done)
    return out


def _companions(source: Path) -> list[Path]:
    """Tokenizer, generation settings, licence: every other file beside the weights.

    Raises:
        CheckpointError: one cannot be copied (see `copy_atomic`), which is found before the work.
    """
    found = sorted(
        path
        for path in source.iterdir()
        if path.is_file()
        and path.name not in _OWN
        and not path.name.startswith(".")
        and not path.name.endswith(_WEIGHTS)
    )
    for path in found:
        os.close(open_regular(source, path.name)[0])
    return found


def _resolved(reader: Reader, config: ModelConfig, source: str) -> tuple[Resolved, list[str]]:
    """The checkpoint with ``mtp.0`` where that can be loaded, else a note that says why it cannot.

    Some quantisers leave the module in another format than the rest, or cut it.
    """
    modules = {match[1] for tensor in reader if (match := MTP.match(tensor.raw))}
    if modules != {"0"} or not config.num_nextn_predict_layers:
        return resolve(reader, config, source=source), []
    try:
        return resolve(reader, config, mtp=True, source=source), []
    except CheckpointError as error:
        try:
            resolved = resolve(reader, config, source=source)
        except CheckpointError:
            raise error from None
        why = f"{len(error.problems)} problems, the first: {error.problems[0]}"
        return resolved, [f"copied mtp.0 as it is, it cannot be loaded with this model ({why})"]


def rewrite(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    preset: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Rewritten:
    """Converts the checkpoint ``source`` to the storage formats of a preset.

    ``target`` gets safetensors shards with official names, an index, ``config.json``, what lies
    beside the weights of ``source``, and ``dsv4_convert.json``. Called again it goes on: shards
    that are whole stay. The release's module ``mtp.0`` is converted too; a newer drafter is copied,
    and so is a module that does not fit the model.

    Args:
        source: any checkpoint that `from_checkpoint` takes.
        target: a directory; made if it is not there.
        preset: name of a `Precision` preset; its formats of weights are written.
        overwrite: replace an earlier conversion of something else.
        progress: called with (bytes done, bytes in total).

    Raises:
        CheckpointError: the source is malformed; ``target`` holds anything else, or is too small.
        ValueError: no such preset; a width does not fit a format.
        OSError: ``target`` cannot be written.
    """
    begin = time.perf_counter()
    precision = Precision.preset(preset)
    source, target = Path(source), Path(target)
    data = read_config(source)
    check_converted(source)
    config = ModelConfig.from_hf(data, source=str(source / "config.json"))
    with Reader(source) as reader:
        resolved, notes = _resolved(reader, config, str(source))
        check_config(data, resolved.naming, str(source))
        for parameter in resolved.parameters:
            leaves(parameter, precision)  # widths against formats
        shards = _shards(units_of(resolved, precision))
        heads = {name: header(_outputs(units)) for name, units in shards.items()}
        plan = hashlib.sha256(b"".join(heads[name] for name in sorted(heads))).hexdigest()
        mark = fingerprint(reader, source)
        read_bytes = sum(tensor.nbytes for tensor in reader)
        manifest = Manifest(__version__, preset, mark, read_bytes, plan)
        companions = _companions(source)
        files = _small_files(data, resolved, precision, shards)
        manifest.files = [*(path.name for path in companions), *files]
        _check_target(source, target)
        target.mkdir(parents=True, exist_ok=True)
        with _locked(target):
            if overwrite:
                _clear(target)
            found = _earlier(target, manifest)
            sizes = {
                name: len(heads[name]) + sum(o.nbytes for o in _outputs(units))
                for name, units in shards.items()
            }
            done, total = 0, sum(sizes.values())

            def advance(nbytes: int) -> None:
                nonlocal done
                done += nbytes
                if progress is not None:
                    progress(done, total)

            for path in target.glob(f"*{TEMPORARY}"):
                path.unlink()
            manifest.shards = _finished(target, found, shards, advance)
            reused = len(manifest.shards)
            todo = {name: units for name, units in shards.items() if name not in manifest.shards}
            for name in todo:
                (target / name).unlink(missing_ok=True)
            need = sum(sizes[name] for name in todo)
            free = shutil.disk_usage(target).free
            if need + _FREE_BYTES > free:
                raise CheckpointError(
                    f"{target}: the conversion needs {need / 1e9:.2f} GB more, its disk has "
                    f"{free / 1e9:.2f} GB free"
                )
            gone = set(found.files if found else ()) - set(manifest.files)
            for path in list(target.iterdir()):  # not by the names, which anybody can write
                if path.name in gone:
                    path.unlink()
            listed = found is not None and found.files == manifest.files
            if todo or found is None or not found.complete or not listed:
                (target / "config.json").unlink(missing_ok=True)  # never beside half of the shards
                manifest.write(target)
            used = 0
            for name, units in todo.items():
                used += sum(t.nbytes for u in units for f in u.tensors.values() for t in f.values())
                with ShardWriter(target / name, _outputs(units)) as writer:

                    def emit(array: np.ndarray, writer: ShardWriter = writer) -> None:
                        writer.write(array)
                        advance(array.nbytes)

                    converter = Converter(reader, resolved, config.n_routed_experts, emit)
                    try:
                        for unit in units:
                            converter.run(unit)
                    except BadValueError:
                        converter.scan.raise_all(str(source))
                        raise
                    nbytes, digest = writer.finish()
                    advance(len(heads[name]))
                report = converter.sums.fields()
                manifest.shards[name] = {"bytes": nbytes, "sha256": digest, "report": report}
                manifest.write(target)
            if fingerprint(reader, source) != mark:
                raise CheckpointError(f"{source}: was changed while it was converted")
            _finish(companions, target, files, manifest)
    report, kept = Sums.together(manifest.shards)
    report.notes += notes + leftovers(resolved, data, precision, converted=True)
    return Rewritten(
        report=report,
        kept=kept,
        read_bytes=used,
        written_bytes=sum(sizes[name] for name in todo),
        total_bytes=total,
        shards=len(shards),
        reused=reused,
        seconds=time.perf_counter() - begin,
    )


def _small_files(
    data: Mapping[str, Any],
    resolved: Resolved,
    precision: Precision,
    shards: Mapping[str, list[Unit]],
) -> dict[str, Any]:
    """What is written behind the shards, as JSON; ``config.json`` is the last."""
    outputs = {name: _outputs(units) for name, units in shards.items()}
    total = sum(output.nbytes for found in outputs.values() for output in found)
    files: dict[str, Any] = {
        "model.safetensors.index.json": {
            "metadata": {"total_size": total},
            "weight_map": {o.name: name for name, found in outputs.items() for o in found},
        }
    }
    quantizer = quantizer_config(resolved.parameters, precision)
    if quantizer is not None:
        files["hf_quant_config.json"] = quantizer
    files["config.json"] = target_config(data, resolved.parameters, precision)
    return files


def _finish(
    companions: list[Path], target: Path, files: Mapping[str, Any], manifest: Manifest
) -> None:
    """Everything but the shards; the manifest that says "complete" is the last to appear."""
    for path in companions:
        copy_atomic(path, target / path.name)
    for name, value in files.items():
        write_atomic(target / name, (json.dumps(value, indent=2) + "\n").encode())
    manifest.complete = True
    manifest.write(target)
