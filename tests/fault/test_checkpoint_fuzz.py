"""C31: of damaged headers comes a ``CheckpointError`` and nothing else, in bounded time and memory.

In CI as many cases as fit into a few seconds; by hand ``FUZZ_CASES=10000 pytest`` with this file. A
case is a function of its number, which a failure names.
"""

import json
import os
import random
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from dsv4_jax.checkpoint import CheckpointError
from dsv4_jax.checkpoint.formats import detect
from dsv4_jax.checkpoint.read import Reader
from dsv4_jax.checkpoint.validate import resolve
from dsv4_jax.config import ModelConfig
from tests.support import tiny

CONFIG, TENSORS = tiny.official()
CASES = int(os.environ.get("FUZZ_CASES", "0"))
CI_SECONDS = 3.0
# Headers have 39 kB at most. The slowest of 10,000 cases took 0.12 s, the largest 0.5 MB.
MOST_SECONDS = 5.0
MOST_BYTES = 50_000_000

TOKENS = (
    b'" { } [ ] , : \\ \\u0000 \\ud800 \0 \xff \xef\xbb\xbf NaN -Infinity null true -1 '
    b"0.5 1e400 -0 9223372036854775807 18446744073709551616 [[[[[[[[ ]]]]]]]] [0,0] [1] [] {} "
    b'"dtype" "shape" "data_offsets" "F8_E4M3" "F4" "BF16" "__metadata__" {"a":{"a":{"a":{ '
    b'"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
).split(b" ")
TOKENS += [b" ", b"9" * 400, b"9" * 5000, b"[" * 5000, b'{"a":' * 5000]


