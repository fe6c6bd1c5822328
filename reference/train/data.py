"""Text of the small model: which files of a standard library, in which split, and its tokenizer.

Everything follows from the library's folder and the lists in this file; nothing is drawn at random
except the order of documents in `Batches`, from a seed.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Held-out modules: the first N_HELD_OUT of `candidates`, by the SHA-256 of their file names.
N_HELD_OUT = 32
# The next ones in the same order: never trained on, watched during training.
N_DEV = 8
CANDIDATE_BYTES = (3_000, 120_000)
# Other files that hold a held-out module's text or tests under a name that the rule of `is_twin`
# does not see.
TWINS = {
    "_pyio.py": ("test_io", "test_fileio", "test_bufio", "test_memoryio", "test_univnewlines"),
    "_strptime.py": ("test_strptime", "test_time"),
    "_compression.py": ("test_bz2", "test_gzip", "test_lzma"),
    "zipimport.py": ("test_zipimport", "test_zipimport_support"),
    "profile.py": ("test_cprofile",),
}
# A file that shares this part of a held-out module's lines is a twin whatever its name.
SHARED_LINES = 0.08
# Tables that a program wrote, and documentation that is not source.
GENERATED = re.compile(
    r"encodings/(?!(__init__|aliases|idna|punycode|utf_.*|.*_codec)\.py)"
    r"|config-.*|_sysconfigdata.*|test/test_tools/.*data|test/.*/badsyntax_.*|lib2to3/tests/data"
)

SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜extracted_url｜>",
    "<｜read_url｜>",
)
BOS, EOS = 0, 1
# Words with a leading mark or space, numbers of up to two digits, punctuation with the newlines
# after it, blank lines, indentation.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def read_library(folder: Path) -> dict[str, str]:
    """Every UTF-8 `.py` file of a standard library, by its path below `folder`."""
    texts = {}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if "site-packages" in path.parts or "__pycache__" in path.parts:
            continue
        try:
            texts[name] = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
    return texts


def candidates(texts: Mapping[str, str]) -> list[str]:
    """Top-level modules of ordinary size, in the order of the SHA-256 of their names."""
    low, high = CANDIDATE_BYTES
    names = [n for n, text in texts.items() if "/" not in n and low <= len(text.encode()) <= high]
    return sorted(names, key=lambda n: hashlib.sha256(n.encode()).hexdigest())


def long_lines(text: str) -> set[str]:
    """Lines of more than 24 characters without their indentation."""
    return {line.strip() for line in text.split("\n") if len(line.strip()) > 24}


def twins(name: str, texts: Mapping[str, str]) -> set[str]:
    """Files that may not be trained on when `name` is held out: its tests and near copies."""
    stem = name.removesuffix(".py").lstrip("_")
    tests = {f"test_{stem}", f"test_{name.removesuffix('.py')}", *TWINS.get(name, ())}
    found = {f"_py{stem}.py", f"_{stem}.py", f"{stem}.py", f"c{stem.title()}.py"}
    own = long_lines(texts[name])
    for other, text in texts.items():
        parts = [part.removesuffix(".py") for part in other.split("/")]
        named = any(part in tests for part in parts) or (
            parts[0] == "test" and parts[-1].startswith(tuple(f"{t}_" for t in tests))
        )
        shared = len(own & long_lines(text)) / max(len(own), 1)
        if named or shared >= SHARED_LINES:
            found.add(other)
    return (found & set(texts)) - {name}


def split(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """File names by use: `held_out`, `dev`, `twins`, `generated` and `train`."""
    order = candidates(texts)
    held, dev = order[:N_HELD_OUT], order[N_HELD_OUT : N_HELD_OUT + N_DEV]
    away = set[str]().union(*(twins(name, texts) for name in held + dev)) - {*held, *dev}
    generated = {name for name in texts if GENERATED.match(name)} - {*held, *dev, *away}
    train = sorted(set(texts) - {*held, *dev} - away - generated)
    return {
        "held_out": sorted(held),
        "dev": sorted(dev),
        "twins": sorted(away),
        "generated": sorted(generated),
        "train": train,
    }


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with V4's special tokens in front, ids 0 (BOS) and 1 (EOS) as released."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenize(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """BOS, the text, EOS. Special tokens in the text are text.

    The library always matches added tokens; a tokenizer that is to see none gets the pieces
    between them and the pieces of their own characters.
    """
    pattern = "|".join(map(re.escape, SPECIAL_TOKENS))
    ids: list[int] = []
    for piece in re.split(f"({pattern})", text):
        halves = [piece[:1], piece[1:]] if piece in SPECIAL_TOKENS else [piece]
        for half in halves:
            ids += tokenizer.encode(half, add_special_tokens=False).ids
    return np.array([BOS, *ids, EOS], np.uint16)


def library_weight(name: str) -> int:
    """How often a document is seen in one epoch: tests and IDLE once, the library twice."""
    return 1 if name.split("/")[0] in ("test", "idlelib", "turtledemo") else 2


class Batches:
    """Rows of consecutive tokens from all documents, shuffled anew in every epoch.

    Args:
        documents: Token ids with BOS and EOS.
        repeats: How often each document stands in an epoch.
        rows: Rows of a batch.
        length: Tokens of a row.
        seed: Of the order; batch `i` depends on the seed and `i` alone.
    """

    def __init__(
        self, documents: list[np.ndarray], repeats: list[int], rows: int, length: int, seed: int
    ) -> None:
        self.documents = [d for d, n in zip(documents, repeats, strict=True) for _ in range(n)]
        self.rows, self.length, self.seed = rows, length, seed
        self.tokens_per_epoch = sum(map(len, self.documents))
        self.batches_per_epoch = (self.tokens_per_epoch - length) // (rows * length)
        if self.batches_per_epoch < 1:
            raise ValueError(
                f"Batches: {rows} rows of {length} need {(rows + 1) * length} tokens, got "
                f"{self.tokens_per_epoch}"
            )
        self._epoch, self._cut = -1, np.zeros((0, 0), np.int32)

    def _lay_out(self, epoch: int) -> None:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.documents))
        stream = np.concatenate([self.documents[i] for i in order]).astype(np.int32)
        n_rows = self.batches_per_epoch * self.rows
        spare = len(stream) - n_rows * self.length
        start = int(rng.integers(spare + 1))
        cut = stream[start : start + n_rows * self.length].reshape(n_rows, self.length)
        self._epoch, self._cut = epoch, cut[rng.permutation(n_rows)]

    def __getitem__(self, step: int) -> np.ndarray:
        """Batch number `step`, `[rows, length]`."""
        epoch, index = divmod(step, self.batches_per_epoch)
        if epoch != self._epoch:
            self._lay_out(epoch)
        return self._cut[index * self.rows : (index + 1) * self.rows]


def repeat_rows(
    rows: np.ndarray, rng: np.random.Generator, most: int = 12
) -> tuple[np.ndarray, np.ndarray]:
    """Makes rows that fall into loops, for the loss against repetition.

    Each row becomes stretches of its own text, each followed by up to `most` copies (at least a
    third of that) of the stretch's last 1 to 48 tokens.

    Returns:
        The rows `[b, t]` and for each token the distance to its copy one turn before, from the
        third occurrence on; -1 in the second occurrence, else 0.

    Raises:
        ValueError: `most` is less than 3.
    """
    out, back = rows.copy(), np.zeros_like(rows)
    length = rows.shape[1]
    if most < 3:
        raise ValueError(f"repeat_rows: most must be >= 3, got {most}")
    for row, distance in zip(out, back, strict=True):
        at = 0
        while at < length:
            at += int(rng.integers(32, 257))
            period = min(int(np.exp(rng.uniform(0, np.log(49)))), at)
            copies = int(rng.integers(most // 3, most + 1))
            end = min(at + copies * period, length)
            if at >= length:
                break
            row[at:end] = np.resize(row[at - period : at], end - at)
            distance[at : at + period] = -1
            distance[min(at + period, end) : end] = period
            at = end
    return out, back


def mark_loops(ids: np.ndarray, prompt: int) -> np.ndarray:
    """Distances as `repeat_rows` gives them, for a continuation that the model itself wrote.

    Args:
        ids: `[t]`, prompt and continuation.
        prompt: Tokens of the prompt; these count as text.

    Returns:
        0 in the prompt; where the continuation stands in the third or a later occurrence of a
        stretch of up to 32 tokens the shortest period, elsewhere -1.
    """
    back = np.where(np.arange(len(ids)) < prompt, 0, -1).astype(np.int32)
    for period in range(32, 0, -1):
        run = 0
        for t in range(period, len(ids)):
            run = run + 1 if ids[t] == ids[t - period] else 0
            if run > period and t >= prompt:
                back[t] = period
    return back


class OwnLoops:
    """Rows of continuations that the model itself wrote, one after the other.

    Args:
        path: A file with `ids`, the `ends` of the continuations in it, and the tokens of their
            `prompts`.
    """

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            parts = np.split(file["ids"].astype(np.int32), file["ends"][:-1])
            prompts = file["prompts"].tolist()
        self.parts = [(ids, mark_loops(ids, n)) for ids, n in zip(parts, prompts, strict=True)]

    def rows(self, shape: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Tokens and distances `[rows, length]`, continuations drawn at random."""
        out = []
        for _ in range(shape[0]):
            row: list[tuple[np.ndarray, np.ndarray]] = []
            while sum(len(ids) for ids, _ in row) < shape[1]:
                row.append(self.parts[int(rng.integers(len(self.parts)))])
            out.append([np.concatenate(x)[: shape[1]] for x in zip(*row, strict=True)])
        tokens, back = zip(*out, strict=True)
        return np.stack(tokens), np.stack(back)


def longest_loop(ids: list[int], max_period: int = 32) -> tuple[int, int]:
    """The most often that a stretch of up to `max_period` tokens stands in a row: (times, period).

    A loop of period p repeated n times is n consecutive equal stretches of p tokens.
    """
    best = (1, 0)
    array = np.asarray(ids)
    for period in range(1, min(max_period, len(ids) - 1) + 1):
        equal = array[period:] == array[:-period]
        run = longest = 0
        for same in equal:
            run = run + 1 if same else 0
            longest = max(longest, run)
        best = max(best, (longest // period + 1, period), key=lambda pair: pair[0])
    return best


def bytes_per_token(tokenizer: Tokenizer, texts: Mapping[str, str]) -> float:
    """UTF-8 bytes by tokens, without BOS and EOS."""
    counts = Counter[str]()
    for text in texts.values():
        counts["bytes"] += len(text.encode())
        counts["tokens"] += len(tokenize(tokenizer, text)) - 2
    return counts["bytes"] / counts["tokens"]
