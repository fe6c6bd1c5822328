"""Bits per byte: how well a model predicts text, independent of its tokenizer.

``bits = sum over tokens of -log2 p(token | BOS and all tokens before it)``; divided by the UTF-8
bytes of the text. Probabilities are the softmax of the FP32 logits (model.md 6.1).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tokenizers import Tokenizer

from dsv4_jax.generate import Model
from dsv4_jax.text import encode
from dsv4_jax.typing import Array, Float32, Int32, Params

__all__ = [
    "Document",
    "Score",
    "cache_size",
    "evaluate",
    "log_softmax",
    "read_document",
    "shorten",
    "total",
]

Progress = Callable[[int, int], object]
"""Called with (tokens done, tokens in total)."""

_CHUNK = 256
_SMALLEST_CHUNK = 8
_SUM_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Document:
    """A text as a model reads it.

    Attributes:
        name: for messages; the path of a file.
        tokens: int32 ``[n]``, without BOS.
        num_bytes: UTF-8 bytes of the text.
    """

    name: str
    tokens: np.ndarray
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model makes of one document, or of several together.

    Attributes:
        name: that of the document.
        num_bytes: UTF-8 bytes.
        num_tokens: tokens predicted; BOS is not one of them.
        bits: ``sum of -log2 p``, FP64.
        drafts: positions where the MTP module's draft and the model's own greedy token both exist.
        agreed: at how many of them they are the same token.
        log2_probs: FP64 ``[num_tokens]``, ``log2 p`` of each token; empty in a total.
    """

    name: str
    num_bytes: int
    num_tokens: int
    bits: float
    drafts: int = 0
    agreed: int = 0
    log2_probs: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros(0), repr=False, compare=False
    )

    @property
    def bits_per_byte(self) -> float:
        """``bits / num_bytes``."""
        return self.bits / self.num_bytes

    @property
    def mtp_agreement(self) -> float | None:
        """Fraction of drafts that are the model's own greedy token; ``None`` without drafts."""
        return self.agreed / self.drafts if self.drafts else None


def total(scores: Sequence[Score]) -> Score:
    """The documents together: bits, bytes, tokens and drafts added up."""
    return Score(
        "total",
        sum(score.num_bytes for score in scores),
        sum(score.num_tokens for score in scores),
        math.fsum(score.bits for score in scores),
        sum(score.drafts for score in scores),
        sum(score.agreed for score in scores),
    )


def read_document(tokenizer: Tokenizer, path: Path) -> Document:
    """Reads and encodes a UTF-8 file, byte for byte: no newline is changed, no BOM removed.

    Args:
        tokenizer: `text.plain_tokenizer` of the checkpoint's, so that a special token spelt out
            in the file counts as the text it is.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, not UTF-8, or the tokens do not decode to the same text.
    """
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path}: the file is empty")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    ids = encode(tokenizer, text)
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    if decoded != text:
        at = next(
            (i for i, (x, y) in enumerate(zip(text, decoded, strict=False)) if x != y),
            min(len(text), len(decoded)),
        )
        raise ValueError(
            f"{path}: the tokenizer must give the text back, but from character {at} on "
            f"{text[at : at + 20]!r} became {decoded[at : at + 20]!r}"
        )
    return Document(str(path), np.array(ids, np.int32), len(data))


def shorten(tokenizer: Tokenizer, document: Document, num_tokens: int) -> Document:
    """The first ``num_tokens`` tokens, or up to a character's tokens fewer: no character is cut.

    Args:
        tokenizer: the one that `read_document` had.

    Raises:
        ValueError: not even one character is complete.
    """
    if num_tokens >= len(document.tokens):
        return document
    text = tokenizer.decode(document.tokens.tolist(), skip_special_tokens=False)
    for n in range(num_tokens, 0, -1):
        start = tokenizer.decode(document.tokens[:n].tolist(), skip_special_tokens=False)
        if start and text.startswith(start):
            return Document(document.name, document.tokens[:n], len(start.encode("utf-8")))
    raise ValueError(f"{document.name}: the first {num_tokens} tokens must hold a whole character")


