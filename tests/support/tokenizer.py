"""Tiny byte-level BPE tokenizers."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MERGES = (("t", "h"), ("h", "e"), ("l", "l"), ("Ġ", "a"))


def byte_tokenizer(merges: Sequence[tuple[str, str]] = MERGES) -> Tokenizer:
    """256 byte tokens, a few merges, two special tokens.

    Characters outside ASCII are always split into one token per byte. Without merges the ids of
    plain text are below 256.
    """
    return _tokenizer(sorted(pre_tokenizers.ByteLevel.alphabet()), list(merges))


CHAT_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
)


def chat_tokenizer(tokens: Sequence[str] = CHAT_TOKENS) -> Tokenizer:
    """Bytes, and the tokens of the chat format from id 0 on, as BOS and EOS are in the release."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return _tokenizer([*tokens, *alphabet], [], special=tokens)


ASCII = (*map(chr, range(0x21, 0x7F)), "Ġ", "Ċ")


def ascii_tokenizer() -> Tokenizer:
    """96 tokens, printable ASCII and the newline; it drops everything else without a word."""
    return _tokenizer(ASCII, [])


def ascii_chat_tokenizer() -> Tokenizer:
    """The tokens of the chat format, and ASCII: for a model whose vocabulary is small."""
    return _tokenizer([*CHAT_TOKENS, *ASCII], [], special=CHAT_TOKENS)


def _tokenizer(
    alphabet: Sequence[str], merges: list[tuple[str, str]], special: Sequence[str] = ("<｜User｜>",)
) -> Tokenizer:
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer
