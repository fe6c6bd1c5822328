"""The calls of a function's ops as few calls: `fused`.

XLA puts every foreign call into a graph of its own and runs these one after another: each begins
when all of the one before has ended. ``dsv4.program`` makes many calls as one. Their kernels stand
in one graph, where a kernel begins while the one ahead ends, and reads its weights meanwhile; and
what does not wait for each other runs side by side, in two lanes.

The function is traced, its jitted parts are opened, and calls of ``dsv4`` targets are collected, as
far as no operation of XLA reads one's results, and within a layer. Every call has the kernels and
the bits that it has by itself.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final, ParamSpec, TypeVar

import jax
import numpy as np
from jax.extend import core

from dsv4_jax import library
from dsv4_jax.ops.moe import late_operands
from dsv4_jax.quant.bits import stored_bytes

__all__ = ["fused"]

_OPENED: Final = frozenset({"jit", "pjit", "closed_call"})
_VIEWS: Final = frozenset({"reshape", "squeeze"})
# An estimate is enough to tell which of two chains of calls is the longer one.
_CALL_US: Final = 5.0
_BYTES_A_US: Final = 3e6
_OTHER_LANE_US: Final = 2.0
"""A call begins later behind one of the other lane: it cannot begin before that one has ended."""
_MOST_BYTES: Final = 64 << 20
"""Of a call that counts: experts are not read whole."""


P = ParamSpec("P")
R = TypeVar("R")


def fused(fun: Callable[P, R]) -> Callable[P, R]:
    """``fun`` with its calls of ``dsv4`` targets in programs.

    To be called inside of ``jax.jit``; arguments and results are trees of arrays.
    """

    @functools.wraps(fun)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        traced, shapes = jax.make_jaxpr(fun, return_shape=True)(*args, **kwargs)
        collector = _Collector()
        leaves = jax.tree.leaves((args, kwargs))
        results = collector.run(traced, leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return wrapped


@dataclasses.dataclass(eq=False)
class _Buffer:
    """What a call of the open program made of a buffer: results count from 0 on, operands of the
    program from -1 down."""

    index: int
    value: jax.Array | None = None  # once the program is called


@dataclasses.dataclass(frozen=True, eq=False)
class _View:
    """A buffer as an array of some shape."""

    buffer: _Buffer
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass
class _Call:
    eqn: core.JaxprEqn
    operands: list[tuple[int, tuple[int, ...]]]
    results: list[tuple[int, tuple[int, ...]]]
    waits: set[int]
    late: set[int]
    us: float
    lane: int = 0


@dataclasses.dataclass(eq=False)
class _Slot:
    """A value of the function. Its views, and the same array given twice, have one place."""

    place: Hashable
    value: Any = None  # once it is made


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    eqn: core.JaxprEqn
    reads: list[_Slot]
    makes: list[_Slot]
    scope: str


Value = jax.Array | np.ndarray | _View


class _Collector:
    """Evaluates a jaxpr; calls wait in the program that is open until their results are read."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._layer: str | None = None
        self._calls: list[_Call] = []
        self._operands: list[Any] = []
        self._results: list[jax.ShapeDtypeStruct] = []
        self._made: list[_View] = []
        self._writer: dict[int, int] = {}  # of a buffer: the call that made what it holds
        self._readers: dict[int, set[int]] = {}

    def run(self, traced: core.ClosedJaxpr, arguments: Sequence[Any]) -> list[Any]:
        """The results for the arguments."""
        steps: list[_Step] = []
        results = _opened(traced, [_Slot(id(x), x) for x in arguments], "", steps)
        last = {slot.place: i for i, step in enumerate(steps) for slot in step.reads}
        last |= {slot.place: len(steps) for slot in results}
        for i, step in enumerate(steps):
            places = [slot.place for slot in step.reads]
            again = frozenset(
                n for n, at in enumerate(places) if last[at] > i or places.count(at) > 1
            )
            made = self._equation(step.eqn, [x.value for x in step.reads], again, step.scope)
            for slot, value in zip(step.makes, made, strict=True):
                slot.value = value
        return [self._real(slot.value) for slot in results]

    def _equation(
        self, eqn: core.JaxprEqn, operands: list[Any], again: frozenset[int], scope: str
    ) -> Sequence[Any]:
        """``again``: places among the operands of what is read again behind this."""
        if _is_call(eqn):
            return self._call(eqn, operands, again, scope)
        viewed = operands[0] if eqn.primitive.name in _VIEWS else None
        if isinstance(viewed, _View) and viewed.buffer.value is None:
            return [dataclasses.replace(viewed, shape=_array(eqn.outvars[0]).shape)]
        return self._bind(eqn, [self._real(value) for value in operands], scope)

    def _bind(self, eqn: core.JaxprEqn, operands: list[Any], scope: str) -> Sequence[Any]:
        params: Any = eqn.primitive.get_bind_params(eqn.params)
        # As the version of JAX has it.
        functions, params = params if isinstance(params, tuple) else ((), params)
        with jax.named_scope(scope), eqn.ctx.manager:
            results = eqn.primitive.bind(*functions, *operands, **params)
        return results if eqn.primitive.multiple_results else [results]

    def _real(self, value: Value) -> Any:
        """The array itself: the program that makes it is called, if it was not yet."""
        if not isinstance(value, _View):
            return value
        if value.buffer.value is None:
            self._flush()
        made = value.buffer.value
        if made is None:
            raise AssertionError("program: a result was written over before it was read")
        return made if made.shape == value.shape else made.reshape(value.shape)

    def _call(
        self, eqn: core.JaxprEqn, operands: list[Any], again: frozenset[int], scope: str
    ) -> Sequence[Any]:
        found = re.search(r"layers?_\d+", scope)
        layer = found[0] if found else ""
        in_place = dict(eqn.params["input_output_aliases"])
        if layer != self._layer or again & in_place.keys():
            self._flush()
        if again & in_place.keys():  # XLA makes a copy for it
            return self._bind(eqn, [self._real(value) for value in operands], scope)
        self._layer = layer
        this, views = len(self._calls), [self._view(value) for value in operands]
        late = _late(eqn)
        call = _Call(eqn, [], [], set(), set(), _CALL_US)
        for n, view in enumerate(views):
            buffer = view.buffer.index
            call.operands.append((buffer, view.shape))
            if buffer in self._writer:
                (call.late if n in late else call.waits).add(self._writer[buffer])
            else:
                call.us += min(stored_bytes(view.shape, view.dtype), _MOST_BYTES) / _BYTES_A_US
            if n in in_place:
                call.waits |= self._readers.get(buffer, set())
            self._readers.setdefault(buffer, set()).add(this)
        made: dict[int, _View] = {}
        for n, var in enumerate(eqn.outvars):
            shape, dtype = _array(var).shape, _array(var).dtype
            source = next((views[i] for i, result in in_place.items() if result == n), None)
            buffer = source.buffer.index if source is not None else self._new(shape, dtype)
            made[n] = _View(_Buffer(buffer), shape, dtype)
            self._writer[buffer] = this
            self._readers[buffer] = set()
            call.results.append((buffer, shape))
            self._hold(made[n])
        call.waits.discard(this)
        call.late -= call.waits
        self._calls.append(call)
        return [made[n] for n in range(len(eqn.outvars))]

    def _view(self, value: Value) -> _View:
        if isinstance(value, _View) and value.buffer.value is None:
            if all(view.buffer is not value.buffer for view in self._made):
                raise AssertionError("program: a result was written over before it was read")
            return value
        value = self._real(value)
        for i, operand in enumerate(self._operands):
            if operand is value:
                return _View(_Buffer(-1 - i), value.shape, value.dtype)
        self._operands.append(value)
        return _View(_Buffer(-len(self._operands)), value.shape, value.dtype)

    def _new(self, shape: tuple[int, ...], dtype: Any) -> int:
        self._results.append(jax.ShapeDtypeStruct(shape, dtype))
        return len(self._results) - 1

    def _hold(self, view: _View) -> None:
        """Results are given out when the program is called; the last one of a buffer wins."""
        self._made = [old for old in self._made if old.buffer.index != view.buffer.index]
        self._made.append(view)

    def _flush(self) -> None:
        calls = self._calls
        if not calls:
            return
        operands, results, held = self._operands, list(self._results), list(self._made)
        # An operand that is written in place is a result as well, behind the others.
        place: dict[int, int] = {}
        for view in held:
            if view.buffer.index < 0:
                place[view.buffer.index] = len(results)
                results.append(operands[-1 - view.buffer.index])
        aliases = {-1 - buffer: result for buffer, result in place.items()}

        def number(buffer: int) -> int:
            return -1 - buffer if buffer < 0 else len(operands) + buffer

        layer = self._layer
        self._clear()
        _assign_lanes(calls)
        names, code = _encode(calls, number)
        shapes = [jax.ShapeDtypeStruct(r.shape, r.dtype) for r in results]
        with jax.named_scope(layer or "calls"):
            made = library.call(
                "program", shapes, *operands, aliases=aliases, names=names, code=code
            )
        for view in held:
            index = view.buffer.index
            view.buffer.value = made[place[index] if index < 0 else index]


