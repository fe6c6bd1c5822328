"""Faults around the bundled model, the BOS setting and the compilation cache of the command."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner

import dsv4_jax.checkpoint
from dsv4_jax import CheckpointError, bundled_checkpoint, cli, env
from dsv4_jax.cli import common
from dsv4_jax.text import bos_token
from tests.support.fake_model import FakeModel, fake_config, fake_params
from tests.support.tokenizer import byte_tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Loads as a model that counts upwards."""
    monkeypatch.setattr(cli, "model_config", lambda path: fake_config())
    monkeypatch.setattr(cli, "_load", lambda *_: (FakeModel(follow=True), fake_params()))
    return tmp_path


def test_bundled_model_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that left the data out."""
    monkeypatch.setattr(dsv4_jax.checkpoint, "__file__", str(tmp_path / "checkpoint/__init__.py"))
    with pytest.raises(CheckpointError, match="lacks the bundled model"):
        bundled_checkpoint()
    result = CliRunner().invoke(cli.app, ["generate", "--prompt", "def "])
    assert result.exit_code == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "lacks the bundled model" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "not valid JSON", id="json"),
        pytest.param("[]", "must hold a JSON object, got list", id="list"),
        pytest.param('{"add_bos_token": 1}', "add_bos_token must be true or false", id="flag"),
        pytest.param('{"add_bos_token": true}', "must be a token of the tokenizer", id="no-token"),
        pytest.param(
            '{"add_bos_token": true, "bos_token": "<s>"}', "got '<s>'", id="unknown-token"
        ),
        pytest.param(
            '{"add_bos_token": true, "bos_token": {"content": 3}}', "got 3", id="odd-token"
        ),
    ],
)
def test_bad_tokenizer_config(checkpoint: Path, content: str, message: str) -> None:
    (checkpoint / "tokenizer_config.json").write_text(content, encoding="utf-8")
    byte_tokenizer().save(str(checkpoint / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json") as caught:
        bos_token(checkpoint, byte_tokenizer())
    assert message in str(caught.value)
    arguments = ["generate", "--checkpoint", str(checkpoint), "--prompt", "A"]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert message in line


def test_unwritable_cache_directory(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Said once; nothing else changes. A file in the way stops root as well."""
    blocked = checkpoint / "file"
    blocked.write_bytes(b"")
    monkeypatch.setattr(common, "compilation_cache", lambda: str(blocked / "dsv4_jax"))
    arguments = ["generate", "--checkpoint", str(checkpoint), "--ids", "1", "--max-new-tokens", "2"]
    result = CliRunner().invoke(cli.app, arguments)
    assert (result.exit_code, result.stdout) == (0, "2 3\n")
    assert result.stderr.count("no compilation cache: ") == 1
    assert not recwarn.list


@pytest.fixture
def cache_enabled() -> Iterator[None]:
    """As outside the tests, for those who only ask."""
    assert env.compilation_cache() is None, "the tests keep no programs"
    jax.config.update("jax_enable_compilation_cache", True)
    yield
    jax.config.update("jax_enable_compilation_cache", False)


@pytest.mark.usefixtures("cache_enabled")
def test_place_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    assert env.compilation_cache() == "/somewhere"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert env.compilation_cache() is None, "JAX takes that for none"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    for home, base in (
        (str(tmp_path / "xdg"), tmp_path / "xdg"),
        ("relative", tmp_path / ".cache"),
        ("", tmp_path / ".cache"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        found = Path(env.compilation_cache() or "")
        assert found.parent == base / "dsv4_jax"
        # E12: another package or another library contract never reads it.
        assert found.name.startswith(f"{dsv4_jax.__version__}-abi{dsv4_jax.library.ABI}-")
    assert not list(tmp_path.iterdir()), "asking makes no directory"


def test_cache_directory_is_private(tmp_path: Path) -> None:
    """JAX runs what it finds there."""
    env.check_writable(str(tmp_path / "cache" / "dsv4_jax"))
    assert (tmp_path / "cache" / "dsv4_jax").stat().st_mode & 0o077 == 0
