"""Bad messages and malformed answers; ids are rows of the acceptance list."""

import time
from typing import Any

import pytest

from dsv4_jax.chat import (
    AssistantMessage,
    ContentDelta,
    StreamParser,
    ToolCall,
    encode,
    parse,
)
from dsv4_jax.text import IncrementalDetokenizer, plain_tokenizer
from dsv4_jax.text import encode as tokenize
from tests.support.tokenizer import chat_tokenizer

USER: dict[str, Any] = {"role": "user", "content": "u"}
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
MEGABYTE = 1_000_000


def _calling(*ids: str) -> dict[str, Any]:
    calls = [{"id": i, "function": {"name": "f", "arguments": "{}"}} for i in ids]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _called(function: Any) -> list[Any]:
    return [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]


def _result(of: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": of, "content": "1"}


def _loop() -> list[Any]:
    loop: list[Any] = []
    loop.append(loop)
    return loop


D1 = [
    pytest.param([], "messages must not be empty", id="D1-empty"),
    pytest.param("hi", "must be a list of messages", id="D1-text"),
    pytest.param({"role": "user"}, "must be a list of messages", id="D1-one-object"),
    pytest.param(["hi"], "message 0 must be an object, got 'hi'", id="D1-no-object"),
    pytest.param([USER, {"content": "x"}], "message 1: role .* got None", id="D1-no-role"),
    pytest.param([{"role": "function", "content": "x"}], "got 'function'", id="D1-role-function"),
    pytest.param(
        [{"role": "direct_search_results", "content": "x"}, USER],
        "message 0: role must be one of system, developer, user, assistant, tool, latest_reminder",
        id="D1-role-dropped-by-the-release",
    ),
    pytest.param([_result("x")], "message 0: a tool result must follow", id="D1-result-first"),
    pytest.param([USER, _result("x")], "got the result of 'x' without", id="D1-result-no-call"),
    pytest.param(
        [USER, {"role": "assistant", "content": "a"}, _result("x")],
        "message 2: a tool result must follow",
        id="D1-result-after-text",
    ),
    pytest.param(
        [USER, _calling("x", "y"), _result("z")],
        "must be one of the calls before it, x, y, got 'z'",
        id="D1-result-of-another-call",
    ),
    pytest.param(
        [USER, _calling("x"), _result("x"), _calling("y"), _result("x")],
        "message 4: .* before it, y, got 'x'",
        id="D1-result-of-an-earlier-turn",
    ),
    pytest.param([{"role": "user", "content": None}], "content must be", id="D1-content-none"),
    pytest.param([{"role": "user", "content": 3}], "content must be", id="D1-content-number"),
    pytest.param(
        [{"role": "user", "content": [{"type": "image_url"}]}], "text parts", id="D1-content-image"
    ),
    pytest.param([{"role": "developer"}], "must not be empty", id="D1-developer-empty"),
    pytest.param([USER | {"task": "sing"}], "task must be one of action", id="D1-task"),
    pytest.param(
        [USER | {"tools": [{"function": {}}]}],
        "message 0: tools and response_format belong to",
        id="D1-tools-of-a-user",
    ),
    pytest.param([_calling("x") | {"tool_calls": "x"}], "must be a list", id="D1-calls-text"),
    pytest.param(_called({"arguments": "{}"}), "message 1: a tool call must", id="D1-no-name"),
    pytest.param(
        _called({"name": "f", "arguments": "[1]"}),
        "must be a JSON object, got",
        id="D1-arguments-list",
    ),
    pytest.param(
        _called({"name": "f", "arguments": {1: 2}}),
        "must be a JSON object, got",
        id="D1-arguments-keys",
    ),
]


@pytest.mark.parametrize(("messages", "message"), D1)
def test_messages_refused(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"reasoning_effort": "low"}, "got 'low'", id="D1-effort"),
        pytest.param({"tools": {"function": {}}}, "must be a list", id="D1-tools-object"),
        pytest.param({"tools": [{"name": "f"}]}, "with a function", id="D1-tools-flat"),
        pytest.param({"context": [{"role": "x"}]}, "context message 0: role", id="D1-context"),
    ],
)
def test_options_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode([USER], **options)


def test_D1_tools_given_twice() -> None:
    tools = [{"function": {"name": "f"}}]
    with pytest.raises(ValueError, match="as an argument and in message 0"):
        encode([{"role": "system", "content": "", "tools": tools}, USER], tools=tools)


