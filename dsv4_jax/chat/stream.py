"""What the model writes, as reasoning, answer and tool calls (model.md 8.2), piece by piece.

The release's parser raises on anything that its format does not allow. A stream cannot: text is
already shown by then. So here the message keeps what was right up to there, an error says what was
wrong, and the rest, from the start of the call or block that is broken, is ``unparsed``: no part of
it is shown or taken for a call. (A parameter may quote a call. Looking for calls behind an error
would run it.)

Between special tokens text only passes through, so the time is linear in the text, and a value of
a megabyte in many small pieces costs no more than in one.
"""

import dataclasses
import json
import math
import re
from typing import Any, Literal, NoReturn

from dsv4_jax.chat.tokens import BOS, DSML, EOS, THINK, THINK_END

__all__ = [
    "AssistantMessage",
    "ContentDelta",
    "Event",
    "ParseError",
    "ReasoningDelta",
    "StreamParser",
    "ToolCall",
    "parse",
]

_OPEN, _CLOSE = f"<{DSML}", f"</{DSML}"
_SPECIAL = (_OPEN, _CLOSE, DSML, EOS, BOS, THINK, THINK_END)
_FIND = re.compile("|".join(map(re.escape, _SPECIAL)))
_PREFIXES = frozenset(special[:size] for special in _SPECIAL for size in range(1, len(special)))
_LONGEST = max(map(len, _PREFIXES))

_HARMLESS = "|DSML|"
"""What stands in the reasoning for a marker: there it is a mistake, but not the end."""

_SHOWN = 60
"""Characters of the model's text in a message."""

_INVOKE = re.compile(r'invoke\s*name="(.+?)">\n\n?', re.DOTALL)


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call: the tool's name and its arguments, a JSON object as text."""

    name: str
    arguments: str


@dataclasses.dataclass(frozen=True)
class ParseError:
    """What the format does not allow, and the character of the text where that begins."""

    offset: int
    reason: str


@dataclasses.dataclass(frozen=True)
class ReasoningDelta:
    """More reasoning."""

    text: str


@dataclasses.dataclass(frozen=True)
class ContentDelta:
    """More of the answer."""

    text: str


Event = ReasoningDelta | ContentDelta | ToolCall | ParseError
"""What `StreamParser` reports; a call comes whole, when it is known to be right."""


@dataclasses.dataclass(frozen=True)
class AssistantMessage:
    """A parsed answer.

    Attributes:
        content: the answer.
        reasoning_content: what came before it in thinking mode.
        tool_calls: the calls, in order.
        errors: what was wrong; empty for a well-formed answer.
        unparsed: the text from the first error on that cannot be passed over.
        role: always ``assistant``.
    """

    content: str = ""
    reasoning_content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    errors: tuple[ParseError, ...] = ()
    unparsed: str = ""
    role: Literal["assistant"] = "assistant"

    def as_dict(self) -> dict[str, Any]:
        """The message as OpenAI has it, for `encode`; without errors and what is unparsed."""
        calls = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in self.tool_calls
        ]
        return {
            "role": self.role,
            "content": self.content,
            "reasoning_content": self.reasoning_content,
            "tool_calls": calls,
        }


class _Malformed(Exception):
    """Part of a tool block that is not as it should be."""


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[:_SHOWN] + "...")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{_short(number)} is too large")
    return value


def _check_json(text: str) -> None:
    """Raises ValueError or RecursionError for what could not be put into a prompt again."""
    value = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    if "\\u" in text:  # an escape may be half of a character
        json.dumps(value, ensure_ascii=False).encode("utf-8")


def _parameter(text: str) -> tuple[str, str, str] | None:
    """Name, ``string`` and value of a parameter; each character is looked at once."""
    opening, name, kind = 'parameter name="', '" string="', '">'
    if not text.startswith(opening):
        return None
    key_end = text.find(name, len(opening))
    kind_end = text.find(kind, key_end + len(name)) if key_end >= 0 else -1
    if kind_end < 0:
        return None
    key, is_string = text[len(opening) : key_end], text[key_end + len(name) : kind_end]
    return key, is_string, text[kind_end + len(kind) :]


def _argument(key: str, is_string: str, value: str) -> str:
    """A parameter as a member of a JSON object; JSON stays as the model wrote it."""
    if is_string == "true":
        value = json.dumps(value, ensure_ascii=False)
    elif is_string == "false":
        try:
            _check_json(value)
        except (ValueError, RecursionError) as error:
            raise _Malformed(f"parameter {_short(key)} must be JSON: {error}") from error
    else:
        raise _Malformed(
            f'parameter {_short(key)} must have string="true" or "false", got {_short(is_string)}'
        )
    return f"{json.dumps(key, ensure_ascii=False)}: {value}"


