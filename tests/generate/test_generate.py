"""Prefill, decode step and generation over the fake model; the real one has its own tests."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.generate import (
    Completion,
    decode_step,
    default_chunk,
    generate,
    prefill,
    stream,
)
from tests.support.fake_model import VOCAB, FakeModel, fake_params

MODULE = importlib.import_module("dsv4_jax.generate")  # `dsv4_jax.generate` is the function
PROMPTS = [[5, 6, 7], [9], list(range(10, 40)), [3] * 11]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 12, "stop_token_ids": ()}


def _prefill(model: Any, rows: list[list[int]], **options: Any) -> tuple[jax.Array, Any]:
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    cache = model.init_cache(batch_size=len(rows), max_len=512)
    return prefill(
        model, fake_params(), tokens, cache, num_tokens=[len(r) for r in rows], **options
    )


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 127, 128, 129, 256])
def test_chunks_do_not_matter(chunk_size: int) -> None:
    rows = [list(range(90)), [4], [], [8] * 300]
    model: Any = FakeModel()
    logits, cache = _prefill(model, rows, chunk_size=chunk_size)
    wanted, whole = _prefill(model, rows, chunk_size=1000)
    np.testing.assert_array_equal(logits, wanted)
    jax.tree.map(np.testing.assert_array_equal, cache, whole)
    assert cache.lengths.tolist() == [90, 1, 0, 300]
    assert not logits[2].any()


def test_ragged_equals_solo_and_prefill_equals_decode() -> None:
    model: Any = FakeModel()
    logits, _ = _prefill(model, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone, _ = _prefill(model, [prompt])
        np.testing.assert_array_equal(alone[0], logits[row])
        cache = model.init_cache(batch_size=1, max_len=64)
        stepped = None
        for token in prompt:
            stepped, cache = decode_step(model, fake_params(), [token], cache)
        assert stepped is not None
        np.testing.assert_array_equal(stepped[0], logits[row])


def test_prefill_shapes_are_few() -> None:
    model: Any = FakeModel()
    for length in range(1, 300, 7):
        _prefill(model, [[2] * length])
    assert {shape[1] for shape in model.traces} <= {8, 16, 32, 64, 128, 256}


def test_prefill_sends_nothing_before_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device idles until then."""
    model: Any = FakeModel()
    params, cache = fake_params(), model.init_cache(batch_size=2, max_len=512)

    def chunk(**_: Any) -> Any:
        raise InterruptedError

    monkeypatch.setattr(MODULE, "prefill_chunk", chunk)
    with jax.transfer_guard_host_to_device("disallow_explicit"), pytest.raises(InterruptedError):
        prefill(model, params, [[1, 2, 3], [4, 5, 6]], cache)


def test_prefill_of_nothing() -> None:
    model: Any = FakeModel()
    _, cache = _prefill(model, [[5, 6], []])
    for tokens, counts in ((np.zeros((2, 0), np.int32), None), ([[1, 2], [3, 4]], [0, 0])):
        logits, cache = prefill(model, fake_params(), tokens, cache, num_tokens=counts)
        assert logits.shape == (2, VOCAB)
        assert not logits.any()
        assert cache.lengths.tolist() == [2, 0]


def test_prefill_takes_any_kind_of_array() -> None:
    model: Any = FakeModel()
    tokens, counts = np.array([[1, 2, 3], [4, 5, 0]]), np.array([3, 2])
    results = []
    for kind in (np.asarray, jnp.asarray, lambda a: a.tolist()):
        cache = model.init_cache(batch_size=2, max_len=8)
        logits, _ = prefill(model, fake_params(), kind(tokens), cache, num_tokens=kind(counts))
        results.append(np.asarray(logits))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    logits, cache = prefill(model, fake_params(), tokens, model.init_cache(batch_size=2, max_len=8))
    assert cache.lengths.tolist() == [3, 3]


