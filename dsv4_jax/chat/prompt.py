"""Messages to prompt text, as the release's own encoder does it (model.md 8.2).

Nothing is escaped: a special token that is spelt out in a message becomes that token, as in the
release. Whoever takes text from strangers decides what to do about that before it gets here.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from dsv4_jax.chat.tokens import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    LATEST_REMINDER,
    MAXIMUM_EFFORT,
    RESPONSE_FORMAT,
    TASKS,
    THINK,
    THINK_END,
    TOOLS,
    USER,
)

__all__ = ["Effort", "encode"]

Effort = Literal["high", "max"]
"""``max`` puts a fixed paragraph in front of everything; ``high`` is what the model does anyway."""

_ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
_BRIEFED = ("system", "developer")
"""Roles that can carry tools and a response schema."""


@dataclasses.dataclass
class _Block:
    """A part of a user turn: text, or the result of the call ``call``."""

    text: str
    call: str | None = None


@dataclasses.dataclass
class _Turn:
    """A message after tool results have become parts of user turns."""

    role: str
    text: str = ""
    where: str = ""
    reasoning: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    response_format: Any = None
    task: str | None = None
    without_eos: bool = False
    blocks: list[_Block] = dataclasses.field(default_factory=list[_Block])


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"encode: {where} must be JSON-serialisable: {error}") from error


def _text(message: Mapping[str, Any], key: str, where: str, *, optional: bool = False) -> str:
    """The text of a field; parts of text as OpenAI has them are joined."""
    content = message.get(key, "")
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
            for part in cast("Sequence[Any]", content)
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(cast("list[str]", parts))
    raise ValueError(f"encode: {where}: {key} must be a string or text parts, got {content!r:.80}")


def _result(message: Mapping[str, Any], where: str) -> _Block:
    """A tool's result; of a list of parts those that are no text are named, as in the release."""
    content = message.get("content", "")
    if isinstance(content, list):
        parts: list[str] = []
        for part in cast("list[Any]", content):
            if not isinstance(part, Mapping) or not isinstance(part.get("text", ""), str):
                raise ValueError(f"encode: {where}: content parts must be objects, got {part!r}")
            kind = part.get("type")
            parts.append(part.get("text", "") if kind == "text" else f"[Unsupported {kind}]")
        content = "\n\n".join(parts)
    if not isinstance(content, str):
        raise ValueError(f"encode: {where}: content must be a string, got {content!r:.80}")
    call = message.get("tool_call_id") or ""
    if not isinstance(call, str):
        raise ValueError(f"encode: {where}: tool_call_id must be a string, got {call!r}")
    return _Block(content, call)


def _calls(message: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ...]:
    calls = message.get("tool_calls") or ()
    if isinstance(calls, str) or not isinstance(calls, Sequence):
        raise ValueError(f"encode: {where}: tool_calls must be a list, got {calls!r:.80}")
    for call in cast("Sequence[Any]", calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"encode: {where}: a tool call must have a function with a name, got {call!r:.80}"
            )
    return tuple(cast("Sequence[Mapping[str, Any]]", calls))


def _call_id(call: Mapping[str, Any]) -> str:
    return str(call.get("id") or call["function"].get("id") or "")


