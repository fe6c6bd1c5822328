"""``dsv4 bench``: how long a step takes, on random weights."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dsv4_jax.bench import Settings, run
from dsv4_jax.bench.report import BUNDLED
from dsv4_jax.cli.common import check_devices, readable_errors, say, table_console

__all__ = ["command"]

_DEFAULTS = Settings()


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _table(*columns: str, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table


def _layers(report: dict[str, Any]) -> Table:
    decode = report["decode"]
    source = {
        "models": "models of one layer and of none, timed by the same loop",
        "profile": "launches in a profile, without the time between them",
    }[decode["layers_from"]]
    table = _table(
        *("layer", "layers", "us", "floor us", "fraction", "launches"),
        title=f"A decode step by layer ({source})",
    )
    for kind in decode["kinds"]:
        table.add_row(
            kind["kind"],
            str(kind["layers"]),
            _number(kind["us"]),
            _number(kind["floor_us"]),
            _number(kind["fraction"], 3),
            _number(kind["launches"]),
        )
    outside = report["profile"] and report["profile"]["outside"]["launches"]
    floor = decode["outside_bytes"] / report["ceilings"]["read"] * 1e6
    table.add_row(
        "outside of layers",
        "",
        _number(decode["outside_us"]),
        _number(floor),
        _number(floor / decode["outside_us"] if decode["outside_us"] > 0 else None, 3),
        _number(outside),
    )
    table.add_section()
    table.add_row("not explained by these", "", _number(decode["unexplained_us"]), "", "", "")
    table.add_row(
        "the step",
        str(report["layers"]),
        _number(decode["us_per_token"]),
        _number(decode["floor_us"]),
        _number(decode["fraction"], 3),
        "",
    )
    return table


def _ops(name: str, place: dict[str, Any]) -> Table:
    table = _table(
        *("op", "kernel", "launches", "us", "idle before, us"),
        title=f"{name}: {place['us']:.1f} us in launches, {place['gap_us']:.1f} us between "
        "(no graphs: replayed from one it is less)",
    )
    for row in place["ops"]:
        numbers = (_number(row[key], 2) for key in ("launches", "us", "gap_us"))
        table.add_row(row["op"], row["kernel"], *numbers)
    return table


def _print(report: dict[str, Any]) -> None:
    decode, memory, prompt = report["decode"], report["memory"], report["prefill"]
    console = table_console()
    console.print(_layers(report))
    for name, place in (report["profile"] or {}).items():
        console.print(_ops(name, place))
    for name, place in ((prompt and prompt["profile"]) or {}).items():
        console.print(_ops(f"prefill, {name}", place))
    rate = report["ceilings"]["read"] / 1e9
    peak = "not available" if memory["peak_bytes"] is None else f"{memory['peak_bytes'] / 1e6:,.1f}"
    lines = [
        f"{report['model']}, {report['layers']} layers, {report['precision']}, batch "
        f"{report['batch']}, context {report['context']}; {report['device']}, "
        f"JAX {report['jax']}; random weights",
        f"decode: {decode['us_per_token']:,.1f} us per token, "
        f"{decode['tokens_per_s']:,.1f} tokens/s, {decode['bytes_per_token'] / 1e6:,.1f} MB per "
        f"token, {decode['fraction']:.3f} of the byte floor at {rate:,.0f} GB/s "
        f"({decode['tokens']} tokens, spread {decode['spread']:.3f}, compilation "
        f"{decode['compile_s']:.1f} s)",
        f"memory: weights {memory['weights_bytes'] / 1e6:,.1f} MB, cache "
        f"{memory['cache_bytes'] / 1e6:,.1f} MB, peak {peak} MB ({memory['peak_from']})",
    ]
    if prompt is not None:
        lines.insert(
            2,
            f"prefill: {prompt['tokens']} tokens in {prompt['us'] / 1e3:,.2f} ms, "
            f"{prompt['tokens_per_s']:,.1f} tokens/s, {prompt['fraction']:.3f} of the floor "
            f"(chunks of {prompt['chunk']})",
        )
    for line in lines:
        say(console, line)


def command(
    model: Annotated[
        str,
        typer.Argument(help="flash, pro, bundled, or a directory with a config.json."),
    ] = BUNDLED,
    layers: Annotated[int | None, typer.Option(help="The first so many. Default: all.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences.")] = _DEFAULTS.batch,
    context: Annotated[
        int | None, typer.Option(help="Tokens in the cache. Default: 4096, or what fits.")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precision preset. Default: that of the model's files.")
    ] = None,
    prefill: Annotated[int, typer.Option(help="Tokens of a prompt to be timed; 0: none.")] = 0,
    chunk: Annotated[int | None, typer.Option(help="Tokens of a chunk of it.")] = None,
    tokens: Annotated[int, typer.Option(help="Decode steps to be timed.")] = _DEFAULTS.tokens,
    profile: Annotated[
        bool, typer.Option("--profile", help="Time per op and between ops (GPU).")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw floor and measurement into this file (matplotlib).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """How long a step takes, on random weights made on the device.

    Decodes with the loop that generation uses. Byte floors are over the read rate of this device,
    measured in the same run.
    """
    console = Console(stderr=True)
    with readable_errors(console):
        check_devices()
        report = run(
            model=model,
            layers=layers,
            batch=batch,
            context=context,
            precision=precision,
            prefill=prefill,
            chunk=chunk,
            tokens=tokens,
            profile=profile,
        )
        if as_json:
            typer.echo(json.dumps(report, allow_nan=False))
        else:
            _print(report)
        if plot is not None:
            from dsv4_jax.bench.plot import draw

            draw(report, plot)
