"""Tokenizer, streaming detokenisation, stop strings."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4_jax.text import IncrementalDetokenizer, StopMatcher, encode, load_tokenizer
from tests.support.tokenizer import byte_tokenizer

TEXTS = [
    pytest.param("plain ascii, two  spaces\nand a newline", id="ascii"),
    pytest.param("größer naïve 日本語", id="multi-byte"),
    pytest.param("family 👨‍👩‍👧‍👦 flag 🇨🇭 end", id="emoji"),
    pytest.param("<｜User｜>hi<think>", id="special"),
    pytest.param("real \ufffd replacement", id="replacement"),
    pytest.param("", id="empty"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_never_split_a_character(text: str) -> None:
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.flush() == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_emoji_spans_tokens_and_comes_out_at_its_last_byte() -> None:
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, "🙂")
    assert len(ids) == 4
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push(token) for token in ids] == ["", "", "", "🙂"]


def test_any_ids_equal_the_library() -> None:
    tokenizer = byte_tokenizer()
    rng = random.Random(5)
    for _ in range(50):
        ids = [rng.randrange(tokenizer.get_vocab_size() + 3) for _ in range(40)]
        detokenizer = IncrementalDetokenizer(tokenizer)
        text = "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()
        assert text == tokenizer.decode(ids, skip_special_tokens=False)


def test_unfinished_character_is_flushed_and_state_starts_afresh() -> None:
    tokenizer = byte_tokenizer()
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert detokenizer.push(*encode(tokenizer, "a🙂")[:-1]) == "a"
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.push(*encode(tokenizer, "b")) == "b"


def test_special_tokens_are_one_id_and_nothing_is_added() -> None:
    tokenizer = byte_tokenizer()
    ids = encode(tokenizer, "<｜User｜>a")
    assert ids[0] == tokenizer.token_to_id("<｜User｜>")
    assert len(ids) == 2


def test_long_line() -> None:
    tokenizer = byte_tokenizer()
    assert len(encode(tokenizer, "x" * 1_000_000)) > 0


def test_load(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert encode(loaded, "hello 🙂") == encode(byte_tokenizer(), "hello 🙂")


@pytest.mark.parametrize(
    ("stops", "text", "shown"),
    [
        pytest.param([], "abc", "abc", id="none"),
        pytest.param(["END"], "text END more", "text ", id="middle"),
        pytest.param(["END"], "text EN", "text EN", id="unfinished-is-shown"),
        pytest.param(["END"], "ENENDx", "EN", id="restart-inside"),
        pytest.param(["aab"], "aaab", "a", id="self-overlap"),
        pytest.param(["abcd", "bc"], "xabcd", "xa", id="first-complete-wins"),
        pytest.param(["bc", "abc"], "xabc", "x", id="same-end-longest-wins"),
        pytest.param(["日本"], "今日本語", "今", id="multi-byte"),
        pytest.param(["x"], "x", "", id="at-once"),
    ],
)
def test_stop_strings_do_not_depend_on_the_pieces(stops: list[str], text: str, shown: str) -> None:
    for size in range(1, len(text) + 1):
        matcher = StopMatcher(stops)
        pieces = [matcher.push(text[i : i + size]) for i in range(0, len(text), size)]
        assert "".join(pieces) + matcher.flush() == shown
        assert matcher.stopped == (shown != text)


def test_only_a_possible_start_is_held_back() -> None:
    matcher = StopMatcher(["STOP", "TOAST"])
    assert matcher.push("a S") == "a "
    assert matcher.push("T") == ""
    assert matcher.push("OA") == "S"
    assert matcher.push("K") == "TOAK"


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=8),
)
def test_stop_matcher_equals_a_plain_search(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    ends = sorted((text.find(s) + len(s), text.find(s)) for s in stops if s in text)
    wanted = text[: ends[0][1]] if ends else text
    matcher = StopMatcher(stops)
    assert "".join(map(matcher.push, pieces)) + matcher.flush() == wanted
