"""Deliberately wrong variants of the model must fail the comparisons that the model passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsv4_jax
from dsv4_jax.model import attention, hc, step
from dsv4_jax.ops import swiglu as swiglu_op
from dsv4_jax.ops.rope import rope
from dsv4_jax.quant.kv import kv_dequant
from tests.model.test_golden import MOVED, run_layer
from tests.model.test_transformers import MAX_ABS
from tests.support.golden_layers import check_layer
from tests.support.hf_tiny import PROMPT
from tests.support.models import golden_model
from tests.support.official import tiny_golden

# Enough tokens for two HCA windows and for the indexer to select.
TOKENS = 280


@pytest.fixture(autouse=True)
def fresh_traces():
    """Ops are jitted: a patched helper must not meet a trace of the right one, nor leave one."""
    jax.clear_caches()
    yield
    jax.clear_caches()


def comb_transposed(monkeypatch):
    right = hc.mix

    def wrong(pending, read, **settings):
        streams, write = pending
        if write is not None:
            write = write._replace(comb=write.comb.swapaxes(1, 2))
        return right(hc.Pending(streams, write), read, **settings)

    monkeypatch.setattr(hc, "mix", wrong)


def entry_one_token_late(monkeypatch):
    """Entries invisible to the token that completes them."""
    monkeypatch.setattr(
        step, "n_closed", lambda positions, valid, m: jnp.where(valid, positions // m, 0)
    )


def window_one_too_narrow(monkeypatch):
    """The oldest key of the window dropped."""
    right = attention.attention

    def wrong(*operands, window, **settings):
        return right(*operands, window=window - 1, **settings)

    monkeypatch.setattr(attention, "attention", wrong)


def sink_in_numerator(monkeypatch):
    """The sink as one more row of the value sum, with the mean of the chunk's keys as its value."""
    right = attention.attention

    def wrong(q, ring, positions, sink, *, frequencies, **settings):
        without_sink = right(q, ring, positions, jnp.full_like(sink, -1e30), **settings)
        with_sink = right(q, ring, positions, sink, **settings).astype(jnp.float32)
        share = 1 - jnp.sum(with_sink * without_sink, -1, keepdims=True) / jnp.sum(
            jnp.square(without_sink.astype(jnp.float32)), -1, keepdims=True
        )
        value = kv_dequant(settings["chunk"], jnp.float32).mean(axis=1)[:, None, None]
        o = (with_sink + share * value).astype(q.dtype)
        return rope(o, positions, frequencies, inverse=True)

    monkeypatch.setattr(attention, "attention", wrong)


def experts_unclamped(monkeypatch):
    def wrong(gate, up, limit):
        return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)

    monkeypatch.setattr(swiglu_op, "clamped_swiglu", wrong)
    monkeypatch.setattr("dsv4_jax.ops._moe_jax.clamped_swiglu", wrong)


VARIANTS = [comb_transposed, entry_one_token_late, window_one_too_narrow, sink_in_numerator]


@pytest.mark.parametrize("variant", VARIANTS)
def test_wrong_variant_fails_golden(monkeypatch, variant):
    """Layer 2 (CSA), row 1; the right model passes the same check in test_golden.py."""
    variant(monkeypatch)
    _, params = golden_model()
    embedding = params["embed"]["weight"]
    result, turned = check_layer(run_layer(2), embedding, tiny_golden(), 2, 1, MOVED)
    print(f"{variant.__name__}: {result}, ties turned {turned}")
    assert not result.meets_bar()


@pytest.mark.parametrize("variant", [*VARIANTS, experts_unclamped])
def test_wrong_variant_fails_transformers(monkeypatch, hf, variant):
    variant(monkeypatch)
    model, params = dsv4_jax.from_checkpoint(hf["path"], precision="float32", progress=False)
    ids = jnp.asarray(hf["ids"][None, :TOKENS], jnp.int32)
    run = jax.jit(lambda p, t, c: model.apply({"params": p}, t, c)[0])
    logits = np.asarray(run(params, ids, model.init_cache(1, PROMPT)))[0]
    error = np.abs(logits - hf["logits"][:TOKENS]).max()
    print(f"{variant.__name__}: max abs {error:.1e}")
    assert error > MAX_ABS
