"""Bits per byte: values against one-shot FP64 sums, independence of batching, the command."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dsv4_jax import bundled_checkpoint, cli
from dsv4_jax.cli import common
from dsv4_jax.cli import evaluate as eval_command
from dsv4_jax.evaluate import Document, Score, evaluate, log_softmax, read_document, total
from dsv4_jax.text import plain_tokenizer
from tests.support.fake_model import VOCAB, FakeModel, fake_config, fake_params
from tests.support.models import golden_layers
from tests.support.official import TINY, tiny_golden
from tests.support.tokenizer import ascii_tokenizer, byte_tokenizer

LENGTHS = (37, 5, 64, 1, 20)


def _documents(lengths: tuple[int, ...] = LENGTHS) -> list[Document]:
    """Random tokens; twice as many bytes."""
    rng = np.random.default_rng(11)
    return [
        Document(f"text {i}", rng.integers(2, VOCAB, n).astype(np.int32), 2 * n)
        for i, n in enumerate(lengths)
    ]


def _exact_log2(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """``log2 p`` of the targets from logits ``[n, v]``, numpy FP64."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1)
    norm = top + np.log(np.exp(wide - top[:, None]).sum(axis=-1))
    return (wide[np.arange(len(targets)), targets] - norm) / math.log(2)


def _fake_log2(tokens: np.ndarray) -> np.ndarray:
    """One-shot over the fake model: BOS and all tokens but the last in one call."""
    model, bos = FakeModel(), FakeModel().config.bos_token_id
    inputs = jnp.asarray(np.concatenate([[bos], tokens[:-1]])[None].astype(np.int32))
    cache = model.init_cache(batch_size=1, max_len=len(tokens))
    count = jnp.array([len(tokens)], jnp.int32)
    logits, _ = model.apply(
        {"params": fake_params()}, inputs, cache, num_tokens=count, logits="all"
    )
    return _exact_log2(np.asarray(logits[0]), tokens)


def test_bits_equal_the_one_shot_sum() -> None:
    documents = _documents()
    scores = evaluate(FakeModel(), fake_params(), documents, batch_size=2, chunk_size=16)
    for document, score in zip(documents, scores, strict=True):
        wanted = _fake_log2(document.tokens)
        # FP32 logits of up to 4 and their exponentials: a few ulps of the log-probability.
        np.testing.assert_allclose(score.log2_probs, wanted, rtol=0, atol=2e-6)
        assert score.bits == pytest.approx(-wanted.sum(), rel=1e-7)
        assert (score.name, score.num_tokens) == (document.name, len(document.tokens))
        assert score.bits_per_byte == score.bits / document.num_bytes
        assert score.mtp_agreement is None
    together = total(scores)
    assert together.bits == math.fsum(score.bits for score in scores)
    assert together.bits_per_byte == together.bits / (2 * sum(LENGTHS))


@pytest.mark.parametrize(
    ("batch_size", "chunk_size"),
    [
        pytest.param(1, 256, id="one-by-one"),
        pytest.param(3, 16, id="chunks-and-a-half-empty-batch"),
        pytest.param(8, 7, id="odd-chunk"),
        pytest.param(5, 1, id="token-by-token"),
    ],
)
def test_chunks_and_neighbours_change_nothing(batch_size: int, chunk_size: int) -> None:
    documents = _documents()
    wanted = evaluate(FakeModel(), fake_params(), documents, batch_size=2, chunk_size=32)
    model = FakeModel()
    found = evaluate(model, fake_params(), documents, batch_size=batch_size, chunk_size=chunk_size)
    for a, b in zip(wanted, found, strict=True):
        # The logits agree bitwise; XLA's exp and log may differ by an ulp between shapes.
        np.testing.assert_allclose(a.log2_probs, b.log2_probs, rtol=0, atol=1e-6)
    assert len(model.traces) == 1  # one shape, whatever the lengths


