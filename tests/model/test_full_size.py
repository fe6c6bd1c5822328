"""V4-Flash and V4-Pro from their configs alone: abstract init, prefill and decode."""

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax import DeepseekV4, ModelConfig, Precision
from dsv4_jax.checkpoint.names import expected_tree
from dsv4_jax.model import linear

# model.md 1.2, in units of its last printed digit.
SIZES = [
    pytest.param(ModelConfig.flash(), 284.33e9, 290.94e9, 0.005e9, id="flash"),
    pytest.param(ModelConfig.pro(), 1573.0e9, 1598.8e9, 0.05e9, id="pro"),
]


def _parameters(tree) -> int:
    """Model parameters: scales belong to the storage format and hash tables are not weights."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(
        leaf.size
        for path, leaf in leaves
        if leaf.dtype not in (jnp.float8_e8m0fnu, jnp.int32)
        and not any(getattr(k, "key", None) == "block_scale" for k in path)
    )


@pytest.mark.parametrize(("config", "without_mtp", "with_mtp", "digit"), SIZES)
def test_init_declares_what_the_release_holds(monkeypatch, config, without_mtp, with_mtp, digit):
    """Byte totals are held to the release in tests/checkpoint/test_names.py."""
    # Traced once for a shape, and not for each of its leaves in each of 43 or 61 layers.
    quantized = jax.jit(linear._quantized, static_argnums=(1, 2))
    monkeypatch.setattr(linear, "_quantized", quantized)
    precision = Precision.preset("official")
    model = DeepseekV4(config, precision, mtp=True)
    cache = jax.eval_shape(lambda: model.init_cache(1, 256))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens, cache)["params"]
    assert tree == expected_tree(config, precision, True)
    assert abs(_parameters(tree) - with_mtp) <= digit
    main = {name: leaf for name, leaf in tree.items() if name != "mtp_0"}
    assert abs(_parameters(main) - without_mtp) <= digit


@pytest.mark.parametrize(
    ("config", "preset", "t"),
    [
        pytest.param(ModelConfig.flash(), "official", 256, id="flash-official-prefill"),
        pytest.param(ModelConfig.flash(), "nvfp4", 1, id="flash-nvfp4-decode"),
        pytest.param(ModelConfig.pro(), "nvfp4", 256, id="pro-nvfp4-prefill"),
        pytest.param(ModelConfig.pro(), "official", 1, id="pro-official-decode"),
    ],
)
def test_prefill_and_decode_shapes(config, preset, t):
    precision = Precision.preset(preset)
    model = DeepseekV4(config, precision)
    params = expected_tree(config, precision, False)
    cache = jax.eval_shape(lambda: model.init_cache(2, 1_048_576))
    logits, after = jax.eval_shape(
        lambda p, x, c: model.apply({"params": p}, x, c, logits="last"),
        params,
        jax.ShapeDtypeStruct((2, t), jnp.int32),
        cache,
    )
    assert (logits.shape, logits.dtype) == ((2, config.vocab_size), jnp.float32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), cache
    )
