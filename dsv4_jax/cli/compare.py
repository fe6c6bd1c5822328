"""``dsv4 compare``: where two precision presets of one checkpoint part."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from dsv4_jax.checkpoint import memory
from dsv4_jax.cli.common import (
    UserError,
    check_devices,
    checkpoint_directory,
    checkpoint_tokenizer,
    enough_memory,
    fast_start,
    load_model,
    model_config,
    progress_bar,
    readable_errors,
    table_console,
    write_whole,
)
from dsv4_jax.compare import (
    Closeness,
    Comparison,
    Operation,
    cache_copies,
    cache_positions,
    compare,
)
from dsv4_jax.config import ModelConfig
from dsv4_jax.evaluate import read_document, shorten
from dsv4_jax.precision import Precision

__all__ = ["command"]

Shown = Callable[[int], str]
"""A token as text."""


def _table(title: str, *columns: str, text: int = 1) -> Table:
    """The first ``text`` columns are words, the others numbers."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < text else "right", no_wrap=i >= text)
    return table


def _cells(closeness: Closeness) -> tuple[str, str, str]:
    return (
        f"{closeness.cosine:.6f}",
        f"{closeness.cosine_min:.6f}",
        f"{closeness.relative_l2:.2e}",
    )


def _layers(found: Comparison) -> Table:
    table = _table(
        "Streams after each layer: free running, and on equal inputs of the layer",
        *("layer", "kind", "free cos", "min", "rel L2", "equal cos", "min", "rel L2"),
        text=2,
    )
    for layer in found.layers:
        table.add_row(
            str(layer.layer), layer.kind, *_cells(layer.free), *_cells(layer.equal_inputs)
        )
    return table


def _operation(table: Table, name: str, layer: str, operation: Operation) -> None:
    if operation.closeness is not None:
        table.add_row(name, layer, *_cells(operation.closeness), "")
    else:
        table.add_row(name, layer, "", "", "", f"{operation.equal_picks:.2%}")


def _operations(found: Comparison, everything: bool) -> Table:
    """Every op of every layer, or each op in the layer where it differs most."""
    columns = ("op", "layer", "cos", "min", "rel L2", "equal picks")
    per_layer = [(str(layer.layer), layer.operations) for layer in found.layers]
    rows = [(name, op) for name, operations in per_layer for op in operations]
    if everything:
        table = _table("Outputs of every op, equal inputs of the layer", *columns, text=2)
        for layer, op in rows:
            _operation(table, op.path, layer, op)
    else:
        table = _table(
            "Outputs of each op in its worst layer, equal inputs (all layers: --ops)",
            *columns,
            text=2,
        )
        worst: dict[str, tuple[float, str, Operation]] = {}
        for layer, op in rows:
            size = op.closeness.relative_l2 if op.closeness else 1 - (op.equal_picks or 0)
            if op.path not in worst or not size <= worst[op.path][0]:
                worst[op.path] = (size, layer, op)
        for name, (_, layer, op) in worst.items():
            _operation(table, name, layer, op)
    for op in found.head:
        _operation(table, op.path, "head", op)
    return table


def _parts(found: Comparison, names: tuple[str, str]) -> Table:
    a, b = found.bits_per_byte
    table = _table(
        f"Bits per byte of {names[0]} when one part runs in {names[1]}",
        *("part", "bits/byte", "difference"),
    )
    for part in found.parts:
        mark = " <- largest" if part == found.largest and part.difference else ""
        table.add_row(part.name + mark, f"{part.bits_per_byte:.5f}", f"{part.difference:+.5f}")
    table.add_section()
    table.add_row(f"all {names[0]}", f"{a:.5f}", "")
    table.add_row(f"all {names[1]}", f"{b:.5f}", f"{b - a:+.5f}")
    return table


