"""The public surface on a GPU: same meaning as on the CPU, equal up to the order of FP32 sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.bench.floor import cut
from dsv4_jax.bench.weights import random_cache, random_params
from dsv4_jax.config import ModelConfig
from dsv4_jax.loop import step_model
from dsv4_jax.model import DeepseekV4
from dsv4_jax.precision import Precision
from tests.support.models import append, golden_ids, run_in_chunks, three_layers

pytestmark = pytest.mark.gpu

LENGTH = 270
# Acceptance list, "across regimes": XLA picks other kernels for other numbers of tokens.
MIN_COSINE = 0.99999


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sum(a * b, -1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


@pytest.mark.parametrize("preset", ["float32", "official", "nvfp4"])
@pytest.mark.parametrize("chunk", [1, 129])
def test_chunks_agree(preset, chunk):
    """P3, P4 across regimes. Measured on an H200: float32 0.9999998 at the worst token."""
    model, params = three_layers(preset)
    ids = golden_ids(LENGTH)
    whole, _ = run_in_chunks(model, params, ids, LENGTH, model.init_cache(2, 288))
    parts, _ = run_in_chunks(model, params, ids, chunk, model.init_cache(2, 288))
    cosines = _cosines(whole, parts)
    print(f"{preset} chunk {chunk}: cosine min {cosines.min():.7f} median {np.median(cosines):.7f}")
    assert cosines.min() >= MIN_COSINE


def test_cpu_and_gpu_agree():
    model, params = three_layers("float32")
    ids = golden_ids(LENGTH)
    gpu, _ = run_in_chunks(model, params, ids, LENGTH, model.init_cache(2, 288))
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        host = jax.device_put(params, cpu)
        expected, _ = run_in_chunks(model, host, ids, LENGTH, model.init_cache(2, 288))
    error = np.abs(gpu - expected).max()
    print(f"float32, CPU against GPU: max abs {error:.1e}")
    # The bar against transformers: FP32 sums in another order.
    assert error < 1e-4


def test_same_call_twice_is_bitwise_equal():
    """P1."""
    model, params = three_layers()
    ids = golden_ids(LENGTH)
    first, _ = run_in_chunks(model, params, ids, 129, model.init_cache(2, 288))
    second, _ = run_in_chunks(model, params, ids, 129, model.init_cache(2, 288))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("preset", ["official", "nvfp4"])
def test_programs_have_the_bits_of_single_calls(preset):
    """Four layers of Flash, random weights and caches; rows that take part and rows that do not."""
    config = cut(ModelConfig.flash(), range(4))
    model = DeepseekV4(config, Precision.preset(preset))
    params = random_params(config, model.precision)
    step = jax.jit(
        functools.partial(step_model, model), static_argnames="programs", donate_argnames="cache"
    )

    def run(rows, programs):
        cache = random_cache(model, rows, 4096 + 64, 4090)
        tokens, found = jnp.arange(rows) + 5, []
        for i in range(24):
            takes = jnp.arange(rows) % 7 != i % 5
            logits, cache = step(
                params=params, tokens=tokens, cache=cache, takes=takes, programs=programs
            )
            tokens = jnp.argmax(logits, -1)
            found.append(np.asarray(logits))
        return np.stack(found)

    for rows in (1, 4, 8, 12, 32, 128):
        np.testing.assert_array_equal(run(rows, True), run(rows, False), err_msg=f"{rows} rows")


def test_surface_and_donation():
    """prefill, decode_step, generate, rewind; the donated cache stays where it is."""
    model, params = three_layers()
    cache = model.init_cache(batch_size=2, max_len=64)
    prompts = [[1, 2, 3], [4, 0, 0]]
    logits, cache = dsv4_jax.prefill(model, params, prompts, cache, num_tokens=[3, 1])
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)]
    for _ in range(4):
        logits, cache = dsv4_jax.decode_step(model, params, jnp.argmax(logits, -1), cache)
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)] == pointers
    np.testing.assert_array_equal(np.asarray(cache.lengths), [7, 5])
    out = dsv4_jax.generate(model, params, [[1, 2, 3], [4]], max_new_tokens=5)
    assert [len(row) for row in out] == [5, 5]


def test_scan_with_donated_cache():
    model, params = three_layers("float32")
    ids = golden_ids(12)
    expected, _ = run_in_chunks(model, params, ids, 1, model.init_cache(2, 288))

    def scanned(params, cache, tokens):
        def step(cache, token):
            logits, cache = model.apply({"params": params}, token[:, None], cache, logits="last")
            return cache, logits

        return jax.lax.scan(step, cache, tokens.T)

    cache = model.init_cache(2, 288)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)]
    cache, logits = jax.jit(scanned, donate_argnums=1)(params, cache, jnp.asarray(ids))
    assert [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(cache.layers)] == pointers
    assert _cosines(np.moveaxis(np.asarray(logits), 0, 1), expected).min() >= MIN_COSINE


def test_overflow_flag():
    model, params = three_layers()
    ids = jnp.asarray(golden_ids(12))
    cache = model.init_cache(2, 8)
    _, cache = append(model, params, ids, cache, jnp.array([12, 3]))
    np.testing.assert_array_equal(np.asarray(cache.lengths), [8, 3])
    np.testing.assert_array_equal(np.asarray(cache.overflow), [True, False])
