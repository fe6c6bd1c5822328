"""Text around the model: the tokenizer, streaming detokenisation, stop strings.

The release's tokenizer is byte-level BPE. Nothing is added to a prompt: its text contains the
special tokens it needs (model.md 8.1). The exception is BOS, where a ``tokenizer_config.json``
says ``"add_bos_token": true``; the release has none.
"""

import codecs
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer, decoders

__all__ = [
    "IncrementalDetokenizer",
    "StopMatcher",
    "bos_token",
    "check_vocabulary",
    "encode",
    "json_object",
    "load_tokenizer",
    "plain_tokenizer",
]

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"


def load_tokenizer(directory: str | Path) -> Tokenizer | None:
    """Reads ``tokenizer.json``; ``None`` when the directory has none.

    Raises:
        ValueError: the file cannot be read as a tokenizer.
    """
    path = Path(directory) / TOKENIZER_FILE
    if not path.is_file():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for anything it dislikes
        raise ValueError(f"{path}: not a readable tokenizer: {error}") from error


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of ``text``; special tokens in it are recognised, nothing is added.

    Raises:
        ValueError: the text holds a lone surrogate, or the tokenizer refuses it.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"encode: text must be valid Unicode, got a lone surrogate at {error.start}"
        ) from error
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def json_object(path: Path) -> dict[str, Any]:
    """The settings of a JSON file.

    Raises:
        ValueError: it is not valid JSON, or no object.
    """
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(read).__name__}")
    return cast("dict[str, Any]", read)


def bos_token(directory: str | Path, tokenizer: Tokenizer) -> int | None:
    """The id that a prompt must begin with; ``None``: prompts stay as they are.

    Raises:
        ValueError: ``tokenizer_config.json`` cannot be read, or its ``bos_token`` is no token.
    """
    path = Path(directory) / SETTINGS_FILE
    if not path.is_file():
        return None
    settings = json_object(path)
    wanted = settings.get("add_bos_token", False)
    if not isinstance(wanted, bool):
        raise ValueError(f"{path}: add_bos_token must be true or false, got {wanted!r}")
    if not wanted:
        return None
    text = settings.get("bos_token")
    if isinstance(text, dict):  # transformers' AddedToken
        text = cast("dict[str, Any]", text).get("content")
    found = tokenizer.token_to_id(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(f"{path}: bos_token must be a token of the tokenizer, got {text!r}")
    return found


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Whether the model has a row for every token; it may have more rows than there are tokens.

    Raises:
        ValueError: it has not.
    """
    last = max([tokenizer.get_vocab_size(False) - 1, *tokenizer.get_added_tokens_decoder()])
    if last >= vocab_size:
        raise ValueError(
            f"{TOKENIZER_FILE}: token ids must be < {vocab_size} (vocab_size), got up to {last}: "
            "is it that of this checkpoint?"
        )


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer without its added tokens: text that spells one is text like any other.

    ``Tokenizer.encode_special_tokens`` would do so for tokens marked special only; the release
    does not mark all of its own.
    """
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = []
    return Tokenizer.from_str(json.dumps(state))


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (GPT-2's alphabet)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in plain}
    others = [byte for byte in range(256) if byte not in plain]
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


class IncrementalDetokenizer:
    """Turns token ids into text piece by piece; the pieces join to the decoded whole.

    Each token is mapped to its bytes and goes through an incremental UTF-8 decoder, so the cost
    per token is constant and a character whose bytes span tokens comes out with its last byte.
    Bytes that can never become a character come out as U+FFFD. Special tokens are kept as text;
    ids that the tokenizer does not know give nothing.

    Args:
        tokenizer: a tokenizer with a byte-level decoder.

    Raises:
        ValueError: the tokenizer decodes in another way.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not isinstance(tokenizer.decoder, decoders.ByteLevel):
            raise ValueError(
                "IncrementalDetokenizer: the tokenizer's decoder must be ByteLevel, got "
                f"{type(tokenizer.decoder).__name__}"
            )
        self._tokenizer = tokenizer
        self._alphabet = _byte_alphabet()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def _bytes(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token) if token >= 0 else None
        if piece is None:
            return b""
        try:
            return bytes(self._alphabet[char] for char in piece)
        except KeyError:  # an added token, stored as its own text
            return piece.encode("utf-8")

    def push(self, *tokens: int) -> str:
        """Text that became certain with these tokens; may be empty."""
        return self._decoder.decode(b"".join(map(self._bytes, tokens)))

    def flush(self) -> str:
        """Ends the text: an unfinished character becomes U+FFFD. The object starts afresh."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class StopMatcher:
    """Passes text through until a stop string appears, also one that spans pieces.

    Holds back only a tail that could be the start of a stop string. The stop string that is
    complete first ends the text (of several with the same end, the longest), so the result does
    not depend on how the text was cut into pieces.

    Args:
        stops: the stop strings; none means that all text passes.

    Raises:
        ValueError: a stop string is empty or not a string.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        if isinstance(stops, str):
            raise ValueError(f"StopMatcher: stops must be a list of strings, got {stops!r}")
        self._stops: tuple[str, ...] = tuple(dict.fromkeys(stops))
        for stop in self._stops:
            if not isinstance(stop, str) or not stop:  # pyright: ignore
                raise ValueError(f"StopMatcher: stop strings must not be empty, got {stop!r}")
        self._held: str = ""
        self.stopped: bool = False

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to show and was not shown before."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = len(text) - self._overlap(text)
        self._held = text[keep:]
        return text[:keep]

    def _overlap(self, text: str) -> int:
        """Length of the longest tail of ``text`` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:size]):
                    longest = size
                    break
        return longest

    def flush(self) -> str:
        """Text still held back at the end (empty after a stop)."""
        held, self._held = self._held, ""
        return held
