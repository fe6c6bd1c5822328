"""Benchmarks of the ops at tiny sizes, and what their checks find."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.bench.floor import cut
from dsv4_jax.config import LayerKind
from dsv4_jax.precision import act_format, weight_format
from dsv4_jax.quant import fp8, nvfp4
from tests.bench import (
    bench_attention,
    bench_compressor,
    bench_dense_linear,
    bench_fp8_linear,
    bench_index_topk,
    bench_long_context,
    bench_moe,
    bench_mxfp4_linear,
    bench_nvfp4_linear,
    bench_router,
    linears,
    timing,
)
from tests.bench.test_timing import GOOD, TINY
from tests.model.test_long_context import SMALL
from tests.support import products, stored
from tests.support.numerics import assert_same_bits

LINEARS: dict[str, Any] = {
    "bfloat16": bench_dense_linear,
    "fp8_w8a8": bench_fp8_linear,
    "fp8_w8a16": bench_fp8_linear,
    "mxfp4_w4a8": bench_mxfp4_linear,
    "nvfp4_w4a4": bench_nvfp4_linear,
    "nvfp4_w4a16": bench_nvfp4_linear,
}


@pytest.fixture
def few_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny weights need not be many."""
    monkeypatch.setattr(timing, "ROTATED_BYTES", 0.0)