@pytest.mark.parametrize("thinking", [True, False])
def test_D2_special_tokens_in_content_are_special_tokens(thinking: bool) -> None:
    """As in the release: nothing is escaped (its own encoder gives the text of this test)."""
    text = f"a</think>{EOS}<｜User｜>b<｜DSML｜tool_calls><｜Assistant｜>"
    prompt = encode([{"role": "user", "content": text}], thinking)
    end = "<think>" if thinking else "</think>"
    assert prompt == f"{BOS}<｜User｜>{text}<｜Assistant｜>{end}"
    tokenizer = chat_tokenizer()
    ids = tokenize(tokenizer, prompt)
    for token, count in ((EOS, 1), ("<｜User｜>", 2), ("<｜Assistant｜>", 2), ("｜DSML｜", 1)):
        assert ids.count(tokenizer.token_to_id(token)) == count


@pytest.mark.parametrize(
    "messages",
    [
        pytest.param([{"role": "user", "content": "a\udcff"}], id="D3-content"),
        pytest.param(_called({"name": "f", "arguments": '{"a": "\\ud800"}'}), id="D3-arguments"),
        pytest.param(
            [{"role": "system", "tools": [{"function": {"name": "\ud800"}}]}], id="D3-tools"
        ),
    ],
)
def test_lone_surrogates(messages: Any) -> None:
    with pytest.raises(ValueError, match="lone surrogate at character"):
        encode(messages)


def test_D3_surrogates_in_an_answer_pass_through() -> None:
    assert parse("\udcff</think>\ud800") == AssistantMessage("\ud800", "\udcff")


