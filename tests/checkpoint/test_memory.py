"""Memory need: against the bytes of a file and against the sizes of model.md written out."""

import dataclasses
import math

import pytest

from dsv4_jax.checkpoint.memory import Plan, need, readable
from dsv4_jax.checkpoint.place import STAGING_BYTES
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import PRESETS
from tests.support import tiny

CONFIG = ModelConfig.from_hf(tiny.official()[0])
TENSORS = tiny.official()[1]
OFFICIAL = PRESETS["official"]


@pytest.mark.parametrize("mtp", [False, True])
def test_weights_are_the_bytes_of_the_file(mtp: bool) -> None:
    kept = {name: raw for name, raw in TENSORS.items() if mtp or not name.startswith("mtp.")}
    # The tree holds the hash tables as int32.
    nbytes = sum(len(raw.data) // (2 if raw.dtype == "I64" else 1) for raw in kept.values())
    assert Plan(CONFIG, OFFICIAL, mtp).need().weights == nbytes


@pytest.mark.parametrize(("batch_size", "max_len"), [(1, 4096), (3, 1_048_576)])
def test_cache_of_the_release(batch_size: int, max_len: int) -> None:
    """Two values of a packed format are one byte, a state is FP32 twice (model.md 4.4)."""
    entry = 448 + 448 // 64 + 64 * 2
    index = 128 // 2 + 128 // 32
    state = 2 * 4
    window = 128 * entry
    csa = math.ceil(max_len / 4 / 128) * 128 * (entry + index) + 8 * 2 * (512 + 128) * state
    hca = math.ceil(max_len / 128 / 128) * 128 * entry + 128 * 512 * state
    row = 43 * window + 21 * csa + 20 * hca + 4 + 1  # the length and the overflow flag
    plan = Plan(ModelConfig.flash(), OFFICIAL, batch_size=batch_size, max_len=max_len)
    assert plan.cache_bytes() == batch_size * row
    drafter = dataclasses.replace(plan, mtp=True).cache_bytes() - plan.cache_bytes()
    assert drafter == batch_size * (window + 4)


def test_layers_held_several_times() -> None:
    plan = Plan(CONFIG, OFFICIAL, max_len=256)
    one = plan.cache_bytes()
    layers = CONFIG.num_hidden_layers
    twice = dataclasses.replace(plan, layer_copies=(2,) * layers).cache_bytes()
    assert twice == 2 * one - 5, "lengths and flags are not of a layer"
    parts = [
        dataclasses.replace(
            plan, layer_copies=tuple(1 + (i == j) for j in range(layers))
        ).cache_bytes()
        - one
        for i in range(layers)
    ]
    assert sum(parts) == twice - one
    assert len(set(parts)) == 3, "SWA, CSA, HCA"


def test_no_cache_unless_asked_for() -> None:
    found = Plan(CONFIG, OFFICIAL).need()
    assert found.cache == 0
    assert found.total == found.weights + found.staging


@pytest.mark.parametrize("sizes", [{"max_len": 0}, {"max_len": 2**21}, {"batch_size": -1}])
def test_sizes_that_no_cache_can_have(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="init_cache: "):
        Plan(CONFIG, OFFICIAL, **({"max_len": 64} | sizes)).need()


def test_staging() -> None:
    """What is loaded as it lies takes its slabs, what is decoded its FP32 values, both bounded."""
    flash = ModelConfig.flash()
    stack = 256 * 2048 * 4096
    # The packed stack is copied once, for its dtype.
    as_stored = Plan(flash, OFFICIAL).need().staging
    assert as_stored == stack // 2 + STAGING_BYTES
    # An embedding in FP32 is made from one in BF16, all at once: with it and two in FP32.
    wide = PRESETS["float32"]
    stored = {"embed.weight": "bfloat16"}
    embedding = 129280 * 4096
    assert Plan(flash, wide, stored=stored).need().staging == embedding * (2 + 2 * 4)
    experts = {"layers.0.ffn.experts.{e}.w1": "mxfp4"}
    most = Plan(flash, wide, stored=experts).need().staging
    assert most == STAGING_BYTES + 2 * 4 * 128 * 2**20 < stack


def test_several_models() -> None:
    plans = [Plan(CONFIG, PRESETS[name], max_len=64) for name in ("official", "float32")]
    a, b = (plan.need() for plan in plans)
    both = need(plans)
    assert (both.weights, both.cache) == (a.weights + b.weights, a.cache + b.cache)
    assert both.staging == max(a.staging, b.staging)


@pytest.mark.parametrize(
    ("count", "text"),
    [(80, "0.1 KiB"), (2**20, "1.00 MiB"), (3 * 2**29, "1.50 GiB"), (2**40, "1024.00 GiB")],
)
def test_readable(count: int, text: str) -> None:
    assert readable(count) == text
