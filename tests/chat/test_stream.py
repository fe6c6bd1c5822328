"""Answers to messages: what was encoded comes back, however it is cut.

Compared with the release's own parser on 180,000 answers, most of them damaged (2026-11-26). What
it refuses is an error here, but for a missing EOS. What it takes comes out the same, but for damage
that its patterns let pass: markers or tags inside names and values, empty names, values that are no
JSON.
"""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_jax.chat import (
    AssistantMessage,
    ContentDelta,
    Event,
    ParseError,
    ReasoningDelta,
    StreamParser,
    ToolCall,
    encode,
    parse,
)

LONGER = 100 if "HYPOTHESIS_PROFILE" in os.environ else 1
"""With random seeds (`HYPOTHESIS_PROFILE=default`) it is run by hand, and looks for longer."""

DATA = Path(__file__).parents[1] / "data" / "encoding"
EOS = "<｜end▁of▁sentence｜>"
HEADERS = {True: "<｜Assistant｜><think>", False: "<｜Assistant｜></think>"}


def answer(message: dict[str, Any], thinking: bool = True) -> str:
    """What the model would have written to give this message."""
    text = encode([{"role": "user", "content": "?"}, message], thinking)
    return text.split(HEADERS[thinking])[1]


def fed(parser: StreamParser, pieces: list[str]) -> list[Event]:
    """All events."""
    events = [event for piece in pieces for event in parser.push(piece)]
    return [*events, *parser.finish()]


def joined(events: list[Event]) -> AssistantMessage:
    """The message as somebody sees it who has the events only."""
    return AssistantMessage(
        content="".join(e.text for e in events if isinstance(e, ContentDelta)),
        reasoning_content="".join(e.text for e in events if isinstance(e, ReasoningDelta)),
        tool_calls=tuple(e for e in events if isinstance(e, ToolCall)),
        errors=tuple(e for e in events if isinstance(e, ParseError)),
    )


def test_vectors() -> None:
    text = (DATA / "output_2.txt").read_text("utf-8")
    message = parse(text.split(HEADERS[True])[-1])
    assert message == AssistantMessage(
        "The capital of France is Paris.", "The user asks about the capital of France. It is Paris."
    )
    first, second = (DATA / "output_1.txt").read_text("utf-8").split(HEADERS[True])[1:]
    message = parse(first.split("<｜User｜>")[0])
    [call] = message.tool_calls
    assert (message.content, message.errors, call.name) == ("", (), "get_weather")
    assert call.arguments == '{"location": "Beijing", "unit": "celsius"}'
    assert parse(second).content.startswith("The weather in Beijing is currently sunny")


def test_eos_may_be_missing_and_ends_the_answer() -> None:
    assert parse("r</think>a") == parse("r</think>a" + EOS) == AssistantMessage("a", "r")
    parser = StreamParser(thinking=False)
    parser.push("a" + EOS[:-1])
    assert not parser.done
    parser.push(EOS[-1])
    assert parser.done
    assert parser.finish() == []
    assert parser.finish() == []
    with pytest.raises(ValueError, match="push must not follow finish"):
        parser.push("b")


def test_text_is_not_held_back_for_long() -> None:
    parser = StreamParser()
    assert parser.push("thin") == [ReasoningDelta("thin")]
    assert parser.push("k <") == [ReasoningDelta("k ")]
    assert parser.push("/think>a\n\n") == [ContentDelta("a")]
    assert parser.push("\nb<｜") == [ContentDelta("\n\n\nb")]
    assert parser.push("c") == [ContentDelta("<｜c")]
    block = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n'
    assert parser.push(block) == []


def test_calls_come_one_by_one() -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in "fg"]
    text = answer({"role": "assistant", "content": "", "tool_calls": calls}, thinking=False)
    first, second = text.split('<｜DSML｜invoke name="g">')
    parser = StreamParser(thinking=False)
    assert parser.push(first + '<｜DSML｜invoke name="g">') == [ToolCall("f", "{}")]
    assert parser.push(second) == [ToolCall("g", "{}")]
    assert parser.message.as_dict()["tool_calls"] == [{"type": "function", **c} for c in calls]


@pytest.mark.parametrize("thinking", [False, True])
def test_history_comes_back_to_the_prompt_that_it_was(thinking: bool) -> None:
    """What is parsed and encoded again is the text that the model wrote: the cache still fits."""
    arguments = '{"a": 1.50, "b": {"c":[]}, "d": "x\\u00e9"}'
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    text = answer({"role": "assistant", "content": "t", "tool_calls": calls}, thinking)
    again = answer(parse(text, thinking).as_dict(), thinking)
    assert again == text
    assert json.loads(parse(text, thinking).tool_calls[0].arguments) == json.loads(arguments)


PLAIN = st.text(st.one_of(st.sampled_from("\n<｜/>ab"), st.characters(codec="utf-8")), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | PLAIN,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(PLAIN, inner, max_size=2),
    max_leaves=4,
).filter(lambda value: "Infinity" not in json.dumps(value))
NAMES = st.text(st.characters(codec="utf-8", exclude_characters='">\n<｜'), min_size=1, max_size=6)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), max_size=3)
CUTS = st.lists(st.integers(0, 2000), max_size=6)


def cut(text: str, at: list[int]) -> list[str]:
    edges = [0, *sorted(i % (len(text) + 1) for i in at), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


@settings(max_examples=30 * LONGER)
@given(PLAIN, PLAIN, CALLS, st.booleans(), CUTS)
def test_any_message_comes_back(
    content: str, reasoning: str, calls: list[Any], thinking: bool, at: list[int]
) -> None:
    wanted = AssistantMessage(
        content,
        reasoning if thinking else "",
        tuple(ToolCall(name, json.dumps(a, ensure_ascii=False)) for name, a in calls),
    )
    text = answer({**wanted.as_dict()}, thinking)
    assert parse(text, thinking) == wanted
    parser = StreamParser(thinking)
    events = fed(parser, cut(text, at))
    assert parser.message == wanted
    assert joined(events) == wanted


TOKENS = st.sampled_from(
    (
        *("<｜DSML｜", "</｜DSML｜", "｜DSML｜", "｜DS", "ML｜", "\n\n<｜DSML｜tool_calls>\n"),
        *(EOS, "<｜begin▁of▁sentence｜>", "<think>", "</think>", "\n", "\n\n", "x", "1"),
        *("tool_calls>\n", 'invoke name="f">\n', "invoke>\n", "tool_calls>", "parameter>\n"),
        *('parameter name="a" string="true">', 'parameter name="a" string="false">'),
        '<｜DSML｜invoke name="g">\n\n</｜DSML｜invoke>\n',
    )
)


@settings(max_examples=150 * LONGER)
@given(st.lists(TOKENS, max_size=14).map("".join), st.booleans(), CUTS)
def test_any_text_whatever(text: str, thinking: bool, at: list[int]) -> None:
    whole = parse(text, thinking)
    assert "｜DSML｜" not in whole.content + whole.reasoning_content
    assert bool(whole.errors) >= bool(whole.unparsed)
    assert not whole.unparsed or whole.unparsed in [text[e.offset :] for e in whole.errors]
    for call in whole.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)
    for pieces in (cut(text, at), list(text)):
        parser = StreamParser(thinking)
        events = fed(parser, pieces)
        assert parser.message == whole
        seen = joined(events)
        assert (seen.content, seen.reasoning_content) == (whole.content, whole.reasoning_content)
        assert (seen.tool_calls, seen.errors) == (whole.tool_calls, whole.errors)