def _flip(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _replace(rng: random.Random, data: bytearray) -> None:
    data[rng.randrange(len(data))] = rng.randrange(256)


def _digit(rng: random.Random, data: bytearray) -> None:
    places = [i for i, byte in enumerate(data) if 0x30 <= byte <= 0x39]
    data[rng.choice(places or [0])] = rng.choice(b"0123456789")


def _insert(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((rng.choice(TOKENS), rng.randbytes(rng.randrange(1, 9))))


def _overwrite(rng: random.Random, data: bytearray) -> None:
    at, token = rng.randrange(len(data)), rng.choice(TOKENS)
    data[at : at + len(token)] = token


def _remove(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.choice((1, 1, 2, rng.randrange(1, len(data) + 1)))]


def _repeat(rng: random.Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    piece = data[at : at + rng.randrange(1, 300)]
    to = rng.choice((at, rng.randrange(len(data))))
    data[to:to] = piece


def _value(rng: random.Random, data: bytearray) -> None:
    """Another value at a whole JSON token: what is well-formed and wrong."""
    ends = [i for i, byte in enumerate(data) if byte in b",]}:"]
    if len(ends) > 1:
        i = rng.randrange(len(ends) - 1)
        data[ends[i] + 1 : ends[i + 1]] = rng.choice(TOKENS)


VALUES = (
    *(
        None,
        True,
        -1,
        0,
        1,
        7,
        0.5,
        2**31,
        2**63 - 1,
        2**63,
        2**64,
        10**400,
        "",
        "U8",
        "F4",
        "BF16",
    ),
    *(
        "F8_E8M0",
        "\ud800",
        [],
        [0],
        [1],
        [0, 0],
        [0, 2**62],
        [2**62, 0],
        [2**32, 2**32],
        {},
        {"": 0},
    ),
)


def _field(rng: random.Random, data: bytearray) -> None:
    """Well-formed JSON with another value, number, key or order somewhere."""
    try:
        header = json.loads(data)
        name = rng.choice(list(header))
        entry = header[name]
        field = rng.choice(list(entry))
        what = rng.randrange(5)
        if what == 0:
            entry[field] = rng.choice(VALUES)
        elif what == 1:
            entry[field][rng.randrange(len(entry[field]))] += rng.choice((-1, 1, 2**31, 2**63))
        elif what == 2:
            entry[rng.choice((field, "x"))] = entry.pop(field)
        elif what == 3:
            header[rng.choice((name[:-1], name + "x", "__metadata__"))] = header.pop(name)
        else:
            header[name] = rng.choice((header[rng.choice(list(header))], rng.choice(VALUES)))
        data[:] = json.dumps(header).encode()
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        _flip(rng, data)  # no header any more


_TEXT = (_flip, _replace, _digit, _insert, _overwrite, _remove, _repeat, _value)
MUTATIONS = (*_TEXT, *(_field for _ in _TEXT))


class Shard(NamedTuple):
    """Length field and header of a shard, and the size of the whole file."""

    head: bytes
    size: int

    def write(self, path: Path) -> None:
        """The data, which nobody reads here, become a hole."""
        path.write_bytes(self.head)
        os.truncate(path, self.size)


def damaged(case: int, shard: Shard) -> Shard:
    """A shard with a few changes to its header, its length field or its size."""
    rng = random.Random(case)
    header = bytearray(shard.head[8:])
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        if header:
            rng.choice(MUTATIONS)(rng, header)
    length, size = len(header), 8 + len(header) + shard.size - len(shard.head)
    what = rng.random()
    if what < 0.05:
        lengths = (rng.randrange(2 * len(shard.head)), rng.getrandbits(64), 0, 2**64 - 1)
        length = rng.choice(lengths)
    elif what < 0.1:
        size = rng.choice((rng.randrange(size), size - 1, size + 1, length, length + 8))
    return Shard(length.to_bytes(8, "little") + header, size)


def look(path: Path, config: ModelConfig) -> str:
    """All that is checked before the first array is placed; what came of it."""
    try:
        with Reader(path) as reader:
            detect(reader.tensors)
            resolve(reader, config, mtp=True)
    except CheckpointError as error:
        str(error).encode()  # can be printed
        assert len(str(error)) < 100_000
        return "refused"
    return "passed"


def _shards(path: Path) -> list[Shard]:
    """A few tensors, for ten times as many cases a second, and all of them, which pass."""
    few = [name for name in TENSORS if name.startswith(("hc_", "layers.0.attn.wq_a"))]
    found: list[Shard] = []
    for part in ({name: TENSORS[name] for name in few}, TENSORS):
        blob = (tiny.write(path, CONFIG, part) / tiny.SINGLE).read_bytes()
        found.append(Shard(blob[: 8 + int.from_bytes(blob[:8], "little")], len(blob)))
    return found


def test_C31_damaged_headers(tmp_path: Path) -> None:
    few, all_of_them = _shards(tmp_path)
    config = ModelConfig.from_hf(CONFIG)
    assert look(tmp_path, config) == "passed"
    found: Counter[str] = Counter()
    slowest = largest = 0.0
    start = time.process_time()
    tracemalloc.start()
    try:
        for case in range(CASES or 1_000_000):
            if not CASES and time.process_time() - start > CI_SECONDS:
                break
            shard = all_of_them if case % 8 == 0 else few
            damaged(case, shard).write(tmp_path / tiny.SINGLE)
            tracemalloc.reset_peak()
            held, began = tracemalloc.get_traced_memory()[0], time.process_time()
            try:
                found[look(tmp_path, config)] += 1
            except BaseException as error:
                error.add_note(f"case {case}")
                raise
            slowest = max(slowest, time.process_time() - began)
            largest = max(largest, tracemalloc.get_traced_memory()[1] - held)
            assert slowest < MOST_SECONDS, f"case {case}"
            assert largest < MOST_BYTES, f"case {case}"
    finally:
        tracemalloc.stop()
    print(f"{dict(found)}, slowest {slowest:.3f} s, largest {largest / 1e6:.1f} MB")
    assert found["refused"] > 50
    if CASES:
        assert found["passed"]  # a changed space, say


ENTRY = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


def _entry(**fields: object) -> bytes:
    return json.dumps({"a": ENTRY | fields}).encode()


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"[" * 1_000_000, id="brackets"),
        pytest.param(b'{"a":' * 1_000_000, id="braces"),
        pytest.param(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", id="deep-entry"),
        pytest.param(b'{"a":' + b"9" * 1_000_000 + b"}", id="million-digits"),
        pytest.param(b'{"a":NaN}', id="nan"),
        pytest.param(b'{"a":-Infinity}', id="infinity"),
        pytest.param(_entry(shape=[float(1)]), id="float-size"),
        pytest.param(_entry(shape=[2**64, 1]), id="size-over-64-bits"),
        pytest.param(_entry(shape=[2**32, 2**32]), id="product-over-64-bits"),
        pytest.param(_entry(shape=[2**62, 0], data_offsets=[0, 0]), id="product-before-zero"),
        pytest.param(_entry(shape=[2**61], dtype="F64"), id="bits-over-64-bits"),
        pytest.param(_entry(shape=[1] * 100_000 + [2]), id="long-shape"),
        pytest.param(_entry(data_offsets=[2**64 - 1, 2**64]), id="offsets-over-64-bits"),
        pytest.param(_entry(data_offsets=[1, 0]), id="offsets-backwards"),
        pytest.param(_entry(data_offsets=[-1, 0]), id="offsets-negative"),
        pytest.param(_entry(data_offsets=[0, 1, 2]), id="offsets-three"),
        pytest.param(_entry(dtype=["U8"]), id="dtype-list"),
        pytest.param(_entry(dtype="F6_E2M3"), id="dtype-unknown"),
        pytest.param(json.dumps({"\ud800": ENTRY}).encode(), id="surrogate"),
        pytest.param(json.dumps({"\x1b[2J\0" + "x" * 10**6: ENTRY}).encode(), id="long-name"),
        pytest.param(json.dumps({"__metadata__": {"a": 1}, "a": ENTRY}).encode(), id="metadata"),
        pytest.param(json.dumps({"__metadata__": [], "a": ENTRY}).encode(), id="metadata-list"),
        pytest.param(b"\xef\xbb\xbf" + _entry(), id="bom"),
        pytest.param(b'{"a\xff":1}', id="not-utf8"),
        pytest.param(b"", id="empty"),
        pytest.param(_entry() + b" {}", id="two-values"),
        pytest.param(b" " + _entry(), id="leading-space"),
    ],
)
def test_C31_malicious_headers(tmp_path: Path, header: bytes) -> None:
    (tmp_path / tiny.SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    began = time.process_time()
    assert look(tmp_path, ModelConfig.from_hf(CONFIG)) == "refused"
    assert time.process_time() - began < MOST_SECONDS
