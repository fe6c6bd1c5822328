"""From the files of a checkpoint to the params tree (model.md sections 7 and 9)."""

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.errors import JaxRuntimeError

from dsv4_jax.checkpoint import memory
from dsv4_jax.checkpoint.convert import EXACT, EXACT_ROUTES, Report, byte_type, convert, typed
from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.checkpoint.formats import check_config, weight_only
from dsv4_jax.checkpoint.manifest import check_converted
from dsv4_jax.checkpoint.names import (
    MTP,
    Parameter,
    leaves,
    set_path,
    target_format,
    uses_act_scales,
)
from dsv4_jax.checkpoint.place import Placer, write_slice
from dsv4_jax.checkpoint.read import Reader, TensorInfo, read_config
from dsv4_jax.checkpoint.scan import SLAB_BYTES, BadValueError
from dsv4_jax.checkpoint.validate import Resolved, resolve
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import ACT_SCALES, Precision
from dsv4_jax.quant import nvfp4
from dsv4_jax.typing import Array, Params

__all__ = ["Progress", "jobs", "leftovers", "load_params", "load_params_from"]

Progress = Callable[[int, int], None] | bool | None
"""``True`` or a callable taking (bytes done, bytes in total); ``None``: on when stderr is a tty."""

Sums = dict[tuple[str, str, str], list[tuple[float, float]]]


