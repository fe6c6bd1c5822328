"""What all commands share: errors in one line, devices, the clock that leaves compilation out."""

import contextlib
import dataclasses
import gc
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, cast

import jax
import typer
from jax.errors import JaxRuntimeError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from typer.core import TyperGroup

from dsv4_jax.config import ModelConfig
from dsv4_jax.env import check_writable, compilation_cache, devices
from dsv4_jax.precision import PRESETS, Precision
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.text import json_object, load_tokenizer, plain_tokenizer

__all__ = [
    "BAD_INPUT",
    "BROKEN_PIPE",
    "EXIT_CODES",
    "INTERRUPTED",
    "Commands",
    "Leave",
    "PrecisionOption",
    "SeedOption",
    "TemperatureOption",
    "TopKOption",
    "TopPOption",
    "UserError",
    "check_devices",
    "checkpoint_directory",
    "checkpoint_tokenizer",
    "compile_clock",
    "enough_memory",
    "fast_start",
    "load_model",
    "model_config",
    "preset_name",
    "progress_bar",
    "readable_errors",
    "sampling_settings",
    "say",
    "table_console",
    "write_whole",
]

BROKEN_PIPE = 1
BAD_INPUT = 2
INTERRUPTED = 130

EXIT_CODES = (
    "Exit codes: 0: done. 1: the reader of stdout went away, or a defect of this program (with a "
    "traceback). 2: wrong options or input, a broken checkpoint, too little memory, an op that "
    "failed. 130: Ctrl-C; no file is left half-written. Errors are one line on stderr."
)

# Options that several commands have.
TemperatureOption = Annotated[
    float | None,
    typer.Option(help="0 is greedy. Default: generation_config.json of the checkpoint, else 0."),
]
TopPOption = Annotated[
    float | None, typer.Option(help="Default: generation_config.json, else 1 (off).")
]
TopKOption = Annotated[int, typer.Option(help="0 is off.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the sampling.")]
PrecisionOption = Annotated[
    str | None, typer.Option(help="Precision preset. Default: the checkpoint's format.")
]

_PIPE_WIDTH = 120
_GRACE_SECONDS = 1.0
"""From Ctrl-C to the end of the process while it is inside XLA, which cannot be interrupted."""


class UserError(Exception):
    """Something the user can put right; shown as one line, exit code 2."""


class Leave(SystemExit):
    """Ends the process after a Ctrl-C inside XLA, which may crash as Python takes it down."""


# That of click, or of typer's own copy of it.
_USAGE_ERROR = cast(type[Exception], typer.BadParameter.__mro__[1])


@contextmanager
def _readable_usage() -> Generator[None]:
    try:
        yield
    except _USAGE_ERROR as error:
        context: Any = getattr(error, "ctx", None)
        text = " ".join(cast(Any, error).format_message().split()).removesuffix(".")
        hint = "" if context is None else f" (see {context.command_path} --help)"
        say(Console(stderr=True), f"error: {text}{hint}")
        raise typer.Exit(BAD_INPUT) from None


