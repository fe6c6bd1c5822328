"""Nothing is lost over a long generation: `tests.bench.long_run` and what it must find."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.bench import long_run
from tests.support.fake_model import FakeModel, fake_params

GROWTH = 64 << 10
"""Bytes on the device: a buffer that every second call leaves behind would be 300 kB."""


def _check(result: dict[str, Any]) -> None:
    print(result)
    assert result["compiled_by_first_call"] > 0
    assert result["compiled_later"] == 0
    assert result["identical"]
    assert result["distinct_tokens"] > 100
    before, after = result["array_bytes"]
    assert after <= before  # garbage of other tests may go


def test_some_hundred_tokens() -> None:
    result = long_run.run(280, "small")
    assert min(result["ring_wraps"]) >= 2
    assert min(result["closed"]["CSA"]) >= 70
    assert min(result["closed"]["HCA"]) >= 2
    _check(result)


@pytest.mark.gpu
def test_20000_tokens() -> None:
    result = long_run.run(20000, "flash")
    assert min(result["ring_wraps"]) >= 150
    assert min(result["closed"]["CSA"]) >= 5000
    assert min(result["closed"]["HCA"]) >= 150
    before, after = result["device_bytes"]
    assert after - before <= GROWTH
    _check(result)


# Of one program: invalid logits come in the second call.
POISONED: Any = FakeModel(poison_row=long_run.PROMPTS[0][0], poison_at=12)


def test_a_cache_that_moves_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = long_run.decode_steps

    def copying(**arguments: Any) -> Any:
        made, cache, feed = real(**arguments)
        return made, jax.tree.map(jnp.copy, cache), feed

    monkeypatch.setattr(long_run, "decode_steps", copying)
    with pytest.raises(ValueError, match="behind 0 tokens: the cache must stay"):
        list(long_run.decoded(POISONED, fake_params(), 20))


def test_invalid_logits_are_found() -> None:
    """They end a row before the others."""
    with pytest.raises(ValueError, match="behind 2 tokens: every row must make tokens"):
        list(long_run.decoded(POISONED, fake_params(), 20))


def test_compilations_are_counted() -> None:
    with long_run.compilations() as count:
        assert count() == 0
        jax.jit(lambda x: x * 3)(jnp.float32(1))
        assert count() >= 1
