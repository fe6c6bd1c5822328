"""Fixtures of several files of faults."""

from typing import Any

import pytest

from dsv4_jax.checkpoint import place


@pytest.fixture
def nothing_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No array may be put on a device."""

    def refuse(*args: Any) -> None:
        raise AssertionError("an array was placed")

    monkeypatch.setattr(place.Placer, "_put", refuse)