def log_softmax(logits: Float32[Array, "*lead v"]) -> Float32[Array, "*lead v"]:
    """Natural logarithms of the probabilities, FP32.

    The exponentials are added in blocks: one running FP32 sum over 129,280 of them could lose
    every term below 2^-24 of it, 0.4 % of the mass together.
    """
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    mass = jnp.exp(shifted)
    pad = -mass.shape[-1] % _SUM_BLOCK
    mass = jnp.pad(mass, [(0, 0)] * (mass.ndim - 1) + [(0, pad)])
    blocks = jnp.sum(mass.reshape(*mass.shape[:-1], -1, _SUM_BLOCK), axis=-1)
    # Without the barrier XLA joins the two sums into one.
    mass_sum = jnp.sum(lax.optimization_barrier(blocks), axis=-1, keepdims=True)
    return shifted - jnp.log(mass_sum)


class _Chunk(NamedTuple):
    """What leaves the device, ``[b, t]`` each; ``draft`` is about the token after the target."""

    log_prob: Array
    greedy: Array
    draft: Array | None


@functools.partial(jax.jit, static_argnames=("model", "mtp"), donate_argnames="cache")
def _score_chunk(
    model: Model,
    params: Params,
    tokens: Int32[Array, "b t"],
    targets: Int32[Array, "b t"],
    num_tokens: Int32[Array, "b"],
    cache: Any,
    *,
    mtp: bool,
) -> tuple[_Chunk, Any]:
    variables = {"params": params}
    if not mtp:
        logits, cache = model.apply(variables, tokens, cache, num_tokens=num_tokens, logits="all")
        draft = None
    else:
        (logits, cache), kept = model.apply(
            variables,
            tokens,
            cache,
            num_tokens=num_tokens,
            logits="all",
            mutable=["intermediates"],
        )
        last = model.config.num_hidden_layers - 1
        (streams,) = kept["intermediates"][f"streams_{last}"]
        drafted, _, cache = model.apply(
            variables, streams, targets, cache, num_tokens=num_tokens, method="draft"
        )
        draft = jnp.argmax(drafted, axis=-1)
    # Not finite when any logit is NaN or +Inf, all are -Inf, or the target's own is.
    log_prob = jnp.take_along_axis(log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return _Chunk(log_prob, jnp.argmax(logits, axis=-1), draft), cache


class _Segment(NamedTuple):
    """Tokens ``start .. start + len(tokens)`` of a document, predicted after a BOS of their own."""

    document: int
    start: int
    tokens: np.ndarray


def _segments(documents: Sequence[Document], context: int | None) -> list[_Segment]:
    """Longest first, so that the rows of a batch have about the same length."""
    cut = [
        _Segment(i, start, document.tokens[start : start + (context or len(document.tokens))])
        for i, document in enumerate(documents)
        for start in range(0, len(document.tokens), context or len(document.tokens))
    ]
    return sorted(cut, key=lambda segment: -len(segment.tokens))


class CacheSize(NamedTuple):
    """Rows and positions of the cache, and the tokens of a row in one call."""

    batch_size: int
    max_len: int
    chunk: int


def cache_size(
    documents: Sequence[Document],
    config: Any,
    *,
    context: int | None,
    batch_size: int,
    chunk_size: int = _CHUNK,
) -> CacheSize:
    """The cache that `evaluate` makes with these arguments."""
    segments = _segments(documents, context)
    longest = len(segments[0].tokens)
    width = min(chunk_size, max(_SMALLEST_CHUNK, 1 << (longest - 1).bit_length()))
    max_len = min(-(-longest // width) * width, config.max_position_embeddings)
    return CacheSize(min(batch_size, len(segments)), max_len, width)


def _check(
    model: Model,
    documents: Sequence[Document],
    context: int | None,
    batch_size: int,
    chunk_size: int,
) -> None:
    limit, vocab = model.config.max_position_embeddings, model.config.vocab_size
    if not documents:
        raise ValueError("evaluate: documents must not be an empty list")
    for name, value in (("context", context), ("batch_size", batch_size), ("chunk", chunk_size)):
        if value is not None and value < 1:
            raise ValueError(f"evaluate: {name} must be >= 1, got {value}")
    if context is not None and context > limit:
        raise ValueError(
            f"evaluate: context {context} exceeds the model's max_position_embeddings {limit}"
        )
    for document in documents:
        tokens = document.tokens
        if tokens.ndim != 1 or tokens.size == 0 or document.num_bytes < 1:
            raise ValueError(f"evaluate: {document.name}: must hold at least one token and byte")
        if context is None and tokens.size > limit:
            raise ValueError(
                f"evaluate: {document.name}: {tokens.size} tokens exceed the model's "
                f"max_position_embeddings {limit}: give a context to cut it into segments"
            )
        bad = tokens[(tokens < 0) | (tokens >= vocab)]
        if bad.size:
            raise ValueError(
                f"evaluate: {document.name}: token ids must be in [0, {vocab}) (vocab_size), "
                f"got {bad[0]}: is tokenizer.json that of this checkpoint?"
            )


def evaluate(
    model: Model,
    params: Params,
    documents: Sequence[Document],
    *,
    context: int | None = None,
    batch_size: int = 8,
    chunk_size: int = _CHUNK,
    mtp: bool = False,
    progress: Progress | None = None,
) -> list[Score]:
    """Scores documents; a score depends on its document only, not on its neighbours.

    Every document is one sequence through the cache, ``chunk_size`` tokens at a time; only one
    shape is compiled. Logits stay on the device.

    Args:
        model: the Flax module.
        params: its parameters.
        documents: texts of any lengths.
        context: cuts every document into segments of this many tokens, each predicted from its
            own BOS on; ``None``: one segment, as long as the document.
        batch_size: most segments in one call of the model.
        chunk_size: most tokens of a segment in one call.
        mtp: also draft: at position ``i`` the MTP module (model.md 6.2) sees the streams and the
            true token ``i + 1``; its argmax counts as agreeing when it is the argmax of the main
            model at position ``i + 1``. The model must have been made with ``mtp=True``.
        progress: called after every chunk.

    Returns:
        One `Score` per document, in order.

    Raises:
        ValueError: no documents, an empty one, one longer than ``max_position_embeddings``
            without ``context``, a token outside the vocabulary, a setting below 1; or logits that
            give no finite probability (document and token are named).
    """
    _check(model, documents, context, batch_size, chunk_size)
    segments = _segments(documents, context)
    rows, max_len, width = cache_size(
        documents, model.config, context=context, batch_size=batch_size, chunk_size=chunk_size
    )
    log2_probs = [np.zeros(len(document.tokens)) for document in documents]
    drafts, agreed = [0] * len(documents), [0] * len(documents)
    done, everything = 0, sum(len(document.tokens) for document in documents)

    for first in range(0, len(segments), rows):
        batch = segments[first : first + rows]
        counts = np.zeros(rows, np.int64)
        counts[: len(batch)] = [len(segment.tokens) for segment in batch]
        steps = -(-int(counts.max()) // width)
        targets = np.zeros((rows, steps * width), np.int32)
        for row, segment in enumerate(batch):
            targets[row, : counts[row]] = segment.tokens
        bos = np.full((rows, 1), model.config.bos_token_id, np.int32)
        tokens = np.concatenate([bos, targets[:, :-1]], axis=1)

        cache = model.init_cache(batch_size=rows, max_len=max_len)
        before: np.ndarray | None = None  # drafts of the previous chunk's last position
        for start in range(0, steps * width, width):
            here = slice(start, start + width)
            taken = np.clip(counts - start, 0, width)
            out, cache = _score_chunk(
                model=model,
                params=params,
                tokens=tokens[:, here],
                targets=targets[:, here],
                num_tokens=taken.astype(np.int32),
                cache=cache,
                mtp=mtp,
            )
            log_prob, greedy, draft = jax.device_get(tuple(out))
            for row, segment in enumerate(batch):
                n = int(taken[row])
                at = segment.start + start
                bits = log_prob[row, :n].astype(np.float64) / math.log(2)
                bad = np.flatnonzero(~np.isfinite(bits))
                if bad.size:
                    raise ValueError(
                        f"evaluate: {documents[segment.document].name}: the logits for token "
                        f"{at + int(bad[0])} must give a finite log-probability, got {bits[bad[0]]}"
                    )
                log2_probs[segment.document][at : at + n] = bits
                if draft is None or n == 0:
                    continue
                # Compared with the greedy token of the position after: the first of a chunk is
                # met by the last draft of the chunk before.
                pairs = draft[row, : n - 1] == greedy[row, 1:n]
                if before is not None:
                    pairs = np.append(pairs, before[row] == greedy[row, 0])
                drafts[segment.document] += pairs.size
                agreed[segment.document] += int(pairs.sum())
            before = None if draft is None else draft[:, -1]
            done += int(taken.sum())
            if progress is not None:
                progress(done, everything)
    return [
        Score(
            document.name,
            document.num_bytes,
            len(document.tokens),
            -math.fsum(log2_probs[i]),
            drafts[i],
            agreed[i],
            log2_probs[i],
        )
        for i, document in enumerate(documents)
    ]
