"""The ``official`` preset against golden outputs of the official code, layer by layer."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv4_jax.model import block, hc
from dsv4_jax.ops._round import round_to
from tests.support.golden_layers import LayerRun, check_layer
from tests.support.models import append, golden_model
from tests.support.official import tiny_golden

LAYERS = [
    pytest.param(i, id=f"layer{i}-{kind}")
    for i, kind in enumerate(("swa", "hca", "csa", "hca", "csa"))
]
ROWS = [pytest.param(0, id="row0"), pytest.param(1, id="row1")]
# Both branches' mHC reads and norms.
MOVED = 4
# Turning more exact ties than this would be fitting, not explaining (see `check_layer`); two are
# needed in layer 2, row 0, on the GPU one in layer 4, row 1 as well: an element of `attn_norm`
# that lies on a tie exactly.
MAX_TURNED = 4
# A sixth of the tokens; measured at most 32 of 300.
MAX_FLIPS = 50
# One BF16 ulp of the collapsed hidden state would be 4e-3; measured 8e-8.
HEAD_REL_L2 = 1e-3
# model.md section 11: 0.07 to 0.11 when flips feed on themselves; a wrong formula gives about 1.4.
FREE_REL_L2 = 0.3
FREE_ARGMAX = 28


def run_layer(layer: int) -> LayerRun:
    """One layer of one row in the form `check_layer` takes, traced anew."""
    model, params = golden_model()

    @jax.jit
    def run(params: Any, streams: Any, tokens: Any, nudge: Any) -> Any:
        unrounded: list[Any] = []
        original = hc.mhc_pre

        def rounded(y: Any, dtype: Any) -> Any:
            # One value for the list and for the model: in two fusions XLA may compute two.
            y = lax.optimization_barrier(y)
            unrounded.append(y)
            y = round_to(y, dtype).astype(jnp.float32) + nudge[len(unrounded) - 1]
            return y.astype(dtype)

        def read(streams: Any, *args: Any, **kwargs: Any) -> Any:
            y, post, comb = original(streams.astype(jnp.float32), *args, **kwargs)
            return rounded(y, streams.dtype), post, comb

        class Norm(block.RMSNorm):
            def __call__(self, x: Any) -> Any:
                return rounded(super().__call__(x.astype(jnp.float32)), x.dtype)

        cache = model.init_cache(1, 512)
        with mock.patch.object(hc, "mhc_pre", read), mock.patch.object(block, "RMSNorm", Norm):
            out, _ = model.apply(
                {"params": params}, streams, tokens, cache, layer=layer, method="layer"
            )
        return out[0].astype(jnp.float32), jnp.stack(unrounded)

    def call(before: np.ndarray, tokens: Any, nudge: np.ndarray) -> Any:
        return run(params, jnp.asarray(before, jnp.bfloat16)[None], tokens[None], nudge)

    return call


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("layer", LAYERS)
def test_layer_from_golden_streams(layer, row):
    _, params = golden_model()
    result, turned = check_layer(
        run_layer(layer), params["embed"]["weight"], tiny_golden(), layer, row, MOVED
    )
    print(f"layer {layer} row {row}: {result}, ties turned {turned}")
    assert result.meets_bar(), result
    assert turned <= MAX_TURNED
    assert len(result.flips) <= MAX_FLIPS


def test_mtp_from_golden_streams():
    model, params = golden_model()
    golden = tiny_golden()
    run = jax.jit(lambda p, s, t, c: model.apply({"params": p}, s, t, c, method="draft")[0][:, -1])
    streams = jnp.asarray(golden["mtp_x"], jnp.bfloat16)
    tokens = jnp.asarray(golden["ids"][:, :300], jnp.int32)
    logits = np.asarray(run(params, streams, tokens, model.init_cache(2, 512)))
    error = np.linalg.norm(logits - golden["mtp_logits"]) / np.linalg.norm(golden["mtp_logits"])
    print(f"mtp: rel L2 {error:.1e}")
    assert error < HEAD_REL_L2


def test_free_running_logits_smoke():
    """300 tokens of prefill and 40 steps; only that flips stay flips, see model.md section 11."""
    model, params = golden_model()
    golden = tiny_golden()
    ids = jnp.asarray(golden["ids"], jnp.int32)
    logits, _ = append(model, params, ids, model.init_cache(2, 512), jnp.full(2, 340, jnp.int32))
    logits = np.asarray(logits)
    for row in range(2):
        got, want = logits[row, 299:], golden["logits"][row]
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        same = int(np.sum(got.argmax(-1) == want.argmax(-1)))
        print(f"free running row {row}: rel L2 {error:.3f}, argmax equal {same} of 41")
        assert error < FREE_REL_L2
        assert same >= FREE_ARGMAX
