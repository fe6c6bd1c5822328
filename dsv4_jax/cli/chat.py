"""``dsv4 chat``: a conversation with a checkpoint.

Answers and tool calls go to stdout; reasoning and what is said about a turn go to stderr, dimmed.
"""

import importlib
import json
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from tokenizers import Tokenizer

from dsv4_jax.chat import (
    AssistantMessage,
    ContentDelta,
    Event,
    ReasoningDelta,
    StreamParser,
    ToolCall,
    check_tokenizer,
    encode,
)
from dsv4_jax.cli.common import (
    Leave,
    PrecisionOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    UserError,
    check_devices,
    checkpoint_directory,
    fast_start,
    load_model,
    model_config,
    readable_errors,
    sampling_settings,
    say,
)
from dsv4_jax.generate import TokenEvent
from dsv4_jax.precision import Precision
from dsv4_jax.sampling import SamplingParams
from dsv4_jax.session import Session
from dsv4_jax.text import IncrementalDetokenizer, load_tokenizer

__all__ = ["command"]

_POSITIONS = 4096
"""Of the cache, where the model has as many."""


def _read_tools(path: Path) -> list[Any]:
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(tools, list):
        raise UserError(f"{path}: must hold a JSON list of tools, got {type(tools).__name__}")
    return tools


def _check_model(directory: Path) -> tuple[Tokenizer, int]:
    """Tokenizer and most positions, when the files allow chat; before any weight is read."""
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise UserError(f"{directory} has no tokenizer.json: chat needs one with the chat tokens")
    config = model_config(directory)
    check_tokenizer(tokenizer, config, str(directory))
    return tokenizer, config.max_position_embeddings


@contextmanager
def _ctrl_c() -> Generator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C was pressed; the second one raises at once."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    # What watches over other commands' Ctrl-C (`readable_errors`) must not hear of these:
    # it may look when the handler is its own again, and end the process.
    descriptor = signal.set_wakeup_fd(-1)
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(descriptor, warn_on_full_buffer=False)


