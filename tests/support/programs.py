"""Programs as `dsv4_jax.program` writes them, read again; the names of all ops beside."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from dsv4_jax import library

__all__ = ["OPS", "Buffer", "Call", "Program", "record"]

PROGRAM = "dsv4.program"
OPS = [target.removeprefix("dsv4.") for target in library.targets() if target != PROGRAM]
"""Every target is an op's, but for the one that calls the others."""

Buffer = tuple[int, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a program; ``waits`` and ``late`` index the calls of it."""

    op: str
    lane: int
    signals: bool
    waits: tuple[int, ...]
    late: tuple[int, ...]
    operands: tuple[Buffer, ...]
    results: tuple[Buffer, ...]
    attributes: dict[str, np.generic]


@dataclasses.dataclass(frozen=True)
class Program:
    """A call of ``dsv4.program``."""

    calls: tuple[Call, ...]
    results: tuple[jax.ShapeDtypeStruct, ...]
    operands: int
    aliases: dict[int, int]
    names: str
    code: np.ndarray

    @property
    def ops(self) -> list[str]:
        """In the order of the calls."""
        return [call.op for call in self.calls]


def _read(names: str, code: np.ndarray) -> tuple[Call, ...]:
    numbers, lines = iter(code.tolist()), names.split("\n")

    def several(one: Callable[[], Any]) -> tuple[Any, ...]:
        return tuple(one() for _ in range(next(numbers)))

    def number() -> int:
        return next(numbers)

    def buffer() -> Buffer:
        return number(), several(number)

    def attribute() -> tuple[str, np.generic]:
        name, dtype = lines[number()], (np.int32, np.float32)[number()]
        return name, np.int32(number()).view(dtype)

    def call() -> Call:
        op, lane, signals = lines[number()].removeprefix("dsv4."), number(), bool(number())
        waits, late = several(number), several(number)
        made = several(buffer), several(buffer)
        return Call(op, lane, signals, waits, late, *made, dict(several(attribute)))

    calls = several(call)
    assert next(numbers, None) is None
    return calls


def record(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """Gets every program that is traced from here on."""
    programs: list[Program] = []
    real = library.call

    def spy(
        op: str, results: Sequence[jax.ShapeDtypeStruct], *operands: Any, **settings: Any
    ) -> list[jax.Array]:
        if op == "program":
            names, code, aliases = (settings[name] for name in ("names", "code", "aliases"))
            calls = _read(names, code)
            programs.append(Program(calls, tuple(results), len(operands), aliases, names, code))
        return real(op, results, *operands, **settings)

    monkeypatch.setattr(library, "call", spy)
    return programs
