"""The ``dsv4`` command: ``generate`` and ``env``; the other commands have a module each.

Results go to stdout, everything else to stderr.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import jax
import typer
from rich.console import Console
from tokenizers import Tokenizer

from dsv4_jax.cli import bench, chat, compare, convert, evaluate, inspect
from dsv4_jax.cli.common import (
    EXIT_CODES,
    Commands,
    Leave,
    PrecisionOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    UserError,
    check_devices,
    checkpoint_directory,
    compile_clock,
    fast_start,
    load_model,
    model_config,
    readable_errors,
    sampling_settings,
    say,
)
from dsv4_jax.env import report
from dsv4_jax.generate import TokenEvent, check_request, stream
from dsv4_jax.loop import STEPS, stepwise
from dsv4_jax.precision import Precision
from dsv4_jax.text import (
    IncrementalDetokenizer,
    StopMatcher,
    bos_token,
    check_vocabulary,
    encode,
    load_tokenizer,
)
from dsv4_jax.version import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="dsv4",
    cls=Commands,
    help="DeepSeek-V4 inference in JAX.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_LEAST_POSITIONS = 512


def _version(value: bool) -> None:
    if value:
        typer.echo(f"dsv4_jax {__version__} (jax {jax.__version__})")
        raise typer.Exit


@app.callback()
def _main(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions.")
    ] = False,
) -> None:
    """DeepSeek-V4 inference in JAX."""


def _positions(needed: int, limit: int) -> int:
    """Positions of a cache for ``needed``: few distinct lengths, since each is compiled anew."""
    return max(needed, min(limit, max(_LEAST_POSITIONS, 1 << (needed - 1).bit_length())))


def _load(checkpoint: Path, precision: str | None, verify: bool, max_len: int) -> tuple[Any, Any]:
    """The model and its parameters, where they and a cache of ``max_len`` positions fit."""
    options = {"max_len": "--max-len", "precision": "--precision"}
    return load_model(checkpoint, precision, verify=verify, max_len=max_len, options=options)


def _check_text(
    console: Console, checkpoint: Path, tokenizer: Tokenizer | None, vocab_size: int, text: bool
) -> None:
    """A tokenizer that does not fit the model: an error for text, a note for ids."""
    if tokenizer is None:
        say(console, f"note: {checkpoint} has no tokenizer.json: ids in, ids out")
        return
    try:
        check_vocabulary(tokenizer, vocab_size)
    except ValueError as error:
        if text:
            raise UserError(f"{checkpoint}: {error}") from None
        say(console, f"note: {checkpoint}: {error}")


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise UserError(f"--ids must be integers such as '1 2 3', got {text!r}") from None


def _prompt_ids(
    tokenizer: Tokenizer | None,
    checkpoint: Path,
    prompt: str | None,
    prompt_file: Path | None,
    ids: str | None,
) -> list[int]:
    if sum(option is not None for option in (prompt, prompt_file, ids)) != 1:
        raise UserError("give exactly one of --prompt, --prompt-file and --ids")
    if ids is not None:
        found = _parse_ids(ids)
    else:
        if tokenizer is None:
            raise UserError(f"{checkpoint} has no tokenizer.json: give token ids with --ids")
        if prompt_file is not None:
            try:
                prompt = prompt_file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise UserError(f"{prompt_file}: not UTF-8 text: {error}") from None
        found = encode(tokenizer, prompt or "")
        bos = bos_token(checkpoint, tokenizer)
        if bos is not None and found[:1] != [bos]:
            found = [bos, *found]
    if not found:
        raise UserError("the prompt is empty")
    return found


class _Output:
    """Writes tokens to stdout: text with a tokenizer, else ids separated by spaces."""

    def __init__(self, tokenizer: Tokenizer | None, stops: list[str]) -> None:
        if tokenizer is None and stops:
            raise UserError("--stop needs a tokenizer.json in the checkpoint")
        self._text = None if tokenizer is None else IncrementalDetokenizer(tokenizer)
        self._stops = StopMatcher(stops)
        self._separator = ""

    @staticmethod
    def _write(text: str) -> None:
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def token(self, _sequence: int, token: int) -> bool:
        """Shows a token; true when a stop string ended the text."""
        if self._text is None:
            self._write(f"{self._separator}{token}")
            self._separator = " "
        else:
            self._write(self._stops.push(self._text.push(token)))
        return self._stops.stopped

    def close(self) -> None:
        """Shows what was held back, and ends the line."""
        if self._text is not None:
            self._write(self._stops.push(self._text.flush()))
            self._write(self._stops.flush())
        self._write("\n")


def _rate(tokens: int, seconds: float) -> str:
    seconds = max(seconds, 0.0)
    rate = f"{tokens / seconds:.1f} tokens/s" if seconds > 0 else "-"
    return f"{tokens} tokens in {seconds:.2f} s ({rate})"


def _run(
    console: Console, prompt_tokens: int, events: Iterator[TokenEvent], output: _Output
) -> TokenEvent | None:
    """Reads the events to their end; prints the speeds, also after Ctrl-C."""
    steps, last = 0, None
    with compile_clock() as compiled:
        start = time.perf_counter()
        first = first_compiled = 0.0
        try:
            with console.status(f"compiling, and prefill of {prompt_tokens} tokens"):
                last = next(events, None)
                first, first_compiled = time.perf_counter() - start, compiled()
            while last is not None and last.finish_reason is None:
                last = next(events, None)
                steps += 1
        finally:
            output.close()
            total, total_compiled = time.perf_counter() - start, compiled()
            if first:
                prefill = first - first_compiled
                if stepwise(prompt_tokens):  # some new tokens were made in the same call
                    shared = min(steps, STEPS - prompt_tokens)
                    prefill *= prompt_tokens / (prompt_tokens + shared)
                say(
                    console,
                    f"prefill {_rate(prompt_tokens, prefill)}, "
                    f"decode {_rate(steps, total - total_compiled - prefill)}, "
                    f"compilation {total_compiled:.1f} s",
                )
    return last


@app.command()
def generate(
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Directory of the checkpoint. Default: the model in the package."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="Prompt: write special tokens yourself; BOS alone is added, where "
            "tokenizer_config.json has add_bos_token."
        ),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="UTF-8 file with the prompt.")] = None,
    ids: Annotated[str | None, typer.Option(help="Prompt as token ids: '1 2 3'.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    max_len: Annotated[
        int | None, typer.Option(help="Positions of the cache. Default: enough.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the output; repeatable.")
    ] = None,
    precision: PrecisionOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Look for NaN and Inf in the weights while loading.")
    ] = False,
) -> None:
    """Continue a prompt; the text streams to stdout.

    Without a tokenizer.json the prompt is given with --ids and token ids are printed.
    """
    console = Console(stderr=True)
    with readable_errors(console):
        directory = checkpoint_directory(checkpoint)
        if precision is not None:
            Precision.preset(precision)
        settings, source = sampling_settings(directory, temperature, top_p, top_k)
        tokenizer = load_tokenizer(directory)
        output = _Output(tokenizer, stop or [])
        tokens = _prompt_ids(tokenizer, directory, prompt, prompt_file, ids)
        config = model_config(directory)
        *_, needed = check_request(
            config, [tokens], max_new_tokens=max_new_tokens, seed=seed, max_len=max_len
        )
        _check_text(console, directory, tokenizer, config.vocab_size, ids is None)
        if max_len is None:
            needed = _positions(needed, config.max_position_embeddings)
        check_devices()
        fast_start(console)

        kind = "bundled checkpoint" if checkpoint is None else "checkpoint"
        say(console, f"{kind}: {directory}")
        model, params = _load(directory, precision, verify, needed)
        say(
            console,
            f"sampling: temperature {settings.temperature}, top_p {settings.top_p}, "
            f"top_k {settings.top_k}, seed {seed} ({source})",
        )
        events = stream(
            model,
            params,
            [tokens],
            max_new_tokens=max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            seed=seed,
            max_len=needed,
            on_token=output.token,
        )
        last = _run(console, len(tokens), events, output)
        if last is not None and last.error is not None:
            raise UserError(last.error)


app.command("chat")(chat.command)
app.command("eval")(evaluate.command)
app.command("compare")(compare.command)
app.command("inspect")(inspect.command)
app.command("convert")(convert.command)
app.command("bench")(bench.command)


@app.command("env")
def env_command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Print versions, devices and settings, for a bug report."""
    with readable_errors(Console(stderr=True)):
        lines = {name: " ".join(value.split()) for name, value in report().items()}
        if as_json:
            typer.echo(json.dumps(lines, ensure_ascii=False))
            return
        width = max(map(len, lines))
        for name, value in lines.items():  # never wrapped: the output goes through pipes
            typer.echo(f"{name:<{width}}  {value}")


def main() -> NoReturn:
    """The ``dsv4`` command as a process."""
    try:
        app()
    except Leave as error:
        # All files are closed.
        with contextlib.suppress(OSError):  # their reader may have been interrupted too
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(cast(int, error.code))
    sys.exit()
