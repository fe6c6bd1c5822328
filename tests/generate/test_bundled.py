"""The model inside the package: its files, its checkpoint, and `dsv4 generate` without a path."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsv4_jax
from dsv4_jax import _ffi, bundled_checkpoint, generate, prefill
from dsv4_jax.checkpoint import from_checkpoint
from dsv4_jax.checkpoint.read import read_config
from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.text import bos_token, encode, load_tokenizer

MOST_BYTES = 12_000_000
"""What the wheel may grow by."""

FILES = {
    "LICENSE-PSF.txt",
    "README.md",
    "config.json",
    "curve.png",
    "generation_config.json",
    "model.safetensors",
    "split.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
PROMPT = "def "


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    path = bundled_checkpoint()
    return ModelConfig.from_hf(read_config(path), source=str(path))


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return from_checkpoint(bundled_checkpoint())


def test_files_and_size() -> None:
    sizes = {path.name: path.stat().st_size for path in bundled_checkpoint().iterdir()}
    assert set(sizes) == FILES
    assert sum(sizes.values()) <= MOST_BYTES, sizes


def test_every_kind_of_layer_is_there(config: ModelConfig) -> None:
    layers = range(config.num_hidden_layers)
    assert {config.layer_kind(i) for i in layers} == set(LayerKind)
    assert {config.is_hash_layer(i) for i in layers} == {False, True}
    assert config.num_nextn_predict_layers == 1


def test_official_format_with_mtp(capsys: pytest.CaptureFixture[str]) -> None:
    """FP8 and MXFP4 as the release has them, found without being told, the MTP module too."""
    model, params = from_checkpoint(bundled_checkpoint(), mtp=True)
    assert 'precision "official"' in capsys.readouterr().err
    assert model.mtp
    assert "mtp_0" in params


def test_text_begins_with_bos(config: ModelConfig) -> None:
    tokenizer = load_tokenizer(bundled_checkpoint())
    assert tokenizer is not None
    assert tokenizer.get_vocab_size() <= config.vocab_size
    assert bos_token(bundled_checkpoint(), tokenizer) == config.bos_token_id
    assert tokenizer.decode(encode(tokenizer, PROMPT)) == PROMPT


def test_sampling_defaults() -> None:
    path = bundled_checkpoint() / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert settings["do_sample"] is True
    assert 0 < settings["temperature"] <= 1
    assert 0 < settings["top_p"] <= 1


def test_greedy_tokens_are_those_of_whole_prefills(loaded: tuple[Any, Any]) -> None:
    """The prompt goes through the decode step; a prefill of all that came before agrees."""
    model, params = loaded
    tokenizer = load_tokenizer(bundled_checkpoint())
    assert tokenizer is not None
    tokens = [model.config.bos_token_id, *encode(tokenizer, PROMPT)]
    [made] = generate(model, params, [tokens], max_new_tokens=4, max_len=64, stop_token_ids=())
    assert len(made) == 4
    for token in made:
        cache = model.init_cache(batch_size=1, max_len=64)
        logits, _ = prefill(model, params, [tokens], cache)
        assert int(np.argmax(logits[0])) == token
        tokens.append(token)


def _dsv4(package: Path, cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PLATFORMS": "cpu",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": str(package),
        "XDG_CACHE_HOME": str(cache),
    }
    # An editable install has a finder of its own, which would come before the copy.
    code = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__]\n"
        "from dsv4_jax.cli import app\n"
        "app()"
    )
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        capture_output=True,
        check=False,
        cwd=cache,
        encoding="utf-8",
        env=environment,
        timeout=600,
    )


def _entries(cache: Path) -> set[str]:
    """Compiled programs, without the times of access that JAX keeps beside them."""
    return {path.name for path in cache.rglob("*-cache")}


@pytest.mark.slow
def test_generate_without_a_checkpoint(tmp_path: Path) -> None:
    """From a package that cannot be written to, at a path with spaces; the second run compiles
    nothing, whatever the prompt."""
    package = tmp_path / "site packages"
    shutil.copytree(
        Path(dsv4_jax.__file__).parent,
        package / "dsv4_jax",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    library = Path(_ffi.__file__)  # beside the package, or elsewhere in an editable install
    shutil.copy(library, package / "dsv4_jax" / library.name)
    for path in (package, *package.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    cache = tmp_path / "cache é"
    cache.mkdir()
    try:
        first = _dsv4(package, cache, "generate", "--prompt", PROMPT, "--max-new-tokens", "8")
        assert first.returncode == 0, first.stderr
        assert len(first.stdout) > 1
        assert f"bundled checkpoint: {package / 'dsv4_jax'}" in first.stderr
        assert "temperature 0.0" not in first.stderr
        assert "Warning" not in first.stderr
        kept = _entries(cache)
        assert any("decode" in name for name in kept)
        [directory] = (cache / "dsv4_jax").iterdir()
        assert directory.name.startswith(f"{dsv4_jax.__version__}-abi")

        again = _dsv4(package, cache, "generate", "--prompt", PROMPT, "--max-new-tokens", "8")
        assert (again.returncode, again.stdout) == (0, first.stdout)
        other = _dsv4(package, cache, "generate", "--prompt", "import os", "--max-new-tokens", "9")
        assert other.returncode == 0, other.stderr
        assert _entries(cache) == kept
    finally:
        for path in (package, *package.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
