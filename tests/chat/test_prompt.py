"""Messages to prompt text: the release's vectors, and its corners one by one.

The corners' texts were compared with the release's own encoder, as were 90,000 random
conversations (2026-11-26).
"""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv4_jax.chat import encode
from dsv4_jax.chat.tokens import MAXIMUM_EFFORT, RESPONSE_FORMAT, TASKS, TOOLS

DATA = Path(__file__).parents[1] / "data" / "encoding"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
U, A = "<｜User｜>", "<｜Assistant｜>"
CALL = """

<｜DSML｜tool_calls>
<｜DSML｜invoke name="f">
{}
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""


def system(text: str = "S", **fields: Any) -> dict[str, Any]:
    return {"role": "system", "content": text, **fields}


def user(text: str = "u", **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **fields}


def assistant(text: str | None = "a", reasoning: str | None = None, **fields: Any) -> Any:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning, **fields}


def call(name: str = "f", arguments: Any = "{}", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **fields}


def result(text: Any, of: str | None = None) -> dict[str, Any]:
    return {"role": "tool", "content": text} | ({} if of is None else {"tool_call_id": of})


def tool(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def test_vector_with_tools() -> None:
    given = json.loads((DATA / "input_1.json").read_text("utf-8"))
    wanted = (DATA / "output_1.txt").read_text("utf-8")
    assert encode(given["messages"], tools=given["tools"]) == wanted
    first, *rest = given["messages"]
    assert encode([{**first, "tools": given["tools"]}, *rest]) == wanted


def test_vector_of_two_turns() -> None:
    given = json.loads((DATA / "input_2.json").read_text("utf-8"))
    assert encode(given) == (DATA / "output_2.txt").read_text("utf-8")


TALK = [system(), user("u1"), assistant("a1", "r1"), user("u2")]
CALLED = assistant(None, "r", tool_calls=[call(id="x"), call(id="y")])
CALLED_TEXT = f"""{U}u{A}<think>r</think>

<｜DSML｜tool_calls>
<｜DSML｜invoke name="f">

</｜DSML｜invoke>
<｜DSML｜invoke name="f">