class _Loader:
    def __init__(
        self,
        placer: Placer,
        resolved: Resolved,
        config: ModelConfig,
        precision: Precision,
        report: Report,
    ) -> None:
        self._placer = placer
        self._tensors = resolved.tensors
        self._stored = resolved.stored
        self._reciprocal = resolved.naming.reciprocal
        self._config = config
        self._precision = precision
        self._report = report
        self._act_scales = resolved.act_scales
        self._apart: list[str] = []  # experts whose w1 and w3 have different activation scales
        self._power_of_two: bool | None = None  # so far; None: no scale seen that matters

    def _linear(self, parameter: Parameter, name: str) -> dict[str, TensorInfo]:
        """Leaf -> tensor of the file; one leaf ``weight`` for what is not a linear."""
        if not parameter.is_linear:
            return {"weight": self._tensors[name]}
        leaves = ("weight", "scale", "block_scale", "global_scale")
        found = {leaf: self._tensors.get(f"{name}.{leaf}") for leaf in leaves}
        return {leaf: tensor for leaf, tensor in found.items() if tensor is not None}

    def job_start(self, job: dict[str, Parameter]) -> tuple[str, int]:
        """Place of a job's first byte."""
        first = [
            (t.file, t.offset) for p in job.values() for t in self._linear(p, p.names()[0]).values()
        ]
        return min(first)

    def run(self, job: dict[str, Parameter], tree: Params) -> None:
        """Loads parameters that belong together and stores their leaves."""
        some = next(iter(job.values()))
        stored, target = self._stored[some.name], target_format(some, self._precision)
        if stored == "int64":
            set_path(tree, some.path, self._placer.hash_table(self._tensors[some.name]))
            return
        if some.experts:
            groups = self._experts(job, stored, target)
        else:
            raw = {
                key: {
                    leaf: self._leaf(leaf, tensor, stored if stored == target else "")
                    for leaf, tensor in self._linear(parameter, parameter.name).items()
                }
                for key, parameter in job.items()
            }
            sums: Sums = {}
            groups = self._convert(job, raw, stored, target, sums, "")
            self._account(job, sums)
        for key in list(groups):
            parameter, found = job[key], groups.pop(key)
            for leaf in list(found):
                path = (*parameter.path, leaf) if parameter.is_linear else parameter.path
                array = typed(leaf, found.pop(leaf), target)
                if parameter.experts and leaf == "block_scale":
                    self._look_at_scales(parameter, array)
                set_path(tree, path, array)
        if some.rule in self._act_scales and uses_act_scales(some.rule, self._precision):
            self._load_act_scales(job, tree)

    def _load_act_scales(self, job: dict[str, Parameter], tree: Params) -> None:
        """``w1`` and ``w3`` read the same token, rounded once: under the larger of their scales."""
        for key, leaf in ACT_SCALES.items():
            together = [p for k, p in job.items() if k == key or (key, k) == ("w1", "w3")]
            stacks = [[self._tensors[f"{n}.act_scale"] for n in p.names()] for p in together]
            array, apart = self._placer.act_scales(stacks, self._reciprocal)
            set_path(tree, (*job[key].path[:-1], leaf), array)
            self._apart += [job[key].names()[e].rpartition(".")[0] for e in apart]

    def _leaf(self, leaf: str, tensor: TensorInfo, form: str) -> Array:
        """One leaf of a single tensor; ``form``: its format if it stays as it is."""
        if leaf == "global_scale":
            return self._placer.global_scales([tensor], self._reciprocal)[0]
        return self._placer.tensor(tensor, byte_type(leaf, form))

    def _look_at_scales(self, parameter: Parameter, block_scale: Array) -> None:
        """Looks for a scale that ``experts_power_of_two`` does not allow, until there is one."""
        asked = self._precision.experts_power_of_two
        if (
            getattr(self._precision, parameter.rule) != "nvfp4_w4a8"
            or asked is False
            or self._power_of_two is False
        ):
            return
        self._power_of_two = bool(nvfp4.scales_are_powers_of_two(block_scale))
        if self._power_of_two:
            return
        flat = jnp.argmin(nvfp4.power_of_two_scales(block_scale))
        at = tuple(int(i) for i in np.unravel_index(int(flat), block_scale.shape))
        name = parameter.names()[at[0]]
        found = f"got {float(np.asarray(block_scale)[at])} at {list(at[1:])}"
        rule = "block scales must be zero or powers of two"
        if asked:
            file = self._linear(parameter, name)["weight"].file
            raise CheckpointError(f"{file}: {name}: {rule} for experts_power_of_two=True, {found}")
        self._report.notes.append(f"experts_power_of_two=False: {name}: {rule}, {found}")

    def settle(self) -> Precision:
        """The precision asked for, with what was found of the experts' scales; reports it."""
        if self._apart:
            self._report.notes.append(
                f"static activation scales of w1 and w3 differ in {len(self._apart)} experts "
                f"({self._apart[0]} ...): the larger one is used for both"
            )
        if self._power_of_two is None:
            return self._precision
        if self._power_of_two:
            self._report.notes.append(
                "experts_power_of_two=True: all block scales of nvfp4_w4a8 experts are zero or "
                "powers of two"
            )
        return dataclasses.replace(self._precision, experts_power_of_two=self._power_of_two)

    def _account(self, job: dict[str, Parameter], sums: Sums) -> None:
        for (key, stored, target), pairs in sums.items():
            parameter = job[key]
            if (stored, target) in EXACT or not pairs:
                if stored != target:
                    self._report.add_exact(parameter.kind, stored, target)
            else:
                error, value = (math.fsum(column) for column in zip(*pairs, strict=True))
                module = parameter.module
                self._report.add_error(parameter.kind, module, stored, target, error, value)

    def _convert(
        self,
        job: dict[str, Parameter],
        raw: dict[str, dict[str, Array]],
        stored: str,
        target: str,
        sums: Sums,
        where: str,
    ) -> dict[str, dict[str, Array]]:
        """Leaves of a group; adds to ``sums`` what got lost (an empty list: nothing)."""
        experts = bool(next(iter(job.values())).experts)
        for key in raw:
            sums.setdefault((key, stored, target), [])
        if stored == target:
            return raw
        if (stored, target) not in EXACT_ROUTES:
            out, errors = convert(raw, stored=stored, target=target, experts=experts)
            for key, found in errors.items():
                error, value = np.asarray(found.error), np.asarray(found.value)
                sums[key, stored, target].append((float(error.sum()), float(value.sum())))
            return out
        route, obstacle = EXACT_ROUTES[stored, target]
        out, flags = route(raw, experts=experts)
        exact = {key: np.atleast_1d(np.asarray(flag)) for key, flag in flags.items()}
        if all(flag.all() for flag in exact.values()):
            return out
        # w1 and w3 share their global scale, so they leave the exact route together.
        if target == "nvfp4" and "w1" in exact and "w3" in exact:
            exact["w1"] = exact["w3"] = exact["w1"] & exact["w3"]
        other, errors = convert(raw, stored=stored, target=target, experts=experts)
        for key, flag in exact.items():
            lost = np.flatnonzero(~flag)
            if not lost.size:
                continue
            error, value = np.asarray(errors[key].error), np.asarray(errors[key].value)
            error, value = np.atleast_1d(error)[lost], np.atleast_1d(value)[lost]
            sums[key, stored, target].append((float(error.sum()), float(value.sum())))
            what = f" of {lost.size} of {flag.size} experts{where}" if experts else ""
            self._report.notes.append(
                f"{job[key].module} {job[key].kind}{what}: {obstacle}, requantised"
            )
            keep = jnp.asarray(flag) if experts else jnp.asarray(flag[0])
            for leaf, x in out[key].items():
                mask = keep.reshape(keep.shape + (1,) * (x.ndim - keep.ndim))
                out[key][leaf] = jnp.where(mask, x, other[key][leaf])
        return out

    def _experts(
        self, job: dict[str, Parameter], stored: str, target: str
    ) -> dict[str, dict[str, Array]]:
        """Stacks the experts of a layer on the device, several per write."""
        names = {key: parameter.names() for key, parameter in job.items()}
        count = next(iter(job.values())).experts
        one = sum(
            tensor.nbytes
            for key, parameter in job.items()
            for tensor in self._linear(parameter, names[key][0]).values()
        )
        step = SLAB_BYTES // one
        if stored != target:
            step = min(
                step, memory.DECODED_BYTES // sum(4 * math.prod(p.shape) for p in job.values())
            )
        step = max(d for d in range(1, max(1, min(step, count)) + 1) if count % d == 0)
        buffers: Any = None
        sums: Sums = {}
        for start in range(0, count, step):
            stacks: dict[tuple[str, str], list[TensorInfo]] = {}
            for key, parameter in job.items():
                for name in names[key][start : start + step]:
                    for leaf, tensor in self._linear(parameter, name).items():
                        stacks.setdefault((key, leaf), []).append(tensor)
            views = {
                key: dtype
                for key in stacks
                if step == count
                and stored == target
                and (dtype := byte_type(key[1], stored)) is not None
            }
            scalars = [at for at in stacks if at[1] == "global_scale"]
            raw: dict[str, dict[str, Array]] = {}
            for key, leaf in scalars:
                found = self._placer.global_scales(stacks.pop((key, leaf)), self._reciprocal)
                raw.setdefault(key, {})[leaf] = found
            for (key, leaf), array in self._placer.stacks(stacks, views).items():
                raw.setdefault(key, {})[leaf] = array
            where = f" from {start}" if step < count else ""
            part = self._convert(job, raw, stored, target, sums, where)
            if step == count:
                buffers = part
                break
            if buffers is None:
                buffers = jax.tree.map(lambda x: jnp.zeros((count, *x.shape[1:]), x.dtype), part)
            buffers = write_slice(buffers, part, start)
        self._account(job, sums)
        return buffers