class _Screen:
    """Shows an answer while it is written; ends a line before the other stream writes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._open = ""  # which stream has an unfinished line

    def show(self, events: list[Event]) -> None:
        """Shows what became certain."""
        for event in events:
            match event:
                case ReasoningDelta(text):
                    self._reasoning(text)
                case ContentDelta(text):
                    self._answer(text)
                case ToolCall(name, arguments):
                    self.end()
                    shown = json.dumps(name, ensure_ascii=False)
                    self._answer(f'{{"name": {shown}, "arguments": {arguments}}}\n')
                case _:  # errors are said after the answer
                    pass

    def _reasoning(self, text: str) -> None:
        if self._open == "answer":
            self.end()
        self._console.print(Text(text, style="dim"), end="", soft_wrap=True)
        self._open = "" if text.endswith("\n") else "reasoning"

    def _answer(self, text: str) -> None:
        if self._open == "reasoning":
            self.end()
        sys.stdout.write(text)
        sys.stdout.flush()
        self._open = "" if text.endswith("\n") else "answer"

    def end(self) -> None:
        """Ends an unfinished line."""
        if self._open == "answer":
            sys.stdout.write("\n")
            sys.stdout.flush()
        elif self._open:
            self._console.print()
        self._open = ""

    def note(self, text: str) -> None:
        """A dim line about the turn."""
        self.end()
        self._console.print(Text(text, style="dim"), soft_wrap=True)


class _Chat:
    """The conversation so far, and one turn after the other."""

    def __init__(
        self,
        console: Console,
        session: Session,
        tokenizer: Tokenizer,
        sampling: dict[str, Any],
        *,
        system: str | None,
        tools: list[Any] | None,
        thinking: bool,
        max_new_tokens: int,
    ) -> None:
        self._console = console
        self._session = session
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._tools = tools
        self._thinking = thinking
        self._max_new_tokens = max_new_tokens
        self._messages: list[dict[str, Any]] = []
        if system is not None:
            self._messages.append({"role": "system", "content": system})
        self.open_calls: deque[str] = deque()
        self.interrupted = False  # in the middle of a step
        self._results: list[dict[str, Any]] = []

    def say(self, line: str) -> bool:
        """Takes a line: a call's result while there are calls, else a message.

        Returns:
            Whether an answer was stopped with Ctrl-C.
        """
        if not self.open_calls:
            return self._turn([{"role": "user", "content": line}])
        self.open_calls.popleft()
        self._results.append({"role": "tool", "content": line})
        return False if self.open_calls else self._turn(self._results)

    def forget_calls(self) -> None:
        """Leaves the calls without results: the next line is a message."""
        self.open_calls.clear()
        self._results = []

    def _prompt(self, new: list[dict[str, Any]]) -> tuple[list[int], int]:
        """The prompt with new messages, and how many tokens may follow it."""
        text = encode([*self._messages, *new], self._thinking, self._tools)
        ids = self._session.encode(self._tokenizer, text)
        room = self._session.max_len - len(ids) + 1  # the last new token is never fed back
        if room < 1:
            raise UserError(
                f"the conversation has {len(ids)} tokens, --max-len is {self._session.max_len}"
            )
        return ids, min(room, self._max_new_tokens)

    def _turn(self, new: list[dict[str, Any]]) -> bool:
        self.forget_calls()
        ids, room = self._prompt(new)
        screen = _Screen(self._console)
        parser = StreamParser(self._thinking)
        with _ctrl_c() as pressed:
            try:
                last = self._answer(ids, room, pressed, parser, screen)
            except KeyboardInterrupt:
                self.interrupted, last = True, None
            stopped = last is None
            screen.show(parser.finish())
        screen.end()
        message = parser.message
        if last is not None and last.error is not None:
            raise UserError(last.error)
        self._note(screen, message, room, "stopped" if last is None else last.finish_reason or "")
        if message.content or message.reasoning_content or message.tool_calls:
            self._messages += [*new, message.as_dict()]
            self.open_calls.extend(call.name for call in message.tool_calls)
        elif stopped:
            screen.note("nothing was answered: that message is forgotten")
        else:
            self._messages += [*new, message.as_dict()]
        return stopped

    def _answer(
        self,
        ids: list[int],
        room: int,
        pressed: Callable[[], bool],
        parser: StreamParser,
        screen: _Screen,
    ) -> TokenEvent | None:
        """Shows the answer; the last event, or ``None`` when it was stopped."""
        session, last = self._session, None
        held = len(session.tokens)
        events = session.stream(ids, max_new_tokens=room, cancelled=pressed, **self._sampling)
        if session.reused:
            rest = len(ids) - session.reused
            screen.note(f"cache: {session.reused} tokens reused, prefill of {rest}")
        else:
            why = f"the prompt does not continue its {held} tokens" if held else "empty"
            screen.note(f"cache: {why}, prefill of {len(ids)}")
        text = IncrementalDetokenizer(self._tokenizer)
        with closing(events):
            for last in events:
                if last.token is not None:
                    screen.show(parser.push(text.push(last.token)))
        screen.show(parser.push(text.flush()))
        return last if last is not None and last.finish_reason is not None else None

    def _note(self, screen: _Screen, message: AssistantMessage, room: int, reason: str) -> None:
        """What there is to say about the end of an answer."""
        if reason == "stopped":
            screen.note("stopped")
            return
        if reason == "length":
            limit = "--max-new-tokens" if room == self._max_new_tokens else "--max-len"
            screen.note(f"cut off after {room} tokens ({limit})")
        for error in message.errors:
            screen.note(f"malformed answer, character {error.offset}: {error.reason}")
        if message.unparsed:
            screen.note(f"not shown: {len(message.unparsed)} characters after that")


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _read(prompt: str) -> str:
    """A line; with editing on a terminal.

    Raises:
        EOFError: there is none.
    """
    if _is_terminal():
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _loop(console: Console, chat: _Chat) -> None:
    interactive = _is_terminal()
    if interactive:
        with suppress(ImportError):  # editing of lines, where the platform has it
            importlib.import_module("readline")
    pressed = False  # Ctrl-C was the last thing
    while True:
        try:
            call = chat.open_calls[0] if chat.open_calls else None
            line = _read("> " if call is None else f"result of {call}> ")
            if not line and call is None:
                continue
            pressed = False
            pressed = chat.say(line)
        except EOFError:
            return
        except KeyboardInterrupt:
            if pressed:
                return
            pressed = True
            chat.forget_calls()
            say(console, "\nCtrl-C again, or Ctrl-D, to leave")
        except (UserError, ValueError) as error:
            if not interactive:
                raise
            say(console, "error: " + " ".join(str(error).split()))


def command(
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="Directory of the checkpoint. Default: the bundled model."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    tools: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with a list of OpenAI tools. Calls are shown, not run: the lines after "
            "an answer with calls are their results, one line each."
        ),
    ] = None,
    thinking: Annotated[
        bool, typer.Option(help="Whether the model reasons before it answers.")
    ] = True,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 1024,
    max_len: Annotated[
        int | None,
        typer.Option(
            help="Positions of the cache: most tokens of the conversation. Default: 4096."
        ),
    ] = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    precision: PrecisionOption = None,
) -> None:
    """Talk with a model; one line is one message.

    Ctrl-C stops an answer after the next token (twice: at once), and what there is of it stays.
    Ctrl-C at the prompt after that, or Ctrl-D, leaves. A turn computes its new tokens only, where
    its prompt continues the one before; in thinking mode without tools it does not, because
    earlier reasoning is dropped.
    """
    console = Console(stderr=True)
    with readable_errors(console):
        directory = checkpoint_directory(checkpoint)
        if precision is not None:
            Precision.preset(precision)
        settings, source = sampling_settings(directory, temperature, top_p, top_k)
        if not 0 <= seed < 2**32:
            raise UserError(f"--seed must be in [0, 2**32), got {seed}")
        if max_new_tokens < 1:
            raise UserError(f"--max-new-tokens must be >= 1, got {max_new_tokens}")
        given = None if tools is None else _read_tools(tools)
        encode([{"role": "system", "content": system or ""}], thinking, given)
        tokenizer, limit = _check_model(directory)
        if max_len is None:
            max_len = min(_POSITIONS, limit)
        if not 1 <= max_len <= limit:
            raise UserError(
                f"--max-len must be 1..{limit} (max_position_embeddings), got {max_len}"
            )
        check_devices()
        fast_start(console)

        options = {"max_len": "--max-len", "precision": "--precision"}
        model, params = load_model(directory, precision, max_len=max_len, options=options)
        chat = _Chat(
            console,
            Session(model, params, max_len=max_len),
            tokenizer,
            _sampling(settings, seed),
            system=system,
            tools=given,
            thinking=thinking,
            max_new_tokens=max_new_tokens,
        )
        say(
            console,
            f"{directory}: {max_len} positions; temperature {settings.temperature}, top_p "
            f"{settings.top_p}, top_k {settings.top_k}, seed {seed} ({source})",
        )
        _loop(console, chat)
        if chat.interrupted:
            raise Leave(0)


def _sampling(settings: SamplingParams, seed: int) -> dict[str, Any]:
    return {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "seed": seed,
    }
