"""Bytes and operations of a step against figures worked out elsewhere."""

import dataclasses

import pytest

from dsv4_jax import ModelConfig, Precision
from dsv4_jax.bench.floor import (
    cut,
    decode_bytes,
    expected_experts,
    prefill_work,
    weight_bytes,
)
from dsv4_jax.config import LayerKind

NVFP4_EXPERTS = Precision(experts="nvfp4_w4a4")
FLASH, PRO = ModelConfig.flash(), ModelConfig.pro()
# GB that one token reads, NVFP4 experts and FP8 linears: sums over the published weight listings.
PARTS = {
    "attention linears": 4.60,
    "experts": 3.65,
    "shared expert": 1.08,
    "router": 0.09,
    "hyper-connections": 0.136,
}
INDEX_QUERIES = 21 * 64 * 128 * 1024 / 1e9
"""Of these the indexer's wq_b, which goes with the layer's and not with the listings' indexer."""


def test_parts_of_flash() -> None:
    layers, outside = decode_bytes(FLASH, NVFP4_EXPERTS, 0, 1)
    sums = {group: sum(layer[group] for layer in layers) / 1e9 for group in layers[0]}
    sums["attention linears"] -= INDEX_QUERIES
    for group, expected in PARTS.items():
        assert sums[group] == pytest.approx(expected, rel=4e-3), group
    assert sums["compressors"] + INDEX_QUERIES == pytest.approx(0.80, abs=5e-3)
    assert sums["rest"] == sums["indexer"] == 0  # it reads its keys
    # The embedding is read by rows.
    assert outside == pytest.approx(129280 * 4096 * 2, rel=1e-3)


@pytest.mark.parametrize(("config", "expected"), [(FLASH, 11.41), (PRO, 40.41)])
def test_sum_of_a_step(config: ModelConfig, expected: float) -> None:
    layers, outside = decode_bytes(config, NVFP4_EXPERTS, 0, 1)
    whole = sum(sum(layer.values()) for layer in layers) + outside
    assert whole / 1e9 == pytest.approx(expected, rel=1.5e-3)


def test_context_adds_caches() -> None:
    """21 CSA layers: every index key once there are more than 512; 512 entries; 20 HCA: all."""
    key, index_key = 583, 68

    def read(context: int) -> float:
        return sum(sum(layer.values()) for layer in decode_bytes(FLASH, Precision(), context, 2)[0])

    long = 2 * (21 * (8192 * index_key + 512 * key) + 20 * 256 * key)
    short = 2 * (21 * 512 * key + 20 * 16 * key)
    assert read(32767) - read(2047) == pytest.approx(long - short)


def test_more_tokens_read_more_experts() -> None:
    assert expected_experts(FLASH, 1) == 6
    assert expected_experts(FLASH, 8) == pytest.approx(44.2, abs=0.05)
    assert expected_experts(PRO, 128) == pytest.approx(333, abs=0.5)
    one, eight = (weight_bytes(FLASH, Precision(), 2, t) for t in (1, 8))
    assert eight["experts"] / one["experts"] == pytest.approx(expected_experts(FLASH, 8) / 6)
    # Hash-routed: of the table a row per token.
    assert eight["router"] - one["router"] == 7 * 6 * 4
    assert {k: eight[k] for k in eight if k not in ("experts", "router")} == {
        k: one[k] for k in one if k not in ("experts", "router")
    }


def test_operations_of_a_prefill() -> None:
    """Routed experts of Flash: 36 T D I a layer; chunks change what is read alone."""
    whole = prefill_work(FLASH, Precision(), 1, 4096, 4096)
    experts = 43 * 36 * 4096 * 4096 * 2048
    bf16_experts = dataclasses.replace(Precision(), experts="mxfp4_w4a16")
    other = prefill_work(FLASH, bf16_experts, 1, 4096, 4096)
    assert whole.fp8_flops - other.fp8_flops == other.bf16_flops - whole.bf16_flops == experts
    # One token a row, no cache to look at: twice the parameters that it uses, and the head.
    one = prefill_work(FLASH, Precision(), 1, 1, 256)
    linear = 4.60e9 + 1.08e9 + 43 * 6 * 3 * 4096 * 2048
    assert one.fp8_flops + one.bf16_flops == pytest.approx(2 * (linear + 0.53e9 + 0.4e9), rel=0.05)
    halves = prefill_work(FLASH, Precision(), 1, 4096, 2048)
    assert halves.fp8_flops == whole.fp8_flops
    assert 1.9 < halves.bytes / whole.bytes < 2


def test_cut() -> None:
    few = cut(FLASH, [0, 2, 3])
    kinds = [few.layer_kind(i) for i in range(3)]
    assert kinds == [LayerKind.SWA, LayerKind.CSA, LayerKind.HCA]
    assert (few.num_hidden_layers, few.num_hash_layers, few.num_nextn_predict_layers) == (3, 2, 0)
    assert cut(FLASH, [0], score_routed=True).num_hash_layers == 0
    assert cut(FLASH, []).compress_ratios == ()
    with pytest.raises(ValueError, match=r"layers must be 0\.\.42, got 43"):
        cut(FLASH, [43])