def jobs(parameters: list[Parameter]) -> list[dict[str, Parameter]]:
    """Groups ``w1``, ``w2``, ``w3`` of the same experts; everything else is on its own."""
    jobs: dict[tuple[str, ...], dict[str, Parameter]] = {}
    for parameter in parameters:
        grouped = parameter.path[-1] in ("w1", "w2", "w3")
        group = parameter.path[:-1] if grouped else parameter.path
        jobs.setdefault(group, {})[parameter.path[-1]] = parameter
    return list(jobs.values())


def leftovers(
    resolved: Resolved,
    data: Mapping[str, Any],
    precision: Precision,
    converted: bool = False,
) -> list[str]:
    """A line for each thing in the files that is not used, or not as somebody may think.

    Args:
        resolved: the source.
        data: its ``config.json``.
        precision: what it becomes.
        converted: in files, not in a tree.
    """
    out: list[str] = []
    drafter = "copied" if converted else "skipped"
    modules = sorted({int(match[1]) for t in resolved.drafter if (match := MTP.match(t.raw))})
    if modules not in ([], [0]):
        listed = ", ".join(f"mtp.{i}" for i in modules)
        out.append(f"{drafter} {len(resolved.drafter)} tensors of a newer drafter ({listed})")
    used, unused = resolved.static_scales(None if converted else precision)
    if used:
        out.append(f"{len(used)} static activation scales of routed experts are used")
    if unused and converted:
        out.append(
            f"dropped {len(unused)} static activation scales ({unused[0]} ...): activations in "
            "NVFP4 are scaled per token"
        )
    elif unused:
        out.append(
            f"{len(unused)} static activation scales ({unused[0]} ...) are not used: only routed "
            "experts in nvfp4_w4a4 take them, other linears scale NVFP4 activations per token"
        )
    rules = {p.rule for p in resolved.parameters if resolved.stored[p.name] == "nvfp4"}
    formats = {rule: getattr(precision, rule) for rule in sorted(rules)}
    if weight_only(data, resolved.naming) and "nvfp4_w4a4" in formats.values():
        changed = ", ".join(rule for rule, form in formats.items() if form == "nvfp4_w4a4")
        out.append(
            f"activations become NVFP4 (nvfp4_w4a4: {changed}): the source has NVFP4 in its "
            "weights alone (nvfp4_w4a16)"
        )
    return out


