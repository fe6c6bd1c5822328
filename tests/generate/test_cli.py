"""The ``dsv4`` command over the fake model: outputs, messages, exit codes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jax.errors import JaxRuntimeError
from typer.testing import CliRunner, Result

from dsv4_jax import __version__, cli
from tests.support.fake_model import FakeModel, fake_config, fake_params
from tests.support.tokenizer import byte_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that "loads" as a model which counts upwards from the last id."""
    _use(monkeypatch, FakeModel(follow=True))
    return tmp_path


def _use(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setattr(cli, "model_config", lambda path: fake_config())
    monkeypatch.setattr(cli, "_load", lambda *_: (model, fake_params()))


def _run(*arguments: object) -> Result:
    # Messages must not depend on the width of a terminal.
    return CliRunner().invoke(cli.app, list(map(str, arguments)), env={"COLUMNS": "60"})


def _generate(checkpoint: Path, *arguments: object) -> Result:
    return _run("generate", "--checkpoint", checkpoint, *arguments)


def _with_tokenizer(checkpoint: Path) -> None:
    byte_tokenizer().save(str(checkpoint / "tokenizer.json"))


def test_version() -> None:
    result = _run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"dsv4_jax {__version__} ")


def test_ids_in_ids_out(checkpoint: Path) -> None:
    result = _generate(checkpoint, "--ids", "1 2, 30", "--max-new-tokens", 4)
    assert (result.exit_code, result.stdout) == (0, "31 32 33 34\n")
    assert "temperature 0.0" in result.stderr
    assert "prefill 3 tokens in" in result.stderr
    assert "decode 3 tokens in" in result.stderr
    assert "compilation" in result.stderr


def test_prompt_streams_text(checkpoint: Path) -> None:
    _with_tokenizer(checkpoint)
    wanted = byte_tokenizer().decode(range(66, 76))
    result = _generate(checkpoint, "--ids", "65", "--max-new-tokens", 10)
    assert (result.exit_code, result.stdout) == (0, wanted + "\n")
    first = byte_tokenizer().encode("A").ids[-1]
    prompt = checkpoint / "prompt with spaces é.txt"
    prompt.write_text("zA", encoding="utf-8")
    for source in (("--prompt", "zA"), ("--prompt-file", prompt)):
        result = _generate(checkpoint, *source, "--max-new-tokens", 3)
        assert result.stdout == byte_tokenizer().decode(range(first + 1, first + 4)) + "\n"


def test_bos_comes_first_where_the_tokenizer_says_so(checkpoint: Path) -> None:
    _with_tokenizer(checkpoint)
    bos, a = "!", byte_tokenizer().encode("A").ids[0]
    settings = {"add_bos_token": True, "bos_token": {"content": bos}}

    def counts(*source: str) -> str:
        return re.findall(r"prefill (\d+) tokens", _generate(checkpoint, *source).stderr)[0]

    assert counts("--prompt", "A") == "1"
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert counts("--prompt", "A") == "2"
    assert counts("--prompt", bos + "A") == "2"
    assert counts("--ids", str(a)) == "1"
    settings["add_bos_token"] = False
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert counts("--prompt", "A") == "1"


