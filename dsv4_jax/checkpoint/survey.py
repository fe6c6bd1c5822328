"""What a checkpoint directory holds, and everything that is wrong with it: no device, no weights.

Headers and settings are read, values only where that is asked for.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.checkpoint.formats import check_config, detect
from dsv4_jax.checkpoint.manifest import check_converted
from dsv4_jax.checkpoint.names import official_name, parameters
from dsv4_jax.checkpoint.read import Reader, TensorInfo, read_config
from dsv4_jax.checkpoint.validate import resolve
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import Precision
from dsv4_jax.text import check_vocabulary, json_object, load_tokenizer

__all__ = ["Group", "Survey", "parameter_counts", "survey"]

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Group:
    """Tensors of one kind in one stored format.

    Attributes:
        kind: official name without layer and expert; ``""``: all kinds.
        dtype: as the files spell it.
        tensors: how many.
        nbytes: their bytes.
    """

    kind: str
    dtype: str
    tensors: int
    nbytes: int


@dataclasses.dataclass
class Survey:
    """A checkpoint directory as far as it can be read.

    Attributes:
        path: the directory.
        config: its architecture; ``None`` where config.json is broken.
        precision: that in which `from_checkpoint` loads the files unless told otherwise; ``None``:
            there is none, or no files.
        holds: what they hold, for people.
        kinds: tensors by kind and stored format, in the order of their names.
        formats: the same over all kinds.
        shards: file -> bytes of its tensors.
        vocabulary: number of tokens of ``tokenizer.json``; ``None`` without a readable one.
        generation: ``generation_config.json``.
        stored: parameter -> format, as ``Resolved.stored``; empty for a broken checkpoint.
        act_scales: as ``Resolved.act_scales``.
        static_scales: how many static activation scales the files have that ``precision`` uses, and
            that it does not use.
        problems: why it cannot be loaded, or not be used with text.
        notes: what is unusual and no problem.
    """

    path: str
    config: ModelConfig | None = None
    precision: Precision | None = None
    holds: str = ""
    kinds: list[Group] = dataclasses.field(default_factory=list[Group])
    formats: list[Group] = dataclasses.field(default_factory=list[Group])
    shards: dict[str, int] = dataclasses.field(default_factory=dict[str, int])
    vocabulary: int | None = None
    generation: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    stored: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    act_scales: frozenset[str] = frozenset()
    static_scales: tuple[int, int] = (0, 0)
    problems: list[str] = dataclasses.field(default_factory=list[str])
    notes: list[str] = dataclasses.field(default_factory=list[str])

    def attempt(self, step: Callable[[], _T]) -> _T | None:
        """The step's result, or its problems."""
        try:
            return step()
        except CheckpointError as error:
            self.problems += error.problems
        except (ValueError, OSError) as error:
            self.problems.append(str(error))
        return None


def parameter_counts(config: ModelConfig, mtp: bool = False) -> tuple[int, int]:
    """Numbers in the model without its hash tables: all, and those that one token uses."""
    total = active = 0
    for parameter in parameters(config, mtp):
        if parameter.rule == "int32":
            continue
        one = math.prod(parameter.shape)
        total += one * max(parameter.experts, 1)
        active += one * (config.num_experts_per_tok if parameter.experts else 1)
    return total, active


def _kind(raw: str) -> str:
    name = re.sub(r"\.experts\.\d+\.", ".experts.", official_name(raw))
    return re.sub(r"^layers\.\d+\.", "", re.sub(r"^mtp\.\d+\.", "mtp.", name))


def _groups(tensors: Iterable[TensorInfo], by_kind: bool) -> list[Group]:
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for tensor in tensors:
        key = (_kind(tensor.raw) if by_kind else "", tensor.dtype)
        count, nbytes = found.get(key, (0, 0))
        found[key] = (count + 1, nbytes + tensor.nbytes)
    return [Group(*key, *value) for key, value in sorted(found.items())]


def survey(
    path: str | os.PathLike[str],
    *,
    mtp: bool = False,
    any_preset: bool = False,
    verify: bool = False,
) -> Survey:
    """Reads what can be read of a checkpoint directory and collects all problems.

    Args:
        path: the directory.
        mtp: the multi-token-prediction module is to be loaded too.
        any_preset: a precision will be given, so that none need fit the files.
        verify: read everything, and look for bad scales, tables and weights.
    """
    out = Survey(os.fspath(path))
    out.attempt(lambda: check_converted(path))
    data = out.attempt(lambda: read_config(path))
    if data is not None:
        source = os.path.join(out.path, "config.json")
        out.config = out.attempt(lambda: ModelConfig.from_hf(data, source=source))
    if Path(path).is_dir():
        _read_tensors(out, data or {}, mtp, any_preset, verify)
        _read_text(out)
    out.problems = list(dict.fromkeys(out.problems))  # a check may serve two steps
    return out


def _read_tensors(
    out: Survey, data: dict[str, Any], mtp: bool, any_preset: bool, verify: bool
) -> None:
    reader = out.attempt(
        lambda: Reader(out.path, lambda error: out.problems.extend(error.problems))
    )
    if reader is None:
        return
    with reader:
        _check_tensors(out, reader, data, mtp, any_preset, verify)


def _check_tensors(
    out: Survey,
    reader: Reader,
    data: dict[str, Any],
    mtp: bool,
    any_preset: bool,
    verify: bool,
) -> None:
    tensors = list(reader)
    out.kinds, out.formats = _groups(tensors, True), _groups(tensors, False)
    for tensor in tensors:
        out.shards[tensor.file] = out.shards.get(tensor.file, 0) + tensor.nbytes
    if not tensors:
        return
    try:
        found = detect(reader.tensors, source=out.path)
        out.precision, out.holds = found.precision, found.holds
    except CheckpointError as error:
        (out.notes if any_preset else out.problems).extend(error.problems)
    config = out.config
    if config is None:
        return
    resolved = out.attempt(
        lambda: resolve(tensors, config, mtp=mtp, source=out.path, unread=reader.unread)
    )
    if resolved is None:
        return
    out.stored, out.act_scales = resolved.stored, resolved.act_scales
    used, unused = resolved.static_scales(out.precision)
    out.static_scales = len(used), len(unused)
    out.attempt(lambda: check_config(data, resolved.naming, out.path))
    if verify:
        scan = resolved.scan(reader, config.n_routed_experts, verify=True)
        out.attempt(lambda: scan.raise_all(out.path))


def _read_text(out: Survey) -> None:
    tokenizer = out.attempt(lambda: load_tokenizer(out.path))
    if tokenizer is not None:
        out.vocabulary = tokenizer.get_vocab_size()
        config = out.config
        if config is not None:
            out.attempt(lambda: check_vocabulary(tokenizer, config.vocab_size))
    elif not (Path(out.path) / "tokenizer.json").is_file():
        out.notes.append("no tokenizer.json: token ids in, token ids out")
    settings = Path(out.path) / "generation_config.json"
    if settings.is_file():
        out.generation = out.attempt(lambda: json_object(settings)) or {}
