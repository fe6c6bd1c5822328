"""``dsv4 inspect``: what a checkpoint holds, what it needs, and what is wrong with it."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsv4_jax.checkpoint.errors import shown
from dsv4_jax.checkpoint.memory import Need, Plan, readable
from dsv4_jax.checkpoint.survey import Group, Survey, parameter_counts, survey
from dsv4_jax.cli.common import (
    BAD_INPUT,
    UserError,
    preset_name,
    readable_errors,
    say,
    table_console,
)
from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.precision import Precision

__all__ = ["command"]

_POSITIONS = 4096
"""Of the cache, besides the most that the model takes, where no length is given."""


class _Row(NamedTuple):
    """The memory of one combination of options."""

    precision: str
    batch_size: int
    max_len: int
    need: Need


def _memory(
    found: Survey,
    config: ModelConfig,
    precisions: dict[str, Precision],
    sizes: tuple[list[int], list[int]],
    mtp: bool,
) -> list[_Row]:
    rows: list[_Row] = []
    for (name, precision), batch_size, max_len in itertools.product(precisions.items(), *sizes):
        plan = Plan(
            config,
            precision,
            mtp,
            batch_size,
            max_len,
            stored=found.stored,
            act_scales=found.act_scales,
        )
        rows.append(_Row(name, batch_size, max_len, plan.need()))
    return rows


def _layer_counts(config: ModelConfig) -> dict[str, int]:
    kinds = [config.layer_kind(i) for i in range(config.num_hidden_layers)]
    return {kind.name.lower(): kinds.count(kind) for kind in LayerKind}


def _settings(found: Survey, mtp: bool) -> Table:
    table = Table(title=Text(found.path), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    config = found.config
    if config is not None:
        total, active = parameter_counts(config, mtp)
        counts = _layer_counts(config)
        table.add_row("parameters", f"{total:,} ({active:,} for a token)")
        kinds = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
        table.add_row("layers", f"{config.num_hidden_layers}: {kinds}")
        hashed = f", the first {config.num_hash_layers} by token" if config.num_hash_layers else ""
        table.add_row(
            "experts",
            f"{config.n_routed_experts} of width {config.moe_intermediate_size}, "
            f"{config.num_experts_per_tok} a token{hashed}",
        )
        table.add_row("width", f"{config.hidden_size} in {config.hc_mult} streams")
        table.add_row("attention", f"{config.num_attention_heads} heads of {config.head_dim}")
        table.add_row("positions", f"{config.max_position_embeddings:,}")
        table.add_row("vocabulary", f"{config.vocab_size:,}")
        table.add_row("MTP modules", str(config.num_nextn_predict_layers))
    stored = preset_name(found.precision) if found.precision is not None else "none that fits"
    table.add_row("precision", f"{stored}: {found.holds}" if found.holds else stored)
    used, unused = found.static_scales
    if used or unused:
        parts = [f"{used} of routed experts, used"] if used else []
        parts += [f"{unused} not used"] if unused else []
        table.add_row("static scales", "of activations: " + ", ".join(parts))
    tokens = "none" if found.vocabulary is None else f"{found.vocabulary:,} tokens"
    table.add_row("tokenizer", tokens)
    # Names and values out of files: nothing that a terminal would obey.
    sampling = ", ".join(f"{shown(n)} {shown(str(v))}" for n, v in found.generation.items())
    table.add_row("generation_config.json", Text(sampling or "none"))
    return table


def _tensors(found: Survey) -> Table:
    """A line per kind of parameter, its scales included; below, one per stored format."""
    table = Table("tensors", "stored as", title="Tensors of the files", title_justify="left")
    for name in ("number", "bytes", ""):
        table.add_column(name, justify="right", no_wrap=True)
    merged: dict[str, list[Group]] = {}
    for group in found.kinds:
        stem = re.sub(r"\.(weight|scale|(weight|input)_\w+)$", "", group.kind)
        merged.setdefault(stem, []).append(group)
    for stem, groups in merged.items():
        groups.sort(key=lambda group: -group.nbytes)  # a weight before its scales
        formats = ", ".join(dict.fromkeys(group.dtype for group in groups))
        table.add_row(Text(shown(stem)), formats, *_sizes(groups))
    table.add_section()
    for group in found.formats:
        table.add_row("all", group.dtype, *_sizes([group]))
    files = "file" if len(found.shards) == 1 else "files"
    table.add_row(f"{len(found.shards)} {files}", "", *_sizes(found.formats))
    return table


def _sizes(groups: list[Group]) -> tuple[str, str, str]:
    nbytes = sum(group.nbytes for group in groups)
    count = sum(group.tensors for group in groups)
    return str(count), f"{nbytes:,}", readable(nbytes)


def _needs(rows: list[_Row]) -> Table:
    table = Table("precision", title="Memory on one device", title_justify="left")
    names = ("batch size", "positions", "weights", "cache", "while loading", "at least")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        need = row.need
        parts = (need.weights, need.cache, need.staging, need.total)
        table.add_row(row.precision, str(row.batch_size), str(row.max_len), *map(readable, parts))
    return table


def _report(found: Survey, rows: list[_Row], mtp: bool) -> dict[str, Any]:
    config = found.config
    report: dict[str, Any] = {"checkpoint": found.path, "config": None}
    if config is not None:
        total, active = parameter_counts(config, mtp)
        report["config"] = dataclasses.asdict(config)
        report["parameters"] = {"total": total, "active": active}
        report["layers"] = _layer_counts(config)
    report["precision"] = None if found.precision is None else preset_name(found.precision)
    used, unused = found.static_scales
    report["static_activation_scales"] = {"used": used, "unused": unused}
    report["tensors"] = [dataclasses.asdict(group) for group in found.kinds]
    report["shards"] = found.shards
    report["tokens"] = found.vocabulary
    report["generation_config"] = found.generation
    report["memory"] = [
        {
            "precision": row.precision,
            "batch_size": row.batch_size,
            "max_len": row.max_len,
            **dataclasses.asdict(row.need),
            "total": row.need.total,
        }
        for row in rows
    ]
    report["notes"] = found.notes
    report["problems"] = found.problems
    return report


def command(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Directory of the checkpoint. Default: the bundled model.", metavar="DIR"
        ),
    ] = None,
    max_len: Annotated[
        list[int] | None,
        typer.Option(
            help="Positions of the cache; repeatable. Default: 4096 and the model's most."
        ),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option(help="Rows of the cache; repeatable. Default: 1.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(help="Precision preset; repeatable. Default: the checkpoint's format."),
    ] = None,
    mtp: Annotated[bool, typer.Option("--mtp", help="With the MTP module.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all tensors: bad scales, tables, NaN, Inf.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """What a checkpoint holds, the memory it needs, and all that is wrong with it.

    Reads headers and settings only, unless told otherwise, and needs no device. Exit code 2 where
    there are problems; what can be shown is shown all the same.
    """
    console = Console(stderr=True)
    with readable_errors(console):
        for name in precision or []:
            Precision.preset(name)
        for name, values in (("--max-len", max_len), ("--batch-size", batch_size)):
            for value in values or []:
                if value < 1:
                    raise UserError(f"{name} must be >= 1, got {value}")
        directory = checkpoint
        if directory is None:
            from dsv4_jax.checkpoint import bundled_checkpoint

            directory = bundled_checkpoint()
        found = survey(directory, mtp=mtp, any_preset=bool(precision), verify=verify)
        rows: list[_Row] = []
        if found.config is not None:
            most = found.config.max_position_embeddings
            lengths = max_len or sorted({min(_POSITIONS, most), most})
            precisions = {name: Precision.preset(name) for name in precision or []}
            if not precision and found.precision is not None:
                precisions = {preset_name(found.precision): found.precision}
            sizes = (batch_size or [1], lengths)
            try:
                rows = _memory(found, found.config, precisions, sizes, mtp)
            except ValueError as error:
                if not found.problems:
                    raise
                found.problems.append(str(error))
        if as_json:
            # In ASCII: settings of a broken checkpoint may hold what UTF-8 cannot.
            typer.echo(json.dumps(_report(found, rows, mtp), allow_nan=False))
        else:
            tables = table_console()
            if found.config is not None or found.kinds:
                tables.print(_settings(found, mtp))
            if found.kinds:
                tables.print(_tensors(found))
            if rows:
                tables.print(_needs(rows))
            for note in found.notes:
                say(tables, f"note: {note}")
        for problem in found.problems:
            say(console, f"problem: {' '.join(problem.split())}")
        if found.problems:
            count = len(found.problems)
            say(console, f"error: {directory}: {count} {'problem' if count == 1 else 'problems'}")
            raise typer.Exit(BAD_INPUT)
