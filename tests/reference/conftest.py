"""Models shared by the tests of the reference."""

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference import mhc_pre, model
from reference.rounding import FP32, OFFICIAL
from reference.weights import dequantize_official
from tests.support import hf_tiny, official
from tests.support.golden_layers import LayerRun


@pytest.fixture(scope="session")
def config() -> dict[str, Any]:
    """Config of the golden model."""
    return official.tiny_config()


@pytest.fixture(scope="session")
def weights() -> dict[str, np.ndarray]:
    """Dequantised weights of the golden model."""
    return dequantize_official(official.tiny_raw())


@pytest.fixture(scope="session")
def golden() -> dict[str, np.ndarray]:
    """Golden outputs."""
    return official.tiny_golden()


@pytest.fixture(scope="session")
def hf() -> dict[str, Any]:
    """The tiny transformers model: official weights and config, ids, one-shot and decode logits."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        if os.environ.get("CI"):
            pytest.fail(f"CI must have torch and transformers: {error}")
        pytest.skip(f"needs torch and transformers: {error}")
    model, ids = hf_tiny.build_model(), hf_tiny.token_ids()
    return {
        "config": hf_tiny.official_config(),
        "weights": hf_tiny.official_weights(model),
        "ids": ids,
        "logits": hf_tiny.logits(model, ids),
        "decode_logits": hf_tiny.decode_logits(model, ids),
    }


@pytest.fixture(scope="session")
def run_layer(config, weights) -> Callable[[int], LayerRun]:
    """The reference's layers in the form `check_layer` takes; looks its ops up when traced."""

    def make(layer: int) -> LayerRun:
        prefix = model.layer_prefix(config, layer)
        needed = {name: w for name, w in weights.items() if name.startswith(prefix)}

        @jax.jit
        def run(needed: Any, streams: Any, tokens: Any, nudge: Any) -> tuple[Any, Any]:
            unrounded: list[Any] = []
            original = mhc_pre.mhc_pre

            def read(*args: Any, rounding: Any, **kwargs: Any) -> Any:
                y, post, comb = original(*args, rounding=FP32, **kwargs)
                unrounded.append(y)
                return rounding.bf(y) + nudge[len(unrounded) - 1], post, comb

            with mock.patch.object(mhc_pre, "mhc_pre", read):
                out = model.layer(needed, config, layer, streams, tokens, OFFICIAL)
            return out, jnp.stack(unrounded)

        return lambda streams, tokens, nudge: run(needed, streams, tokens, nudge)

    return make
