"""What all commands share: errors in one line, devices, the clock that leaves compilation out."""

import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

import jax
import typer
from jax.errors import JaxRuntimeError
from rich.console import Console

from dsv4_jax.env import devices

__all__ = ["UserError", "check_devices", "compile_clock", "readable_errors", "say"]

_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


def check_devices() -> None:
    """Before anything is read: a device to run on."""
    try:
        devices()
    except RuntimeError as error:
        raise UserError(f"no device: {error}") from None


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
