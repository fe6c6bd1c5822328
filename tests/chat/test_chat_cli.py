"""``dsv4 chat`` over a model that says what it was told."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dsv4_jax import bundled_checkpoint, cli
from dsv4_jax.chat import check_tokenizer
from dsv4_jax.checkpoint.read import read_config
from dsv4_jax.cli import chat
from dsv4_jax.cli.common import Leave
from dsv4_jax.config import ModelConfig
from dsv4_jax.text import IncrementalDetokenizer, encode, load_tokenizer
from tests.support.fake_model import fake_params
from tests.support.official import tiny_config
from tests.support.scripted_model import ScriptedModel
from tests.support.tokenizer import CHAT_TOKENS, chat_tokenizer

TOKENIZER = chat_tokenizer()
VOCAB = 270
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="é" string="false">[1]</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)


class Bench:
    """A checkpoint directory and the answers of its model."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self._patch = monkeypatch
        TOKENIZER.save(str(path / "tokenizer.json"))
        self.config()
        self.answers("r</think>a")

    def config(self, **fields: Any) -> None:
        config = {**tiny_config(), "vocab_size": VOCAB, **fields}
        (self.path / "config.json").write_text(json.dumps(config))

    def answers(self, *texts: str, **fields: Any) -> None:
        scripts = tuple(tuple(encode(TOKENIZER, text)) for text in texts)
        model = ScriptedModel(scripts=scripts, vocab=VOCAB, **fields)
        self._patch.setattr(chat, "load_model", lambda *_, **__: (model, fake_params()))

    def run(self, lines: str | bytes, *arguments: object) -> Result:
        command = ["chat", "--checkpoint", str(self.path), "--max-len", "512", *map(str, arguments)]
        return CliRunner().invoke(cli.app, command, input=lines, env={"COLUMNS": "60"})


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def _cache_lines(result: Result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("cache: ")]


def test_answer_and_reasoning_go_apart(bench: Bench) -> None:
    result = bench.run("hi\n")
    assert (result.exit_code, result.stdout) == (0, "a\n"), result.stderr
    assert result.stderr.splitlines()[-2:] == ["cache: empty, prefill of 6", "r"]


def test_turns_reuse_the_cache_in_chat_mode(bench: Bench) -> None:
    bench.answers("one", "two\n", "three")
    result = bench.run("a\n\nb\nc", "--no-thinking", "--system", "S")
    assert (result.exit_code, result.stdout) == (0, "one\ntwo\nthree\n"), result.stderr
    # BOS S User a Assistant </think> one; EOS User b Assistant </think>.
    assert _cache_lines(result) == [
        "cache: empty, prefill of 6",
        "cache: 9 tokens reused, prefill of 5",
        "cache: 18 tokens reused, prefill of 5",
    ]


def test_dropped_reasoning_is_a_prompt_of_its_own(bench: Bench) -> None:
    bench.answers("r</think>a", "s</think>b")
    lines = _cache_lines(bench.run("x\ny\n"))
    assert lines[1] == "cache: the prompt does not continue its 8 tokens, prefill of 11"


def test_calls_are_shown_and_their_results_asked_for(bench: Bench, tmp_path: Path) -> None:
    bench.answers(f"r</think>t{CALL}", "s</think>done", "u</think>bye")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    seen: list[Any] = []
    real = chat.encode

    def spy(messages: Any, *options: Any) -> str:
        seen.append(list(messages))
        return real(messages, *options)

    bench._patch.setattr(chat, "encode", spy)
    result = bench.run("go\n22°\nthanks\n", "--tools", tmp_path / "tools.json", "--max-len", 4000)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == 't\n{"name": "f", "arguments": {"é": [1]}}\ndone\nbye\n'
    assert [message["role"] for message in seen[-1]] == [
        *("user", "assistant", "tool", "assistant", "user"),
    ]
    assert seen[-1][2]["content"] == "22°"
    [_, second, third] = _cache_lines(result)
    assert "tokens reused" in second, "with tools all reasoning stays in the prompt"
    assert "tokens reused" in third