def _worst(found: Comparison, names: tuple[str, str], shown: Shown) -> Table:
    a, b = names
    table = _table(
        "Tokens whose log2 probability differs most",
        *("token", f"top {a}", f"top {b}", "position", f"log2 p {a}", f"log2 p {b}", "difference"),
        text=3,
    )
    for row in found.worst:
        table.add_row(
            *(Text(repr(shown(token))) for token in (row.token, row.top_a, row.top_b)),
            str(row.position),
            f"{row.log2_a:.3f}",
            f"{row.log2_b:.3f}",
            f"{row.difference:+.3f}",
        )
    return table


def _print(found: Comparison, names: tuple[str, str], shown: Shown, everything: bool) -> None:
    console = table_console()
    console.print(_operations(found, everything))
    console.print(_layers(found))
    if found.worst:
        console.print(_worst(found, names, shown))
    console.print(_parts(found, names))
    cosine, least, relative = _cells(found.logits)
    lines = (
        f"logits: cosine {cosine} (min {least}), relative L2 {relative}, "
        f"KL({names[0]} || {names[1]}) {found.kl_bits:.3e} bits, "
        f"top-1 agreement {found.top1_agreement:.2%}",
        f"{found.num_tokens} tokens, {found.num_bytes} bytes",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _report(found: Comparison, head: dict[str, Any], shown: Shown) -> str:
    report = {**head, **found.as_dict()}
    for row in report["worst"]:
        for name in ("token", "top_a", "top_b"):
            row[f"{name}_text"] = shown(row[name])
    return json.dumps(report, ensure_ascii=False, allow_nan=False)


def _check_memory(
    directory: Path, config: ModelConfig, precision: tuple[str, str], num_tokens: int
) -> None:
    """Refuses two models and their caches that do not fit together."""
    max_len = cache_positions(num_tokens, config.max_position_embeddings)
    plans = [
        memory.Plan(config, Precision.preset(name), max_len=max_len, layer_copies=copies)
        for name, copies in zip(precision, cache_copies(config.num_hidden_layers), strict=True)
    ]
    with enough_memory({"max_len": "--max-tokens"}):
        memory.check(plans, source=str(directory))


def command(
    precision: Annotated[
        tuple[str, str], typer.Option(help="Two presets: the reference and the other.")
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 file.")],
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Directory of the checkpoint. Default: the bundled model."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens, from the file's beginning.")] = 1024,
    worst: Annotated[int, typer.Option(help="How many tokens to list.")] = 20,
    ops: Annotated[bool, typer.Option("--ops", help="Print every op of every layer.")] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="File for the numbers as JSON; - is stdout, without tables."),
    ] = None,
) -> None:
    """Where two precision presets part: per layer, per op, per token, in bits per byte.

    Both models are held in memory at once.
    """
    console = Console(stderr=True)
    with readable_errors(console):
        for name in precision:
            Precision.preset(name)
        for name, value, least in (("--max-tokens", max_tokens, 1), ("--worst", worst, 0)):
            if value < least:
                raise UserError(f"{name} must be >= {least}, got {value}")
        directory = checkpoint_directory(checkpoint)
        tokenizer = checkpoint_tokenizer(directory)
        document = shorten(tokenizer, read_document(tokenizer, text), max_tokens)
        config = model_config(directory)
        check_devices()
        _check_memory(directory, config, precision, len(document.tokens))
        fast_start(console)

        a, b = (load_model(directory, name) for name in precision)
        with progress_bar(console, "chunks") as progress:
            found = compare(
                a,
                b,
                document.tokens,
                num_bytes=document.num_bytes,
                worst=worst,
                progress=progress,
            )
        shown = _decoder(tokenizer)
        head = {
            "checkpoint": str(directory),
            "precision": list(precision),
            "text": str(text),
        }
        if json_file is not None and str(json_file) == "-":
            typer.echo(_report(found, head, shown))
            return
        if json_file is not None:
            write_whole(json_file, _report(found, head, shown) + "\n")
        _print(found, precision, shown, ops)


def _decoder(tokenizer: Tokenizer) -> Shown:
    """Tokens as text; one that is no whole character as its id."""

    def shown(token: int) -> str:
        text = tokenizer.decode([token], skip_special_tokens=False)
        return text if text and "\N{REPLACEMENT CHARACTER}" not in text else f"<{token}>"

    return shown
