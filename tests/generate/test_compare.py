"""Comparison of two models: exact on equal ones, the right layer and op on changed ones."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from dsv4_jax import DeepseekV4, cli
from dsv4_jax.cli import compare as compare_command
from dsv4_jax.compare import (
    Closeness,
    Comparison,
    _Stack,
    cache_copies,
    cache_positions,
    compare,
)
from dsv4_jax.compare.measure import numbers, picks
from dsv4_jax.evaluate import read_document, shorten
from dsv4_jax.text import plain_tokenizer
from tests.support.models import append, golden_layers
from tests.support.official import tiny_golden
from tests.support.tokenizer import byte_tokenizer

# A sliding-window layer with hash routing and a CSA layer, in FP32: scaling a weight then scales
# its output to FP32 rounding. Three chunks, the last one ragged.
LAYERS, TOKENS, CHUNK = (0, 2), 80, 32
EXACT = Closeness(1.0, 1.0, 0.0)


@functools.cache
def _stack() -> tuple[DeepseekV4, Any]:
    model, params = golden_layers(LAYERS, "float32")
    return DeepseekV4(model.config, model.precision), params


def _changed(path: str, factor: float) -> tuple[DeepseekV4, Any]:
    """The stack with one weight scaled."""
    model, params = _stack()

    def scaled(tree: Any, names: list[str]) -> Any:
        if not names:
            return tree * factor
        return {**tree, names[0]: scaled(tree[names[0]], names[1:])}

    return model, scaled(params, path.split("/"))


def _ids() -> np.ndarray:
    return tiny_golden()["ids"][0, :TOKENS]


@functools.cache
def _compare(path: str = "", factor: float = 1.0) -> Comparison:
    other = _changed(path, factor) if path else _stack()
    return compare(_stack(), other, _ids(), num_bytes=2 * TOKENS, chunk_size=CHUNK, worst=7)


def test_a_model_equals_itself() -> None:
    found = _compare()
    assert (found.num_tokens, found.num_bytes) == (TOKENS, 2 * TOKENS)
    assert found.bits_a == found.bits_b
    assert found.bits_per_byte == (found.bits_a / (2 * TOKENS),) * 2
    assert (found.logits, found.kl_bits, found.top1_agreement) == (EXACT, 0.0, 1.0)
    assert [layer.kind for layer in found.layers] == ["swa", "csa"]
    for layer in found.layers:
        assert (layer.free, layer.equal_inputs) == (EXACT, EXACT)
    for operations in (*(layer.operations for layer in found.layers), found.head):
        for op in operations:
            assert op.closeness == (None if op.path.endswith("picks") else EXACT), op.path
            assert op.equal_picks == (1.0 if op.path.endswith("picks") else None), op.path
    assert [part.name for part in found.parts] == ["embed", "layer 0", "layer 1", "head"]
    assert all(part.difference == 0 for part in found.parts)
    assert all(token.difference == 0 for token in found.worst)


def test_every_module_is_there() -> None:
    found = _compare()
    shared = [
        *("hc_attn:x", "hc_attn:post", "hc_attn:comb"),
        *("attn/wq_a", "attn/wkv", "attn/q_norm", "attn/wq_b"),
    ]
    compressed = ["attn/compressor", "attn/indexer/compressor", "attn/indexer:picks"]
    rest = [
        *("attn/wo_a", "attn/wo_b", "attn"),
        *("hc_ffn:x", "hc_ffn:post", "hc_ffn:comb"),
        *("ffn/gate:picks", "ffn/gate:weights"),
        *(f"ffn/shared_experts/{name}" for name in ("w1", "w3", "w2")),
        *("ffn/shared_experts", "ffn/experts", "ffn"),
    ]
    paths = [[op.path for op in layer.operations] for layer in found.layers]
    assert paths == [
        [*shared, *rest],
        [*shared, "attn/indexer/wq_b", *compressed, *rest],
    ]
    assert [op.path for op in found.head] == ["hc_head", "logits"]


@pytest.mark.parametrize(
    ("weight", "factor", "part", "path", "relative"),
    [
        pytest.param(
            "layers_1/attn/wo_b/weight", 1.25, "layer 1", "attn/wo_b", 0.25, id="csa-output"
        ),
        pytest.param(
            "layers_0/ffn/shared_experts/w2/weight",
            0.5,
            "layer 0",
            "ffn/shared_experts/w2",
            0.5,
            id="swa-shared-expert",
        ),
        pytest.param("head/weight", 1.125, "head", "logits", 0.125, id="head"),
    ],
)
def test_the_changed_part_is_named(
    weight: str, factor: float, part: str, path: str, relative: float
) -> None:
    found = _compare(weight, factor)
    assert found.bits_a == _compare().bits_a
    assert found.largest.name == part
    for entry in found.parts:
        # Only that part differs, so it alone makes b out of a; the others make nothing.
        bits = found.bits_b if entry.name == part else found.bits_a
        assert entry.bits_per_byte == bits / found.num_bytes, entry.name
        assert entry.difference == (bits - found.bits_a) / found.num_bytes
    for layer in found.layers:
        name = f"layer {layer.layer}"
        assert (layer.equal_inputs == EXACT) == (name != part), name
        reached = part != "head" and name >= part
        assert (layer.free == EXACT) == (not reached), name
    groups = [(f"layer {layer.layer}", layer.operations) for layer in found.layers]
    for name, operations in [*groups, ("head", found.head)]:
        before = True
        for op in operations:
            if (name, op.path) == (part, path):
                before = False
                assert op.closeness.relative_l2 == pytest.approx(relative, rel=1e-5)
                assert op.closeness.cosine == pytest.approx(1, abs=1e-6)
            elif before or name != part:
                assert op.closeness in (EXACT, None), (name, op.path)
                assert op.equal_picks in (None, 1.0), (name, op.path)
        assert before == (name != part)


def test_logits_and_tokens_equal_one_shot() -> None:
    """Against single calls of both models and numpy FP64."""
    weight, factor = "layers_0/attn/wo_b/weight", 1.5
    found = _compare(weight, factor)
    ids = _ids()
    inputs = jnp.asarray(np.concatenate([[0], ids[:-1]])[None].astype(np.int32))
    logits = []
    for model, params in (_stack(), _changed(weight, factor)):
        out, _ = append(
            model, params, inputs, model.init_cache(1, TOKENS), jnp.array([TOKENS], jnp.int32)
        )
        logits.append(np.asarray(out[0], np.float64))
    a, b = logits
    log_a, log_b = (x - np.log(np.exp(x).sum(axis=-1, keepdims=True)) for x in logits)
    log2_a, log2_b = (x[np.arange(TOKENS), ids] / math.log(2) for x in (log_a, log_b))
    # A layer compiled alone and the whole model round alike but for the order of some FP32 sums.
    assert found.bits_a == pytest.approx(-log2_a.sum(), rel=1e-5)
    assert found.bits_b == pytest.approx(-log2_b.sum(), rel=1e-5)
    kl = (np.exp(log_a) * (log_a - log_b)).sum(axis=-1).mean() / math.log(2)
    assert kl > 1e-3
    assert found.kl_bits == pytest.approx(kl, rel=1e-3)
    assert found.top1_agreement == (a.argmax(-1) == b.argmax(-1)).mean()
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert found.logits.cosine == pytest.approx(cosine.mean(), abs=1e-5)
    assert found.logits.cosine_min == pytest.approx(cosine.min(), abs=1e-5)
    wanted = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert found.logits.relative_l2 == pytest.approx(wanted, rel=1e-3)

    order = np.argsort(-np.abs(log2_b - log2_a), kind="stable")[:7]
    assert [token.position for token in found.worst] == order.tolist()
    for token in found.worst:
        i = token.position
        assert (token.token, token.top_a, token.top_b) == (ids[i], a[i].argmax(), b[i].argmax())
        assert token.log2_a == pytest.approx(log2_a[i], abs=1e-3)
        assert token.log2_b == pytest.approx(log2_b[i], abs=1e-3)
        assert token.difference == token.log2_b - token.log2_a


@pytest.mark.slow
def test_presets_with_other_streams() -> None:
    """BF16 streams against FP32 streams; the layer against `method="layer"` of both models."""
    pair = [golden_layers((0,), preset) for preset in ("official", "float32")]
    pair = [(DeepseekV4(model.config, model.precision), params) for model, params in pair]
    ids = _ids()[:CHUNK]
    found = compare(*pair, ids, num_bytes=CHUNK, chunk_size=CHUNK)
    tokens = jnp.asarray(np.concatenate([[0], ids[:-1]])[None].astype(np.int32))
    outputs = []
    for model, params in pair:
        streams = model.apply({"params": params}, tokens, method="embed_tokens")
        cache = model.init_cache(1, CHUNK)
        run = functools.partial(model.apply, method="layer", layer=0)
        out, _ = jax.jit(run)({"params": params}, streams, tokens, cache)
        outputs.append(np.asarray(out[0].astype(jnp.float32), np.float64).reshape(CHUNK, -1))
    a, b = outputs
    wanted = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert 1e-3 < wanted < 0.2  # the formats do differ, by a few roundings
    assert found.layers[0].equal_inputs.relative_l2 == pytest.approx(wanted, rel=1e-3)
    assert found.layers[0].free == found.layers[0].equal_inputs  # the embedding is BF16 in both
    assert found.parts[0].difference == 0


def test_numbers_of_rows() -> None:
    rng = np.random.default_rng(5)
    a = rng.normal(size=(6, 40)).astype(np.float32) * 1e15
    b = a + rng.normal(size=a.shape).astype(np.float32) * 1e12
    a[3], b[3] = 0, 0
    a[4] = 0
    b[5] = -a[5]
    apart, lost, size = np.asarray(numbers(jnp.asarray(a), jnp.asarray(b)), np.float64).T
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    for i in range(3):
        cosine = wide_a[i] @ wide_b[i] / np.linalg.norm(wide_a[i]) / np.linalg.norm(wide_b[i])
        # 1 - cosine is near 1e-6 here and keeps digits that an FP32 cosine has lost.
        assert apart[i] == pytest.approx(1 - cosine, rel=1e-3)
    assert apart[3:].tolist() == [0, 1, pytest.approx(2, rel=1e-6)]
    np.testing.assert_allclose(lost, ((wide_a - wide_b) ** 2).sum(axis=-1), rtol=1e-5)
    np.testing.assert_allclose(size, (wide_a**2).sum(axis=-1), rtol=1e-5)


def test_picks_in_any_order() -> None:
    a = jnp.array([[0, 3, 7], [2, 5, -1], [-1, -1, -1]])
    b = jnp.array([[7, 0, 4], [5, -1, -1], [1, 2, 3]])
    assert picks(a, b).tolist() == [[2, 3], [1, 2], [0, 0]]


def test_what_is_not_finite_is_reported() -> None:
    found = _compare("layers_1/ffn/shared_experts/w1/weight", math.nan)
    assert found.layers[0].equal_inputs == EXACT
    assert math.isnan(found.layers[1].equal_inputs.relative_l2)
    assert found.largest.name == "layer 1"
    report = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert report["bits_b"] is None
    assert report["layers"][1]["equal_inputs"]["cosine"] is None
    assert report["worst"][0]["difference"] is None
    assert report["bits_a"] == found.bits_a


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"tokens": []}, r"n >= 1, got float64 \[0\]", id="D11-none"),
        pytest.param({"tokens": [[1]]}, r"got int64 \[1, 1\]", id="D11-rank"),
        pytest.param({"tokens": [256]}, r"in \[0, 256\), got 256", id="D11-id-high"),
        pytest.param({"num_bytes": 0}, "num_bytes must be >= 1, got 0", id="bytes"),
        pytest.param({"chunk_size": 0}, "chunk_size must be >= 1, got 0", id="D7-chunk"),
    ],
)
def test_compare_refuses(arguments: dict[str, Any], message: str) -> None:
    options = {"tokens": [1], "num_bytes": 1, **arguments}
    with pytest.raises(ValueError, match=message):
        compare(_stack(), _stack(), **options)


def test_compare_refuses_other_configs_and_lengths() -> None:
    model, params = _stack()
    short = dataclasses.replace(model.config, max_position_embeddings=4)
    other = DeepseekV4(short, model.precision)
    with pytest.raises(ValueError, match="same config"):
        compare(_stack(), (other, params), [1], num_bytes=1)
    with pytest.raises(ValueError, match="5 tokens exceed the model's max_position_embeddings 4"):
        compare((other, params), (other, params), [1] * 5, num_bytes=1)


def test_shorten_keeps_characters_whole(tmp_path: Path) -> None:
    tokenizer = plain_tokenizer(byte_tokenizer(merges=()))
    path = tmp_path / "text"
    path.write_text("aé€", encoding="utf-8")
    document = read_document(tokenizer, path)
    found = [shorten(tokenizer, document, n) for n in range(1, 8)]
    assert [len(part.tokens) for part in found] == [1, 1, 3, 3, 3, 6, 6]
    assert [part.num_bytes for part in found] == [1, 1, 3, 3, 3, 6, 6]
    path.write_text("€", encoding="utf-8")
    with pytest.raises(ValueError, match="first 2 tokens must hold a whole character"):
        shorten(tokenizer, read_document(tokenizer, path), 2)


def test_caches_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `dsv4 compare` takes for its memory need is what `compare` holds."""
    found = {"a": [0] * len(LAYERS), "b": [0] * len(LAYERS)}
    a, b = _stack(), _changed("layers_1/attn/wo_b/weight", 1.25)
    caches = _Stack.caches

    def count(self: _Stack, first: int = 0) -> dict[int, Any]:
        made = caches(self, first)
        for i, cache in made.items():
            found["a" if self.params is a[1] else "b"][i] += 1
            assert cache.window.nope.shape[0] == 1
        assert self.max_len == cache_positions(TOKENS, 10**6, CHUNK)
        return made

    monkeypatch.setattr(_Stack, "caches", count)
    compare(a, b, _ids(), num_bytes=TOKENS, chunk_size=CHUNK)
    assert (tuple(found["a"]), tuple(found["b"])) == cache_copies(len(LAYERS))