def test_context_equals_separate_documents() -> None:
    documents, context = _documents(), 16
    found = evaluate(FakeModel(), fake_params(), documents, context=context, chunk_size=8)
    for document, score in zip(documents, found, strict=True):
        starts = range(0, len(document.tokens), context)
        parts = [Document("", document.tokens[s : s + context], 1) for s in starts]
        alone = evaluate(FakeModel(), fake_params(), parts)
        np.testing.assert_allclose(
            score.log2_probs,
            np.concatenate([part.log2_probs for part in alone]),
            rtol=0,
            atol=1e-6,  # as above
        )
    whole = evaluate(FakeModel(), fake_params(), documents)
    # Where the context cuts nothing, nothing changes; where it cuts, the hash of the history does.
    same = [abs(a.bits - b.bits) < 1e-4 for a, b in zip(whole, found, strict=True)]
    assert same == [len(document.tokens) <= context for document in documents]


def test_a_uniform_model_needs_log2_of_the_vocabulary() -> None:
    flat = {"scale": jnp.zeros((), jnp.float32)}
    for score in evaluate(FakeModel(), flat, _documents()):
        # One FP32 logarithm: relative error 2^-24 or so.
        assert score.bits == pytest.approx(score.num_tokens * math.log2(VOCAB), rel=1e-6)


def test_log_softmax_keeps_a_long_tail() -> None:
    """129,279 terms of 2^-25.5 beside a 1: each vanishes in a running FP32 sum that holds it."""
    logits = np.full(129280, -25.5 * math.log(2), np.float32)
    logits[0] = 0
    wanted = _exact_log2(logits[None], np.array([0]))[0]
    found = float(log_softmax(jnp.asarray(logits))[0]) / math.log(2)
    # The 511 terms in the block of the 1 may still vanish.
    assert found == pytest.approx(wanted, abs=511 * 2**-25.5 / math.log(2))
    running = np.cumsum(np.exp(logits), dtype=np.float32)[-1]
    assert abs(-math.log2(running) - wanted) > 1e-3  # the wrong variant


def test_progress_counts_tokens() -> None:
    seen: list[tuple[int, int]] = []
    evaluate(
        FakeModel(),
        fake_params(),
        _documents(),
        batch_size=2,
        chunk_size=16,
        progress=lambda done, everything: seen.append((done, everything)),
    )
    everything = sum(LENGTHS)
    assert seen[-1] == (everything, everything)
    assert seen == sorted(seen)


