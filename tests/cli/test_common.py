"""What the commands share: progress on stderr, whole files, exit codes."""

import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from rich.console import Console
from typer.testing import CliRunner

from dsv4_jax import cli
from dsv4_jax.checkpoint.load import _bar
from dsv4_jax.cli.common import (
    BAD_INPUT,
    BROKEN_PIPE,
    EXIT_CODES,
    INTERRUPTED,
    progress_bar,
    write_whole,
)
from dsv4_jax.generate import TokenEvent

ROOT = Path(__file__).parents[2]


def _console(terminal: bool) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=100), text


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_of_a_computation(terminal: bool) -> None:
    """First it compiles, then it counts; a pipe gets nothing."""
    console, text = _console(terminal)
    with progress_bar(console, "tokens") as progress:
        before = text.getvalue()
        progress(3, 12)
    assert ("compiling" in before) == terminal
    assert ("3/12" in text.getvalue()) == terminal
    assert ("tokens" in text.getvalue()) == terminal
    assert terminal or text.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_of_a_prompt(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    console, text = _console(terminal)
    cli._run(console, 3, iter([TokenEvent(0, None, "eos")]), cli._Output(None, []))
    assert ("compiling, and prefill of 3 tokens" in text.getvalue()) == terminal
    assert "prefill 3 tokens in " in text.getvalue()
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate --seed x", "'--seed'"),
        ("inspect --max-len 1.5", "'--max-len'"),
        ("generate --seed", "'--seed' requires an argument"),
        ("generate --unknown", "--unknown (see "),
        ("convert a", "DST"),
        ("--unknown", "--unknown (see "),
        ("no-such-command", "'no-such-command' (see "),
    ],
)
def test_wrong_options_are_one_line(arguments: str, message: str) -> None:
    result = CliRunner().invoke(cli.app, arguments.split())
    assert (result.exit_code, result.stdout) == (BAD_INPUT, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_help_is_shown_whole() -> None:
    """Without arguments, or asked for."""
    for arguments, code in (([], BAD_INPUT), (["--help"], 0), (["generate", "--help"], 0)):
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == code
        assert "Usage: " in result.output and "\n  --help " in result.output


@pytest.mark.parametrize(
    ("prompt", "events", "prefill", "decode"),
    [
        # 3 + 5 steps of 0.1 s in the first call, one of 0.5 s behind it.
        pytest.param(3, 7, "0.30 s (10.0 tokens/s)", "6 tokens in 1.00 s", id="two-calls"),
        pytest.param(3, 2, "0.60 s (5.0 tokens/s)", "1 tokens in 0.20 s", id="one-call"),
        pytest.param(16, 2, "0.80 s (20.0 tokens/s)", "1 tokens in 0.00 s", id="prefill"),
    ],
)
def test_speeds(
    prompt: int, events: int, prefill: str, decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call of a short prompt also makes tokens: its time is shared out by steps."""
    now = 100.0

    def made() -> Iterator[TokenEvent]:
        nonlocal now
        now += 0.8
        for i in range(events):
            now += 0.5 if i == 6 else 0
            yield TokenEvent(0, i, "length" if i + 1 == events else None)

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr("time.perf_counter", lambda: now)
    console, text = _console(False)
    cli._run(console, prompt, made(), cli._Output(None, []))
    assert f"prefill {prompt} tokens in {prefill}, decode {decode}" in text.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_of_a_load(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    console, text = _console(terminal)
    monkeypatch.setattr("rich.console.Console", lambda stderr: console)
    monkeypatch.setattr("sys.stderr", text)
    monkeypatch.setattr(text, "isatty", lambda: terminal, raising=False)
    with _bar(None, 4000) as advance:
        advance(1000)
    assert ("loading" in text.getvalue()) == terminal
    assert ("1.0/4.0 kB" in text.getvalue()) == terminal
    assert terminal or text.getvalue() == ""


def test_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "b ericht ü.json", tmp_path / "link"
    link.symlink_to(path.name)
    mask = os.umask(0o027)
    try:
        write_whole(link, "é1")
    finally:
        os.umask(mask)
    assert link.is_symlink()
    assert path.read_text(encoding="utf-8") == "é1"
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o600)
    write_whole(path, "2")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("2", 0o600)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "3")
    assert path.read_text() == "2"
    assert sorted(tmp_path.iterdir()) == [path, link], "no temporary file is left"
    write_whole(Path(os.devnull), "4")
    assert not Path(os.devnull).is_file()


def test_exit_codes_are_documented() -> None:
    """In the help and in README.md alike."""
    help_text = " ".join(CliRunner().invoke(cli.app, ["--help"]).stdout.split())
    assert EXIT_CODES.removesuffix(".") in help_text.replace("half- written", "half-written")
    assert [int(code) for code in re.findall(r"(\d+): ", EXIT_CODES)] == [
        0, BROKEN_PIPE, BAD_INPUT, INTERRUPTED,
    ]  # fmt: skip
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, after = readme.split("| exit code |")
    table = after.split("\n\n")[0]
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)] == [
        0, BROKEN_PIPE, BAD_INPUT, INTERRUPTED,
    ]  # fmt: skip
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__
        assert f"`dsv4 {name}" in readme