class Commands(TyperGroup):
    """Wrong options and arguments of the command and of its commands are one line too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:  # the help
            return super().parse_args(ctx, args)
        with _readable_usage():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _readable_usage():
            return super().invoke(ctx)


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


def _watch(read: int, seen: threading.Event, interrupt: object, console: Console) -> None:
    """Ends the process after Ctrl-C when Python has not come to handle it."""
    while number := os.read(read, 1):
        if number[0] != signal.SIGINT or signal.getsignal(signal.SIGINT) is not interrupt:
            continue  # a command that does something else upon Ctrl-C (chat)
        if seen.wait(_GRACE_SECONDS):
            seen.clear()
        else:
            console.show_cursor()
            say(console, "interrupted")
            os._exit(INTERRUPTED)  # files are renamed into place when whole: none is half-written


@contextmanager
def _prompt_interrupt(console: Console) -> Generator[None]:
    """Ctrl-C also ends a compilation or a step, of which Python would await the end."""
    previous = signal.getsignal(signal.SIGINT)
    if (
        threading.current_thread() is not threading.main_thread()
        or previous is not signal.default_int_handler
    ):
        yield  # somebody else's business
        return
    seen = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        seen.set()
        raise KeyboardInterrupt

    read, write = os.pipe()
    os.set_blocking(write, False)
    watcher = threading.Thread(target=_watch, args=(read, seen, interrupt, console), daemon=True)
    watcher.start()
    descriptor = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        signal.set_wakeup_fd(descriptor)
        seen.set()
        os.close(write)
        watcher.join()
        os.close(read)


@contextmanager
def readable_errors(console: Console) -> Generator[None]:
    """Turns user errors into one line and exit code 2, Ctrl-C into 130."""
    try:
        with _prompt_interrupt(console):
            yield
    except KeyboardInterrupt:
        say(console, "interrupted")
        raise Leave(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader of stdout left; point it elsewhere so that the exit flush cannot fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN_PIPE) from None
    except (UserError, ValueError, OSError, NotImplementedError, JaxRuntimeError) as error:
        say(console, "error: " + " ".join(str(error).split()))
        raise typer.Exit(BAD_INPUT) from None


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


def model_config(checkpoint: Path) -> ModelConfig:
    """The architecture of a checkpoint, which must be no unfinished conversion."""
    from dsv4_jax.checkpoint.manifest import check_converted
    from dsv4_jax.checkpoint.read import read_config

    check_converted(checkpoint)
    return ModelConfig.from_hf(read_config(checkpoint), source=str(checkpoint / "config.json"))


def load_model(
    checkpoint: Path,
    precision: str | None,
    *,
    mtp: bool = False,
    verify: bool = False,
    batch_size: int = 1,
    max_len: int | None = None,
    options: Mapping[str, str] | None = None,
) -> tuple[Any, Any]:
    """The model and its parameters, in a preset or in the format of the files.

    Args:
        checkpoint: its directory.
        precision: the preset.
        mtp: with the MTP module.
        verify: look at all weights.
        batch_size: rows of the cache that is to fit besides.
        max_len: its positions; ``None``: no cache.
        options: ``memory.OPTIONS`` as this command calls them; ``--precision`` alone by default.
    """
    from dsv4_jax.checkpoint import from_checkpoint

    with enough_memory(options):
        return from_checkpoint(
            checkpoint,
            precision=precision,
            mtp=mtp,
            verify=verify,
            batch_size=batch_size,
            max_len=max_len,
        )


@contextmanager
def enough_memory(options: Mapping[str, str] | None = None) -> Generator[None]:
    """Has a refusal name the options of this command (see `load_model`)."""
    from dsv4_jax.checkpoint.memory import OutOfMemory

    try:
        yield
    except OutOfMemory as error:
        raise UserError(error.explain(options or {"precision": "--precision"})) from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all; a device or pipe as it is."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # the target of a link, not the link
    mode = path.stat().st_mode & 0o777 if path.exists() else None
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as stream:
        try:
            stream.write(text)
            stream.close()
            os.chmod(stream.name, _new_file_mode() if mode is None else mode)
            os.replace(stream.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(stream.name)
            raise


def _new_file_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def preset_name(precision: Precision) -> str:
    """What a preset is called; "as stored": none is what the files hold."""
    # Whether the scales are powers of two is found out at load; no preset says.
    plain = dataclasses.replace(precision, experts_power_of_two=None)
    return next((name for name, preset in PRESETS.items() if preset == plain), "as stored")


@contextmanager
def progress_bar(console: Console, what: str) -> Generator[Callable[[int, int], None]]:
    """Gives a function of (done, total) that moves a bar, on a terminal.

    The first step compiles; until it is done the bar says so.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("compiling", total=None)

        def move(done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield move


def sampling_settings(
    checkpoint: Path, temperature: float | None, top_p: float | None, top_k: int
) -> tuple[SamplingParams, str]:
    """The settings, and where those that the user did not give come from."""
    path = checkpoint / "generation_config.json"
    defaults = json_object(path) if path.is_file() else {}
    if temperature is None:
        sampled = defaults.get("do_sample", "temperature" in defaults)
        temperature = defaults.get("temperature", 1.0) if sampled else 0.0
    if top_p is None:
        top_p = defaults.get("top_p", 1.0)
    source = path.name if defaults else "greedy unless told otherwise"
    return SamplingParams(cast(float, temperature), cast(float, top_p), top_k), source
