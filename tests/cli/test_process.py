"""The commands as processes: Ctrl-C, a closed pipe, and E11: where and how Python runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from dsv4_jax import cli
from tests.support import tiny
from tests.support.install import read_only_copy
from tests.support.tokenizer import ascii_chat_tokenizer, ascii_tokenizer

ROOT = Path(__file__).parents[2]

# An editable installation would lead back to the checkout.
ELSEWHERE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
"""


def start(
    code: str,
    *arguments: object,
    options: tuple[str, ...] = (),
    path: Path = ROOT,
    **variables: str,
) -> subprocess.Popen[str]:
    """Python with ``code`` and the package under ``path``."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DSV4_", "JAX_", "PYTHON"))
    }
    environment |= {"PYTHONPATH": str(path), "JAX_PLATFORMS": "cpu", "COLUMNS": "80"}
    return subprocess.Popen(
        [sys.executable, "-B", "-P", *options, "-c", code, *map(str, arguments)],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of the tiny release, so that compiling takes little, and a tokenizer."""
    config, tensors = tiny.official()
    config |= {"num_hidden_layers": 1, "compress_ratios": [0, 0], "num_hash_layers": 1}
    config |= {"eos_token_id": 2**20}  # generation ends by its length alone
    kept = {name: raw for name, raw in tensors.items() if not name.startswith("layers.")}
    kept |= {name: raw for name, raw in tensors.items() if name.startswith("layers.0.")}
    path = tmp_path_factory.mktemp("checkpoint") / "mödel mit leerzeichen"
    tiny.write(path, config, kept)
    ascii_tokenizer().save(str(path / "tokenizer.json"))
    (path / "täxt file.txt").write_text("def f(x): return [x]\n", encoding="utf-8")
    return path


# Ctrl-C.

BLOCKED = """
import hashlib, sys
from rich.console import Console
from dsv4_jax.cli.common import readable_errors
with readable_errors(Console(stderr=True)):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, of which Python sees nothing
"""
GENERATE = "from dsv4_jax.cli import main; main()"


@pytest.mark.parametrize("what", ["blocked", "generating"])
def test_ctrl_c(checkpoint: Path, what: str) -> None:
    """One line, at once: also inside native code, and while tokens come."""
    if what == "blocked":
        process = start(BLOCKED)
    else:
        arguments = ("--checkpoint", checkpoint, "--ids", "1 2", "--max-new-tokens", 100_000)
        process = start(GENERATE, "generate", *arguments, JAX_ENABLE_COMPILATION_CACHE="0")
    assert process.stdout
    assert process.stdout.read(1)
    time.sleep(0.5)  # into the native code
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert time.monotonic() - sent < 20  # loaded machines; alone it is 1 s or less
    assert process.returncode == 130
    lines = stderr.splitlines()
    assert lines.count("interrupted") == 1
    assert lines[-1] == "interrupted"
    assert "Traceback" not in stderr


def test_closed_pipe() -> None:
    process = start(GENERATE, "inspect", "--json")
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(60) == 1
    process.stderr.close()
    assert stderr == ""


# E11.

COMMANDS = (
    ELSEWHERE
    + """
import json
from typer.testing import CliRunner
from dsv4_jax import cli
done = []
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(cli.app, arguments, input="a\\n")
    done.append([result.exit_code, result.stdout, result.stderr, repr(result.exception)])
print(json.dumps({"file": cli.__file__, "done": done, "debug": __debug__}))
"""
)


@pytest.fixture
def moved(tmp_path: Path) -> Generator[Path]:
    """The package, read-only, at a path with spaces and umlauts."""
    with read_only_copy(tmp_path / "räum lich ü" / "site packages") as folder:
        yield folder


@pytest.fixture
def talker(checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint with the tokens of the chat format."""
    path = shutil.copytree(checkpoint, tmp_path / "chät modell")
    config = json.loads((path / "config.json").read_text(encoding="utf-8")) | {"eos_token_id": 1}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    ascii_chat_tokenizer().save(str(path / "tokenizer.json"))
    return path


def test_E11_every_command(checkpoint: Path, talker: Path, moved: Path, tmp_path: Path) -> None:
    """Optimised, warnings as errors, nothing writable, paths with spaces and umlauts."""
    before = sorted(checkpoint.iterdir())
    text, report = checkpoint / "täxt file.txt", tmp_path / "räum lich ü" / "b ericht.json"
    converted = tmp_path / "räum lich ü" / "kon vertiert"
    where = ("--checkpoint", checkpoint)
    commands: dict[str, tuple[Any, ...]] = {
        "env": ("env", "--json"),
        "inspect": ("inspect", checkpoint, "--json"),
        "tables": ("inspect", checkpoint),
        "bundled": ("inspect", "--json"),
        "generate": ("generate", *where, "--prompt", "def", "--max-new-tokens", 3),
        "chat": (
            *("chat", "--checkpoint", talker, "--max-len", 64, "--max-new-tokens", 2),
            *("--system", "é", "--no-thinking"),
        ),
        "eval": ("eval", *where, "--text", text, "--json"),
        "compare": (
            *("compare", *where, "--precision", "official", "float32", "--text", text),
            *("--max-tokens", 8, "--json", report),
        ),
        "bench": (
            *("bench", checkpoint, "--layers", 1, "--tokens", 8, "--context", 32),
            *("--precision", "official", "--json"),
        ),
        "convert": ("convert", checkpoint, converted, "--to", "nvfp4", "--json"),
        "converted": ("inspect", converted, "--json"),
    }
    assert {name for name, *_ in commands.values()} == {
        command.name or command.callback.__name__ for command in cli.app.registered_commands
    }
    process = start(
        COMMANDS,
        json.dumps([list(map(str, command)) for command in commands.values()]),
        options=("-O", "-W", "error"),
        path=moved,
        HOME="/dev/null",  # stops root too
        XDG_CACHE_HOME="",
        # Quick compilation of slow programs.
        XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    )
    stdout, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr) == (0, "")
    found = json.loads(stdout.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(moved)
    assert not found["debug"]
    done = dict(zip(commands, found["done"], strict=True))
    for name, (code, out, err, exception) in done.items():
        assert code == 0, (name, out, err, exception)
        assert "Warning" not in err, name
    assert sorted(checkpoint.iterdir()) == before
    outputs = {name: values[1] for name, values in done.items()}
    assert json.loads(outputs["env"])["devices"].startswith("cpu:0 ")
    assert json.loads(outputs["inspect"])["problems"] == []
    assert Path(json.loads(outputs["bundled"])["checkpoint"]).is_relative_to(moved)
    assert json.loads(outputs["eval"])["total"]["bytes"] == text.stat().st_size
    assert json.loads(report.read_text(encoding="utf-8"))["num_tokens"] == 8
    assert done["generate"][2].count("no compilation cache: ") == 1
    assert "cache: empty, prefill of " in done["chat"][2]
    assert json.loads(outputs["bench"])["layers"] == 1
    assert json.loads(outputs["convert"])["target"] == str(converted)
    assert json.loads(outputs["converted"])["precision"] == "nvfp4"