class _Block:
    """The inside of a tool block, one segment (a tag and the text up to the next) at a time.

    Segments must come as ``block { invoke { parameter parameter-end } invoke-end } block-end``.
    """

    def __init__(self) -> None:
        self._after = "start"
        self._name = ""
        self._arguments: dict[str, str] = {}

    @property
    def complete(self) -> bool:
        """Whether the block was closed."""
        return self._after == "block end"

    def segment(self, tag: str, text: str, last: bool) -> ToolCall | None:
        """Takes a segment; a call when one is finished with it.

        Args:
            tag: how the segment begins.
            text: what follows the marker.
            last: no other tag follows, so that text may be cut off.

        Raises:
            _Malformed: it has no place here, or is not written as it must be.
        """
        if tag == _OPEN:
            self._opening(text)
            return None
        return self._closing(text, last) if tag == _CLOSE else self._refuse(tag, text)

    def _refuse(self, tag: str, text: str) -> NoReturn:
        raise _Malformed(f"{_short((tag + text).replace(DSML, ''))} must not follow {self._after}")

    def _opening(self, text: str) -> None:
        if self._after == "start" and text == "tool_calls>\n":
            self._after = "block"
        elif self._after in ("block", "invoke end") and (found := _INVOKE.fullmatch(text)):
            self._after, self._name, self._arguments = "invoke", found[1], {}
        elif self._after in ("invoke", "parameter end") and (parts := _parameter(text)):
            key = parts[0]
            if key in self._arguments:
                raise _Malformed(f"parameter {_short(key)} must be given once")
            self._arguments[key] = _argument(*parts)
            self._after = "parameter"
        else:
            self._refuse(_OPEN, text)

    def _closing(self, text: str, last: bool) -> ToolCall | None:
        if self._after == "parameter" and text == "parameter>\n":
            self._after = "parameter end"
        elif self._after in ("invoke", "parameter end") and (
            text == "invoke>\n" or (last and text == "invoke>")
        ):
            self._after = "invoke end"
            return ToolCall(self._name, "{" + ", ".join(self._arguments.values()) + "}")
        elif self._after in ("block", "invoke end") and text == "tool_calls>":
            self._after = "block end"
        else:
            self._refuse(_CLOSE, text)
        return None