def test_inactive_rows_are_untouched() -> None:
    model: Any = FakeModel()
    cache: Any
    _, cache = _prefill(model, PROMPTS)
    before = jax.device_get(cache)
    active = np.array([True, False, True, False])
    for kind in (np.asarray, jnp.asarray):
        _, cache = decode_step(model, fake_params(), kind([1, 2, 3, 4]), cache, active=kind(active))
    assert (cache.lengths - before.lengths).tolist() == [2, 0, 2, 0]
    np.testing.assert_array_equal(cache.history[~active], before.history[~active])


def test_cache_is_donated_and_keeps_its_place() -> None:
    model: Any = FakeModel()
    cache: Any
    logits, cache = _prefill(model, PROMPTS)
    old, place = cache, cache.history.unsafe_buffer_pointer()
    for _ in range(3):
        logits, cache = decode_step(model, fake_params(), jnp.argmax(logits, axis=-1), cache)
    assert old.history.is_deleted()
    assert cache.history.unsafe_buffer_pointer() == place
    with pytest.raises((RuntimeError, ValueError), match=r"deleted|donated"):
        decode_step(model, fake_params(), jnp.argmax(logits, axis=-1), old)


def test_decode_step_works_under_jit_and_scan() -> None:
    model: Any = FakeModel()
    params = fake_params()

    def body(carry: Any, _: None) -> Any:
        tokens, cache = carry
        logits, cache = decode_step(model, params, tokens, cache)
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return (tokens, cache), tokens

    start = jnp.array([5, 9], jnp.int32)
    cache = model.init_cache(batch_size=2, max_len=64)
    _, scanned = jax.jit(lambda t, c: jax.lax.scan(body, (t, c), length=6))(start, cache)
    cache, tokens = model.init_cache(batch_size=2, max_len=64), start
    for i in range(6):
        (tokens, cache), _ = body((tokens, cache), None)
        np.testing.assert_array_equal(tokens, scanned[i])


def test_generate_is_the_loop_of_its_parts() -> None:
    model: Any = FakeModel()
    out = generate(model, fake_params(), PROMPTS, max_new_tokens=20, stop_token_ids=())
    logits, cache = _prefill(model, PROMPTS)
    steps: list[list[int]] = []
    for _ in range(20):
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        steps.append(tokens.tolist())
        logits, cache = decode_step(model, fake_params(), tokens, cache)
    assert out == [list(ids) for ids in zip(*steps, strict=True)]
    assert {c.finish_reason for c in out} == {"length"}


def test_ragged_batch_equals_solo_with_early_ends() -> None:
    model: Any = FakeModel(eos_token_id=2, follow=False)
    options: dict[str, Any] = {"max_new_tokens": 150, "temperature": 1.5, "seed": 3}
    together = generate(model, fake_params(), PROMPTS, **options)
    assert len({len(c) for c in together}) > 1, "rows should end at different steps"
    assert any(c.finish_reason == "eos" for c in together)
    for prompt, completion in zip(PROMPTS, together, strict=True):
        alone = generate(model, fake_params(), [prompt], **options)[0]
        assert alone == completion
        assert alone.finish_reason == completion.finish_reason
        assert 2 not in completion


def test_no_recompilation_after_the_first_step() -> None:
    model: Any = FakeModel(eos_token_id=96)
    generate(model, fake_params(), PROMPTS, max_new_tokens=40, stop_token_ids=())
    assert model.traces == [(4, 32), (4, 1)]
    generate(model, fake_params(), PROMPTS, max_new_tokens=40, stop_token_ids=(), temperature=0.5)
    generate(
        model,
        fake_params(),
        PROMPTS,
        max_new_tokens=40,
        seed=[4, 3, 2, 1],
        temperature=0.5,
        top_p=0.9,
    )
    assert model.traces == [(4, 32), (4, 1)]


def test_max_len_does_not_change_the_tokens() -> None:
    model: Any = FakeModel()
    short = generate(model, fake_params(), PROMPTS, **SAMPLED)
    assert short == generate(model, fake_params(), PROMPTS, **SAMPLED, max_len=700)
    assert short == generate(model, fake_params(), PROMPTS, **SAMPLED, max_len=30 + 12 - 1)