def test_malformed_answers_are_said_and_not_shown(bench: Bench) -> None:
    bench.answers("r</think>a" + CALL.replace("false", "maybe"))
    result = bench.run("x\n")
    assert (result.exit_code, result.stdout) == (0, "a\n")
    assert "malformed answer, character 10: tool calls: parameter 'é' must have" in result.stderr
    assert "DSML" not in result.output
    assert "not shown: " in result.stderr


def test_answers_are_cut_off(bench: Bench) -> None:
    bench.answers("x" * 600)
    result = bench.run("a\n", "--no-thinking", "--max-new-tokens", 3)
    assert result.stdout == "xxx\n"
    assert "cut off after 3 tokens (--max-new-tokens)" in result.stderr
    result = bench.run("a\nb\n", "--no-thinking")
    assert result.stdout == "x" * (512 - 5 + 1) + "\n"
    assert "(--max-len)" in result.stderr
    assert result.exit_code == 2
    assert "the conversation has 518 tokens, --max-len is 512" in result.stderr


def test_D15_ctrl_c_stops_the_answer_and_the_cache_stays(bench: Bench) -> None:
    """Pressed while the second of three tokens is shown; what there is stays in the history."""
    bench.answers("abc", "def")
    real, count = IncrementalDetokenizer.push, 0

    def push(self: IncrementalDetokenizer, *tokens: int) -> str:
        nonlocal count
        count += 1 if len(tokens) == 1 else 0
        if count == 2:
            count += 1
            signal.raise_signal(signal.SIGINT)
        return real(self, *tokens)

    bench._patch.setattr(IncrementalDetokenizer, "push", push)
    handler = signal.getsignal(signal.SIGINT)
    result = bench.run("x\ny\n", "--no-thinking")
    assert (result.exit_code, result.stdout) == (0, "ab\ndef\n"), result.stderr
    assert "stopped" in result.stderr
    # BOS User x Assistant </think> a is in the cache; b was not fed yet.
    assert _cache_lines(result)[1] == "cache: 6 tokens reused, prefill of 6"
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_twice_at_once(bench: Bench) -> None:
    """The second does not wait for the step; a message without an answer is forgotten."""
    real = chat.Session.stream

    def stream(*arguments: Any, **options: Any) -> Any:
        yield from ()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    def first_time(*arguments: Any, **options: Any) -> Any:
        bench._patch.setattr(chat.Session, "stream", real)
        return stream()

    bench._patch.setattr(chat.Session, "stream", first_time)
    result = bench.run("x\nx\n")
    assert (result.exit_code, result.stdout) == (0, "a\n"), result.stderr
    assert "nothing was answered: that message is forgotten" in result.stderr
    assert result.exc_info
    assert result.exc_info[0] is Leave, "XLA may crash as Python takes it down"


def test_ctrl_c_of_an_answer_does_not_reach_the_watcher() -> None:
    """It ends the process where Python does not come to handle a Ctrl-C (`readable_errors`)."""
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write)
    try:
        with chat._ctrl_c() as pressed:
            signal.raise_signal(signal.SIGINT)
            assert pressed()
        with pytest.raises(BlockingIOError):
            os.read(read, 1)
    finally:
        assert signal.set_wakeup_fd(before) == write
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_at_the_prompt(bench: Bench, times: int) -> None:
    presses = ["press"] * times

    def read(_: str) -> str:
        if presses:
            presses.pop()
            raise KeyboardInterrupt
        if times == 1:
            presses.extend(["press"] * 2)
            return "x"
        raise AssertionError("asked again after the second Ctrl-C")

    bench._patch.setattr(chat, "_read", read)
    result = bench.run("")
    assert result.exit_code == 0
    assert result.stdout == ("a\n" if times == 1 else "")
    assert "Ctrl-C again, or Ctrl-D, to leave" in result.stderr