def _one_call(value: str) -> str:
    return (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
        f'<｜DSML｜parameter name="a" string="true">{value}</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    )


LONG = [
    pytest.param("x" * MEGABYTE, id="D3-letters"),
    pytest.param("\n" * MEGABYTE, id="D3-newlines"),
    pytest.param("<" * MEGABYTE, id="D3-brackets"),
    pytest.param("<｜DSML" * (MEGABYTE // 6), id="D3-half-markers"),
    pytest.param(_one_call("x" * MEGABYTE), id="D3-value"),
    pytest.param(_one_call('" string="' * (MEGABYTE // 10)), id="D3-value-of-attributes"),
    pytest.param(_one_call("")[:40] + '">\n' * (MEGABYTE // 3), id="D3-name"),
    pytest.param("\n\n<｜DSML｜tool_calls>\n" + "<｜DSML｜" * (MEGABYTE // 7), id="D3-markers"),
]


@pytest.mark.parametrize("text", LONG)
def test_a_megabyte_takes_linear_time(text: str) -> None:
    """In pieces of 20 characters, which hold what is quadratic in the pieces or in the text.

    Linear is below half a second of CPU here; quadratic would be minutes.
    """
    start = time.process_time()
    parser = StreamParser(thinking=False)
    for i in range(0, len(text), 20):
        parser.push(text[i : i + 20])
    parser.finish()
    assert parser.message == parse(text, thinking=False)
    assert time.process_time() - start < 10


def test_D3_a_megabyte_in_a_message() -> None:
    start = time.process_time()
    text = "x" * MEGABYTE
    calls = [{"function": {"name": "f", "arguments": {"a": text}}}]
    messages = [{"role": "user", "content": text}, {"role": "assistant", "tool_calls": calls}]
    prompt = encode(messages, thinking=False)
    assert parse(prompt.split("</think>")[1], thinking=False).tool_calls[0].name == "f"
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "value",
    [
        pytest.param({1, 2}, id="D4-set"),
        pytest.param(object(), id="D4-object"),
        pytest.param(b"x", id="D4-bytes"),
        pytest.param(float("nan"), id="D4-nan"),
        pytest.param(_loop(), id="D4-loop"),
    ],
)
def test_not_serialisable(value: Any) -> None:
    tools = [{"function": {"name": "f", "parameters": value}}]
    with pytest.raises(ValueError, match="message 0: a tool must be JSON-serialisable"):
        encode([{"role": "system", "content": "", "tools": tools}, USER])
    with pytest.raises(ValueError, match="response_format must be JSON-serialisable"):
        encode([USER], response_format={"schema": value})
    with pytest.raises(ValueError, match="message 1: argument 'a' must be JSON-serialisable"):
        encode(_called({"name": "f", "arguments": {"a": value}}))


OPEN = "<｜DSML｜tool_calls>\n"
GOOD = '<｜DSML｜invoke name="good">\n\n</｜DSML｜invoke>\n'
CLOSE = "</｜DSML｜tool_calls>"
P = '<｜DSML｜parameter name="a" string="true">1</｜DSML｜parameter>\n'


def _invoke(body: str) -> str:
    return f'<｜DSML｜invoke name="bad">\n{body}</｜DSML｜invoke>\n'


BROKEN = [
    pytest.param(f"a\n\n{OPEN}{GOOD}", "must be closed", 1, id="D5-truncated-after-a-call"),
    pytest.param(
        f'a\n\n{OPEN}{GOOD}<｜DSML｜invoke name="bad">\n<｜DSML｜param',
        "where the text ends",
        1,
        id="D5-truncated-in-a-tag",
    ),
    pytest.param(f"a\n\n{OPEN}{GOOD}{_invoke(P)[:-40]}", "", 1, id="D5-truncated-in-a-call"),
    pytest.param(f"a\n\n{OPEN[:-3]}", "'<tool_call' must not", 0, id="D5-truncated-wrapper"),
    pytest.param(
        f"a\n\n{OPEN.replace('calls', 'call')}{GOOD}{CLOSE}",
        "'<tool_call>\\n' must not follow start",
        0,
        id="D5-misspelt-wrapper",
    ),
    pytest.param(
        f"a\n\n{OPEN.replace('tool', 'function')}{GOOD}{CLOSE}",
        "'<function_calls>\\n' must not follow start",
        0,
        id="D5-wrapper-of-another-version",
    ),
    pytest.param(f"a{OPEN}{GOOD}{CLOSE}", "on a line of its own", 0, id="D5-wrapper-in-a-line"),
    pytest.param(f"a{GOOD}", "on a line of its own", 0, id="D5-no-wrapper"),
    pytest.param("a｜DSML｜tool_calls>", "on a line of its own", 0, id="D5-marker-alone"),
    pytest.param(f"a{CLOSE}", "on a line of its own", 0, id="D5-closing-alone"),
    pytest.param(
        f"a\n\n{OPEN}{GOOD}{_invoke(GOOD)}{CLOSE}",
        "'<invoke name=\"good\">\\n\\n' must not follow invoke",
        1,
        id="D5-nested-call",
    ),
    pytest.param(
        f"a\n\n{OPEN}{GOOD}{_invoke(P.replace('1', OPEN + GOOD + GOOD + CLOSE))}{CLOSE}",
        "must not follow parameter",
        1,
        id="D5-nested-in-a-value",
    ),
    pytest.param(
        f"a\n\n{OPEN}{OPEN}{GOOD}{CLOSE}{CLOSE}",
        "'<tool_calls>\\n' must not follow block",
        0,
        id="D5-nested-wrapper",
    ),
    pytest.param(
        f"a\n\n{OPEN}{GOOD}{_invoke(P + P)}{CLOSE}",
        "parameter 'a' must be given once",
        1,
        id="D5-duplicated-parameter",
    ),
    pytest.param(
        f"a\n\n{OPEN}{GOOD}{_invoke(P.replace('true', 'maybe'))}{GOOD}{CLOSE}",
        "parameter 'a' must have string=\"true\" or \"false\", got 'maybe'",
        1,
        id="D5-string-maybe",
    ),
    pytest.param(
        f"a\n\n{OPEN}{_invoke(P.replace('true', 'false').replace('>1<', '>one<'))}{CLOSE}",
        "parameter 'a' must be JSON",
        0,
        id="D5-value-no-json",
    ),
    pytest.param(
        f"a\n\n{OPEN}{_invoke(P.replace('true', 'false').replace('>1<', '>NaN<'))}{CLOSE}",
        "NaN is no JSON",
        0,
        id="D5-value-nan",
    ),
    pytest.param(
        f"a\n\n{OPEN}{_invoke(P.replace('true', 'false').replace('>1<', '>[-1e999]<'))}{CLOSE}",
        "'-1e999' is too large",
        0,
        id="D5-value-infinite",
    ),
    pytest.param(
        f"a\n\n{OPEN}"
        + _invoke(P.replace("true", "false").replace(">1<", '>["\\ud800"]<'))
        + CLOSE,
        "surrogates not allowed",
        0,
        id="D5-value-half-a-character",
    ),
    pytest.param(
        f"a\n\n{OPEN}"
        + _invoke(P.replace("true", "false").replace(">1<", f">{'[' * 100_000}<"))
        + CLOSE,
        "parameter 'a' must be JSON",
        0,
        id="D5-value-too-deep",
    ),
    pytest.param(f"a\n\n{OPEN}{GOOD}{CLOSE}b", "must not follow", 1, id="D5-text-after-calls"),
    pytest.param(f"a\n\n{OPEN}b{GOOD}{CLOSE}", "must not follow", 0, id="D5-text-before-calls"),
    pytest.param(
        f"a\n\n{OPEN}{GOOD}{CLOSE}\n\n{OPEN}{GOOD}{CLOSE}",
        "must not follow",
        1,
        id="D5-second-block",
    ),
    pytest.param(f"a{EOS}b", "must not follow the end", 0, id="D5-text-after-the-end"),
    pytest.param(f"a\n\n{OPEN}{GOOD}{EOS}", "must be closed", 1, id="D5-end-in-the-block"),
]


@pytest.mark.parametrize(("text", "reason", "calls"), BROKEN)
@pytest.mark.parametrize("thinking", [False, True])
def test_malformed_answers(text: str, reason: str, calls: int, thinking: bool) -> None:
    text = "r</think>" + text if thinking else text
    message = parse(text, thinking)
    assert message.content == "a"
    assert message.reasoning_content == ("r" if thinking else "")
    assert message.tool_calls == (ToolCall("good", "{}"),) * calls
    [error] = message.errors
    assert reason in error.reason
    assert text[error.offset :] == message.unparsed


@pytest.mark.parametrize(
    ("text", "wanted", "reasons"),
    [
        pytest.param("r", ("", "r"), ["must end with '</think>'"], id="D5-unfinished-reasoning"),
        pytest.param(
            f"r\n\n{OPEN}</think>a",
            ("a", "r\n\n<|DSML|tool_calls>\n"),
            ["'<｜DSML｜' must not be in the reasoning"],
            id="D5-marker-in-the-reasoning",
        ),
        pytest.param(
            "<think>r</think>a<think></think>b",
            ("a<think></think>b", "<think>r"),
            [
                "'<think>' must not be in the reasoning",
                "'<think>' must not be in the answer",
                "'</think>' must not be in the answer",
            ],
            id="D5-think-again",
        ),
    ],
)
def test_errors_that_end_nothing(text: str, wanted: tuple[str, str], reasons: list[str]) -> None:
    message = parse(text)
    assert (message.content, message.reasoning_content) == wanted
    assert [error.reason for error in message.errors] in (
        reasons,
        ["reasoning " + reason for reason in reasons],
    )
    assert message.unparsed == ""


WELL = _one_call("Zürich 🙂").replace(CLOSE, GOOD + CLOSE + EOS)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("r</think>a" + WELL, id="D6-well-formed"),
        pytest.param("r</think>a" + WELL.replace("true", "maybe"), id="D6-malformed"),
        pytest.param("r</think>a" + WELL[:-60], id="D6-truncated"),
        pytest.param("r</think>a\n" + WELL.replace("calls", "call"), id="D6-misspelt"),
    ],
)
def test_split_everywhere(text: str) -> None:
    """At every byte: half a character is no text yet, the detokeniser keeps it."""
    wanted = parse(text)
    assert wanted.content.startswith("a")
    encoded = text.encode()
    for i in range(len(encoded) + 1):
        first = encoded[:i].decode(errors="ignore")
        parser = StreamParser()
        events = parser.push(first) + parser.push(text[len(first) :]) + parser.finish()
        assert parser.message == wanted
        assert "".join(e.text for e in events if isinstance(e, ContentDelta)) == wanted.content
    assert wanted.errors or wanted.tool_calls == (
        ToolCall("f", '{"a": "Zürich 🙂"}'),
        ToolCall("good", "{}"),
    )


def test_D6_through_the_detokeniser() -> None:
    """Tokens of one byte, as a model may write them; a marker is one token or many."""
    text = "r</think>a" + WELL
    tokenizer = chat_tokenizer()
    for ids in (tokenize(tokenizer, text), tokenize(plain_tokenizer(tokenizer), text)):
        detokenizer, parser = IncrementalDetokenizer(tokenizer), StreamParser()
        for token in ids:
            parser.push(detokenizer.push(token))
        parser.finish()
        assert parser.message == parse(text)
    assert len(ids) == len(text.encode())
