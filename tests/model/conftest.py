"""The tiny transformers model, saved and loaded as a user would."""

import os
from typing import Any

import pytest

from tests.support import hf_tiny


@pytest.fixture(scope="session")
def hf(tmp_path_factory) -> dict[str, Any]:
    """Directory of a saved FP32 checkpoint, its ids, one-shot and 64 decode-step logits."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have torch and transformers: {error}")
        pytest.skip(f"needs torch and transformers: {error}")
    path = tmp_path_factory.mktemp("hf-tiny")
    model, ids = hf_tiny.save(path), hf_tiny.token_ids()
    return {
        "path": path,
        "ids": ids,
        "logits": hf_tiny.logits(model, ids),
        "decode_logits": hf_tiny.decode_logits(model, ids),
    }