class StreamParser:
    """Parses an answer while it is written; how the text is cut makes no difference.

    Nothing of a tool block, complete or not, is ever reported as content. Malformed text raises
    nothing: it is reported as `ParseError`.

    An answer may end with EOS or without. EOS ends it wherever it stands; ``done`` says so.

    Args:
        thinking: whether the prompt ended with ``<think>``, so that reasoning comes first.
    """

    def __init__(self, thinking: bool = True) -> None:
        self._state = "reasoning" if thinking else "content"
        self._done = False
        self._finished = False
        self._tail = ""  # may be the beginning of a special token
        self._offset = 0  # of the tail in the text
        self._newlines = ""  # may be the beginning of a tool block
        self._block = _Block()
        self._tag = ""  # the segment of the block that is being read
        self._segment: list[str] = []
        self._raw: list[str] = []  # the text since the last whole call
        self._raw_offset = 0
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[ToolCall] = []
        self._errors: list[ParseError] = []
        self._unparsed: list[str] = []
        self._events: list[Event] = []

    @property
    def done(self) -> bool:
        """Whether EOS was seen: more text would be an error."""
        return self._done

    @property
    def message(self) -> AssistantMessage:
        """The message so far."""
        return AssistantMessage(
            "".join(self._content),
            "".join(self._reasoning),
            tuple(self._calls),
            tuple(self._errors),
            "".join(self._unparsed),
        )

    def push(self, text: str) -> list[Event]:
        """Takes the next piece; what became certain with it.

        Raises:
            ValueError: after `finish`.
        """
        if self._finished:
            raise ValueError("StreamParser: push must not follow finish")
        buffer = self._tail + text
        at = 0
        for found in _FIND.finditer(buffer):
            self._plain(buffer[at : found.start()], self._offset + at)
            self._special(found[0], self._offset + found.start())
            at = found.end()
        held = min(len(buffer) - at, _LONGEST)
        while held and buffer[-held:] not in _PREFIXES:
            held -= 1
        end = len(buffer) - held
        self._plain(buffer[at:end], self._offset + at)
        self._tail = buffer[end:]
        self._offset += end
        return self._take()

    def finish(self) -> list[Event]:
        """Ends the text; what became certain by that. A second call does nothing."""
        if not self._finished:
            self._plain(self._tail, self._offset)
            self._offset += len(self._tail)
            self._tail = ""
            if self._state not in ("broken", "ended"):
                self._end(self._offset)
            self._finished = True
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _error(self, offset: int, reason: str) -> None:
        self._errors.append(ParseError(offset, reason))
        self._events.append(self._errors[-1])

    def _reason(self, text: str) -> None:
        if text:
            self._reasoning.append(text)
            self._events.append(ReasoningDelta(text))

    def _answer(self, text: str) -> None:
        if text:
            self._content.append(text)
            self._events.append(ContentDelta(text))

    def _plain(self, text: str, offset: int) -> None:
        """Text without special tokens."""
        if not text:
            return
        match self._state:
            case "reasoning":
                self._reason(text)
            case "content":
                text = self._newlines + text
                kept = len(text.rstrip("\n"))
                kept = max(kept, len(text) - 2)
                self._newlines = text[kept:]
                self._answer(text[:kept])
            case "block":
                self._segment.append(text)
                self._raw.append(text)
            case "ended":
                self._error(offset, "text must not follow the end of the answer")
                self._break(text)
            case _:
                self._unparsed.append(text)

    def _special(self, token: str, offset: int) -> None:
        self._done |= token == EOS
        match self._state:
            case "broken" | "ended":
                self._plain(token, offset)
            case _ if token == EOS:
                self._end(offset)
                if self._state == "broken":
                    self._unparsed.append(token)
                else:
                    self._state = "ended"
            case "reasoning" if token == THINK_END:
                self._state = "content"
            case "reasoning":
                self._error(offset, f"{token!r} must not be in the reasoning")
                self._reason(token.replace(DSML, _HARMLESS))
            case "block":
                self._in_block(token, offset)
            case _:
                self._in_content(token, offset)

    def _in_content(self, token: str, offset: int) -> None:
        if token == _OPEN and self._newlines == "\n\n":
            self._newlines = ""
            self._state, self._tag = "block", token
            self._raw, self._raw_offset = ["\n\n", token], offset - 2
            return
        self._answer(self._newlines)
        self._newlines = ""
        if token in (_OPEN, _CLOSE, DSML):
            self._error(offset, "a tool block must begin on a line of its own after an empty one")
            self._break(token)
        else:
            self._error(offset, f"{token!r} must not be in the answer")
            self._answer(token)  # left out, it could make a marker of what is beside it

    def _in_block(self, token: str, offset: int) -> None:
        if token in (_OPEN, _CLOSE, DSML):
            self._close_segment(offset)
            if self._state == "broken":
                self._unparsed.append(token)
                return
            self._tag = token
        else:  # text like any other for the parameter that holds it
            self._segment.append(token)
        self._raw.append(token)

    def _close_segment(self, offset: int, last: bool = False) -> None:
        """Looks at the segment that was read and ends at ``offset``."""
        text = "".join(self._segment)
        self._segment = []
        try:
            call = self._block.segment(self._tag, text, last)
        except _Malformed as error:
            where = ", where the text ends" if last else ""
            self._error(self._raw_offset, f"tool calls: {error}{where}")
            self._break(*self._raw)
            return
        if call is not None:
            self._calls.append(call)
            self._events.append(call)
            self._raw, self._raw_offset = [], offset

    def _break(self, *text: str) -> None:
        self._state = "broken"
        self._unparsed += text

    def _end(self, offset: int) -> None:
        """The answer ends here."""
        if self._state == "reasoning":
            self._error(offset, f"reasoning must end with {THINK_END!r}")
        elif self._state == "content":
            self._answer(self._newlines)
            self._newlines = ""
        else:
            self._close_segment(offset, last=True)
            if self._state != "broken" and not self._block.complete:
                self._error(self._raw_offset, "tool calls: the block must be closed")
                self._break(*self._raw)


def parse(text: str, thinking: bool = True) -> AssistantMessage:
    """A whole answer: `StreamParser` fed at once. Never raises.

    Args:
        text: what the model wrote after the prompt, with EOS or without.
        thinking: as for `StreamParser`.
    """
    parser = StreamParser(thinking)
    parser.push(text)
    parser.finish()
    return parser.message
