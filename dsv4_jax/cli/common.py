"""What all commands share: errors in one line, devices, the clock that leaves compilation out."""

import dataclasses
import gc
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import typer
from jax.errors import JaxRuntimeError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from dsv4_jax.env import check_writable, compilation_cache, devices
from dsv4_jax.precision import PRESETS
from dsv4_jax.text import load_tokenizer, plain_tokenizer

__all__ = [
    "UserError",
    "check_devices",
    "checkpoint_directory",
    "checkpoint_tokenizer",
    "compile_clock",
    "fast_start",
    "load_model",
    "preset_name",
    "progress_bar",
    "readable_errors",
    "say",
    "table_console",
]

_INTERRUPTED = 130
_PIPE_WIDTH = 120


class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


def check_devices() -> None:
    """Before anything is read: a device to run on."""
    try:
        devices()
    except RuntimeError as error:
        raise UserError(f"no device: {error}") from None


def table_console() -> Console:
    """For tables on stdout: in a pipe or file they are never so narrow that numbers are cut."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    return console


def say(console: Console, text: str) -> None:
    """One line of plain text, never wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def compile_clock() -> Generator[Callable[[], float]]:
    """Gives a function that returns the seconds JAX has spent tracing and compiling."""
    spans: list[tuple[float, float]] = []

    def listen(event: str, start_time: float, end_time: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            while spans and spans[-1][0] >= start_time:  # work inside this span: count it once
                spans.pop()
            spans.append((start_time, end_time))

    jax.monitoring.register_event_time_span_listener(listen)
    try:
        yield lambda: sum(end - start for start, end in spans)
    finally:
        jax.monitoring.unregister_event_time_span_listener(listen)


@contextmanager
def readable_errors(console: Console) -> Generator[None]:
    """Turns user errors into one line and exit code 2, Ctrl-C into 130."""
    try:
        yield
    except KeyboardInterrupt:
        say(console, "interrupted")
        raise typer.Exit(_INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of stdout left; point it elsewhere so that the exit flush cannot fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except (UserError, ValueError, OSError, NotImplementedError, JaxRuntimeError) as error:
        say(console, "error: " + " ".join(str(error).split()))
        raise typer.Exit(2) from None


def checkpoint_directory(option: Path | None) -> Path:
    """The directory that ``--checkpoint`` names, else that of the bundled model."""
    if option is None:
        from dsv4_jax.checkpoint import bundled_checkpoint

        return bundled_checkpoint()
    if not option.is_dir():
        raise UserError(f"--checkpoint {option} is not a directory")
    return option


def fast_start(console: Console) -> None:
    """Keeps compiled programs for the next process; fewer collections while JAX traces."""
    gc.set_threshold(100_000)  # the default spends a fifth of the tracing on the collector
    directory = compilation_cache()
    if directory is None:
        return
    if "://" not in directory:
        try:
            check_writable(directory)
        except OSError as error:
            say(console, f"no compilation cache: {error}")
            jax.config.update("jax_enable_compilation_cache", False)
            return
    jax.config.update("jax_compilation_cache_dir", directory)
    # Small programs too: each costs more to compile than to read.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def checkpoint_tokenizer(checkpoint: Path) -> Tokenizer:
    """The checkpoint's tokenizer for plain text, in which special tokens mean nothing."""
    tokenizer = load_tokenizer(checkpoint)
    if tokenizer is None:
        raise UserError(f"{checkpoint} has no tokenizer.json: it is needed to read text")
    return plain_tokenizer(tokenizer)


def load_model(checkpoint: Path, precision: str | None, *, mtp: bool = False) -> tuple[Any, Any]:
    """The model and its parameters, in a preset or in the format of the files."""
    from dsv4_jax.checkpoint import from_checkpoint

    return from_checkpoint(checkpoint, precision=precision, mtp=mtp)


def preset_name(model: Any) -> str:
    """What the preset of a model is called; "as stored": none is what the files hold."""
    # Whether the scales are powers of two is found out at load; no preset says.
    plain = dataclasses.replace(model.precision, experts_power_of_two=None)
    return next((name for name, preset in PRESETS.items() if preset == plain), "as stored")


@contextmanager
def progress_bar(console: Console, what: str) -> Generator[Callable[[int, int], None]]:
    """Gives a function of (done, total) that moves a bar, on a terminal."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(what, total=None)

        def move(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield move