def test_cache_lengths_are_few(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is compiled anew, so that prompts of all lengths share some; --max-len is exact."""
    assert [cli._positions(n, 4096) for n in (1, 512, 513, 2048, 4000)] == [
        512, 512, 1024, 2048, 4096,
    ]  # fmt: skip
    assert cli._positions(40, 100) == 100
    assert cli._positions(5000, 4096) == 5000, "refused later, with the number that was asked for"
    seen: list[int] = []
    monkeypatch.setattr(cli, "stream", lambda *_, max_len, **__: seen.append(max_len) or iter(()))
    _generate(checkpoint, "--ids", "1 2")
    _generate(checkpoint, "--ids", "1 2", "--max-len", 80)
    assert seen == [512, 80]


def test_stop_cuts_before_it(checkpoint: Path) -> None:
    _with_tokenizer(checkpoint)
    text = byte_tokenizer().decode(range(41, 51))
    result = _generate(
        checkpoint, "--ids", "40", "--max-new-tokens", 20, "--stop", "zzz", "--stop", text[3:6]
    )
    assert (result.exit_code, result.stdout) == (0, text[:3] + "\n")


def test_held_back_text_is_shown_at_the_end(checkpoint: Path) -> None:
    _with_tokenizer(checkpoint)
    text = byte_tokenizer().decode(range(41, 46))
    result = _generate(
        checkpoint, "--ids", "40", "--max-new-tokens", 5, "--stop", text[3:] + "never"
    )
    assert result.stdout == text + "\n"


def test_defaults_of_the_checkpoint(checkpoint: Path) -> None:
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.95}))
    stderr = _generate(checkpoint, "--ids", "1", "--max-new-tokens", 1).stderr
    assert "temperature 0.6, top_p 0.95" in stderr
    assert "generation_config.json" in stderr
    stderr = _generate(checkpoint, "--ids", "1", "--temperature", 0, "--top-p", 1).stderr
    assert "temperature 0.0, top_p 1.0" in stderr
    path.write_text(json.dumps({"do_sample": False, "temperature": 0.6}))
    assert "temperature 0.0" in _generate(checkpoint, "--ids", "1").stderr
    path.write_text(json.dumps({"do_sample": True}))
    assert "temperature 1.0" in _generate(checkpoint, "--ids", "1").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "exactly one of --prompt, --prompt-file and --ids", id="no-prompt"),
        pytest.param(["--ids", "1", "--prompt", "x"], "exactly one of", id="two-prompts"),
        pytest.param(["--prompt", "hi"], "give token ids with --ids", id="C25-no-tokenizer"),
        pytest.param(["--ids", "1 x"], "--ids must be integers", id="ids-not-numbers"),
        pytest.param(["--ids", ""], "the prompt is empty", id="ids-empty"),
        pytest.param(["--ids", "1 97"], "must be in [0, 97), got 97", id="D11-id-high"),
        pytest.param(["--ids", "1", "--top-p", "0"], "top_p must be in (0, 1]", id="D7-top-p"),
        pytest.param(["--ids", "1", "--temperature", "nan"], "temperature must be", id="D7-nan"),
        pytest.param(["--ids", "1", "--max-new-tokens", "0"], "max_new_tokens", id="D7-none-new"),
        pytest.param(["--ids", "1 2 3", "--max-len", "2"], "max_len is 2", id="B2-prompt"),
        pytest.param(["--ids", "1", "--stop", "x"], "needs a tokenizer.json", id="stop-no-text"),
        pytest.param(["--ids", "1", "--precision", "fp3"], "'fp3'", id="precision"),
        pytest.param(["--ids", "1", "--seed", "-1"], "seed must be in", id="seed"),
        pytest.param(["--prompt-file", "/nowhere"], "--ids", id="file-no-tokenizer"),
    ],
)
def test_user_errors_are_one_line(checkpoint: Path, arguments: list[str], message: str) -> None:
    result = _generate(checkpoint, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--ids", "1 1000"], "must be in [0, 1000), got 1000", id="D11-id-high"),
        pytest.param(["--ids", "1", "--seed", 2**32], "seed must be in", id="seed"),
        pytest.param(["--ids", "1", "--max-len", 4097], "max_len 4097 exceeds", id="B2-max-len"),
        pytest.param(["--ids", "1", "--top-k", -1], "top_k must be", id="D7-top-k"),
    ],
)
def test_options_are_checked_before_weights_are_read(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[Any], message: str
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(cli, "_load", load)
    result = _generate(checkpoint, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("tokenizer.json", b"{", "not a readable tokenizer", id="C25-tokenizer"),
        pytest.param("generation_config.json", b"{", "not valid JSON", id="C2-json"),
        pytest.param("generation_config.json", b"[]", "must hold a JSON object", id="C2-list"),
        pytest.param(
            "generation_config.json", b'{"temperature": "x"}', "temperature", id="D7-text"
        ),
    ],
)
def test_broken_files_are_one_line(
    checkpoint: Path, name: str, content: bytes, message: str
) -> None:
    (checkpoint / name).write_bytes(content)
    result = _generate(checkpoint, "--ids", "1")
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert message in result.stderr


def test_unreadable_prompts(checkpoint: Path) -> None:
    _with_tokenizer(checkpoint)
    (checkpoint / "latin.txt").write_bytes(b"caf\xe9")
    for arguments, message in (
        (("--prompt-file", checkpoint / "latin.txt"), "not UTF-8"),
        (("--prompt-file", checkpoint / "missing.txt"), "No such file"),
        (("--prompt", ""), "the prompt is empty"),
        (("--ids", "1", "--stop", ""), "stop strings must not be empty"),
    ):
        result = _generate(checkpoint, *arguments)
        assert result.exit_code == 2
        assert message in result.stderr


def test_missing_checkpoint(tmp_path: Path) -> None:
    result = _generate(tmp_path / "absent", "--ids", "1")
    assert result.exit_code == 2
    assert "is not a directory" in result.stderr


def test_invalid_logits_are_reported(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, FakeModel(follow=True, poison_row=5, poison_at=3))
    result = _generate(checkpoint, "--ids", "5")
    assert result.exit_code == 2
    assert result.stdout == "6 7\n"
    assert "NaN" in result.stderr.splitlines()[-1]


def test_C25_ids_need_no_tokenizer(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said in a note; a tokenizer with too many tokens is one too, and an error for text."""
    stderr = _generate(checkpoint, "--ids", "1", "--max-new-tokens", 1).stderr
    assert f"note: {checkpoint} has no tokenizer.json: ids in, ids out\n" in stderr
    _with_tokenizer(checkpoint)
    assert "note: " not in _generate(checkpoint, "--ids", "1", "--max-new-tokens", 1).stderr
    monkeypatch.setattr(cli, "model_config", lambda path: fake_config(vocab_size=261))
    rule = "token ids must be < 261 (vocab_size), got up to 261"
    result = _generate(checkpoint, "--ids", "1", "--max-new-tokens", 1)
    assert result.exit_code == 0
    assert f"note: {checkpoint}: tokenizer.json: {rule}" in result.stderr
    result = _generate(checkpoint, "--prompt", "a")
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: {checkpoint}: tokenizer.json: {rule}")


@pytest.mark.parametrize("when", ["load", "decode"])
def test_ctrl_c(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def interrupt(*_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(*((cli, "_load") if when == "load" else (cli._Output, "token")), interrupt)
    result = _generate(checkpoint, "--ids", "1")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert "Traceback" not in result.stderr


def test_options_of_typer_are_plain_text(checkpoint: Path) -> None:
    result = _generate(checkpoint, "--ids", "1", "--top-k", "many")
    assert result.exit_code == 2
    assert "--top-k" in result.stderr


def test_an_op_that_fails_is_one_line(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library without code for the GPU, say: the op's own message, no traceback."""

    def fail(*_: object) -> None:
        raise JaxRuntimeError("UNIMPLEMENTED: dsv4.cache_write: built for sm_90a,\ndevice is sm_80")

    monkeypatch.setattr(cli, "_load", fail)
    result = _generate(checkpoint, "--ids", "1")
    assert result.exit_code == 2
    assert "dsv4.cache_write: built for sm_90a, device is sm_80" in result.stderr
    assert "Traceback" not in result.stderr