@pytest.mark.usefixtures("few_sets")
@pytest.mark.parametrize("form", LINEARS)
@pytest.mark.parametrize("baseline", [False, True])
def test_linear_bench_at_tiny_size(form: str, baseline: bool) -> None:
    groups = 2 if form == "fp8_w8a16" else 1
    row = linears.Row("flash", "tiny", 48, 160, groups)
    case = linears.Case(row, f"xla_{form}" if baseline else form, 3)
    LINEARS[form].measure(case, **TINY)
    other = dataclasses.replace(case, t=5)
    y = jnp.ones((5, groups, 48 // groups), case.dtype)
    with pytest.raises(AssertionError, match="similarity"):
        linears._check(other, 0, linears._x(other, 0), y)


@pytest.mark.usefixtures("few_sets")
def test_several_weights_at_tiny_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both results are looked at."""
    case = linears.Case(linears.Row("flash", "tiny_x2", 96, 160, weights=2), "bfloat16", 3)
    bench_dense_linear.measure(case, **TINY)
    right = bench_dense_linear._several

    def wrong(*arguments: Any, **settings: Any) -> Any:
        first, _ = right(*arguments, **settings)
        return first, first

    monkeypatch.setattr(bench_dense_linear, "_several", wrong)
    with pytest.raises(AssertionError, match="similarity"):
        bench_dense_linear.measure(case, **TINY)


@pytest.mark.usefixtures("few_sets")
@pytest.mark.parametrize("form", [*bench_moe.FORMS, "xla_mxfp4_w4a16", "xla_nvfp4_w4a16"])
def test_moe_bench_at_tiny_size(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_moe.SIZES, "tiny", (8, 64, 96))
    layer = bench_moe.Layer("tiny", "zipf", 8, 64, 96)
    case = bench_moe.Case(layer, form, 1 if form.startswith("xla_") else 5)
    bench_moe.measure(case, **TINY)
    x, routing = products.normal_values(1, case.t, 64), products.routing(0, 5, 6, 8)
    with pytest.raises(AssertionError, match="relative L2"):
        stacks = bench_moe.stacks("tiny", case.linear)
        bench_moe.check(case, x, *routing, stacks, jnp.zeros((case.t, 64)))


def test_router_bench_at_tiny_size() -> None:
    row = linears.Row("flash", "tiny", 12, 64)
    for form in ("bfloat16", "hash"):
        bench_router.measure(linears.Case(row, form, 3), evict_bytes=0.0, **TINY)


@pytest.mark.parametrize("name", ["csa160", "hca384"])
@pytest.mark.parametrize(("form", "t"), [("fp8", 3), ("xla_fp8", 2), ("fp8", 5)])
def test_attention_bench_at_tiny_size(
    name: str, form: str, t: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch, and a chunk of one row."""
    monkeypatch.setitem(bench_attention.HEADS, "pro", 2)
    monkeypatch.setattr(bench_attention, "PREFILL", 4)
    monkeypatch.setattr(bench_attention, "CONTEXT", 2048)
    row = next(r for r in bench_attention.ROWS if (r.model, r.name) == ("pro", name))
    case = bench_attention.Case(row, form, t)
    bench_attention.measure(case, evict_bytes=0.0, **TINY)
    operands = bench_attention.inputs(case, 0)
    o = bench_attention.call(operands)
    bench_attention.check(case, operands, o)
    with pytest.raises(AssertionError, match="too far"):
        bench_attention.check(case, operands, -o)


@pytest.mark.parametrize(
    ("form", "t"), [("mxfp4", 3), ("fp8", 5), ("xla_mxfp4", 2), ("xla_topk", 2)]
)
def test_index_topk_bench_at_tiny_size(form: str, t: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch, and a chunk of one row."""
    monkeypatch.setitem(bench_index_topk.PICKS, "pro", 20)
    monkeypatch.setattr(bench_index_topk, "HEADS", 2)
    monkeypatch.setattr(bench_index_topk, "PREFILL", 4)
    monkeypatch.setattr(stored, "STRETCH", 128)
    case = bench_index_topk.Case(bench_index_topk.Row("pro", 300), form, t)
    bench_index_topk.measure(case, evict_bytes=0.0, **TINY)
    if form.startswith("xla_"):
        return
    operands = bench_index_topk.inputs(case, 0)
    idx = bench_index_topk.call(case, operands)
    bench_index_topk.check(case, operands, idx)
    for wrong, message in (
        (idx[..., ::-1], "do not ascend"),
        (idx + 300, "beyond the entries"),
        (jnp.broadcast_to(jnp.arange(20), idx.shape), "the best"),  # missing, or chosen instead
    ):
        with pytest.raises(AssertionError, match=message):
            bench_index_topk.check(case, operands, wrong)


@pytest.mark.parametrize(
    ("layer", "t", "start"), [("csa", 1, 7), ("csa", 1, 8), ("csa", 9, 0), ("hca", 1, 127)]
)
def test_compressor_bench_at_tiny_size(layer: str, t: int, start: int) -> None:
    """A decoded token, whose window closes or not, and a chunk."""
    case = bench_compressor.Case(layer, 2, t, start)
    bench_compressor.measure(case, evict_bytes=0.0, **{**TINY, "sets": 2})
    written, rest = bench_compressor.make_set(case, 0)
    got = bench_compressor.call(case, written, *rest)
    bench_compressor.check(case, got, 0)
    with pytest.raises(AssertionError, match="state"):
        bench_compressor.check(case, [new._replace(kv_state=-new.kv_state) for new in got], 0)
    if case.windows:
        with pytest.raises(AssertionError, match="of a pool differ"):
            bench_compressor.check(
                case,
                [new._replace(pool=old.pool) for new, old in zip(got, written, strict=True)],
                0,
            )


@pytest.mark.parametrize("kind", [LayerKind.CSA, LayerKind.HCA])
def test_long_context_bench_at_tiny_size(
    kind: LayerKind, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache goes round in place."""
    case = bench_long_context.Case(bench_long_context.Row("flash", kind, 4095), "official", 2)
    tiny = cut(SMALL, [SMALL.compress_ratios.index(kind.value)], score_routed=True)
    result = bench_long_context.measure(case, tiny, steps=3, max_len=4096, replays=2)
    assert result.launches == 3 and result.gb_s > 0
    printed = capsys.readouterr().out
    assert "MB a step: weights" in printed and ("index keys" in printed) == (kind is LayerKind.CSA)


def test_bytes_of_a_long_context() -> None:
    """The last position of a million: every index key, 512 entries; all of HCA's."""
    last = {case.name: case.cache_bytes for case in bench_long_context.CASES[3::4]}
    csa, hca = last["flash official csa-1048575 b=1"], last["flash official hca-1048575 b=1"]
    assert (csa["index keys"], csa["entries"]) == (262144 * 68, 512 * 583)
    assert (hca["index keys"], hca["entries"]) == (0, 8192 * 583)


def test_steps_between_tokens() -> None:
    """A number of tokens that costs more than half as much again as one beside it."""
    cases = [bench_moe.Case(bench_moe.UNIFORM[0], "mxfp4_w4a8", t) for t in (1, 2, 8)]
    fractions = (0.5, 0.7, 0.4)
    measured = {
        case: dataclasses.replace(GOOD, fraction=fraction)
        for case, fraction in zip(cases, fractions, strict=True)
    }
    assert bench_moe.steps(measured) == [f"{cases[2].name}: 1.75 times what t=2 costs"]


def test_bars_of_the_table() -> None:
    def bars(name: str, form: str, t: int) -> tuple[float | None, float | None]:
        (row,) = (r for r in linears.QUANTIZED if (r.model, r.name) == ("flash", name))
        return linears.Case(row, form, t).bars

    assert bars("wq_b", "fp8_w8a8", 1) == (10.3, 0.75)
    assert bars("wq_b", "nvfp4_w4a4", 32) == (None, 0.7)
    assert bars("wkv", "fp8_w8a8", 8) == (round(2171008 / 4.39e6 + 2.5, 2), None)
    assert bars("wkv", "fp8_w8a8", 4096) == bars("wkv", "nvfp4_w4a4", 1)[1:] * 2 == (None, None)
    keys = {case.name: case for case in bench_attention.CASES}
    assert keys["pro fp8 csa1152 t=128"].max_us == 92
    assert keys["pro fp8 csa1152 t=4096"].max_us == round(4 * 4096 * 128 * 512 * 1152 / 595e6, 1)
    assert round(keys["flash fp8 csa640 t=128"].flops / 31e-6 / 1e12) == 346
    best = {case.name: case.max_us for case in bench_index_topk.CASES}
    assert best["pro mxfp4 n262144 t=32"] == 300 and best["flash fp8 n8192 t=4096"] == 570
    assert "flash mxfp4 n8192 t=1" not in best
    assert len(best) == 28 and len(bench_index_topk.BASELINES) == 14 + 4
    entries = {case.name: case for case in bench_compressor.CASES}
    assert entries["csa b=128 t=1 closing"].bars == (None, None)
    assert entries["csa b=1 t=1 closing"].bars == entries["hca b=1 t=1 open"].bars == (4.0, None)
    assert entries["hca b=1 t=4096"].bars == (None, 0.55)
    prefill = 8 * 4096 * 512 + 8 * 128 * 512 + 4 * 128 * 512 + 32 * 583
    assert entries["hca b=1 t=4096"].launch_bytes == prefill
    moe = {case.name: case.max_us for case in bench_moe.CASES}
    assert moe["flash nvfp4_w4a8 uniform t=8"] == 172.8
    assert moe["pro nvfp4_w4a4 uniform t=1"] == 70 and moe["pro mxfp4_w4a8 zipf t=8"] is None


def test_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Which cases the command line picks; a failure is told and does not end the run."""
    bench, ran = bench_nvfp4_linear, list[Any]()

    def run(case: Any) -> timing.Result:
        ran.append(case)
        if case.row.name == "wkv":
            raise AssertionError("far off")
        return GOOD

    def program(line: str) -> int:
        ran.clear()
        return linears.program(bench.CASES, bench.EVERY, run, bench.BASELINES, line.split())

    monkeypatch.delenv("BENCH_JSONL", raising=False)
    assert program("--models flash --rows wq_a wq_b") == 0 and len(ran) == 15
    assert program("--models pro --rows wq_b --tokens 1 16") == 0
    assert [(case.form, case.t) for case in ran] == [
        (form, t) for form in ("nvfp4_w4a4", "nvfp4_w4a16") for t in (1, 16)
    ]
    assert program("--forms nvfp4_w4a8 --tokens 8 --rows wkv wq_a") == 1 and len(ran) == 4
    assert "FAILED flash wkv nvfp4_w4a8 t=8: far off" in capsys.readouterr().out
    assert program("--only-baselines --tokens 1 --rows wo_b") == 0
    assert {case.form for case in ran} == {"xla_nvfp4_w4a4", "xla_nvfp4_w4a16"}


def test_a_missed_bar_has_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of JSON all the same."""
    monkeypatch.setenv("BENCH_JSONL", str(tmp_path / "lines.jsonl"))
    missed = dataclasses.replace(GOOD, gpu=timing.BAR_GPU, ok=False)
    bench, picked = bench_nvfp4_linear, "--models flash --rows wkv --tokens 1".split()
    assert linears.program(bench.CASES, bench.EVERY, lambda _: missed, arguments=picked) == 1
    lines = (tmp_path / "lines.jsonl").read_text("utf-8").splitlines()
    assert lines and all(json.loads(line)["ok"] is False for line in lines)


def test_activations_are_those_of_the_package() -> None:
    """Bit for bit: ties, blocks of zeros, a row of zeros, a last block that is shorter."""
    x = products.normal_values(3, 12, 448).astype(np.float32)
    x *= 10.0 ** np.random.default_rng(0).uniform(-6, 6, (12, 1)).astype(np.float32)
    x[3], x[4, :128] = 0, 0
    x[5] = np.arange(448) / 64  # quotients on ties
    value, _ = products.activation(x, "fp8")
    assert_same_bits(value, fp8.dequantize_act(fp8.quantize_act(jnp.asarray(x), 128), 128))
    value, scale = products.activation(x, "nvfp4")
    s2 = nvfp4.token_global_scale(jnp.asarray(x))
    assert_same_bits(scale, s2)
    assert_same_bits(value, nvfp4.dequantize_blocks(nvfp4.quantize(jnp.asarray(x), s2)))


@pytest.mark.parametrize("form", ["fp8_w8a8", "mxfp4_w4a8", "nvfp4_w4a4", "bfloat16"])
def test_wrong_products_are_found(form: str) -> None:
    """Another activation format, an element, a factor, a NaN."""
    storage = weight_format(form)
    leaves = products.random_weight(0, storage, (96, 256))
    wide = products.decoded_rows(storage, leaves, np.arange(96))
    x = products.normal_values(0, 5, 256)
    exact = products.product(x, wide, act_format(form))
    products.assert_product(exact.astype(np.float32), exact)
    products.assert_product(jnp.asarray(exact, jnp.bfloat16), exact)
    wrong = {"factor": exact * 1.004, "element": exact.copy(), "NaN": exact.copy()}
    wrong["element"][3, 4] += 0.1 * np.std(exact)
    wrong["NaN"][0, 0] = np.nan
    if form != "bfloat16":
        wrong["activation"] = products.product(x, wide, "bfloat16")
    for name, y in wrong.items():
        with pytest.raises(AssertionError, match=r"similarity|too far|finite"):
            products.assert_product(y.astype(np.float32), exact, name, fp8=True)


@pytest.mark.parametrize("form", ["mxfp4_w4a8", "nvfp4_w4a4", "nvfp4_w4a16"])
def test_wrong_experts_are_found(form: Any) -> None:
    """Another activation format, the weight after ``w2``, a factor, an expert left out."""
    storage = weight_format(form)
    shapes = {"w1": (4, 128, 256), "w2": (4, 256, 128), "w3": (4, 128, 256)}
    stacks = {
        name: products.random_weight(i, storage, shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    x, (idx, weight) = products.normal_values(0, 9, 256), products.routing(0, 9, 2, 4)
    weight = np.full_like(weight, 0.3)

    def run(linear: Any = form, idx: Any = idx, weight: Any = weight) -> np.ndarray:
        return products.expected_experts(x, idx, weight, stacks, linear, 10.0)

    exact = run()
    products.assert_experts(exact.astype(np.float32), exact, form)
    products.assert_experts(jnp.asarray(exact, jnp.bfloat16), exact, form)
    other = f"{storage}_{'w4a8' if form.endswith('a16') else 'w4a16'}"
    wrong = {
        "activation": run(other),
        "weight after": 0.3 * run(weight=np.ones_like(weight)),
        "factor": exact * 1.003,
        "expert": run(idx=np.stack([idx[:, 0], np.full(9, 4, np.int32)], axis=1)),
    }
    for name, y in wrong.items():
        with pytest.raises(AssertionError, match=r"relative L2|too large"):
            products.assert_experts(y.astype(np.float32), exact, form, name)
