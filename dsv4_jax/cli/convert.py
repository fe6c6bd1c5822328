"""``dsv4 convert``: a checkpoint into another number format."""

import json
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from dsv4_jax.cli.common import readable_errors
from dsv4_jax.precision import Precision

__all__ = ["command"]


def command(
    source: Annotated[Path, typer.Argument(help="Checkpoint to read.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="Directory to write.", metavar="DST")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="Precision preset whose weights are written: nvfp4, nvfp4_experts (the routed "
            "experts alone, as NVIDIA's checkpoints), official, fp8, bfloat16 or float32.",
        ),
    ],
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an earlier conversion of something else."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Write a checkpoint in another number format, shard by shard.

    Loading the result gives the bits that loading SRC with that precision gives, but for static
    activation scales, which are dropped. Stopped and called again it goes on where it was; called
    on a whole result it compares the hashes of all shards.
    Experts go from MXFP4 to NVFP4 without loss; the report says what does not.
    """
    console = Console(stderr=True)
    with readable_errors(console):
        Precision.preset(to)
        # What is not a copy of bytes is computed on the CPU; a GPU's memory is for others.
        jax.config.update("jax_platforms", "cpu")
        from dsv4_jax.checkpoint.rewrite import rewrite

        columns = (
            TextColumn("converting"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as bar:
            task = bar.add_task("converting", total=None)
            result = rewrite(
                source,
                target,
                to,
                overwrite=overwrite,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
        if as_json:
            typer.echo(
                json.dumps(
                    {"source": str(source), "target": str(target), "to": to} | result.fields()
                )
            )
            return
        for line in result.lines():
            typer.echo(line)