# The command.


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that "loads" as the stack, in the second preset with a changed layer."""
    pair = {"official": _stack(), "nvfp4": _changed("layers_1/attn/wo_b/weight", 1.25)}
    monkeypatch.setattr(compare_command, "model_config", lambda path: pair["official"][0].config)
    monkeypatch.setattr(compare_command, "load_model", lambda path, precision: pair[precision])
    monkeypatch.setattr(
        compare_command, "compare", functools.partial(compare, chunk_size=CHUNK)
    )  # the chunks that are compiled already
    byte_tokenizer(merges=()).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text("def f(x):\n    return [x]\n" * 4, encoding="utf-8")
    return tmp_path


def _run(checkpoint: Path, *arguments: object) -> Result:
    command = ["compare", "--checkpoint", checkpoint, *arguments]
    return CliRunner().invoke(cli.app, list(map(str, command)), env={"COLUMNS": "60"})


def test_tables_and_json(checkpoint: Path) -> None:
    text, report = checkpoint / "text", checkpoint / "report.json"
    common = ("--precision", "official", "nvfp4", "--text", text, "--max-tokens", TOKENS)
    result = _run(checkpoint, *common, "--worst", 3, "--json", report)
    assert result.exit_code == 0, result.stderr
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["precision"] == ["official", "nvfp4"]
    assert (found["num_tokens"], found["num_bytes"]) == (TOKENS, TOKENS)
    assert found["largest"] == "layer 1"
    assert [part["name"] for part in found["parts"]] == ["embed", "layer 0", "layer 1", "head"]
    assert len(found["worst"]) == 3
    row = found["worst"][0]
    assert row["token_text"] == text.read_text(encoding="utf-8")[row["position"]]
    for shown in (
        "layer 1 <- largest",
        f"{found['bits_per_byte_b']:.5f}",
        f"{found['parts'][2]['difference']:+.5f}",
        f"{found['layers'][1]['equal_inputs']['relative_l2']:.2e}",
        f"{row['difference']:+.3f}",
        repr(row["token_text"]),
        f"top-1 agreement {found['top1_agreement']:.2%}",
    ):
        assert shown in result.stdout
    assert result.stdout.count("attn/wq_a") == 1
    assert _run(checkpoint, *common, "--ops").stdout.count("attn/wq_a") == len(LAYERS)

    result = _run(checkpoint, *common, "--worst", 3, "--json", "-")
    assert json.loads(result.stdout) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--precision", "official", "fp3"], "'fp3'", id="precision"),
        pytest.param(["--max-tokens", "0"], "--max-tokens must be >= 1", id="max-tokens"),
        pytest.param(["--worst", "-1"], "--worst must be >= 0", id="worst"),
        pytest.param(["--text", "/nowhere"], "No such file", id="missing"),
        pytest.param(["--checkpoint", "/nowhere"], "is not a directory", id="C1"),
        pytest.param(["--json", "/nowhere/file"], "No such file", id="json"),
    ],
)
def test_user_errors_are_one_line(checkpoint: Path, arguments: list[str], message: str) -> None:
    common = ["--precision", "official", "nvfp4", "--text", str(checkpoint / "text")]
    result = _run(checkpoint, *common, "--max-tokens", str(TOKENS), *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert message in result.stderr