@contextlib.contextmanager
def _bar(progress: Progress, total: int) -> Generator[Callable[[int], None], None, None]:
    """A function that takes the bytes just read."""
    if progress is None:
        progress = sys.stderr.isatty()
    if callable(progress):
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        yield advance
    elif not progress:
        yield lambda count: None
    else:
        from rich import progress as rich_progress
        from rich.console import Console

        with rich_progress.Progress(
            rich_progress.TextColumn("loading"),
            rich_progress.BarColumn(),
            rich_progress.DownloadColumn(),
            rich_progress.TransferSpeedColumn(),
            rich_progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        ) as bar:
            task = bar.add_task("loading", total=total)
            yield lambda count: bar.advance(task, count)


def load_params(
    path: str | os.PathLike[str],
    config: ModelConfig,
    precision: Precision,
    *,
    mtp: bool = False,
    progress: Progress = None,
    report: Report | None = None,
    verify: bool = False,
) -> Params:
    """Loads the params tree of a checkpoint directory in the formats of ``precision``.

    Everything is checked before the first array is put on a device. At most 512 MiB are staged
    on the host at a time.

    Args:
        path: checkpoint directory.
        config: its architecture.
        precision: the number formats of the tree.
        mtp: load the module ``mtp.0`` into ``mtp_0`` as well.
        progress: see ``Progress``.
        report: filled with what conversions did; without it the lines are printed to stderr.
        verify: look for NaN and Inf in weights too; bad scales are always found.

    Raises:
        CheckpointError: the checkpoint is malformed or does not fit ``config``, or
            ``precision.experts_power_of_two`` is ``True`` and not so.
        OutOfMemory: the weights do not fit the device (a ``CheckpointError`` too).
        ValueError: a width does not fit a format of ``precision``.
    """
    check_converted(path)
    with Reader(path) as reader:
        params, _ = load_params_from(
            reader,
            config,
            precision,
            mtp=mtp,
            progress=progress,
            report=report,
            source=str(path),
            verify=verify,
            data=read_config(path),
        )
    return params


def load_params_from(
    reader: Reader,
    config: ModelConfig,
    precision: Precision,
    *,
    mtp: bool = False,
    progress: Progress = None,
    report: Report | None = None,
    source: str = "checkpoint",
    verify: bool = False,
    batch_size: int = 1,
    max_len: int | None = None,
    data: Mapping[str, Any] | None = None,
) -> tuple[Params, Precision]:
    """``load_params`` of an open reader; ``source`` names it in messages.

    ``batch_size`` and ``max_len`` are of the cache that must fit besides; ``None``: none. ``data``:
    its ``config.json``, which must not contradict the names of the tensors.

    Returns:
        The tree, and ``precision`` with ``experts_power_of_two`` as it was found to be.
    """
    resolved = resolve(reader, config, mtp=mtp, source=source)
    check_config(data or {}, resolved.naming, source)
    for parameter in resolved.parameters:
        leaves(parameter, precision)  # widths against formats, before anything is placed
    plan = memory.Plan(
        config,
        precision,
        mtp,
        batch_size=batch_size,
        max_len=max_len,
        stored=resolved.stored,
        act_scales=resolved.act_scales,
    )
    have = memory.check([plan], source=source)
    found = Report() if report is None else report
    scan = resolved.scan(reader, config.n_routed_experts, verify=verify)
    tree: Params = {}
    used = set(resolved.static_scales(precision)[0])
    total = sum(
        tensor.nbytes
        for name, tensor in resolved.tensors.items()
        if not name.endswith(".act_scale") or tensor.raw in used
    )
    bad_value: str | None = None
    no_memory: memory.OutOfMemory | None = None
    with _bar(progress, total) as advance:
        placer = Placer(reader, advance, scan)
        loader = _Loader(placer, resolved, config, precision, found)
        try:
            for job in sorted(jobs(resolved.parameters), key=loader.job_start):
                loader.run(job, tree)
                placer.finish()
        except BadValueError as error:
            bad_value = str(error)
        except (JaxRuntimeError, MemoryError) as error:
            no_memory = memory.exhausted(error, [plan], source=source, have=have)
            if no_memory is None:
                raise
    # Not in the handlers: there the frames of what failed are alive, and with them their arrays.
    if bad_value is not None or no_memory is not None:
        tree.clear()
        placer.drop()
        if bad_value is not None:
            scan.raise_all(source)
            raise CheckpointError(bad_value)  # the file was mended in between
        if no_memory is not None:
            raise no_memory
    settled = loader.settle()
    found.notes += leftovers(resolved, data or {}, precision)
    if report is None:
        for line in found.lines():
            print(f"dsv4: {line}", file=sys.stderr)
    return tree, settled
