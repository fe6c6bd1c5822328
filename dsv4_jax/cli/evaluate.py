"""``dsv4 eval``: bits per byte of text files."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dsv4_jax.cli.common import (
    PrecisionOption,
    UserError,
    check_devices,
    checkpoint_directory,
    checkpoint_tokenizer,
    compile_clock,
    fast_start,
    load_model,
    model_config,
    preset_name,
    progress_bar,
    readable_errors,
    say,
    table_console,
)
from dsv4_jax.evaluate import Score, cache_size, evaluate, read_document, total
from dsv4_jax.precision import Precision

__all__ = ["command"]


def _fields(score: Score) -> dict[str, Any]:
    """What the report says of a file or of all of them."""
    fields: dict[str, Any] = {
        "bytes": score.num_bytes,
        "tokens": score.num_tokens,
        "bits": score.bits,
        "bits_per_byte": score.bits_per_byte,
    }
    if score.mtp_agreement is not None:
        fields["mtp_agreement"] = score.mtp_agreement
    return fields


def _table(scores: list[Score], together: Score) -> Table:
    mtp = together.mtp_agreement is not None
    table = Table("file")
    table.columns[0].overflow = "fold"
    for name in ("bytes", "tokens", "bits", "bits/byte", *(["MTP agrees"] if mtp else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for score in [*scores, together]:
        if score is together:
            table.add_section()
        agreement = score.mtp_agreement
        table.add_row(
            Text(score.name),  # a name is no markup
            str(score.num_bytes),
            str(score.num_tokens),
            f"{score.bits:.1f}",
            f"{score.bits_per_byte:.5f}",
            *(["-" if agreement is None else f"{agreement:.2%}"] if mtp else []),
        )
    return table


def _options(rows: int, batch_size: int) -> dict[str, str]:
    """What lowers the memory need: shorter segments are more of them, that fill a batch."""
    context = "--context" if rows == batch_size else f"--batch-size to {rows} and --context"
    return {
        "max_len": context,
        "batch_size": "--batch-size",
        "precision": "--precision",
        "mtp": "--mtp",
    }


def command(
    files: Annotated[list[Path] | None, typer.Argument(help="More files.", metavar="FILE")] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="UTF-8 file; repeatable, and further files may follow it."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Directory of the checkpoint. Default: the bundled model."),
    ] = None,
    precision: PrecisionOption = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Cut files into segments of so many tokens, each predicted on its own. "
            "Default: a file is one segment."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Most segments computed together.")] = 8,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Also report how often MTP drafts the model's own token.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Bits per byte of text files.

    Every token of a file is predicted from BOS and all tokens before it. Special tokens that are
    spelt out in a file are plain text.
    """
    console = Console(stderr=True)
    with readable_errors(console):
        paths = [*(text or []), *(files or [])]
        if not paths:
            raise UserError("give at least one file with --text")
        directory = checkpoint_directory(checkpoint)
        if precision is not None:
            Precision.preset(precision)
        for name, value in (("--context", context), ("--batch-size", batch_size)):
            if value is not None and value < 1:
                raise UserError(f"{name} must be >= 1, got {value}")
        tokenizer = checkpoint_tokenizer(directory)
        documents = [read_document(tokenizer, path) for path in paths]
        size = cache_size(
            documents, model_config(directory), context=context, batch_size=batch_size
        )
        check_devices()
        fast_start(console)

        model, params = load_model(
            directory,
            precision,
            mtp=mtp,
            batch_size=size.batch_size,
            max_len=size.max_len,
            options=_options(size.batch_size, batch_size),
        )
        with compile_clock() as compiled, progress_bar(console, "tokens") as progress:
            start = time.perf_counter()
            scores = evaluate(
                model,
                params,
                documents,
                context=context,
                batch_size=batch_size,
                mtp=mtp,
                progress=progress,
            )
            compilation = compiled()
            seconds = max(time.perf_counter() - start - compilation, 0.0)
        together = total(scores)
        rate = together.num_tokens / seconds if seconds > 0 else None
        if as_json:
            report = {
                "checkpoint": str(directory),
                "precision": precision or preset_name(model.precision),
                "files": [{"path": score.name, **_fields(score)} for score in scores],
                "total": _fields(together),
                "seconds": seconds,
                "tokens_per_second": rate,
                "compilation_seconds": compilation,
            }
            typer.echo(json.dumps(report, ensure_ascii=False, allow_nan=False))
        else:
            table_console().print(_table(scores, together))
        say(
            console,
            f"{together.num_tokens} tokens in {seconds:.2f} s "
            f"({'-' if rate is None else f'{rate:.1f}'} tokens/s), "
            f"compilation {compilation:.1f} s",
        )
