"""What the trained model in the package can do, on text it has not seen."""

import functools
import json
import lzma
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from dsv4_jax import bundled_checkpoint, from_checkpoint, generate, prefill
from dsv4_jax.evaluate import evaluate, read_document, total
from dsv4_jax.text import encode, load_tokenizer, plain_tokenizer
from reference.train.data import longest_loop

HELD_OUT = Path(__file__).parents[1] / "data" / "held-out"
FILES = [HELD_OUT / f"{name}.py.txt" for name in ("bisect", "fnmatch", "netrc")]
# The bars of the model: bits per byte, and how often MTP drafts the model's own token.
BITS_PER_BYTE = 1.45
MTP_AGREEMENT = 0.6
# A preset may differ from `official` by so many bits per byte. The last phases were not trained in
# `nvfp4`, which costs 0.023 on these files (most of it in the CSA layer); twice that is a defect.
PRESET_COST = {"float32": 0.02, "nvfp4": 0.046}
NEW_TOKENS = 512
OF_THE_BAR = 8
"""Prompts; they are continued in one batch with the others: a row does not know its neighbours."""
# Which greedy texts loop depends on roundings: of the eight prompts 3 with the sums of XLA's
# products, 4 with those of the linears' handlers, 5 with attention's as well; of these and 15 other
# places 11 with either. The logits of the first two differ by an RMS of 0.12; flipping the last bit
# of one in 1000 values of the embedding moves them by 0.17.
LOOPS = 11
TENTHS = (1, 3, 5, 7, 9)
BEFORE = 200  # characters


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = load_tokenizer(bundled_checkpoint())
    assert found is not None
    return found


def bits_per_byte(preset: str, tokenizer: Tokenizer, files: list[Path]) -> Any:
    """With MTP where its bar is held."""
    mtp = preset not in PRESET_COST
    model, params = from_checkpoint(bundled_checkpoint(), precision=preset, mtp=mtp, progress=False)
    documents = [read_document(plain_tokenizer(tokenizer), file) for file in files]
    return total(evaluate(model, params, documents, context=1024, mtp=mtp))


@pytest.mark.slow
def test_held_out_text(tokenizer: Tokenizer) -> None:
    """Better than a compressor that sees the same files, in every preset."""
    scores = {
        preset: bits_per_byte(preset, tokenizer, FILES[:2]) for preset in ("official", *PRESET_COST)
    }
    found = {preset: score.bits_per_byte for preset, score in scores.items()}
    data = b"".join(file.read_bytes() for file in FILES[:2])
    assert found["official"] <= BITS_PER_BYTE
    assert found["official"] < 8 * len(lzma.compress(data, preset=9)) / len(data)
    for preset, most in PRESET_COST.items():
        assert abs(found[preset] - found["official"]) <= most, found
    assert scores["official"].mtp_agreement >= MTP_AGREEMENT


class Greedy(NamedTuple):
    """Greedy continuations of the eight prompts of the bar, then of `places`."""

    model: Any
    params: Any
    names: list[str]
    prompts: list[list[int]]
    made: list[list[int]]


@pytest.fixture(scope="module")
def greedy(tokenizer: Tokenizer) -> Greedy:
    model, params = from_checkpoint(bundled_checkpoint(), progress=False)
    texts = json.loads((HELD_OUT / "prompts.json").read_text("utf-8"))
    assert len(texts) == OF_THE_BAR
    texts |= places()
    prompts = [[model.config.bos_token_id, *encode(tokenizer, text)] for text in texts.values()]
    made = generate(model, params, prompts, max_new_tokens=NEW_TOKENS)
    return Greedy(model, params, list(texts), prompts, [list(row) for row in made])


def first_of(greedy: Greedy, count: int) -> Greedy:
    """Its first texts."""
    names, prompts, made = (x[:count] for x in greedy[2:])
    return greedy._replace(names=names, prompts=prompts, made=made)


def loops(greedy: Greedy) -> dict[str, tuple[int, int]]:
    """Texts in which a stretch of up to 32 tokens stands four times in a row: times and period."""
    found = {n: longest_loop(row) for n, row in zip(greedy.names, greedy.made, strict=True)}
    return {name: loop for name, loop in found.items() if loop[0] >= 4}


@pytest.mark.slow
@pytest.mark.xfail(strict=True, reason="5 of 8: dsv4_jax/data/stdlib/README.md says what was tried")
def test_greedy_text_does_not_loop(greedy: Greedy) -> None:
    """The bar: at most one of the eight."""
    found = loops(first_of(greedy, OF_THE_BAR))
    assert len(found) <= 1, found


def places() -> dict[str, str]:
    """Lines before five places of every held-out file."""
    found: dict[str, str] = {}
    for file in FILES:
        text = file.read_text("utf-8")
        for tenth in TENTHS:
            at = text.rfind("\n", 0, len(text) * tenth // 10) + 1
            found[f"{file.name} at {tenth}/10"] = text[max(0, at - BEFORE) : at]
    return found


@pytest.mark.slow
def test_greedy_text_loops_no_more_than_it_did(greedy: Greedy) -> None:
    """Of more texts than the bar's: one alone turns on the last bit of a logit."""
    assert len(greedy.made) == OF_THE_BAR + len(FILES) * len(TENTHS)
    found = loops(greedy)
    assert len(found) <= LOOPS, found


@pytest.mark.slow
def test_greedy_text_equals_prefills(greedy: Greedy) -> None:
    """A prefill of all that was written predicts each token of it.

    One prefill of the whole predicts every position, bitwise what a prefill of each prefix gives
    (tests/model/test_append.py); some prefixes are prefilled by themselves, too.
    """
    model, params, names, prompts, made = first_of(greedy, OF_THE_BAR)
    whole = [prompt + row for prompt, row in zip(prompts, made, strict=True)]
    ids = np.zeros((len(whole), -(-max(map(len, whole)) // 128) * 128), np.int32)
    for row, tokens in zip(ids, whole, strict=True):
        row[: len(tokens)] = tokens

    @functools.partial(jax.jit, donate_argnums=2)
    def best(params: Any, ids: Any, cache: Any) -> tuple[Any, Any]:
        logits, cache = model.apply({"params": params}, ids, cache)
        return jnp.argmax(logits, axis=-1), cache

    cache, parts = model.init_cache(*ids.shape), []
    for start in range(0, ids.shape[1], 128):
        part, cache = best(params, ids[:, start : start + 128], cache)
        parts.append(np.asarray(part))
    predicted = np.concatenate(parts, axis=1)
    for i, (name, prompt, row) in enumerate(zip(names, prompts, made, strict=True)):
        first = len(prompt) - 1
        assert predicted[i, first : first + len(row)].tolist() == row, name
    for done in (0, 1, 130, 300):
        prefix = whole[0][: len(prompts[0]) + done]
        logits, _ = prefill(model, params, [prefix], model.init_cache(1, ids.shape[1]))
        assert int(np.argmax(logits[0])) == whole[0][len(prefix)]