def _opened(
    traced: core.ClosedJaxpr, arguments: Sequence[_Slot], scope: str, steps: list[_Step]
) -> list[_Slot]:
    """Appends the equations, those of jitted parts that make calls too; gives the results."""
    jaxpr = traced.jaxpr
    slots: dict[core.Var, _Slot] = dict(zip(jaxpr.invars, arguments, strict=True))
    slots |= {v: _Slot(id(x), x) for v, x in zip(jaxpr.constvars, traced.consts, strict=True)}

    def of(atom: Any) -> _Slot:
        return _Slot(id(atom.val), atom.val) if isinstance(atom, core.Literal) else slots[atom]

    for eqn in jaxpr.eqns:
        reads = [of(atom) for atom in eqn.invars]
        here = _joined(scope, str(eqn.source_info.name_stack))
        if eqn.primitive.name in _OPENED and _has_calls(_inner(eqn)):
            inside = _joined(here, f"jit({eqn.params.get('name')})")
            makes = _opened(_inner(eqn), reads, inside, steps)
        else:
            views = eqn.primitive.name in _VIEWS
            makes = [_Slot(reads[0].place if views else object()) for _ in eqn.outvars]
            steps.append(_Step(eqn, reads, makes, here))
        slots |= zip(eqn.outvars, makes, strict=True)
    return [of(atom) for atom in jaxpr.outvars]