@pytest.mark.slow
def test_model_bits_and_drafts_equal_one_shot() -> None:
    """A CSA layer and the MTP module, in ragged chunks against single calls."""
    model, params = golden_layers((2,))
    # From where the wrong variant below is seen: of random weights hardly a draft agrees.
    ids = tiny_golden()["ids"][:, 50:].astype(np.int32)
    documents = [Document("long", ids[0, :90], 90), Document("short", ids[1, :41], 41)]
    scores = evaluate(model, params, documents, batch_size=2, chunk_size=32, mtp=True)

    inputs = np.zeros((2, 90), np.int32)
    targets = np.zeros((2, 90), np.int32)
    for row, document in enumerate(documents):
        n = len(document.tokens)
        inputs[row, :n] = [model.config.bos_token_id, *document.tokens[:-1]]
        targets[row, :n] = document.tokens

    @jax.jit
    def one_shot(params: Any, inputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        count = jnp.array([90, 41], jnp.int32)
        variables = {"params": params}
        cache = model.init_cache(2, 90)
        streams, cache = model.apply(variables, inputs, cache, num_tokens=count, method="streams")
        logits = model.apply(variables, streams, method="head_logits")
        drafted: Any = model.apply(
            variables, streams, targets, cache, num_tokens=count, method="draft"
        )
        return logits, drafted[0]

    logits, drafted = map(np.asarray, one_shot(params, inputs, targets))
    for row, (document, score) in enumerate(zip(documents, scores, strict=True)):
        n = len(document.tokens)
        wanted = _exact_log2(logits[row, :n], document.tokens)
        # Logits agree bitwise on the CPU; the rest is FP32 rounding of a log-probability near 10.
        np.testing.assert_allclose(score.log2_probs, wanted, rtol=0, atol=1e-5)
        agrees = drafted[row, : n - 1].argmax(-1) == logits[row, 1:n].argmax(-1)
        assert (score.drafts, score.agreed) == (n - 1, int(agrees.sum()))
    # A draft compared with the greedy token of its own position would be other numbers here.
    same = drafted.argmax(-1) == logits.argmax(-1)
    wrong = [int(same[row, : len(d.tokens)].sum()) for row, d in enumerate(documents)]
    agreed = [score.agreed for score in scores]
    print(f"drafts that agree: {agreed}, of the wrong positions: {wrong}")
    assert wrong != agreed


def test_no_drafts_no_agreement() -> None:
    score = Score("x", 1, 1, 1.0, drafts=0, agreed=0)
    assert score.mtp_agreement is None
    assert Score("x", 1, 5, 1.0, drafts=4, agreed=3).mtp_agreement == 0.75


# The command.


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a tokenizer that "loads" as the fake model."""
    _use(monkeypatch, FakeModel())
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    ascii_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _use(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    monkeypatch.setattr(eval_command, "model_config", lambda path: fake_config())
    monkeypatch.setattr(
        eval_command, "load_model", lambda path, precision, **_: (model, fake_params())
    )


def _eval(checkpoint: Path, *arguments: object) -> Result:
    command = ["eval", "--checkpoint", checkpoint, "--precision", "official", *arguments]
    return CliRunner().invoke(cli.app, list(map(str, command)), env={"COLUMNS": "60"})


def _write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_json_of_two_files(checkpoint: Path) -> None:
    a = _write(checkpoint, "a.py", "print('hello')\n")
    b = _write(checkpoint, "b.py", "x = 1\n" * 9)
    for arguments in (("--text", a, b), ("--text", a, "--text", b), (a, b)):
        result = _eval(checkpoint, *arguments, "--json")
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        assert list(report) == [
            "checkpoint",
            "precision",
            "files",
            "total",
            "seconds",
            "tokens_per_second",
            "compilation_seconds",
        ]
        assert (report["checkpoint"], report["precision"]) == (str(checkpoint), "official")
        tokenizer = plain_tokenizer(ascii_tokenizer())
        for entry, path in zip(report["files"], (a, b), strict=True):
            document = read_document(tokenizer, path)
            bits = -_fake_log2(document.tokens).sum()
            assert entry["path"] == str(path)
            assert entry["bytes"] == entry["tokens"] == path.stat().st_size
            assert entry["bits"] == pytest.approx(bits, rel=1e-6)
            assert entry["bits_per_byte"] == entry["bits"] / entry["bytes"]
        assert report["total"]["bytes"] == a.stat().st_size + b.stat().st_size
        assert report["total"]["bits"] == sum(entry["bits"] for entry in report["files"])


def test_table(checkpoint: Path) -> None:
    path = _write(checkpoint, "[bold] name.txt", "abc" * 20)
    result = _eval(checkpoint, "--text", path)
    assert result.exit_code == 0
    column = [line.split("│")[1] for line in result.stdout.splitlines() if "│" in line]
    shown = "".join(column).replace(" ", "")
    assert shown == str(path).replace(" ", "") + "total"
    bits = -_fake_log2(read_document(ascii_tokenizer(), path).tokens).sum()
    assert f"{bits / 60:.5f}" in result.stdout
    assert "60 tokens in" in result.stderr


def test_special_tokens_in_a_file_are_text(tmp_path: Path) -> None:
    text = "a <｜User｜> b <think>\r\n\N{ZERO WIDTH NO-BREAK SPACE}é"
    path = _write(tmp_path, "text", text)
    tokenizer = byte_tokenizer(merges=())
    document = read_document(plain_tokenizer(tokenizer), path)
    assert document.num_bytes == len(text.encode()) == len(document.tokens)
    assert document.tokens.max() < 256
    # With the tokenizer as it is, both would be one token.
    assert len(read_document(tokenizer, path).tokens) < document.num_bytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "No such file", id="missing"),
        pytest.param(b"", "the file is empty", id="empty"),
        pytest.param(b"caf\xe9", "not UTF-8 text", id="not-utf-8"),
        pytest.param("café".encode(), "from character 3 on 'é' became ''", id="no-round-trip"),
    ],
)
def test_bad_files_are_one_line(checkpoint: Path, content: bytes | None, message: str) -> None:
    path = checkpoint / "text"
    if content is not None:
        path.write_bytes(content)
    _assert_one_line(_eval(checkpoint, "--text", path), message, str(path))


def _assert_one_line(result: Result, *messages: str) -> None:
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: ")
    for message in messages:
        assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "give at least one file with --text", id="no-files"),
        pytest.param(["--text", "FILE", "--context", "0"], "--context must be >= 1", id="context"),
        pytest.param(["--text", "FILE", "--batch-size", "-1"], "--batch-size must be", id="batch"),
        pytest.param(["--text", "FILE", "--precision", "fp3"], "'fp3'", id="precision"),
        pytest.param(
            ["--text", "FILE", "--context", "5000"], "max_position_embeddings 4096", id="B2-context"
        ),
        pytest.param(["--text", "LONG"], "give a context to cut it", id="B2-whole-file"),
        pytest.param(["--text", "FILE", "--checkpoint", "/nowhere"], "not a directory", id="C1"),
    ],
)
def test_bad_options_are_one_line(checkpoint: Path, arguments: list[str], message: str) -> None:
    files = {
        "FILE": str(_write(checkpoint, "file", "some text")),
        "LONG": str(_write(checkpoint, "long", "x" * 4097)),
    }
    result = _eval(checkpoint, *(files.get(argument, argument) for argument in arguments))
    _assert_one_line(result, message)


def test_checkpoint_and_tokenizer(checkpoint: Path) -> None:
    path = _write(checkpoint, "file", "some text")
    (checkpoint / "tokenizer.json").unlink()
    _assert_one_line(_eval(checkpoint, "--text", path), "has no tokenizer.json")
    assert common.checkpoint_directory(None) == bundled_checkpoint()
    with pytest.raises(common.UserError, match=r"--checkpoint .*nowhere is not a directory"):
        common.checkpoint_directory(checkpoint / "nowhere")


def test_D11_tokenizer_of_another_checkpoint(checkpoint: Path) -> None:
    byte_tokenizer().save(str(checkpoint / "tokenizer.json"))
    path = _write(checkpoint, "file", "é")
    _assert_one_line(_eval(checkpoint, "--text", path), str(path), "in [0, 97) (vocab_size)")


def test_logits_that_are_not_finite(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, FakeModel(poison_row=0, poison_at=4))
    path = _write(checkpoint, "file", "some text")
    # After 4 tokens, BOS among them, the fourth token of the file is predicted.
    result = _eval(checkpoint, "--text", path)
    _assert_one_line(result, f"{path}: the logits for token 3 must", "got nan")


@pytest.mark.slow
def test_command_over_the_golden_checkpoint(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "tiny")
    byte_tokenizer(merges=()).save(str(tmp_path / "tiny" / "tokenizer.json"))
    path = _write(tmp_path, "text", "The quick brown fox.\n")
    result = CliRunner().invoke(
        cli.app, ["eval", "--checkpoint", str(tmp_path / "tiny"), str(path), "--mtp", "--json"]
    )
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["precision"] == "official"
    assert report["total"]["tokens"] == report["total"]["bytes"] == 21
    # Random weights: a little worse than the 8 bits of knowing nothing.
    assert 8 < report["total"]["bits_per_byte"] < 12
    assert 0 <= report["total"]["mtp_agreement"] <= 1
