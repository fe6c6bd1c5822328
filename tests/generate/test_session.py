"""A cache that stays between turns gives the tokens of a fresh one."""

from typing import Any

import numpy as np
import pytest

import dsv4_jax
from dsv4_jax import Session, generate
from dsv4_jax.text import encode
from tests.support.fake_model import VOCAB, FakeModel, fake_params
from tests.support.models import golden_ids, three_layers
from tests.support.tokenizer import byte_tokenizer

FIRST = [5, 6, 7, 8]


MODEL = FakeModel(eos_token_id=-1)  # one, and one length: compiled once
MAX_LEN = 400


def _session(model: Any = MODEL) -> Session:
    return Session(model, fake_params(), max_len=MAX_LEN)


def _generated(prompt: list[int], **options: Any) -> list[int]:
    """Without a session."""
    return generate(MODEL, fake_params(), [prompt], max_len=MAX_LEN, **options)[0]


def _tokens(session: Session, prompt: list[int], **options: Any) -> list[int]:
    return [e.token for e in session.stream(prompt, **options) if e.token is not None]


@pytest.mark.parametrize("more", [1, 7, 8, 300])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_turns_equal_generate(more: int, temperature: float) -> None:
    """Continued through the decode step (up to 8 tokens) or in chunks, sampled or greedy."""
    session = _session()
    options: dict[str, Any] = {"max_new_tokens": 6, "temperature": temperature, "seed": 3}
    prompt = list(FIRST)
    for turn in range(2):
        made = _tokens(session, prompt, **options)
        assert made == _generated(prompt, **options)
        assert session.reused == (0 if turn == 0 else len(FIRST) + 5)
        assert session.tokens == (*prompt, *made[:-1]), "the last token was not fed back"
        prompt = [*prompt, *made, *(i % VOCAB for i in range(more))]


@pytest.mark.parametrize(
    ("prompt", "reused"),
    [
        pytest.param([5, 6, 7, 8, 9], 4, id="continued"),
        pytest.param([5, 6, 7, 8], 0, id="the-same"),
        pytest.param([5, 6, 7], 0, id="shorter"),
        pytest.param([5, 6, 7, 9, 9], 0, id="other"),
    ],
)
def test_only_what_continues_the_cache_is_reused(prompt: list[int], reused: int) -> None:
    session = _session()
    _tokens(session, FIRST, max_new_tokens=1)
    assert session.tokens == tuple(FIRST)
    made = _tokens(session, prompt, max_new_tokens=3)
    assert session.reused == reused
    assert made == _generated(prompt, max_new_tokens=3)


def test_end_reasons() -> None:
    model = FakeModel(eos_token_id=12, follow=True)
    session = _session(model)
    assert [(e.token, e.finish_reason) for e in session.stream([10])] == [(11, None), (None, "eos")]
    assert session.tokens == (10, 11)
    events = list(session.stream([10, 11, 20], max_new_tokens=2))
    assert [(e.token, e.finish_reason) for e in events] == [(21, None), (22, "length")]
    session = _session(FakeModel(follow=True, poison_row=5, poison_at=3))
    [*_, last] = session.stream([5, 6])
    assert (last.token, last.finish_reason) == (None, "invalid_logits")
    assert last.error is not None
    assert "for position 3" in last.error


def test_nothing_is_compiled_for_a_further_turn() -> None:
    session = _session()
    _tokens(session, FIRST, max_new_tokens=4)
    traces = len(MODEL.traces)
    _tokens(session, [*session.tokens, 1, 2, 3, 4, 5], max_new_tokens=4)
    assert len(MODEL.traces) == traces


def test_text_keeps_the_tokens_of_the_cache() -> None:
    """Although the tokenizer would merge them."""
    tokenizer = byte_tokenizer()
    t, h = encode(tokenizer, "t"), encode(tokenizer, "h")
    assert len(encode(tokenizer, "th")) == 1
    session = _session(FakeModel(follow=True, eos_token_id=-1))
    assert session.encode(tokenizer, "th") == encode(tokenizer, "th")
    _tokens(session, [*t, *h], max_new_tokens=1)
    assert session.encode(tokenizer, "th<｜User｜>") == [*t, *h, *encode(tokenizer, "<｜User｜>")]
    assert session.encode(tokenizer, "tt") == encode(tokenizer, "tt")
    half = encode(tokenizer, "🙂")[:2]
    assert max(half) >= VOCAB, "no prompt of this model: set by hand"
    session._tokens = half
    assert session.encode(tokenizer, "🙂") == encode(tokenizer, "🙂")


def test_an_old_iterator_is_refused() -> None:
    session = _session()
    old = session.stream(FIRST)
    next(old)
    new = session.stream([*FIRST, 1])
    with pytest.raises(RuntimeError, match="must not be read after a further stream"):
        list(old)
    assert next(new).token is not None


@pytest.mark.slow
def test_real_model_continues_bitwise() -> None:
    """Turns on one cache, cut short and taken up again, against prompts of their own."""
    model, params = three_layers()
    ids = golden_ids(14)[0].tolist()
    session = Session(model, params, max_len=16)
    options: dict[str, Any] = {"max_new_tokens": 3}
    first = _tokens(session, ids[:4], **options)
    events = session.stream(prompt := [*ids[:4], *first, *ids[4:6]], **options)
    second = [next(events).token]
    events.close()
    assert session.reused == 6
    assert session.tokens == tuple(prompt)
    third = _tokens(session, [*prompt, *second, ids[6]], **options)
    assert session.reused == len(prompt)
    for made, asked in (
        (first, ids[:4]),
        (second, prompt),
        (third, [*prompt, *second, ids[6]]),
    ):
        cache = model.init_cache(1, 16)
        tokens = [*asked, *made]
        for i, token in enumerate(tokens[:-1]):
            logits, cache = dsv4_jax.decode_step(model, params, [token], cache)
            assert i + 1 < len(asked) or int(np.argmax(logits[0])) == tokens[i + 1]
