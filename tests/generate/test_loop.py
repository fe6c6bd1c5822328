"""Several decode steps in one program make the tokens of a loop over `decode_step`."""

import importlib
from typing import Any

import jax
import numpy as np
import pytest

from dsv4_jax.generate import TokenEvent, decode_step, stream
from dsv4_jax.loop import STEPS
from dsv4_jax.sampling import sample, step_keys
from tests.support.fake_model import VOCAB, FakeModel, fake_params

MODULE = importlib.import_module("dsv4_jax.generate")  # `dsv4_jax.generate` is the function
MAX_LEN = 41
POISONED = 5  # the first token of a row that gets invalid logits
KEYS = jax.jit(step_keys)
SIZES = (1, 2, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS + 1)


def _one_by_one(
    model: Any,
    prompts: list[list[int]],
    asked: set[int],
    *,
    max_new_tokens: int,
    stop_token_ids: list[int],
    seed: list[int],
    **settings: Any,
) -> tuple[list[tuple[Any, ...]], np.ndarray]:
    """Events as tuples, and what the rows hold at the end; the host decides after every token."""
    b = len(prompts)
    sizes = np.array([len(prompt) for prompt in prompts])
    cache: Any = model.init_cache(batch_size=b, max_len=MAX_LEN)
    logits = np.zeros((b, VOCAB), np.float32)
    for i in range(sizes.max()):
        active = i < sizes
        tokens = [prompt[min(i, len(prompt) - 1)] for prompt in prompts]
        new, cache = decode_step(model, fake_params(), tokens, cache, active=active)
        logits = np.where(active[:, None], new, logits)
    active = np.ones(b, np.bool_)
    events: list[tuple[Any, ...]] = []
    for count in range(max_new_tokens):
        keys = KEYS(np.array(seed, np.uint32), sizes + count)
        drawn, valid = jax.device_get(tuple(sample(logits, keys, **settings)))
        for row in np.flatnonzero(active).tolist():
            token, reason = int(drawn[row]), None
            if not valid[row]:
                token, reason = None, "invalid_logits"
            elif token in stop_token_ids:
                token, reason = None, "eos" if token == model.eos_token_id else "stop"
            elif token in asked:
                reason = "stop"
            elif count + 1 == max_new_tokens:
                reason = "length"
            events.append((row, token, reason))
            active[row] = reason is None
        if active.any():
            logits, cache = decode_step(model, fake_params(), drawn, cache, active=active)
    return events, np.asarray(cache.lengths)


def _fields(event: TokenEvent) -> tuple[Any, ...]:
    return event.sequence, event.token, event.finish_reason


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_streams_equal_single_steps(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged prompts, random stop tokens and limits around a call's steps; no row is overfed.

    On a GPU a call has no early end, short prompts are prefilled too, and what is off is no code.
    """
    rng = np.random.default_rng(0)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    # Not equal: the backend is looked at while tracing.
    model: Any = FakeModel(
        eos_token_id=3 if backend == "cpu" else 4, poison_row=POISONED, poison_at=12
    )
    held: list[np.ndarray] = []
    real = MODULE.decode_steps

    def spy(**arguments: Any) -> Any:
        made, cache, feed = real(**arguments)
        assert not np.asarray(cache.overflow).any()
        held.append(np.asarray(cache.lengths))
        return made, cache, feed

    monkeypatch.setattr(MODULE, "decode_steps", spy)
    reasons: set[Any] = set()
    for case in range(40):
        most = SIZES[: 4 if case % 2 else None]
        prompts = [rng.integers(0, VOCAB, rng.choice(most)).tolist() for _ in range(3)]
        if case % 3 == 0:
            prompts[1][0] = POISONED
        room = MAX_LEN - max(map(len, prompts)) + 1
        options: dict[str, Any] = {
            "max_new_tokens": int(rng.choice([1, 2, STEPS - 1, STEPS, STEPS + 1, 17, room])),
            "stop_token_ids": [model.eos_token_id, *rng.choice(range(5, VOCAB), 3, False).tolist()],
            "seed": rng.integers(0, 2**32, 3).tolist(),
            "temperature": float(rng.choice([0.0, 1.0])),
            "top_p": float(rng.choice([1.0, 0.9])),
        }
        asked = set(rng.choice(VOCAB, 2).tolist()) if case % 4 == 0 else set[int]()
        wanted, lengths = _one_by_one(model, prompts, asked, **options)
        held.clear()
        events = list(
            stream(
                model,
                fake_params(),
                prompts,
                max_len=MAX_LEN,
                on_token=lambda _, token, asked=asked: token in asked,
                **options,
            )
        )
        assert list(map(_fields, events)) == wanted, case
        if held and not asked:  # the device knows nothing of `on_token`: it may go on for a call
            np.testing.assert_array_equal(held[-1], lengths)
        reasons |= {event.finish_reason for event in events}
    assert reasons == {None, "eos", "stop", "length", "invalid_logits"}
    decodes = [shape for shape in model.traces if shape == (3, 1)]
    programs = 1 if backend == "cpu" else 3  # greedy, drawn, filtered
    assert len(decodes) == 1 + programs, "`decode_step` once, and the loop's programs"


@pytest.mark.parametrize("ids", [[2**31], [2**40, VOCAB], [-1], [-2]])
def test_stop_tokens_outside_the_vocabulary_stop_nothing(ids: list[int]) -> None:
    model: Any = FakeModel(follow=True)
    events = list(stream(model, fake_params(), [[20]], max_new_tokens=3, stop_token_ids=[*ids, 22]))
    assert list(map(_fields, events)) == [(0, 21, None), (0, None, "stop")]