</｜DSML｜invoke>
</｜DSML｜tool_calls>{EOS}"""

CASES = [
    pytest.param([user()], {}, f"{U}u{A}<think>", id="thinking"),
    pytest.param([user()], {"thinking": False}, f"{U}u{A}</think>", id="chat"),
    pytest.param(
        TALK, {}, f"S{U}u1{A}</think>a1{EOS}{U}u2{A}<think>", id="earlier-reasoning-is-dropped"
    ),
    pytest.param(
        TALK,
        {"drop_thinking": False},
        f"S{U}u1{A}<think>r1</think>a1{EOS}{U}u2{A}<think>",
        id="all-reasoning-is-kept",
    ),
    pytest.param(
        TALK,
        {"thinking": False},
        f"S{U}u1{A}</think>a1{EOS}{U}u2{A}</think>",
        id="chat-mode-has-no-reasoning",
    ),
    pytest.param(
        [system(tools=[tool()]), *TALK[1:]],
        {},
        "S\n\n" + '{"name": "f"}'.join(TOOLS) + f"{U}u1{A}<think>r1</think>a1{EOS}{U}u2{A}<think>",
        id="tools-keep-reasoning",
    ),
    pytest.param(
        [user()],
        {"tools": [tool(), tool("é")], "thinking": False},
        "\n\n" + '{"name": "f"}\n{"name": "é"}'.join(TOOLS) + f"{U}u{A}</think>",
        id="tools-without-a-system-message",
    ),
    pytest.param(
        [system(), user()],
        {"response_format": {"type": "object"}},
        f'S\n\n{RESPONSE_FORMAT}{{"type": "object"}}{U}u{A}<think>',
        id="response-format",
    ),
    pytest.param(
        [{"role": "developer", "content": "D", "tools": [tool()], "response_format": {"a": 1}}],
        {},
        f'{U}D\n\n{json.dumps({"name": "f"}).join(TOOLS)}\n\n{RESPONSE_FORMAT}{{"a": 1}}{A}<think>',
        id="developer-is-a-user-turn",
    ),
    pytest.param(
        [{"role": "developer", "content": "D"}, assistant(), user()],
        {},
        f"a{EOS}{U}u{A}<think>",
        id="earlier-developer-goes-with-the-reasoning",
    ),
    pytest.param(
        [{"role": "developer", "content": "D"}, assistant(), user()],
        {"thinking": False},
        f"{U}D{A}</think>a{EOS}{U}u{A}</think>",
        id="earlier-developer-stays-in-chat-mode",
    ),
    pytest.param(
        [user()],
        {"reasoning_effort": "max"},
        f"{MAXIMUM_EFFORT}{U}u{A}<think>",
        id="effort-max",
    ),
    pytest.param([user()], {"reasoning_effort": "high"}, f"{U}u{A}<think>", id="effort-high"),
    pytest.param(
        [user()],
        {"reasoning_effort": "max", "thinking": False},
        f"{U}u{A}</think>",
        id="effort-max-in-chat-mode",
    ),
    pytest.param([user("a"), user("b")], {}, f"{U}a\n\nb{A}<think>", id="user-turns-merge"),
    pytest.param(
        [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
        {},
        f"{U}ab{A}<think>",
        id="text-parts",
    ),
    pytest.param(
        [user(), CALLED, result("2", "y"), user("mind"), result("1", "x")],
        {"drop_thinking": False},
        f"{CALLED_TEXT}{U}<tool_result>1</tool_result>\n\nmind\n\n<tool_result>2</tool_result>"
        f"{A}<think>",
        id="results-in-the-order-of-the-calls",
    ),
    pytest.param(
        [user(), CALLED, result("2"), result("1")],
        {"drop_thinking": False},
        f"{CALLED_TEXT}{U}<tool_result>2</tool_result>\n\n<tool_result>1</tool_result>{A}<think>",
        id="results-without-ids-as-they-come",
    ),
    pytest.param(
        [
            user(),
            CALLED,
            result([{"type": "text", "text": "1"}, {"type": "image"}], "x"),
            assistant(),
        ],
        {},
        f"{U}u{A}</think>"
        + CALLED_TEXT.split("</think>")[1]
        + f"{U}<tool_result>1\n\n[Unsupported image]</tool_result>{A}<think></think>a{EOS}",
        id="results-are-a-user-turn-before-which-reasoning-goes",
    ),
    pytest.param(
        [user(), assistant("t", tool_calls=[call(arguments='{"a": "x\\ny", "b": [1,"é"]}')])],
        {"thinking": False},
        f"{U}u{A}</think>t"
        + CALL.format(
            '<｜DSML｜parameter name="a" string="true">x\ny</｜DSML｜parameter>\n'
            '<｜DSML｜parameter name="b" string="false">[1, "é"]</｜DSML｜parameter>'
        )
        + EOS,
        id="arguments",
    ),
    pytest.param(
        [user(), assistant("", tool_calls=[call(arguments="no json")])],
        {"thinking": False},
        f"{U}u{A}</think>"
        + CALL.format(
            '<｜DSML｜parameter name="arguments" string="true">no json</｜DSML｜parameter>'
        )
        + EOS,
        id="arguments-that-are-no-json",
    ),
    pytest.param(
        [user(), assistant("a", "r", wo_eos=True)],
        {},
        f"{U}u{A}<think>r</think>a",
        id="to-be-continued",
    ),
    pytest.param(
        [user(task="title")], {"thinking": False}, f"{U}u{TASKS['title']}", id="task-title"
    ),
    pytest.param([user(task="action")], {}, f"{U}u{A}<think>{TASKS['action']}", id="task-action"),
    pytest.param(
        [user(task="query"), assistant("q", "r"), user()],
        {"drop_thinking": False},
        f"{U}u{TASKS['query']}q{EOS}{U}u{A}<think>",
        id="the-answer-to-a-task-has-no-reasoning",
    ),
    pytest.param(
        [{"role": "latest_reminder", "content": "now"}, user()],
        {},
        f"<｜latest_reminder｜>now{U}u{A}<think>",
        id="latest-reminder",
    ),
    pytest.param(
        [user(), {"role": "latest_reminder", "content": "now"}],
        {},
        f"{U}u{A}<think><｜latest_reminder｜>now",
        id="latest-reminder-after-the-user",
    ),
    pytest.param([system(None), user()], {}, f"{U}u{A}<think>", id="empty-system"),
]


@pytest.mark.parametrize(("messages", "options", "wanted"), CASES)
def test_corners(messages: list[Any], options: dict[str, Any], wanted: str) -> None:
    kept = json.dumps(messages)
    assert encode(messages, **options) == BOS + wanted
    assert encode(messages, add_default_bos=False, **options) == wanted
    assert json.dumps(messages) == kept, "the caller's messages are left alone"


def test_arguments_may_be_an_object() -> None:
    """The release takes JSON text only and nests an object in a parameter ``arguments``."""
    texts = [
        encode([user(), assistant(tool_calls=[call(arguments=given)])])
        for given in ({"a": [1, "x"]}, '{"a": [1, "x"]}')
    ]
    assert texts[0] == texts[1]


def test_context_is_what_is_there_already() -> None:
    text = encode(TALK[3:], context=TALK[:3])
    assert text == f"{U}u2{A}<think>"
    assert encode(TALK[3:], context=TALK[:3], reasoning_effort="max") == text
    called = [user(), assistant("", tool_calls=[call(id="x"), call(id="y")])]
    late = encode([result("2", "y"), result("1", "x")], context=called)
    assert late == (f"{U}<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>{A}<think>"), (
        "the order of the calls is the context's"
    )
    with_tools = encode(TALK[1:], context=TALK[:1], tools=[tool()])
    assert with_tools == f"{U}u1{A}<think>r1</think>a1{EOS}{U}u2{A}<think>"
    assert encode(TALK[1:2], context=[user()], tools=[tool()]) == f"{U}u1{A}<think>"