def _array(var: core.Var) -> jax.ShapeDtypeStruct:
    aval: Any = var.aval
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _joined(scope: str, name: str) -> str:
    return "/".join(filter(None, (scope, name)))


def _inner(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    return eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]


def _is_call(eqn: core.JaxprEqn) -> bool:
    """Of an op of ours; a program is one already."""
    target = str(eqn.params.get("target_name")) if eqn.primitive.name == "ffi_call" else ""
    return target.startswith("dsv4.") and target != "dsv4.program"


def _has_calls(traced: core.ClosedJaxpr) -> bool:
    for eqn in traced.jaxpr.eqns:
        if _is_call(eqn):
            return True
        if eqn.primitive.name in _OPENED and _has_calls(_inner(eqn)):
            return True
    return False


def _late(eqn: core.JaxprEqn) -> frozenset[int]:
    """Operands that only the last launches of a call read, behind an ``AwaitLate``."""
    if eqn.params["target_name"] != "dsv4.moe":
        return frozenset()
    return late_operands(dict(eqn.params["attributes"]))


def _assign_lanes(calls: Sequence[_Call]) -> None:
    """Each call where it begins first, behind a call that it waits for; the first lane in doubt."""
    free, end = [0.0, 0.0], list[float]()
    for call in calls:
        begins = list(free)
        for lane in (0, 1):
            for i in call.waits:
                away = calls[i].lane != lane
                begins[lane] = max(begins[lane], end[i] + (_OTHER_LANE_US if away else 0.0))
        call.lane = 1 if begins[1] < begins[0] else 0
        end.append(begins[call.lane] + call.us)
        free[call.lane] = end[-1]


def _encode(calls: Sequence[_Call], number: Callable[[int], int]) -> tuple[str, np.ndarray]:
    """``names`` and ``code`` of ``dsv4.program`` (ffi/program/program_ffi.cc)."""
    names: dict[str, int] = {}

    def name(text: str) -> int:
        return names.setdefault(text, len(names))

    needed = {i for call in calls for i in call.waits | call.late}
    code = [len(calls)]
    for n, call in enumerate(calls):
        code += [name(call.eqn.params["target_name"]), call.lane, int(n in needed)]
        for others in (call.waits, call.late):
            code += [len(others), *sorted(others)]
        for buffers in (call.operands, call.results):
            code.append(len(buffers))
            for buffer, shape in buffers:
                code += [number(buffer), len(shape), *shape]
        attributes = sorted(dict(call.eqn.params["attributes"]).items())
        code.append(len(attributes))
        for key, value in attributes:
            if type(value) not in (np.int32, np.float32):
                raise TypeError(
                    f"program: attribute {key} must be int32 or float32, got {type(value)}"
                )
            code += [name(key), int(type(value) is np.float32), int(value.view(np.int32))]
    return "\n".join(names), np.array(code, np.int32)
