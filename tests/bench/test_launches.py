"""The launches of a layer, from events as a profile has them; the models that are profiled."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax import DeepseekV4, ModelConfig, Precision
from dsv4_jax.bench.profile import Launch, Row, launches_of, layer_rows, op_names, part_of
from dsv4_jax.bench.weights import random_cache
from dsv4_jax.checkpoint.names import expected_tree
from dsv4_jax.config import LayerKind
from tests.bench import launches
from tests.bench.launches import table

STEP = "jit(decode)/DeepseekV4/DeepseekV4._advance"
HLO = f"""
ENTRY %main.1 (p: bf16[4]) -> bf16[4] {{
  %ffi_call.1 = bf16[4] custom-call(%p), metadata={{op_name="{STEP}/layer_0/layers_0.advance/moe/ffn/experts/jit(moe)/ffi_call" source_line=1}}
  %ffi_call.2 = (bf16[4], f32[4]) custom-call(%p), metadata={{op_name="{STEP}/layer_1/layers_1.advance/attention/hc_attn/jit(mhc)/ffi_call"}}
  ffi_call.3 = bf16[4] custom-call(%p), metadata={{op_name="{STEP}/layer_1/layers_1.advance/attention/attn/indexer/wq_b/jit(fp8_linear)/ffi_call"}}
  %ffi_call.4 = bf16[4] custom-call(%p), metadata={{op_name="{STEP}/layer_1/layers_1.advance/attention/attn/jit(attention)/ffi_call"}}
  %loop_fusion = bf16[4] fusion(%p), kind=kLoop, metadata={{op_name="{STEP}/layer_1/layers_1.advance/attention/attn/reshape"}}
  %ffi_call.5 = bf16[4] custom-call(%p), metadata={{op_name="{STEP}/layer_1/layers_1.advance/moe/hc_ffn/jit(mhc)/ffi_call"}}
  %ffi_call.6 = bf16[4] custom-call(%p), metadata={{op_name="{STEP}/layer_1/layers_1.advance/moe/ffn/gate/jit(router)/jit(dense_linear)/ffi_call"}}
  %ffi_call.7 = bf16[4] custom-call(%p), metadata={{op_name="{STEP}/layer_2/layers_2.advance/attention/hc_attn/jit(mhc)/ffi_call"}}
  ROOT %add = bf16[4] add(%p, %p), metadata={{op_name="{STEP}/add"}}
}}
"""  # noqa: E501
# A step's launches in order: instruction, kernel.
EVENTS = [
    ("add", "wrapped_add"),
    ("ffi_call.1", "void dsv4::(anonymous namespace)::MoeSm90Kernel<4, 2>(dsv4::Params)"),
    ("ffi_call.2", "void dsv4::(anonymous namespace)::ClusterKernel<16>(dsv4::MhcParams)"),
    ("ffi_call.3", "GemmKernel"),
    ("ffi_call.3", "ReduceKernel"),
    ("ffi_call.4", "AttentionKernel"),
    ("loop_fusion", "loop_fusion"),
    (None, "MemcpyD2D"),
    ("ffi_call.5", "void dsv4::(anonymous namespace)::ClusterKernel<16>(dsv4::MhcParams)"),
    ("add", "wrapped_add"),  # what XLA does once a step, wherever it does it
    ("ffi_call.6", "GemmKernel"),
    (None, "MemsetD2D"),
    ("ffi_call.6", "ReduceKernel"),
    (None, "MemcpyD2D"),
    ("ffi_call.7", "void dsv4::(anonymous namespace)::ClusterKernel<16>(dsv4::MhcParams)"),
]
STEPS = 2


def event(number: int, instruction: str | None, kernel: str) -> Any:
    stats = [("correlation_id", number), *([("hlo_op", instruction)] if instruction else [])]
    return SimpleNamespace(name=kernel, start_ns=2000.0 * number, duration_ns=2000.0, stats=stats)


def profile(device: str = "/device:GPU:0") -> Any:
    """Two steps; events of a line need not be in order."""
    events = [event(i, *each) for i, each in enumerate(EVENTS * STEPS)][::-1]
    lines = [
        SimpleNamespace(name="Stream #13(Compute)", events=events),
        SimpleNamespace(name="XLA Ops", events=events),
    ]
    return SimpleNamespace(
        planes=[
            SimpleNamespace(name="/host:CPU", lines=lines, stats=[]),
            SimpleNamespace(name=device, lines=lines, stats=[]),
        ]
    )


def found() -> list[Launch]:
    return launches_of(profile(), op_names(HLO))


def test_rows_of_a_layer() -> None:
    assert layer_rows(found(), [1], STEPS) == [
        Row("ClusterKernel<16>", "hc_attn mhc", "counted", 1, 2),
        Row("GemmKernel", "attn/indexer/wq_b fp8_linear", "indexer", 1, 2),
        Row("ReduceKernel", "attn/indexer/wq_b fp8_linear", "indexer", 1, 2),
        Row("AttentionKernel", "attn attention", "attention", 1, 2),
        Row("loop_fusion", "attn reshape", "counted", 1, 2),
        Row("MemcpyD2D", "?", "counted", 1, 2),  # before the MoE's read, not before layer 2's
        Row("ClusterKernel<16>", "hc_ffn mhc", "counted", 1, 2),
        Row("GemmKernel", "ffn/gate router", "MoE", 1, 2),
        Row("MemsetD2D", "?", "MoE", 1, 2),
        Row("ReduceKernel", "ffn/gate router", "MoE", 1, 2),
    ]


def test_rows_outside() -> None:
    rows = layer_rows(found(), [None], STEPS)
    assert [(row.kernel, row.op, row.count) for row in rows] == [("wrapped_add", "add", 2)]


def test_every_launch_is_somewhere() -> None:
    counts = [sum(r.count for r in layer_rows(found(), [i], STEPS)) for i in (None, 0, 1, 2)]
    assert sum(counts) == len(EVENTS)


def test_what_waits_for_the_one_ahead_is_counted_once() -> None:
    """A launch that begins early adds what it takes beyond; one inside of another nothing."""
    times = [(0.0, 10.0), (4e3, 9.0), (5e3, 2.0), (20e3, 1.0)]  # begin in ns, us
    path = "jit(f)/layer_0/attention/attn/jit(attention)/ffi_call"
    launches = [Launch(f"K{chr(65 + i)}", path, *time) for i, time in enumerate(times)]
    rows = layer_rows(launches[::-1], [0], 1)
    assert [(row.us, row.gap_us) for row in rows] == [(10, 0), (3, 0), (0, 0), (1, 7)]


def test_sums_of_a_table() -> None:
    lines = table("flash", layer_rows(found(), [1], STEPS)).splitlines()
    assert lines[0] == "### flash"
    assert lines[4] == "| `ClusterKernel<16>` | hc_attn mhc | 1 | 2.0 |  |"
    assert lines[5] == "| `GemmKernel` | attn/indexer/wq_b fp8_linear | 1 | 2.0 | indexer |"
    assert lines[-4:] == [
        "| **launches that count** | | 4 | 8.0 | |",
        "| attention, not counted | | 1 | 2.0 | |",
        "| indexer, not counted | | 2 | 4.0 | |",
        "| MoE, not counted | | 3 | 6.0 | |",
    ]


def test_parts() -> None:
    """The indexer's compressor is one of the layer's, and a norm is no expert."""
    assert part_of(("attn", "indexer", "compressor"), "dense_linears") == "counted"
    assert part_of(("attn", "compressor"), "dense_linears") == "counted"
    assert part_of(("hc_ffn",), "mhc") == "counted"
    assert part_of(("attn", "indexer"), "index_topk") == "indexer"
    assert part_of(("ffn", "shared_experts", "w1"), "fp8_linear") == "MoE"


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"launches of a GPU, got .*/device:TPU:0.*Stream #13"):
        launches_of(profile("/device:TPU:0"), {})
    if jax.default_backend() == "cpu":
        assert "needs a GPU, got the backend cpu" in str(launches.main([]))


def test_the_dump_has_every_event() -> None:
    text = launches.dumped(profile())
    assert text.count("MemcpyD2D") == 2 * 2 * STEPS  # of two lines
    assert "line Stream #13(Compute): 30 events" in text


@pytest.mark.parametrize("size", ["flash", "pro"])
def test_models(size: str) -> None:
    """Every kind of the release is listed, and the program names its layers."""
    config = launches.small(getattr(ModelConfig, size)())
    kinds = [config.layer_kind(i) for i in launches.LISTED]
    first = LayerKind.SWA if size == "flash" else LayerKind.HCA
    assert kinds == [first, LayerKind.CSA, LayerKind.HCA]
    assert [config.is_hash_layer(i) for i in launches.LISTED] == [True, False, False]
    model = DeepseekV4(config, Precision())
    params = expected_tree(config, Precision(), False)
    cache = jax.eval_shape(lambda: random_cache(model, 1, launches.POSITION + 1, launches.POSITION))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    jitted = jax.jit(launches.decode, static_argnames="model", donate_argnames="cache")
    traced = jitted.trace(model, params, tokens, cache)
    text = traced.lower(lowering_platforms=("cuda",)).as_text(debug_info=True)
    for layer in launches.LISTED:
        assert f"layer_{layer}/layers_{layer}.advance/moe/hc_ffn/jit(mhc)" in text
    assert "attn/jit(_where)" not in text  # entries that are visible: once a step, in no layer
    assert "ffn/gate/jit(_take)" not in text  # the router reads the table of a hash-routed layer
    assert "DeepseekV4._step/jit(_where)" in text