def _tools(tools: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if not tools:
        return ()
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise ValueError(f"encode: {where}: tools must be a list, got {tools!r:.80}")
    for tool in cast("Sequence[Any]", tools):
        if not isinstance(tool, Mapping) or not isinstance(tool.get("function"), Mapping):
            raise ValueError(
                f"encode: {where}: a tool must be an object with a function, got {tool!r:.80}"
            )
    return tuple(cast("Sequence[Mapping[str, Any]]", tools))


def _turn(message: Any, where: str) -> _Turn:
    """One message, checked; a tool result as a user turn of one block."""
    if not isinstance(message, Mapping):
        raise ValueError(f"encode: {where} must be an object, got {message!r:.80}")
    fields = cast("Mapping[str, Any]", message)
    role = fields.get("role")
    if role not in _ROLES:
        raise ValueError(f"encode: {where}: role must be one of {', '.join(_ROLES)}, got {role!r}")
    if role not in _BRIEFED and (fields.get("tools") or fields.get("response_format")):
        raise ValueError(
            f"encode: {where}: tools and response_format belong to a system or developer message, "
            f"got them in one of role {role}"
        )
    task = fields.get("task")
    if task is not None and task not in TASKS:
        raise ValueError(f"encode: {where}: task must be one of {', '.join(TASKS)}, got {task!r}")
    if role == "tool":
        return _Turn("tool", where=where, blocks=[_result(fields, where)])
    text = _text(fields, "content", where, optional=role in ("system", "assistant"))
    if role == "developer" and not text:
        raise ValueError(f"encode: {where}: content of a developer message must not be empty")
    return _Turn(
        role,
        text,
        where,
        reasoning=_text(fields, "reasoning_content", where, optional=True),
        calls=_calls(fields, where) if role == "assistant" else (),
        tools=_tools(fields.get("tools"), where),
        response_format=fields.get("response_format"),
        task=task,
        without_eos=bool(fields.get("wo_eos")),
        blocks=[_Block(text)] if role == "user" else [],
    )


def _check_results(turns: Sequence[_Turn]) -> None:
    """Every tool result must answer a call of the assistant turn before it."""
    ids: list[str] | None = None
    for turn in turns:
        if turn.role == "assistant":
            ids = [_call_id(call) for call in turn.calls] or None
        elif turn.role == "tool":
            wanted = turn.blocks[0].call
            if ids is None:
                raise ValueError(
                    f"encode: {turn.where}: a tool result must follow an assistant message with "
                    f"tool_calls, got the result of {wanted!r} without one"
                )
            if wanted and any(ids) and wanted not in ids:
                raise ValueError(
                    f"encode: {turn.where}: tool_call_id must be one of the calls before it, "
                    f"{', '.join(filter(None, ids))}, got {wanted!r}"
                )


def _merge(turns: Sequence[_Turn]) -> list[_Turn]:
    """Tool results and user messages that follow each other become one user turn."""
    merged: list[_Turn] = []
    for turn in turns:
        last = merged[-1] if merged and merged[-1].role == "user" else None
        if turn.role == "tool":
            if last is None:
                merged.append(_Turn("user", where=turn.where, blocks=list(turn.blocks)))
            else:
                last.blocks += turn.blocks
        elif turn.role == "user" and last is not None and last.task is None:
            last.blocks += turn.blocks  # its own task is lost, as in the release
        else:
            merged.append(turn)
    return merged


def _sort_results(turns: Sequence[_Turn]) -> None:
    """Puts the results of a turn into the order of the calls; text stays where it is."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn.calls:
            order = {name: i for i, call in enumerate(turn.calls) if (name := _call_id(call))}
        results = [block for block in turn.blocks if block.call is not None]
        if len(results) > 1 and order:
            ordered = iter(sorted(results, key=lambda block: order.get(block.call or "", 0)))
            turn.blocks = [b if b.call is None else next(ordered) for b in turn.blocks]


def _last_user(turns: Sequence[_Turn]) -> int:
    users = (i for i, turn in enumerate(turns) if turn.role in ("user", "developer"))
    return max(users, default=-1)


def _drop_earlier(turns: Sequence[_Turn]) -> list[_Turn]:
    """Without what the release leaves out before the last user turn: developer turns.

    (Reasoning goes with `_render`.)
    """
    last = _last_user(turns)
    return [turn for i, turn in enumerate(turns) if i >= last or turn.role != "developer"]


def _briefing(turn: _Turn) -> str:
    """Tools and response schema of a system or developer turn."""
    text = ""
    if turn.tools:
        schemas = (_json(tool["function"], f"{turn.where}: a tool") for tool in turn.tools)
        text += "\n\n" + "\n".join(schemas).join(TOOLS)
    if turn.response_format:
        schema = _json(turn.response_format, f"{turn.where}: response_format")
        text += "\n\n" + RESPONSE_FORMAT + schema
    return text


def _arguments(call: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The arguments of a call: a JSON object, as text or as it is.

    Text that is no JSON is one parameter called ``arguments``, as in the release.
    """
    given = call["function"].get("arguments", "{}")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            given = {"arguments": given}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise ValueError(
            f"encode: {where}: arguments of a tool call must be a JSON object, got {given!r:.80}"
        )
    return given


def _invoke(call: Mapping[str, Any], where: str) -> str:
    lines = [f'<{DSML}invoke name="{call["function"]["name"]}">']
    parameters: list[str] = []
    for key, value in _arguments(call, where).items():
        is_text = isinstance(value, str)
        shown = value if is_text else _json(value, f"{where}: argument {key!r}")
        parameters.append(
            f'<{DSML}parameter name="{key}" string="{"true" if is_text else "false"}">'
            f"{shown}</{DSML}parameter>"
        )
    return "\n".join([*lines, "\n".join(parameters), f"</{DSML}invoke>"])


def _tool_calls(turn: _Turn) -> str:
    if not turn.calls:
        return ""
    invokes = (_invoke(call, turn.where) for call in turn.calls)
    return "\n".join(["\n", f"<{DSML}tool_calls>", *invokes, f"</{DSML}tool_calls>"])


def _user(turn: _Turn) -> str:
    parts = (
        block.text if block.call is None else f"<tool_result>{block.text}</tool_result>"
        for block in turn.blocks
    )
    return "\n\n".join(parts)


def _body(turns: Sequence[_Turn], i: int, reasoned: bool) -> str:
    """A turn without what leads over to the next one."""
    turn = turns[i]
    match turn.role:
        case "system":
            return turn.text + _briefing(turn)
        case "developer":
            return USER + turn.text + _briefing(turn)
        case "user":
            return USER + _user(turn)
        case "latest_reminder":
            return LATEST_REMINDER + turn.text
        case _:
            of_task = i > 0 and turns[i - 1].task is not None
            reasoning = turn.reasoning + THINK_END if reasoned and not of_task else ""
            end = "" if turn.without_eos else EOS
            return reasoning + turn.text + _tool_calls(turn) + end


def _render(turns: Sequence[_Turn], i: int, last: int, thinking: bool, drop: bool) -> str:
    """A turn and, where an answer follows, the tokens that ask for it.

    Args:
        turns: all of them.
        i: which.
        last: the last user turn; with ``drop`` only assistant turns after it keep reasoning.
        thinking: thinking or chat mode.
        drop: whether earlier reasoning goes.
    """
    turn = turns[i]
    text = _body(turns, i, reasoned=thinking and (not drop or i > last))
    if i + 1 < len(turns) and turns[i + 1].role not in ("assistant", "latest_reminder"):
        return text
    if turn.task is not None and turn.task != "action":
        return text + TASKS[turn.task]
    if turn.task == "action":
        return text + ASSISTANT + (THINK if thinking else THINK_END) + TASKS["action"]
    if turn.role in ("user", "developer"):
        return text + ASSISTANT + (THINK if thinking and (not drop or i >= last) else THINK_END)
    return text


def _briefed(
    messages: Sequence[Any], tools: Sequence[Mapping[str, Any]] | None, response_format: Any
) -> list[Any]:
    """The messages with tools and schema in the first one, or in an empty system message."""
    given = {"tools": tools, "response_format": response_format}
    given = {key: value for key, value in given.items() if value}
    if not given:
        return list(messages)
    first = messages[0]
    if not isinstance(first, Mapping) or first.get("role") not in _BRIEFED:
        return [{"role": "system", "content": "", **given}, *messages]
    for key in given:
        if first.get(key):
            raise ValueError(f"encode: {key} is given as an argument and in message 0: once only")
    return [{**cast("Mapping[str, Any]", first), **given}, *messages[1:]]


def encode(
    messages: Sequence[Mapping[str, Any]],
    thinking: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    response_format: Any = None,
    drop_thinking: bool = True,
    reasoning_effort: Effort | None = None,
    add_default_bos: bool = True,
    context: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The prompt text of a conversation, byte for byte that of the release's encoder.

    Messages are OpenAI's: ``role`` (system, developer, user, assistant, tool, latest_reminder),
    ``content`` (text, or text parts, which are joined), for an assistant ``reasoning_content`` and
    ``tool_calls``, for a tool ``tool_call_id``. Of the release: ``tools`` and ``response_format``
    in a system or developer message, ``task`` (one-shot classification), ``wo_eos`` (an assistant
    turn to be continued).

    Where the release's encoder has an assertion or fails otherwise there is a ``ValueError``; it
    is stricter in unknown roles, tool results that no call asked for, and tools in other messages.
    Arguments of a call may be an object where the release takes JSON text only.

    Args:
        messages: at least one.
        thinking: the model reasons before it answers; else chat mode.
        tools: OpenAI's tool list, for the first message (or an empty system message before it).
        response_format: a JSON schema, put where the tools are.
        drop_thinking: leave out the reasoning before the last user turn. Ignored where there are
            tools: then all of it stays.
        reasoning_effort: only ``max`` has an effect, and only in thinking mode.
        add_default_bos: begin with BOS, unless there is a context.
        context: messages whose text is already there; the result continues it.

    Raises:
        ValueError: malformed messages, or text with a lone surrogate.
    """
    if reasoning_effort not in (None, "high", "max"):
        raise ValueError(
            f"encode: reasoning_effort must be None, 'high' or 'max', got {reasoning_effort!r}"
        )
    for name, given in (("messages", messages), ("context", context)):
        if isinstance(given, str | Mapping) or not isinstance(given, Sequence):  # pyright: ignore
            raise ValueError(f"encode: {name} must be a list of messages, got {given!r:.80}")
    if not messages:
        raise ValueError("encode: messages must not be empty")
    known = len(context)
    every = _briefed([*context, *messages], tools, response_format)
    ours = len(every) - known - len(messages)  # a system message for the tools
    known += ours if known else 0
    turns = [
        _turn(message, f"message {i}" if i >= 0 else f"context message {i + known - ours}")
        for i, message in enumerate(every, len(messages) - len(every))
    ]
    _check_results(turns)
    before, after = _merge(turns[:known]), _merge(turns[known:])
    turns = [*before, *after]
    _sort_results(turns)
    drop = drop_thinking and not any(turn.tools for turn in turns)
    start = len(before)
    if thinking and drop:
        turns = _drop_earlier(turns)
        start = len(_drop_earlier(before))
    text = BOS if add_default_bos and not known else ""
    if thinking and reasoning_effort == "max" and start == 0:
        text += MAXIMUM_EFFORT
    last = _last_user(turns)
    text += "".join(_render(turns, i, last, thinking, drop) for i in range(start, len(turns)))
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            "encode: messages must be valid Unicode, got a lone surrogate at character "
            f"{error.start} of the prompt"
        ) from error
    return text