def test_on_a_terminal_an_error_ends_the_turn_only(bench: Bench) -> None:
    """Through a pipe it ends the program, see the errors below. Prompts say what is asked for."""
    bench.answers(f"r</think>{CALL}")
    lines, prompts = iter(["\udcff", "go", KeyboardInterrupt, EOFError]), []

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    bench._patch.setattr(chat, "_is_terminal", lambda: True)
    bench._patch.setattr("builtins.input", ask)
    result = bench.run("")
    assert result.exit_code == 0
    assert result.stdout == '{"name": "f", "arguments": {"é": [1]}}\n'
    assert "error: encode: messages must be valid Unicode" in result.stderr
    assert prompts == ["> ", "> ", "result of f> ", "> "], "Ctrl-C leaves a call without a result"


def test_invalid_logits_end_the_turn(bench: Bench) -> None:
    bench.answers("r</think>a", poison=0)
    result = bench.run("x\n")
    assert result.exit_code == 2
    assert "NaN" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--tools", "{path}/none.json"], "No such file", id="tools-missing"),
        pytest.param(["--tools", "{path}/config.json"], "a JSON list of tools", id="tools-object"),
        pytest.param(["--tools", "{path}/bad.json"], "not valid JSON", id="tools-json"),
        pytest.param(["--tools", "{path}/flat.json"], "with a function", id="tools-flat"),
        pytest.param(["--max-new-tokens", "0"], "--max-new-tokens must be >= 1", id="D7-none-new"),
        pytest.param(["--temperature", "nan"], "temperature must be", id="D7-nan"),
        pytest.param(["--seed", "-1"], "--seed must be in", id="seed"),
        pytest.param(["--max-len", "0"], "--max-len must be 1..1048576", id="max-len"),
        pytest.param(["--max-len", "5"], "has 6 tokens, --max-len is 5", id="B2-prompt"),
        pytest.param(["--precision", "fp3"], "'fp3'", id="precision"),
        pytest.param(["--checkpoint", "{path}/none"], "is not a directory", id="checkpoint"),
    ],
)
def test_user_errors_are_one_line(bench: Bench, arguments: list[str], message: str) -> None:
    (bench.path / "bad.json").write_text("{")
    (bench.path / "flat.json").write_text('[{"name": "f"}]')
    result = bench.run("hi\n", *(text.format(path=bench.path) for text in arguments))
    assert (result.exit_code, result.stdout) == (2, "")
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_D3_input_that_is_not_utf8(bench: Bench) -> None:
    result = bench.run(b"caf\xe9\n")
    assert result.exit_code == 2
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr


def test_C25_no_tokenizer(bench: Bench) -> None:
    (bench.path / "tokenizer.json").unlink()
    result = bench.run("hi\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "has no tokenizer.json: chat needs one with the chat tokens" in result.stderr


def test_C25_chat_tokens_are_missing(bench: Bench) -> None:
    tokens = tuple(t for t in CHAT_TOKENS if t not in ("<think>", "</think>", "｜DSML｜"))
    tokenizer = chat_tokenizer(tokens)
    tokenizer.save(str(bench.path / "tokenizer.json"))
    result = bench.run("hi\n")
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.endswith("it lacks </think>, ｜DSML｜"), "<think> is a token of all of them"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        pytest.param({"vocab_size": 200}, "vocab_size 200, its largest is 262", id="C25-vocab"),
        pytest.param({"bos_token_id": 7}, "as bos_token_id, 7, got 0", id="C25-bos"),
        pytest.param({"eos_token_id": 2}, "as eos_token_id, 2, got 1", id="C25-eos"),
    ],
)
def test_tokenizer_of_another_model(bench: Bench, fields: Any, message: str) -> None:
    bench.config(**fields)
    result = bench.run("hi\n")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_the_bundled_model_has_the_chat_tokens() -> None:
    directory = bundled_checkpoint()
    config = ModelConfig.from_hf(read_config(directory), source=str(directory))
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    check_tokenizer(tokenizer, config, str(directory))
