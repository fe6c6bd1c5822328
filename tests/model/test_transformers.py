"""``float32`` against transformers' own FP32 model, loaded from what it saved."""

import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from tests.support.hf_tiny import DECODE_STEPS, PROMPT
from tests.support.models import append

# The bar; measured 1e-5, FP32 sums in another order over six layers.
MAX_ABS = 1e-4


@pytest.fixture(scope="module")
def loaded(hf):
    return dsv4_jax.from_checkpoint(hf["path"], precision="float32", progress=False)


@pytest.fixture(scope="module")
def prompt_cache(hf, loaded):
    """Logits of the prompt in one call, and the cache after it."""
    model, params = loaded
    ids = jnp.asarray(hf["ids"][None, :PROMPT], jnp.int32)
    cache = model.init_cache(1, PROMPT + DECODE_STEPS)
    return append(model, params, ids, cache, jnp.array([PROMPT]))


def test_prefill_logits(hf, prompt_cache):
    error = np.abs(np.asarray(prompt_cache[0])[0] - hf["logits"][:PROMPT]).max()
    print(f"prefill of {PROMPT}: max abs {error:.1e}")
    assert error < MAX_ABS


def test_64_decode_steps(hf, loaded, prompt_cache):
    """Against transformers' decode through its cache, across the HCA boundary at 383."""
    model, params = loaded
    _, cache = prompt_cache
    rows = []
    for i in range(PROMPT, PROMPT + DECODE_STEPS):
        token = jnp.asarray(hf["ids"][None, i : i + 1], jnp.int32)
        logits, cache = append(model, params, token, cache, jnp.array([1]))
        rows.append(np.asarray(logits)[0, 0])
    error = np.abs(np.stack(rows) - hf["decode_logits"]).max()
    print(f"{DECODE_STEPS} decode steps: max abs {error:.1e}")
    assert error < MAX_ABS
    assert int(cache.lengths[0]) == PROMPT + DECODE_STEPS
