"""Text of the small model: split, tokenizer, batches, loops and evaluation windows."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.train import data
from reference.train.run import Plan, Text, greedy_rows, loops, windows

# Modules of the library below; more than are held out and watched, so that some are trained on.
MODULES = [f"mod{i:02}.py" for i in range(data.N_HELD_OUT + data.N_DEV + 8)]


def module(name, lines=100):
    """A module of ordinary size whose lines no other one has."""
    return "".join(f"value_{i} = compute('{name}', {i:04}) + offset\n" for i in range(lines))


def by_hash(names):
    return sorted(names, key=lambda n: hashlib.sha256(n.encode()).hexdigest())


@pytest.fixture(scope="module")
def library():
    """Modules, and for the first two held-out ones every sort of twin; and what is trained on."""
    texts = {name: module(name) for name in MODULES}
    stem, other = (name.removesuffix(".py") for name in by_hash(MODULES)[:2])
    lines = texts[f"{other}.py"].splitlines()
    twin = {
        f"test/test_{stem}.py": "named after it",
        f"test/test_{stem}_more.py": "named after it, with an end",
        f"test/test_{stem}/data.py": "in a folder named after it",
        f"_{stem}.py": "the C half",
        f"_py{stem}.py": "the Python half",
        f"c{stem.title()}.py": "the old C half",
        "pkg/copied.py": "\n".join(lines[:8]) + "\n",  # 8 of 100 lines
    }
    free = {
        "pkg/similar.py": "\n".join(lines[:7]) + "\n",  # 7 of 100
        "pkg/short.py": "import os\n" * 100,
        f"test/test_{stem}er.py": "of another module whose name begins alike",
        "tiny.py": "too small to be held out",
        "big.py": "#" * (data.CANDIDATE_BYTES[1] + 1),
        "encodings/utf_8.py": "source",
    }
    generated = {"encodings/cp1252.py": "a table", "config-3/x.py": "made by configure"}
    return texts | twin | free | generated, set(twin), set(free), set(generated)


def test_split_holds_out_by_the_hash_of_the_name(library):
    parts = data.split(library[0])
    order = by_hash(MODULES)
    assert parts["held_out"] == sorted(order[: data.N_HELD_OUT])
    assert parts["dev"] == sorted(order[data.N_HELD_OUT : data.N_HELD_OUT + data.N_DEV])


def test_split_uses_every_file_once(library):
    texts, twin, free, generated = library
    parts = data.split(texts)
    assert sorted(name for names in parts.values() for name in names) == sorted(texts)
    assert set(parts["twins"]) == twin
    assert set(parts["generated"]) == generated
    assert set(parts["train"]) == free | set(by_hash(MODULES)[data.N_HELD_OUT + data.N_DEV :])


def test_split_trains_on_no_twin(library):
    texts = library[0]
    parts = data.split(texts)
    for name in (*parts["held_out"], *parts["dev"]):
        assert not data.twins(name, texts) & set(parts["train"]), name


def test_twins_that_only_the_table_knows():
    texts = {"_strptime.py": module("a"), "test/test_time.py": "", "test/test_timeit.py": ""}
    assert data.twins("_strptime.py", texts) == {"test/test_time.py"}


def test_split_does_not_depend_on_the_order_of_files(library):
    texts = library[0]
    assert data.split(dict(reversed(texts.items()))) == data.split(texts)


def test_read_library_leaves_out_what_is_not_its_source(tmp_path):
    files = {
        "a.py": b"x\r\n\xc3\xa4",
        "pkg/b.py": b"y",
        "c.txt": b"z",
        "site-packages/d.py": b"z",
        "pkg/__pycache__/e.py": b"z",
        "latin.py": b"\xe4",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert data.read_library(tmp_path) == {"a.py": "x\r\nä", "pkg/b.py": "y"}


@pytest.mark.parametrize(
    ("name", "times"), [("os.py", 2), ("json/decoder.py", 2), ("test/test_os.py", 1)]
)
def test_library_weight(name, times):
    assert data.library_weight(name) == times


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer((module(name, 20) for name in MODULES[:4]), 300)


def text_of(tokenizer, ids):
    return tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def test_special_tokens_have_the_released_ids(tokenizer):
    assert tokenizer.get_vocab_size() == 300
    ids = [tokenizer.token_to_id(token) for token in data.SPECIAL_TOKENS]
    assert ids == list(range(len(data.SPECIAL_TOKENS)))
    assert tokenizer.token_to_id("<｜begin▁of▁sentence｜>") == data.BOS == 0
    assert tokenizer.token_to_id("<｜end▁of▁sentence｜>") == data.EOS == 1


PIECES = [*data.SPECIAL_TOKENS, "<", "｜", ">", "think", " \t\r\n\n", "value_1 = 12345", "äß漢🙂\0"]


@given(st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=40))
def test_tokenize_gives_the_text_back_without_special_ids(tokenizer, text):
    ids = data.tokenize(tokenizer, text)
    assert (ids[0], ids[-1]) == (data.BOS, data.EOS)
    assert (ids[1:-1] >= len(data.SPECIAL_TOKENS)).all()
    assert text_of(tokenizer, ids[1:-1]) == text


def test_the_library_alone_would_give_a_special_id(tokenizer):
    """Why `tokenize` cuts: without it a document could end in its middle."""
    assert tokenizer.encode(data.SPECIAL_TOKENS[data.EOS]).ids == [data.EOS]


def test_numbers_are_cut_by_two_digits_and_words_merged(tokenizer):
    pieces = [text_of(tokenizer, [i]) for i in data.tokenize(tokenizer, "mod +off")[1:-1]]
    assert pieces == ["mod", " +", "off"]
    numbers = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("x12345 6")]
    assert numbers == ["x", "12", "34", "5", "Ġ", "6"]


def test_bytes_per_token(tokenizer):
    texts = {"a": "mod", "b": "ä🙂"}  # one token, and one for each of 2 + 4 bytes
    assert data.bytes_per_token(tokenizer, texts) == (3 + 2 + 4) / (1 + 2 + 4)


def distinct_documents(lengths, first=100):
    """Documents in which every token occurs once."""
    cuts = first + np.cumsum([0, *lengths])
    return [np.arange(a, b, dtype=np.uint16) for a, b in pairwise(cuts)]


def batches(seed=5, rows=3, length=16):
    return data.Batches(distinct_documents([30, 50, 70, 21]), [1, 2, 1, 2], rows, length, seed)


def test_batches_depend_on_seed_and_step_alone():
    made, again = batches(), batches()
    steps = range(3 * made.batches_per_epoch)
    forth = [made[i] for i in steps]
    back = [again[i] for i in reversed(steps)][::-1]
    np.testing.assert_array_equal(forth, back)
    other = [batches(seed=6)[i] for i in steps]
    assert not np.array_equal(forth, other)


@pytest.mark.parametrize("epoch", [0, 1, 4])
def test_an_epoch_is_all_documents_but_less_than_a_batch_and_a_row(epoch):
    made = batches()
    n = made.batches_per_epoch
    rows = np.concatenate([made[epoch * n + i] for i in range(n)])
    assert rows.shape == (3 * n, 16) and rows.dtype == np.int32
    documents = distinct_documents([30, 50, 70, 21])
    want = np.bincount(np.concatenate([documents[i] for i in (0, 1, 1, 2, 3, 3)]))
    got = np.bincount(rows.ravel(), minlength=len(want))
    assert (got <= want).all()
    assert 0 <= (want - got).sum() < 3 * 16 + 16
    # Rows are stretches of the stream: a token is followed by its successor except at an end.
    ends = {int(d[-1]) for d in documents}
    a, b = rows[:, :-1].ravel(), rows[:, 1:].ravel()
    assert (b == a + 1)[~np.isin(a, list(ends))].all()


def test_epochs_differ_in_their_order():
    made = batches()
    assert not np.array_equal(made[0], made[made.batches_per_epoch])


def test_batches_of_too_little_text():
    enough = distinct_documents([64])
    assert data.Batches(enough, [1], 3, 16, 0).batches_per_epoch == 1
    with pytest.raises(ValueError, match="3 rows of 16 need 64 tokens, got 63"):
        data.Batches([enough[0][:-1]], [1], 3, 16, 0)


@pytest.mark.parametrize("most", [12, 6, 3])
def test_repeat_rows(most):
    """Every token outside a copy is the row's own; every copy equals the token one turn before."""
    rows = np.random.default_rng(1).integers(16, 5000, (40, 700)).astype(np.int32)
    kept = rows.copy()
    out, back = data.repeat_rows(rows, np.random.default_rng(2), most)
    np.testing.assert_array_equal(rows, kept)
    np.testing.assert_array_equal(out[back == 0], rows[back == 0])
    seen = set()
    for row, distance in zip(out, back, strict=True):
        starts = np.flatnonzero((distance == -1) & (np.roll(distance, 1) != -1))
        for at in starts:
            second = int(np.argmin(np.append(distance[at:], 0) == -1))
            rest = distance[at + second :]
            further = int(np.argmin(np.append(rest, 0) > 0))
            end = at + second + further
            # Where the row ends in the second occurrence, only its beginning is there.
            period = second if end < len(row) or further else None
            periods = range(second, 49) if period is None else [period]
            assert any((row[at:end] == row[at - p : end - p]).all() for p in periods)
            assert (rest[:further] == period).all()
            if end < len(row):
                assert further % second == 0
                seen.add(1 + further // second)
        # Nothing else is marked.
        marked = [int(at) for at in starts]
        assert all(distance[i - 1] for i in np.flatnonzero(distance) if i not in marked)
    # Every number of copies that may occur does, and periods up to the longest.
    assert seen == set(range(max(most // 3, 1), most + 1))
    assert 40 <= back.max() <= 48


def test_repeat_rows_without_a_third_occurrence():
    with pytest.raises(ValueError, match="most must be >= 3, got 2"):
        data.repeat_rows(np.zeros((1, 64), np.int32), np.random.default_rng(0), 2)


def test_mark_loops():
    """Only what the model wrote, from the third turn on, with the shortest period."""
    text = [5, 6, 7, 5, 6, 7, 5, 6, 7, 5, 6, 9, 9, 9, 9]
    marked = [-1] * 6 + [3] * 5 + [-1] * 2 + [1] * 2
    assert data.mark_loops(np.array(text), 0).tolist() == marked
    assert data.mark_loops(np.array(text), 8).tolist() == [0] * 8 + marked[8:]
    long = list(range(33)) * 3  # a period too long to be called a loop
    assert data.mark_loops(np.array(long), 1).tolist() == [0] + [-1] * 98


def test_own_loops(tmp_path):
    parts = [np.array([1, 2, 2, 2, 2]), np.array([3, 4, 5])]
    np.savez(
        tmp_path / "x.npz",
        ids=np.concatenate(parts),
        ends=np.array([5, 8]),
        prompts=np.array([1, 2]),
    )
    own = data.OwnLoops(tmp_path / "x.npz")
    tokens, back = own.rows((6, 20), np.random.default_rng(0))
    assert tokens.shape == back.shape == (6, 20)
    want = {1: [0], 2: [-1, -1, 1, 1], 3: [0], 4: [0], 5: [-1]}
    seen = set()
    for row, distances in zip(tokens.tolist(), back.tolist(), strict=True):
        for token in set(row):
            found = [d for t, d in zip(row, distances, strict=True) if t == token]
            pattern = want[token] * 20
            assert found == pattern[: len(found)]
            seen.add(token)
    assert seen == {1, 2, 3, 4, 5}


def most_in_a_row(ids, max_period):
    """`longest_loop`, spelled out."""
    best = (1, 0)
    for period in range(1, max_period + 1):
        for start in range(len(ids)):
            times = 1
            piece = ids[start : start + period]
            while ids[start + times * period : start + (times + 1) * period] == piece:
                times += 1
            if len(piece) == period and times > best[0]:
                best = (times, period)
    return best


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([], (1, 0)),
        ([7], (1, 0)),
        ([1, 2, 3, 4], (1, 0)),
        ([9, *[1, 2, 3] * 4, 8], (4, 3)),
        ([9, *[1, 2, 3] * 4, 1, 2, 8], (4, 3)),  # two thirds of a fifth time do not count
        ([1, 2, 3] * 4 + [5] * 5, (5, 1)),
        ([5] * 5 + [1, 2, 3] * 6, (6, 3)),
        (list(range(32)) * 4, (4, 32)),
        (list(range(33)) * 4, (1, 0)),  # longer than the longest period
    ],
)
def test_longest_loop(ids, expected):
    assert data.longest_loop(ids) == expected


@given(st.lists(st.integers(0, 2), max_size=24))
def test_longest_loop_like_the_definition(ids):
    assert data.longest_loop(ids, 6) == most_in_a_row(ids, 6)


def test_loops_counts_continuations_before_their_eos():
    loop, line = [5, 6] * 8, list(range(20, 36))
    rows = np.array(
        [
            loop + line,  # in the prompt
            line + loop,
            line + loop[:6] + [data.EOS] + loop[:9],  # three times, then after the end
            line + [5, 6] * 4 + [data.EOS] * 8,
        ]
    )
    assert loops(rows, 16) == 2


@pytest.mark.parametrize("length", [16, 64])
def test_windows_count_every_token_of_a_text_once(length):
    """For documents around every multiple of a window, also with nothing between BOS and EOS."""
    sizes = [2, 3, 15, 16, 17, 18, 19, 31, 32, 33, 34, 35, 50]
    documents = [
        np.concatenate([[data.BOS], text, [data.EOS]]).astype(np.uint16)
        for text in distinct_documents([n - 2 for n in sizes])
    ]
    rows, counts = windows(documents, length)
    assert rows.shape[1] == length + 2 and counts.shape == (len(rows), length)
    targets = rows[:, 1:-1][counts]
    np.testing.assert_array_equal(targets, np.concatenate([d[1:-1] for d in documents]))
    given = rows[:, :-2][counts]
    np.testing.assert_array_equal(given, np.concatenate([d[:-2] for d in documents]))


def test_greedy_rows():
    stream = np.arange(1000, dtype=np.uint16)
    rows = greedy_rows([stream[:300], stream[300:]], 3, 8, 4)
    np.testing.assert_array_equal(rows[:, 0], [0, 495, 991])
    np.testing.assert_array_equal(rows[:, :8], rows[:, :1] + np.arange(8))
    np.testing.assert_array_equal(rows[:, 8:], 0)


def test_text_loads_what_prepare_writes(tmp_path):
    """`Text.load` cuts at the documents' ends."""
    documents = {
        "train": distinct_documents([4, 6]),
        "dev": distinct_documents([3]),
        "held_out": distinct_documents([2, 5, 1]),
    }
    arrays = {"train_repeats": np.array([1, 2])}
    for name, ids in documents.items():
        arrays[f"{name}_ids"] = np.concatenate(ids)
        arrays[f"{name}_ends"] = np.cumsum([len(x) for x in ids])
        arrays[f"{name}_bytes"] = np.array([3 * len(x) for x in ids])
    np.savez(tmp_path / "tokens.npz", **arrays)
    text = Text.load(tmp_path / "tokens.npz")
    assert text.repeats == [1, 2] and text.n_bytes["held_out"] == [6, 15, 3]
    for name, ids in documents.items():
        assert [x.tolist() for x in text.ids[name]] == [x.tolist() for x in ids]


def test_plan_schedule():
    """Warm-up over 2 steps, constant to half, linear to zero; phases by step."""
    plan = Plan(
        20, rows=8, length=128, long_length=512, rate=1.0, warmup=0.1, decay_from=0.5, dropout=0.2
    )
    rates = [float(plan.knobs(i).rate) for i in range(20)]
    np.testing.assert_allclose(
        rates, [0.5] + [1.0] * 9 + [1 - i / 10 for i in range(10)], rtol=1e-6
    )  # FP32
    assert [bool(plan.knobs(i).sparse) for i in (3, 4)] == [False, True]
    np.testing.assert_allclose([plan.knobs(i).dropout for i in (11, 12)], [0.2, 0.1], rtol=1e-6)
    assert [plan.phase(i) for i in range(10, 18)] == [
        *["bf16"] * 2,
        *["nvfp4", "official", "official", "official"] * 1,
        *["nvfp4", "official"],
    ]
    assert (plan.shape(11), plan.shape(12)) == ((8, 130), (2, 514))
    assert plan.presets() == {"bf16": (8, 130), "official": (2, 514), "nvfp4": (2, 514)}


def test_plan_puts_loops_into_late_batches_only():
    plan = Plan(10, rows=2, length=126, long_length=126, loop_rows=1)
    text = data.Batches(distinct_documents([3000]), [1], 2, 128, 0)
    tokens, back = plan.batch(text, 5)
    assert not back.any()
    np.testing.assert_array_equal(tokens, text[5])
    tokens, back = plan.batch(text, 6)
    again = plan.batch(text, 6)
    np.testing.assert_array_equal(tokens, again[0])
    np.testing.assert_array_equal(back, again[1])
    assert back[0].any() and not back[1].any()
    np.testing.assert_array_equal(tokens[1], text[6][1])
    assert (tokens[0] != text[6][0]).any()