def test_equal_prompts_differ_by_seed_only() -> None:
    model: Any = FakeModel()
    one, two, three = generate(model, fake_params(), [[7, 8]] * 3, **SAMPLED, seed=[1, 1, 2])
    assert one == two != three


def test_stop_tokens() -> None:
    model: Any = FakeModel(eos_token_id=12, follow=True)
    params = fake_params()
    done = generate(model, params, [[8]], max_new_tokens=10)[0]
    assert (done, done.finish_reason) == ([9, 10, 11], "eos")
    done = generate(model, params, [[8]], max_new_tokens=10, stop_token_ids=[11])[0]
    assert (done, done.finish_reason) == ([9, 10], "stop")
    done = generate(model, params, [[8]], max_new_tokens=5, stop_token_ids=[])[0]
    assert (done, done.finish_reason) == ([9, 10, 11, 12, 13], "length")
    # The last allowed token is looked at too.
    done = generate(model, params, [[8]], max_new_tokens=3)[0]
    assert (done, done.finish_reason) == ([9, 10, 11], "length")
    done = generate(model, params, [[11]], max_new_tokens=1)[0]
    assert (done, done.finish_reason) == ([], "eos")


def test_on_token_sees_all_and_may_end_a_sequence() -> None:
    model: Any = FakeModel(follow=True)
    seen: list[tuple[int, int]] = []

    def on_token(sequence: int, token: int) -> bool:
        seen.append((sequence, token))
        return token == 22

    out = generate(model, fake_params(), [[20], [30]], max_new_tokens=4, on_token=on_token)
    assert out == [[21, 22], [31, 32, 33, 34]]
    assert [c.finish_reason for c in out] == ["stop", "length"]
    assert seen == [(0, 21), (1, 31), (0, 22), (1, 32), (1, 33), (1, 34)]


def test_stream_events() -> None:
    model: Any = FakeModel(eos_token_id=22, follow=True)
    events = list(stream(model, fake_params(), [[20], [30]], max_new_tokens=3))
    assert [(e.sequence, e.token, e.finish_reason) for e in events] == [
        (0, 21, None),
        (1, 31, None),
        (0, None, "eos"),
        (1, 32, None),
        (1, 33, "length"),
    ]


def test_completion_is_a_list() -> None:
    completion = Completion([1, 2], "length")
    assert completion == [1, 2]
    assert (completion.finish_reason, completion.error) == ("length", None)


def test_prompts_may_be_arrays() -> None:
    model: Any = FakeModel()
    wanted = generate(model, fake_params(), PROMPTS, **SAMPLED)
    arrays = [np.array(PROMPTS[0]), jnp.array(PROMPTS[1]), PROMPTS[2], tuple(PROMPTS[3])]
    assert generate(model, fake_params(), arrays, **SAMPLED) == wanted  # type: ignore[arg-type]


def test_ids_reach_the_whole_vocabulary() -> None:
    model: Any = FakeModel()
    out = generate(
        model,
        fake_params(),
        [[0], [VOCAB - 1]],
        max_new_tokens=300,
        temperature=50.0,
        stop_token_ids=(),
        seed=[1, 2],
    )
    assert set(out[0]) | set(out[1]) == set(range(VOCAB))


def test_wide_ints_and_strict_promotion() -> None:
    model: Any = FakeModel()
    wanted = generate(model, fake_params(), PROMPTS, **SAMPLED)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        assert generate(model, fake_params(), PROMPTS, **SAMPLED) == wanted


@pytest.mark.parametrize(
    ("backend", "rows", "tokens"),
    [("cpu", 1, 256), ("gpu", 1, 4096), ("gpu", 3, 1024), ("gpu", 16, 256), ("gpu", 100, 256)],
)
def test_default_chunk(
    backend: str, rows: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert default_chunk(rows) == tokens
