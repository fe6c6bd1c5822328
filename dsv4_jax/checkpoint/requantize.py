"""Tensors of a checkpoint in another format, as a stream of bytes (`rewrite` writes them down).

A unit is what must be known together: ``w1`` and ``w3`` share a global scale. Exact conversions
look at bytes alone, by numpy; the others are those of `convert`, on slabs of rows.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import numpy as np

from dsv4_jax.checkpoint.convert import (
    EXACT,
    EXACT_ROUTES,
    Report,
    convert,
    fp8_scales_on_host,
    largest,
    mxfp4_to_nvfp4_on_host,
)
from dsv4_jax.checkpoint.export import outputs_of
from dsv4_jax.checkpoint.load import jobs
from dsv4_jax.checkpoint.names import Parameter, target_format
from dsv4_jax.checkpoint.place import read_global_scales
from dsv4_jax.checkpoint.read import Reader, TensorInfo
from dsv4_jax.checkpoint.scan import HOST_DTYPE
from dsv4_jax.checkpoint.validate import Resolved
from dsv4_jax.checkpoint.write import CHUNK_BYTES, Output
from dsv4_jax.precision import Precision

__all__ = ["SLAB_VALUES", "Converter", "Sums", "Unit", "units_of"]

SLAB_VALUES: Final = 4 * 2**20
"""Most values that are decoded at a time."""

_HOST_ROUTES: Final = {
    ("mxfp4", "nvfp4"): mxfp4_to_nvfp4_on_host,
    ("fp8_float32", "fp8"): fp8_scales_on_host,
}

Host = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is converted and written together: a linear, a shared or one routed expert.

    ``tensors``: a key (``w1``, or the last of the path) -> leaf -> where it lies. ``parameters`` is
    empty for a tensor that is copied whatever it is.
    """

    parameters: dict[str, Parameter]
    tensors: dict[str, dict[str, TensorInfo]]
    stored: str
    target: str
    outputs: tuple[Output, ...]

    @property
    def start(self) -> tuple[str, int]:
        """Place of its first byte."""
        return min((t.file, t.offset) for found in self.tensors.values() for t in found.values())


def units_of(resolved: Resolved, precision: Precision) -> list[Unit]:
    """Everything that the result holds, in the order in which the source does."""
    out: list[Unit] = []
    ends = ("weight", "scale", "block_scale", "global_scale")
    for job in jobs(resolved.parameters):
        some = next(iter(job.values()))
        stored, target = resolved.stored[some.name], target_format(some, precision)
        for e in range(some.experts or 1):
            tensors: dict[str, dict[str, TensorInfo]] = {}
            outputs: list[Output] = []
            for key, parameter in job.items():
                name = parameter.name.replace("{e}", str(e))
                names = {end: f"{name}.{end}" for end in ends} if parameter.is_linear else {}
                names = names or {"weight": name}
                tensors[key] = {
                    end: resolved.tensors[n] for end, n in names.items() if n in resolved.tensors
                }
                outputs += outputs_of(parameter, name, target)
            out.append(Unit(job, tensors, stored, target, tuple(outputs)))
    for tensor in resolved.drafter:
        output = Output(tensor.raw, tensor.dtype, tensor.shape)
        out.append(Unit({}, {"copy": {"weight": tensor}}, "copy", "copy", (output,)))
    return sorted(out, key=lambda unit: unit.start)


class Sums:
    """What a shard adds to the report; sums of squares, because a layer may span two shards."""

    def __init__(self) -> None:
        self.errors: dict[tuple[str, str, str, str], list[float]] = {}
        self.exact: set[tuple[str, str, str]] = set()
        self.kept: set[str] = set()
        self.notes: list[str] = []

    def add(
        self, parameter: Parameter, stored: str, target: str, errors: tuple[float, float] | None
    ) -> None:
        """``errors``: sums of squares of error and value of a lossy conversion, or ``None``."""
        if stored == target or (stored, target) == ("int64", "int32"):
            self.kept.add(parameter.kind)
        elif errors is None or (stored, target) in EXACT:
            self.exact.add((parameter.kind, stored, target))
        else:
            key = (parameter.kind, stored, target, parameter.module)
            sums = self.errors.setdefault(key, [0.0, 0.0])
            sums[0] += errors[0]
            sums[1] += errors[1]

    def fields(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "errors": [[*key, *sums] for key, sums in self.errors.items()],
            "exact": sorted(map(list, self.exact)),
            "kept": sorted(self.kept),
            "notes": self.notes,
        }

    @staticmethod
    def together(shards: Mapping[str, Mapping[str, Any]]) -> tuple[Report, list[str]]:
        """The report of all shards, and what was kept."""
        report, kept = Report(), set[str]()
        sums: dict[tuple[str, str, str, str], list[float]] = {}
        for _, shard in sorted(shards.items()):
            found = shard["report"]
            for kind, stored, target, module, error, value in found["errors"]:
                both = sums.setdefault((kind, stored, target, module), [0.0, 0.0])
                both[0] += error
                both[1] += value
            for kind, stored, target in found["exact"]:
                report.add_exact(kind, stored, target)
            kept |= set(found["kept"])
            report.notes += found["notes"]
        for (kind, stored, target, module), (error, value) in sums.items():
            report.add_error(kind, module, stored, target, error, value)
        return report, sorted(kept)


