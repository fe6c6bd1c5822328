"""Checkpoints with one thing wrong, and what loading them must say."""

from pathlib import Path
from typing import Any

import pytest

from dsv4_jax.checkpoint import CheckpointError, from_checkpoint
from tests.support import tiny

CONFIG, TENSORS = tiny.official()
WQ_A = "layers.0.attn.wq_a"
EXPERT = "layers.2.ffn.experts.3.w2"


def fails(path: Path, *parts: str, **options: Any) -> str:
    """The message of the ``CheckpointError`` that loading gives, which holds ``parts``."""
    with pytest.raises(CheckpointError) as error:
        from_checkpoint(path, progress=False, **options)
    for part in parts:
        assert part in str(error.value), str(error.value)
    return str(error.value)


def write(path: Path, **changes: tiny.Raw | None) -> Path:
    """The tiny checkpoint with tensors replaced, added, or (None) dropped."""
    tensors = TENSORS | {k: v for k, v in changes.items() if v is not None}
    return tiny.write(path, CONFIG, tiny.drop(tensors, [k for k, v in changes.items() if not v]))
