"""Deliberately wrong variants must fail the comparisons that the reference passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference import attention, mhc_post, model, moe, visibility
from reference.rounding import bf
from tests.support.golden_layers import check_layer

# The bound of test_transformers.py, which every wrong variant must exceed.
MAX_ABS = 1e-4


def comb_transposed(monkeypatch):
    right = mhc_post.mhc_post
    monkeypatch.setattr(
        mhc_post,
        "mhc_post",
        lambda f, s, post, comb, *rest: right(f, s, post, comb.swapaxes(1, 2), *rest),
    )


def entry_one_token_late(monkeypatch):
    """Entries invisible to the token that completes them."""
    monkeypatch.setattr(
        visibility, "entries", lambda t, n, m: jnp.arange(n)[None, :] < jnp.arange(t)[:, None] // m
    )


def window_one_too_wide(monkeypatch):
    right = visibility.window
    monkeypatch.setattr(visibility, "window", lambda t, width: right(t, width + 1))


def sink_in_numerator(monkeypatch):
    """The sink as one more row of the value sum, here with the mean key as its value."""

    def wrong(q, keys, sink, mask, rounding):
        a = jnp.einsum("thd,sd->ths", q, keys, precision="highest") * q.shape[-1] ** -0.5
        a = jnp.where(mask[:, None, :], a, -jnp.inf)
        top = jnp.max(a, axis=-1, keepdims=True)
        e, extra = jnp.exp(a - top), jnp.exp(sink[:, None] - top)
        denominator = jnp.sum(e, axis=-1, keepdims=True) + extra
        e = bf(e) if rounding.bf16_probs else e
        value = jnp.einsum("ths,sd->thd", e, keys, precision="highest") + extra * keys.mean(axis=0)
        return rounding.bf(value / denominator)

    monkeypatch.setattr(attention, "masked_attention", wrong)


def experts_unclamped(monkeypatch):
    monkeypatch.setattr(moe, "swiglu", lambda a, b, limit: jax.nn.silu(a) * b)


def gate_clamped_below(monkeypatch):
    monkeypatch.setattr(
        moe,
        "swiglu",
        lambda a, b, limit: jax.nn.silu(jnp.clip(a, -limit, limit)) * jnp.clip(b, -limit, limit),
    )


def test_right_variant_passes_golden(run_layer, weights, golden):
    """The control of the golden half: layer 2 (CSA), row 1."""
    result, _ = check_layer(run_layer(2), weights["embed.weight"], golden, 2, 1)
    assert result.meets_bar(), result


@pytest.mark.parametrize(
    "variant", [comb_transposed, entry_one_token_late, window_one_too_wide, sink_in_numerator]
)
def test_wrong_variant_fails_golden(monkeypatch, run_layer, weights, golden, variant):
    variant(monkeypatch)
    result, turned = check_layer(run_layer(2), weights["embed.weight"], golden, 2, 1)
    print(f"{variant.__name__}: {result}, ties turned {turned}")
    assert not result.meets_bar()


@pytest.mark.parametrize(
    "variant",
    [
        comb_transposed,
        entry_one_token_late,
        window_one_too_wide,
        sink_in_numerator,
        experts_unclamped,
        gate_clamped_below,
    ],
)
def test_wrong_variant_fails_transformers(monkeypatch, hf, variant):
    variant(monkeypatch)
    run = jax.jit(lambda w, t: model.forward(w, hf["config"], t))
    logits = np.asarray(run(hf["weights"], jnp.asarray(hf["ids"])))
    error = np.abs(logits - hf["logits"]).max()
    print(f"{variant.__name__}: max abs error {error:.1e}")
    assert error > MAX_ABS