class Converter:
    """Reads units and hands the bytes of their outputs to ``emit``, in order."""

    def __init__(
        self, reader: Reader, resolved: Resolved, experts: int, emit: Callable[[np.ndarray], None]
    ) -> None:
        self._reader = reader
        self._reciprocal = resolved.naming.reciprocal
        self.scan = resolved.scan(reader, experts)
        self._emit = emit
        self.sums = Sums()

    def run(self, unit: Unit) -> None:
        """One unit."""
        if unit.stored == "int64":
            for found in unit.tensors.values():
                self._table(found["weight"])
        elif unit.stored == unit.target:
            for found in unit.tensors.values():
                for leaf, tensor in found.items():
                    self._copy(leaf, tensor)
        else:
            self._change(unit)
            return
        for parameter in unit.parameters.values():
            self.sums.add(parameter, unit.stored, unit.target, None)

    def _read(self, leaf: str, tensor: TensorInfo, first: int = 0, rows: int = -1) -> np.ndarray:
        """Some rows of a tensor; a global scale as the scalar that multiplies."""
        if leaf == "global_scale":
            return read_global_scales(self._reader, self.scan, [tensor], self._reciprocal)[0]
        shape = tensor.shape if rows < 0 else (rows, *tensor.shape[1:])
        host = np.empty(shape, HOST_DTYPE[tensor.dtype])
        skip = first * (tensor.nbytes // max(1, tensor.shape[0])) if first else 0
        self._reader.read_into(tensor, host, skip)
        self.scan.check(tensor, host, skip)
        return host

    def _copy(self, leaf: str, tensor: TensorInfo) -> None:
        if leaf != "weight":
            self._emit(self._read(leaf, tensor))
            return
        for start in range(0, tensor.nbytes, CHUNK_BYTES):
            host = np.empty(min(CHUNK_BYTES, tensor.nbytes - start), np.uint8)
            self._reader.read_into(tensor, host, start)
            self._emit(host)

    def _table(self, tensor: TensorInfo) -> None:
        host = np.empty(tensor.shape, np.int64)
        self._reader.read_into(tensor, host)
        self.scan.check(tensor, host)
        self._emit(host)

    def _change(self, unit: Unit) -> None:
        pair = (unit.stored, unit.target)
        out: Host = {}
        exact = dict.fromkeys(unit.tensors, False)
        if pair in _HOST_ROUTES:
            raw = {
                key: {leaf: self._read(leaf, tensor) for leaf, tensor in found.items()}
                for key, found in unit.tensors.items()
            }
            out, exact = _HOST_ROUTES[pair](raw)
            if unit.target == "nvfp4" and "w1" in exact and "w3" in exact:
                exact["w1"] = exact["w3"] = exact["w1"] and exact["w3"]  # as the loader does
        for key, parameter in unit.parameters.items():
            if exact[key]:
                for array in out.pop(key).values():
                    self._emit(array)
                self.sums.add(parameter, *pair, None)
                continue
            if pair in EXACT_ROUTES:
                what = unit.tensors[key]["weight"].raw
                self.sums.notes.append(f"{what}: {EXACT_ROUTES[pair][1]}, requantised")
            self._slabs(unit, key, parameter)

    def _slab_rows(self, parameter: Parameter) -> Iterator[tuple[int, int]]:
        """(first row, rows): whole tiles of 128 rows."""
        rows = parameter.shape[0]
        width = math.prod(parameter.shape[1:])
        step = max(128, SLAB_VALUES // width // 128 * 128)
        for first in range(0, rows, step):
            yield first, min(step, rows - first)

    def _slab(
        self, found: Mapping[str, TensorInfo], stored: str, first: int, rows: int
    ) -> dict[str, Any]:
        raw: dict[str, Any] = {}
        for leaf, tensor in found.items():
            if leaf == "scale" and stored in ("fp8", "fp8_float32"):
                raw[leaf] = self._read(leaf, tensor, first // 128, -(-rows // 128))
            else:
                raw[leaf] = self._read(leaf, tensor, first, rows)
        return raw

    def _slabs(self, unit: Unit, key: str, parameter: Parameter) -> None:
        """A tensor by the conversions that loading uses, twice read where NVFP4 needs its maximum.

        The weight goes out as it comes; the scales, at most an eighth of it, follow.
        """
        amax: Any = None
        if unit.target == "nvfp4":
            partners = ("w1", "w3") if key in ("w1", "w3") else (key,)
            found = [
                largest(self._slab(unit.tensors[p], unit.stored, *rows), stored=unit.stored)
                for p in partners
                for rows in self._slab_rows(unit.parameters[p])
            ]
            amax = np.max(np.stack([np.asarray(x) for x in found]))
        scales: dict[str, list[np.ndarray]] = {}
        error = value = 0.0
        errors: tuple[float, float] | None = None
        for first, rows in self._slab_rows(parameter):
            raw = self._slab(unit.tensors[key], unit.stored, first, rows)
            # One name for all: a program for each would take longer than the work.
            group, lost = convert(
                {"w": raw}, stored=unit.stored, target=unit.target, experts=False, amax=amax
            )
            for leaf, array in group["w"].items():
                host = np.asarray(array)
                if leaf == "weight":
                    self._emit(host)
                elif leaf == "global_scale":
                    scales[leaf] = [host]
                else:
                    scales.setdefault(leaf, []).append(host)
            if lost:
                error += float(lost["w"].error)
                value += float(lost["w"].value)
                errors = error, value
        for leaf in ("scale", "block_scale", "global_scale"):
            for host in scales.get(leaf, []):
                self._emit(host)
        self.sums.add(parameter, unit.stored, unit.target, errors)
