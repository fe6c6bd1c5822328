"""Bad operands and extreme data of every op; ids are rows of the acceptance list, A and B.

What is bitwise of all ops alike (A6, A13, row independence) is in tests/ops/test_rows.py; what is
said of FFI handlers, shards and sizes (A9 to A12, A22, A23, E12) in test_ffi_faults.py.
"""

# ruff: noqa: B008 (an operand without data is immutable, so it may be a default)
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv4_jax.ops.attention import attention
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.compressor import CompressorJob, compressor
from dsv4_jax.ops.dense_linear import dense_linear, dense_linears
from dsv4_jax.ops.fp8_linear import fp8_linear, fp8_linears
from dsv4_jax.ops.hadamard import hadamard
from dsv4_jax.ops.head_norm import head_norm
from dsv4_jax.ops.index_query_finish import index_query_finish
from dsv4_jax.ops.index_topk import index_topk
from dsv4_jax.ops.key_finish import QueryNorm, key_finish
from dsv4_jax.ops.mhc import Read, Write, mhc
from dsv4_jax.ops.mhc_head import mhc_head
from dsv4_jax.ops.mhc_post import mhc_post
from dsv4_jax.ops.mhc_pre import mhc_pre
from dsv4_jax.ops.moe import moe
from dsv4_jax.ops.mxfp4_linear import mxfp4_linear
from dsv4_jax.ops.nvfp4_linear import nvfp4_linear, nvfp4_linears
from dsv4_jax.ops.query_finish import query_finish
from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.ops.rmsnorm_fp8 import rmsnorm_fp8
from dsv4_jax.ops.rmsnorm_nvfp4 import rmsnorm_nvfp4
from dsv4_jax.ops.rope import rope
from dsv4_jax.ops.router import router
from dsv4_jax.ops.swiglu import swiglu
from dsv4_jax.precision import Precision
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.quant.kv import IndexRows, KvRows
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.support.numerics import assert_same_tree, f64, row_of
from tests.support.op_cases import CASES, OpCase

F16, F32, BF16, I32, U8 = jnp.float16, jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint8
EPS = 1e-6
FREQUENCIES = np.ones(8, np.float32)


def s(shape: str, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    """An operand without data: ``s("5 4 48")``."""
    return jax.ShapeDtypeStruct(tuple(int(n) for n in shape.split()), dtype)


def kv(lead: str, scale: str = "", rope: str = "") -> KvRows:
    """Keys of FP8 with 448 + 64 channels; the parts named get other shapes."""
    return KvRows(
        s(f"{lead} 448", E4M3), s(scale or f"{lead} 7", UE8M0), s(rope or f"{lead} 64", BF16)
    )


def _rmsnorm(x: Any = s("5 96"), weight: Any = s("96")) -> Any:
    return jax.eval_shape(lambda x, w: rmsnorm(x, w, EPS), x, weight)


def _rmsnorm_nvfp4(x: Any = s("5 96"), weight: Any = s("96"), global_scale: Any = None) -> Any:
    return jax.eval_shape(lambda x, w, g: rmsnorm_nvfp4(x, w, EPS, g), x, weight, global_scale)


def _rmsnorm_fp8(x: Any = s("5 96"), weight: Any = s("96")) -> Any:
    return jax.eval_shape(lambda x, w: rmsnorm_fp8(x, w, EPS), x, weight)


def _head_norm(q: Any = s("5 3 64"), rounding: Any = "float32") -> Any:
    return jax.eval_shape(lambda q: head_norm(q, EPS, rounding=rounding), q)


def _rope(x: Any = s("2 3 4 24"), positions: Any = s("2 3", I32)) -> Any:
    return jax.eval_shape(lambda x, p: rope(x, p, FREQUENCIES), x, positions)


def _mhc_pre(
    streams: Any = s("5 4 48"),
    fn: Any = s("24 192", F32),
    base: Any = s("24", F32),
    scale: Any = s("3", F32),
) -> Any:
    op = lambda *a: mhc_pre(*a, iters=20, hc_eps=EPS, rms_eps=EPS)  # noqa: E731
    return jax.eval_shape(op, streams, fn, base, scale)


def _mhc_post(
    branch: Any = s("5 48"),
    streams: Any = s("5 4 48"),
    post: Any = s("5 4", F32),
    comb: Any = s("5 4 4", F32),
) -> Any:
    return jax.eval_shape(mhc_post, branch, streams, post, comb)


def _mhc_head(
    streams: Any = s("5 4 48"),
    fn: Any = s("4 192", F32),
    base: Any = s("4", F32),
    scale: Any = s("1", F32),
) -> Any:
    op = lambda *a: mhc_head(*a, hc_eps=EPS, rms_eps=EPS)  # noqa: E731
    return jax.eval_shape(op, streams, fn, base, scale)


def _mhc(
    streams: Any = s("5 4 256"),
    branch: Any = s("5 256"),
    post: Any = s("5 4", F32),
    comb: Any = s("5 4 4", F32),
    fn: Any = s("24 1024", F32),
    base: Any = s("24", F32),
    scale: Any = s("3", F32),
    norm: Any = s("256"),
    global_scale: Any = None,
    write: bool = True,
    read: bool = True,
    iters: int = 20,
    forms: Any = ("nvfp4",),
    regime: Any = None,
) -> Any:
    def op(streams: Any, writes: Any, reads: Any, scale: Any) -> Any:
        settings = {"iters": iters, "hc_eps": EPS, "rms_eps": EPS, "forms": forms, "regime": regime}
        return mhc(
            streams,
            Write(*writes) if write else None,
            Read(*reads) if read else None,
            scale,
            **settings,
        )

    return jax.eval_shape(op, streams, (branch, post, comb), (fn, base, scale, norm), global_scale)


def _hadamard(x: Any = s("5 128")) -> Any:
    return jax.eval_shape(hadamard, x)


def _router(
    x: Any = s("5 96"),
    weight: Any = s("32 96"),
    bias: Any = s("32", F32),
    expert_idx: Any = None,
    k: int = 6,
    tokens: Any = None,
) -> Any:
    op = lambda *a: router(*a[:4], k=k, scale=1.0, tokens=a[4])  # noqa: E731
    return jax.eval_shape(op, x, weight, bias, expert_idx, tokens)


def _dense_linear(x: Any = s("5 96"), weight: Any = s("40 96"), **settings: Any) -> Any:
    return jax.eval_shape(lambda *a: dense_linear(*a, **settings), x, weight)


def _dense_linears(
    x: Any = s("5 96"), weights: Any = (s("40 96"), s("24 96")), **settings: Any
) -> Any:
    return jax.eval_shape(lambda *a: dense_linears(*a, **settings), x, weights)


def _fp8_linear(
    x: Any = s("5 192"),
    weight: Any = s("160 192", E4M3),
    scale: Any = s("2 2", UE8M0),
    up: Any = None,
    **settings: Any,
) -> Any:
    fn = lambda *a: fp8_linear(*a[:3], up=a[3], **settings)  # noqa: E731
    return jax.eval_shape(fn, x, weight, scale, up)


def gated(up: Any = s("5 192"), limit: float | None = 10.0, **others: Any) -> dict[str, Any]:
    """Operands of `_fp8_linear` and `_nvfp4_linear` with ``x`` that is a gate."""
    return {"up": up, "limit": limit, **others}


def coded(code: str, scale: str, **settings: Any) -> dict[str, Any]:
    """Operands of `_fp8_linear` with ``x`` that is quantised, of 256 inputs."""
    x = Fp8(s(code, E4M3), s(scale, UE8M0))
    return {"x": x, "weight": s("160 256", E4M3), "scale": s("2 2", UE8M0), **settings}


def _fp8_linears(
    x: Any = s("5 192"),
    weights: Any = (s("160 192", E4M3), s("24 192", E4M3)),
    scales: Any = (s("2 2", UE8M0), s("1 2", UE8M0)),
    **settings: Any,
) -> Any:
    return jax.eval_shape(lambda *a: fp8_linears(*a, **settings), x, weights, scales)


def _mxfp4_linear(
    x: Any = s("5 192"),
    weight: Any = s("40 192", E2M1),
    scale: Any = s("40 6", UE8M0),
    **settings: Any,
) -> Any:
    return jax.eval_shape(lambda *a: mxfp4_linear(*a, **settings), x, weight, scale)


def _nvfp4_linear(
    x: Any = s("5 192"),
    weight: Any = s("40 192", E2M1),
    block_scale: Any = s("40 12", E4M3),
    global_scale: Any = s("", F32),
    act_scale: Any = s("", F32),
    up: Any = None,
    **settings: Any,
) -> Any:
    op = lambda *a: nvfp4_linear(*a[:5], up=a[5], **settings)  # noqa: E731
    return jax.eval_shape(op, x, weight, block_scale, global_scale, act_scale, up)


def _nvfp4_linears(
    x: Any = s("5 192"),
    weights: Any = (s("40 192", E2M1), s("24 192", E2M1)),
    block_scales: Any = (s("40 12", E4M3), s("24 12", E4M3)),
    global_scales: Any = (s("", F32),) * 2,
    act_scale: Any = s("", F32),
    **settings: Any,
) -> Any:
    op = lambda *a: nvfp4_linears(*a, **settings)  # noqa: E731
    return jax.eval_shape(op, x, weights, block_scales, global_scales, act_scale)


def _swiglu(gate: Any = s("5 48"), up: Any = s("5 48")) -> Any:
    return jax.eval_shape(lambda g, u: swiglu(g, u, limit=10.0), gate, up)


def _moe(
    x: Any = s("5 96"),
    expert_idx: Any = s("5 3", I32),
    expert_weight: Any = s("5 3", F32),
    valid: Any = s("5", jnp.bool_),
    shared: Any = s("5 96"),
    linear: Any = "mxfp4_w4a8",
    drop: str = "",
    first_expert: int = 0,
    dtype: Any = F32,
    regime: Any = None,
    power_of_two: bool = False,
    up_act_scale: Any = None,
    down_act_scale: Any = None,
    nvfp4: bool = False,
    **leaves: Any,
) -> Any:
    def stack(name: str, n: int, k: int) -> dict[str, Any]:
        stack = {
            "weight": leaves.get(f"{name}_weight", s(f"4 {n} {k}", E2M1)),
            "scale": leaves.get(f"{name}_scale", s(f"4 {n} {k // 32}", UE8M0)),
        }
        if nvfp4:
            stack.pop("scale")
            stack |= {"block_scale": s(f"4 {n} {k // 16}", E4M3), "global_scale": s("4", F32)}
        return {leaf: x for leaf, x in stack.items() if f"{name}_{leaf}" != drop}

    w = stack("w1", 64, 96), stack("w2", 96, 64), stack("w3", 64, 96)
    settings: dict[str, Any] = {
        "linear": linear,
        "first_expert": first_expert,
        "dtype": dtype,
        "regime": regime,
        "power_of_two": power_of_two,
    }
    op = lambda *a: moe(*a, limit=10.0, **settings)  # noqa: E731
    scales = up_act_scale, down_act_scale
    return jax.eval_shape(op, x, expert_idx, expert_weight, valid, *w, shared, *scales)


def _compressor(
    kv: Any = s("2 9 192", F32),
    gate: Any = s("2 9 192", F32),
    ape: Any = s("4 192", F32),
    norm: Any = s("96"),
    kv_state: Any = s("2 8 192", F32),
    gate_state: Any = s("2 8 192", F32),
    start: Any = s("2", I32),
    count: Any = s("2", I32),
    frequencies: Any = s("16", F32),
    ratio: int = 4,
    jobs: int = 1,
    index: Any = None,
    dtype: Any = BF16,
    **parts: Any,
) -> Any:
    pool = _store("2 10", parts, "pool") if index is None else index
    job = CompressorJob(kv, gate, ape, norm, kv_state, gate_state, pool)
    op = lambda *a: compressor(*a, ratio=ratio, eps=EPS, dtype=dtype)  # noqa: E731
    return jax.eval_shape(op, [job] * jobs, start, count, frequencies)


def _index_topk(
    q: Any = s("2 3 4 32", E2M1),
    q_scale: Any = s("2 3 4 1", UE8M0),
    weight: Any = s("2 3 4"),
    key: Any = s("2 100 32", E2M1),
    scale: Any = s("2 100 1", UE8M0),
    n_visible: Any = s("2 3", I32),
    topk: int = 24,
    rounding: Any = "float32",
) -> Any:
    op = lambda *a: index_topk(*a, topk=topk, rounding=rounding)  # noqa: E731
    return jax.eval_shape(op, IndexRows(q, q_scale), weight, IndexRows(key, scale), n_visible)


def _store(lead: str, parts: dict[str, Any], name: str) -> KvRows:
    """Keys of 64 + 32 channels, as far as ``parts`` has no others under ``name_...``."""
    return KvRows(
        parts.get(f"{name}_nope", s(f"{lead} 64", E4M3)),
        parts.get(f"{name}_scale", s(f"{lead} 1", UE8M0)),
        parts.get(f"{name}_rope", s(f"{lead} 32")),
    )


def _attention(
    q: Any = s("2 3 4 96"),
    positions: Any = s("2 3", I32),
    sink: Any = s("4", F32),
    start: Any = s("2", I32),
    n_visible: Any = s("2 3", I32),
    topk_idx: Any = s("2 3 9", I32),
    frequencies: Any = s("16", F32),
    chunk: bool = True,
    pool: bool = True,
    window: int = 8,
    regime: Any = None,
    **parts: Any,
) -> Any:
    ring = _store("2 8", parts, "ring")
    rows = {
        "chunk": _store("2 3", parts, "chunk") if chunk else None,
        "start": start,
        "pool": _store("2 256", parts, "pool") if pool else None,
        "n_visible": n_visible,
        "topk_idx": topk_idx,
        "frequencies": frequencies,
    }
    op = lambda *a, **rows: attention(*a, window=window, regime=regime, **rows)  # noqa: E731
    return jax.eval_shape(op, q, ring, positions, sink, **rows)


def _query_finish(
    q: Any = s("2 3 4 96"),
    positions: Any = s("2 3", I32),
    frequencies: Any = s("16", F32),
    rounding: Any = "float32",
) -> Any:
    op = lambda *a: query_finish(*a, EPS, rounding=rounding)  # noqa: E731
    return jax.eval_shape(op, q, positions, frequencies)


def _index_query_finish(
    q: Any = s("2 3 4 64"),
    positions: Any = s("2 3", I32),
    frequencies: Any = s("16", F32),
    form: Any = "mxfp4",
    heads: Any = None,
    rounding: Any = "float32",
) -> Any:
    settings = {"form": form, "rounding": rounding}
    op = lambda *a: index_query_finish(*a[:3], heads=a[3], **settings)  # noqa: E731
    return jax.eval_shape(op, q, positions, frequencies, heads)


def _key_finish(
    kv: Any = s("2 3 96"),
    weight: Any = s("96"),
    start: Any = s("2", I32),
    frequencies: Any = s("16", F32),
    form: Any = "fp8",
    count: Any = s("2", I32),
    ring: bool = True,
    query: Any = None,
    query_form: Any = "fp8",
    **parts: Any,
) -> Any:
    store = _store("2 8", parts, "ring") if ring else None
    rest = {"ring": store, "count": count, "query": query and QueryNorm(*query)}
    forms = {"form": form, "query_form": query_form}
    op = lambda *a, **rest: key_finish(*a, EPS, **forms, **rest)  # noqa: E731
    return jax.eval_shape(op, kv, weight, start, frequencies, **rest)


def _cache_write(
    cache: Any = s("2 8 16", E4M3), rows: Any = s("2 3 16", E4M3), slots: Any = s("2 3", I32)
) -> Any:
    return jax.eval_shape(cache_write, cache, rows, slots)


MOE_SHAPES = {"w1": "64 96", "w2": "96 64", "w3": "64 96"}
MOE_SCALES = {"w1": "64 3", "w2": "96 2", "w3": "64 3"}
MOE_STATIC: dict[str, Any] = {"up_act_scale": s("4", F32), "down_act_scale": s("4", F32)}
W4A4: dict[str, Any] = {"linear": "nvfp4_w4a4", "nvfp4": True, **MOE_STATIC}
CALLS: list[Callable[..., Any]] = [
    _rmsnorm,
    _rmsnorm_nvfp4,
    _rmsnorm_fp8,
    _head_norm,
    _rope,
    _mhc_pre,
    _mhc_post,
    _mhc_head,
    _mhc,
    _hadamard,
    _router,
    _dense_linear,
    _dense_linears,
    _fp8_linear,
    _fp8_linears,
    _mxfp4_linear,
    _nvfp4_linear,
    _nvfp4_linears,
    _swiglu,
    _moe,
    _compressor,
    _index_topk,
    _attention,
    _query_finish,
    _key_finish,
    _index_query_finish,
    _cache_write,
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__[1:])
def test_good_operands(call: Callable[..., Any]) -> None:
    """The operands that every case below breaks in one place are accepted."""
    call()


RANK: list[tuple[Callable[..., Any], str, dict[str, Any]]] = [
    (_rmsnorm, "weight", {"weight": s("1 96")}),
    (_rmsnorm, "x", {"x": s("")}),
    (_rmsnorm_nvfp4, "x", {"x": s("")}),
    (_rmsnorm_nvfp4, "weight", {"weight": s("1 96")}),
    (_rmsnorm_nvfp4, "weight", {"weight": s("")}),
    (_rmsnorm_nvfp4, "global_scale", {"global_scale": s("1", F32)}),
    (_rmsnorm_nvfp4, "global_scale", {"global_scale": s("5", F32)}),
    (_rmsnorm_fp8, "x", {"x": s("")}),
    (_rmsnorm_fp8, "weight", {"weight": s("1 96")}),
    (_head_norm, "q", {"q": s("64")}),
    (_rope, "x", {"x": s("3 24")}),
    (_rope, "positions", {"positions": s("6", I32)}),
    (_mhc_pre, "streams", {"streams": s("5 192")}),
    (_mhc_pre, "fn", {"fn": s("24 4 48", F32)}),
    (_mhc_post, "streams", {"streams": s("5 192")}),
    (_mhc_post, "comb", {"comb": s("5 16", F32)}),
    (_mhc_head, "streams", {"streams": s("1 5 4 48")}),
    (_mhc, "streams", {"streams": s("5 1024")}),
    (_mhc, "fn", {"fn": s("24576", F32)}),
    (_mhc, "global_scale", {"global_scale": s("1", F32)}),
    (_hadamard, "x", {"x": s("")}),
    (_router, "x", {"x": s("1 5 96")}),
    (_router, "weight", {"weight": s("96")}),
    (_router, "bias", {"bias": s("1 32", F32)}),
    (_dense_linear, "x", {"x": s("96")}),
    (_dense_linear, "x", {"x": s("1 1 5 96")}),
    (_dense_linear, "weight", {"weight": s("1 40 96")}),
    (_dense_linears, "x", {"x": s("96")}),
    (_dense_linears, r"weights\[0\]", {"weights": [s("40")]}),
    (_dense_linears, r"weights\[1\]", {"weights": [s("40 96"), s("1 24 96")]}),
    (_fp8_linear, "x", {"x": s("192")}),
    (_fp8_linear, "weight", {"weight": s("1 160 192", E4M3)}),
    (_fp8_linear, "scale", {"scale": s("2", UE8M0)}),
    (_fp8_linear, "x", coded("256", "2")),
    (_fp8_linear, "scale of x", coded("5 256", "2")),
    (_fp8_linear, "up", gated(up=s("192"))),
    (_fp8_linears, r"weights\[1\]", {"weights": [s("160 192", E4M3), s("24", E4M3)]}),
    (_fp8_linears, r"scales\[0\]", {"scales": [s("2", UE8M0), s("1 2", UE8M0)]}),
    (_mxfp4_linear, "x", {"x": s("192")}),
    (_mxfp4_linear, "scale", {"scale": s("240", UE8M0)}),
    (_nvfp4_linear, "weight", {"weight": s("7680", E2M1)}),
    (_nvfp4_linear, "global_scale", {"global_scale": s("1", F32)}),
    (_nvfp4_linear, "act_scale", {"act_scale": s("1", F32)}),
    (_nvfp4_linear, "act_scale", {"act_scale": s("5", F32)}),
    (_nvfp4_linear, "up", gated(up=s("192"))),
    (_nvfp4_linears, r"weights\[1\]", {"weights": [s("40 192", E2M1), s("24", E2M1)]}),
    (_nvfp4_linears, r"block_scales\[0\]", {"block_scales": [s("40", E4M3), s("24 12", E4M3)]}),
    (_nvfp4_linears, r"global_scales\[1\]", {"global_scales": [s("", F32), s("1", F32)]}),
    (_nvfp4_linears, "act_scale", {"act_scale": s("2", F32)}),
    (_swiglu, "gate", {"gate": s("48")}),
    (_moe, "x", {"x": s("1 5 96")}),
    (_moe, "expert_idx", {"expert_idx": s("5", I32)}),
    (_moe, "w1 weight", {"w1_weight": s("64 96", E2M1)}),
    (_moe, "valid", {"valid": s("5 1", jnp.bool_)}),
    (_moe, "up_act_scale", W4A4 | {"up_act_scale": s("", F32)}),
    (_moe, "down_act_scale", W4A4 | {"down_act_scale": s("4 1", F32)}),
    (_moe, "shared", {"shared": s("1 5 96")}),
    (_compressor, "kv", {"kv": s("9 192", F32)}),
    (_compressor, "ape", {"ape": s("192", F32)}),
    (_compressor, "norm", {"norm": s("1 96")}),
    (_compressor, "gate_state", {"gate_state": s("8 192", F32)}),
    (_compressor, "pool codes", {"pool_nope": s("10 64", E4M3)}),
    (_compressor, "start", {"start": s("", I32)}),
    (_index_topk, "q", {"q": s("6 4 32", E2M1)}),
    (_index_topk, "q scale", {"q_scale": s("6 4 1", UE8M0)}),
    (_index_topk, "weight", {"weight": s("6 4")}),
    (_index_topk, "keys", {"key": s("200 32", E2M1)}),
    (_index_topk, "keys scale", {"scale": s("2 100", UE8M0)}),
    (_compressor, "frequencies", {"frequencies": s("1 16", F32)}),
    (_index_topk, "n_visible", {"n_visible": s("6", I32)}),
    (_attention, "q", {"q": s("6 4 96")}),
    (_attention, "ring nope", {"ring_nope": s("8 64", E4M3)}),
    (_attention, "ring scale", {"ring_scale": s("2 8", UE8M0)}),
    (_attention, "chunk rope", {"chunk_rope": s("2 3 1 32")}),
    (_attention, "pool nope", {"pool_nope": s("1 2 256 64", E4M3)}),
    (_attention, "positions", {"positions": s("6", I32)}),
    (_attention, "sink", {"sink": s("4 1", F32)}),
    (_attention, "start", {"start": s("", I32)}),
    (_attention, "n_visible", {"n_visible": s("2", I32)}),
    (_attention, "topk_idx", {"topk_idx": s("2 3", I32)}),
    (_attention, "frequencies", {"frequencies": s("1 16", F32)}),
    (_cache_write, "cache", {"cache": s("8 16", E4M3)}),
    (_cache_write, "cache", {"cache": s("1 2 8 16", E4M3)}),
    (_cache_write, "rows", {"rows": s("6 16", E4M3)}),
    (_cache_write, "slots", {"slots": s("6", I32)}),
    (_cache_write, r"cache\.scale", {"cache": kv("2 8", scale="8 7"), "rows": kv("2 3")}),
    (_cache_write, r"rows\.rope", {"cache": kv("2 8"), "rows": kv("2 3", rope="6 64")}),
    (_query_finish, "q", {"q": s("6 4 96")}),
    (_query_finish, "positions", {"positions": s("6", I32)}),
    (_query_finish, "frequencies", {"frequencies": s("1 16", F32)}),
    (_key_finish, "kv", {"kv": s("6 96")}),
    (_key_finish, "weight", {"weight": s("1 96")}),
    (_key_finish, "start", {"start": s("2 3", I32)}),
    (_key_finish, "count", {"count": s("", I32)}),
    (_key_finish, "frequencies", {"frequencies": s("", F32)}),
    (_key_finish, "ring nope", {"ring_nope": s("16 64", E4M3)}),
    (_key_finish, "ring scale", {"ring_scale": s("2 8", UE8M0)}),
    (_key_finish, "ring rope", {"ring_rope": s("2 8 1 32")}),
    (_index_query_finish, "q", {"q": s("2 3 256")}),
    (_index_query_finish, "positions", {"positions": s("2 3 4", I32)}),
    (_index_query_finish, "frequencies", {"frequencies": s("1 16", F32)}),
]
AXIS: list[tuple[Callable[..., Any], str, dict[str, Any]]] = [
    (_rmsnorm, r"weight must be \[96\] .*got \[95\]", {"weight": s("95")}),
    (_rmsnorm_nvfp4, r"weight must be \[96\] .*\[5, 96\], got \[80\]", {"weight": s("80")}),
    (_rmsnorm_nvfp4, r"weight must be \[112\] .*got \[96\]", {"x": s("2 3 112")}),
    (_rmsnorm_fp8, r"weight must be \[96\] .*\[5, 96\], got \[80\]", {"weight": s("80")}),
    (_rope, "x must have at least 16 channels, got 14", {"x": s("2 3 14")}),
    (_rope, r"positions must be \[2, 3\] .*got \[3, 2\]", {"positions": s("3 2", I32)}),
    (_mhc_pre, r"fn must be \[24, 192\] .*got \[24, 191\]", {"fn": s("24 191", F32)}),
    (_mhc_pre, r"base must be \[24\] .*got \[23\]", {"base": s("23", F32)}),
    (_mhc_pre, r"scale must be \[3\] .*got \[2\]", {"scale": s("2", F32)}),
    (_mhc_post, r"branch must be \[5, 48\] .*got \[4, 48\]", {"branch": s("4 48")}),
    (_mhc_post, r"comb must be \[5, 4, 4\] .*got \[5, 4, 3\]", {"comb": s("5 4 3", F32)}),
    (_mhc_head, r"fn must be \[4, 192\] .*got \[24, 192\]", {"fn": s("24 192", F32)}),
    (_mhc, r"branch must be \[5, 256\] .*got \[4, 256\]", {"branch": s("4 256")}),
    (_mhc, r"post must be \[5, 4\] .*got \[5, 3\]", {"post": s("5 3", F32)}),
    (_mhc, r"comb must be \[5, 4, 4\] .*got \[5, 16\]", {"comb": s("5 16", F32)}),
    (_mhc, r"fn must be \[24, 1024\] .*got \[24, 256\]", {"fn": s("24 256", F32)}),
    (_mhc, r"rows of fn must be one of \[24, 4\], got 23", {"fn": s("23 1024", F32)}),
    (_mhc, r"base must be \[24\] .*got \[4\]", {"base": s("4", F32)}),
    (_mhc, r"scale must be \[3\] .*got \[1\]", {"scale": s("1", F32)}),
    (_mhc, r"norm must be \[256\] .*got \[128\]", {"norm": s("128")}),
    (_mhc, "one of write and read must be given, got None", {"write": False, "read": False}),
    (_mhc, "iters must be at least 1, got 0", {"iters": 0}),
    (_mhc, "regime must be one of .*got 'fast'", {"regime": "fast"}),
    (_mhc, r"forms must name at least one form of x, got \(\)", {"forms": ()}),
    (_mhc, "forms must be one of .*got 'mxfp4'", {"forms": ("mxfp4",)}),
    (
        _mhc,
        "global_scale must come with the form nvfp4, got .*fp8",
        {"global_scale": s("", F32), "forms": ("fp8",)},
    ),
    (_mhc, "global_scale must come with a read", {"global_scale": s("", F32), "read": False}),
    (_hadamard, "last axis must be a power of two, got 96", {"x": s("5 96")}),
    (_hadamard, "last axis must be a power of two, got 0", {"x": s("5 0")}),
    (_router, r"x and weight must agree .*\[5, 96\] and \[32, 95\]", {"weight": s("32 95")}),
    (_router, r"bias must be \[32\], got \[31\]", {"bias": s("31", F32)}),
    (
        _router,
        r"expert_idx must be \[5, 6\], got \[5, 5\]",
        {"bias": None, "expert_idx": s("5 5", I32)},
    ),
    (_router, "k must be 1..32 .*got 33", {"k": 33}),
    (
        _router,
        r"k must be 1..4 \(of 4 experts\), got 6",
        {"weight": s("4 96"), "bias": s("4", F32)},
    ),
    (
        _router,
        r"k must be 1..32 \(of 64 experts\), got 33",
        {"weight": s("64 96"), "bias": s("64", F32), "k": 33},
    ),
    (_router, "k must be 1..32 .*got 0", {"k": 0}),
    (
        _router,
        r"expert_idx must be \[9, 6\], got \[9, 5\]",
        {"bias": None, "expert_idx": s("9 5", I32), "tokens": s("5", I32)},
    ),
    (
        _router,
        r"expert_idx must be \[1, 6\], got \[0, 6\]",
        {"bias": None, "expert_idx": s("0 6", I32), "tokens": s("5", I32)},
    ),
    (
        _router,
        r"tokens must be \[5\], got \[4\]",
        {"bias": None, "expert_idx": s("9 6", I32), "tokens": s("4", I32)},
    ),
    (_router, "tokens must come with expert_idx", {"tokens": s("5", I32)}),
    (_router, "exactly one of bias and expert_idx", {"bias": None}),
    (_router, "exactly one of bias and expert_idx", {"expert_idx": s("5 6", I32)}),
    (_dense_linear, r"agree on the last axis.* got x \[5, 96\] and", {"weight": s("40 95")}),
    (_dense_linear, r"agree .*at least 1, got x \[5, 0\]", {"x": s("5 0"), "weight": s("40 0")}),
    (_dense_linear, r"evenly over x's 3 groups, got \[40, 96\]", {"x": s("5 3 96")}),
    (_dense_linear, r"evenly over x's 0 groups, got \[40, 96\]", {"x": s("5 0 96")}),
    (_dense_linear, r"regime must be one of .*got 'any'", {"regime": "any"}),
    (_dense_linears, r"weights must hold 1\.\.8 arrays, got 0", {"weights": []}),
    (_dense_linears, r"weights must hold 1\.\.8 arrays, got 9", {"weights": [s("40 96")] * 9}),
    (
        _dense_linears,
        r"x and weights\[1\] must agree .*got x \[5, 96\] and weights\[1\] \[24, 95\]",
        {"weights": [s("40 96"), s("24 95")]},
    ),
    (
        _dense_linears,
        r"x and weights\[0\] must agree .*at least 1, got x \[5, 0\]",
        {"x": s("5 0"), "weights": [s("40 0")] * 2},
    ),
    (
        _dense_linears,
        r"weights\[1\] must split evenly over x's 5 groups, got \[24, 96\]",
        {"x": s("3 5 96")},
    ),
    (_dense_linears, r"regime must be one of .*got 'any'", {"regime": "any"}),
    (_dense_linears, "dtype must be one or 2, .*got 1", {"dtype": (F32,)}),
    (_fp8_linear, r"x must end in weight's 192 inputs, got \[5, 191\]", {"x": s("5 191")}),
    (_fp8_linear, r"evenly over x's 3 groups, got \[160, 192\]", {"x": s("5 3 192")}),
    (_fp8_linear, r"evenly over x's 0 groups, got \[160, 192\]", {"x": s("5 0 192")}),
    (
        _fp8_linear,
        r"weight must have inputs, got \[160, 0\]",
        {"x": s("5 0"), "weight": s("160 0", E4M3), "scale": s("2 0", UE8M0)},
    ),
    (_fp8_linear, r"act must be one of .*got 'nvfp4'", {"act": "nvfp4"}),
    (_fp8_linear, r"regime must be one of .*got 'Decode'", {"regime": "Decode"}),
    (_fp8_linear, r"act must be 'fp8' for x .*'bfloat16'", coded("5 256", "5 2", act="bfloat16")),
    (
        _fp8_linear,
        r"x that is quantised must have a multiple of 128 inputs, got \[5, 192\]",
        {"x": Fp8(s("5 192", E4M3), s("5 2", UE8M0))},
    ),
    (_fp8_linear, r"x must end in weight's 256 inputs, got \[5, 384\]", coded("5 384", "5 3")),
    (_fp8_linear, r"evenly over x's 3 groups", coded("5 3 256", "5 3 2")),
    (_fp8_linear, "up and limit must come together, got up alone", gated(limit=None)),
    (_fp8_linear, "up and limit must come together, got limit alone", gated(up=None)),
    (_fp8_linear, r"up must be \[5, 192\] as x, got \[5, 191\]", gated(up=s("5 191"))),
    (_fp8_linear, r"up must be \[5, 192\] as x, got \[4, 192\]", gated(up=s("4 192"))),
    (_fp8_linear, "act must be 'fp8' for x with up, got 'bfloat16'", gated(act="bfloat16")),
    (_fp8_linears, r"weights must hold 1\.\.8 arrays, got 0", {"weights": [], "scales": []}),
    (_fp8_linears, "scales must be as many as weights, 2, got 1", {"scales": [s("2 2", UE8M0)]}),
    (_fp8_linears, "dtype must be one or 2, .*got 3", {"dtype": (F32, BF16, F32)}),
    (_fp8_linears, r"x must end in weights\[0\]'s 192 inputs, got", {"x": s("5 191")}),
    (_fp8_linears, r"act must be one of .*got 'nvfp4'", {"act": "nvfp4"}),
    (_mxfp4_linear, r"x must end in weight's 192 inputs, got \[5, 96\]", {"x": s("5 96")}),
    (_mxfp4_linear, r"evenly over x's 3 groups", {"x": s("5 3 192")}),
    (_mxfp4_linear, r"act must be one of .*got 'nvfp4'", {"act": "nvfp4"}),
    (_mxfp4_linear, r"regime must be one of .*got 1", {"regime": 1}),
    (_nvfp4_linear, r"x must end in weight's 192 inputs, got \[5, 96\]", {"x": s("5 96")}),
    (_nvfp4_linear, r"evenly over x's 3 groups", {"x": s("5 3 192")}),
    (_nvfp4_linear, r"act must be one of .*got 'fp4'", {"act": "fp4"}),
    (_nvfp4_linear, r"act_scale must be None unless .*got act 'fp8'", {"act": "fp8"}),
    (_nvfp4_linear, r"act_scale must be None unless .*got act 'bfloat16'", {"act": "bfloat16"}),
    (_nvfp4_linear, r"regime must be one of .*got 'any'", {"regime": "any"}),
    (_nvfp4_linear, "up and limit must come together, got up alone", gated(limit=None)),
    (_nvfp4_linear, "up and limit must come together, got limit alone", gated(up=None)),
    (_nvfp4_linear, r"up must be \[5, 192\] as x, got \[5, 191\]", gated(up=s("5 191"))),
    (
        _nvfp4_linear,
        "act must be 'nvfp4' for x with up, got 'fp8'",
        gated(act="fp8", act_scale=None),
    ),
    (
        _nvfp4_linears,
        r"weights must hold 1\.\.8 arrays, got 0",
        {"weights": [], "block_scales": [], "global_scales": []},
    ),
    (
        _nvfp4_linears,
        "block_scales must be as many as weights, 2, got 1",
        {"block_scales": [s("40 12", E4M3)]},
    ),
    (
        _nvfp4_linears,
        "global_scales must be as many as weights, 2, got 3",
        {"global_scales": [s("", F32)] * 3},
    ),
    (_nvfp4_linears, "dtype must be one or 2, .*got 3", {"dtype": (F32, BF16, F32)}),
    (_nvfp4_linears, r"x must end in weights\[0\]'s 192 inputs, got", {"x": s("5 191")}),
    (_nvfp4_linears, r"act must be one of .*got 'fp4'", {"act": "fp4"}),
    (_nvfp4_linears, r"act_scale must be None unless .*got act 'fp8'", {"act": "fp8"}),
    (_head_norm, r"rounding must be one of .*got 'float16'", {"rounding": "float16"}),
    (_swiglu, r"gate and up must agree, got \[5, 48\] and \[5, 47\]", {"up": s("5 47")}),
    (_moe, r"x must be \[5, 96\], got \[5, 64\]", {"x": s("5 64")}),
    (_moe, r"expert_weight and valid must be \[5, 3\]", {"expert_weight": s("5 2", F32)}),
    (_moe, r"expert_weight and valid .*got .* and \[4\]", {"valid": s("4", jnp.bool_)}),
    (_moe, r"shared must be \[5, 96\], got \[5, 95\]", {"shared": s("5 95")}),
    (
        _moe,
        r"expert_idx must hold at least one pick, got \[5, 0\]",
        {"expert_idx": s("5 0", I32), "expert_weight": s("5 0", F32)},
    ),
    (
        _moe,
        r"w1 must not be empty, got \[0, 64, 96\]",
        {f"{w}_weight": s(f"0 {shape}", E2M1) for w, shape in MOE_SHAPES.items()}
        | {f"{w}_scale": s(f"0 {shape}", UE8M0) for w, shape in MOE_SCALES.items()},
    ),
    (_moe, "first_expert must be 0..2147483643 for 4 experts, got -1", {"first_expert": -1}),
    (_moe, "first_expert must be .*got 2147483644", {"first_expert": 2**31 - 4}),
    (_moe, r"regime must be one of .*got 'any'", {"regime": "any"}),
    (_moe, "power_of_two is of nvfp4_w4a8 alone, got linear 'mxfp4_w4a8'", {"power_of_two": True}),
    (_moe, "linear must be one of .*got 'mxfp4'", {"linear": "mxfp4"}),
    (_moe, "w1 must have the leaves .*block_scale", {"linear": "nvfp4_w4a4"}),
    (_moe, "w2 must have the leaves .*scale", {"drop": "w2_scale"}),
    (_moe, r"given together, got no up_act_scale", W4A4 | {"up_act_scale": None}),
    (_moe, r"given together, got no down_act_scale", W4A4 | {"down_act_scale": None}),
    (_moe, r"up_act_scale must be \[4\], got \[3\]", W4A4 | {"up_act_scale": s("3", F32)}),
    (_moe, r"down_act_scale must be \[4\], got \[1\]", W4A4 | {"down_act_scale": s("1", F32)}),
    (
        _moe,
        "up_act_scale must be None unless linear is 'nvfp4_w4a4', got linear 'mxfp4_w4a8'",
        MOE_STATIC,
    ),
    (
        _moe,
        r"w1, w3 must be \[e, i, d\] and w2 \[e, d, i\], got \[4, 64, 96\], \[4, 32, 96\]",
        {"w3_weight": s("4 32 96", E2M1), "w3_scale": s("4 32 3", UE8M0)},
    ),
    (_compressor, r"gate must be \[2, 9, 192\], got \[2, 8, 192\]", {"gate": s("2 8 192", F32)}),
    (_compressor, r"kv must be \[2, 9, 192\], got \[2, 9, 96\]", {"kv": s("2 9 96", F32)}),
    (_compressor, r"ape must be \[4, 192\], got \[3, 192\]", {"ape": s("3 192", F32)}),
    (
        _compressor,
        r"kv_state must be \[2, 8, 192\], got \[2, 8, 191\]",
        {"kv_state": s("2 8 191", F32)},
    ),
    (
        _compressor,
        r"gate_state must be \[2, 8, 192\], got \[2, 9, 192\]",
        {"gate_state": s("2 9 192", F32)},
    ),
    (
        _compressor,
        "kv_state must hold at least 8 rows for ratio 4, got 7",
        {name: s("2 7 192", F32) for name in ("kv_state", "gate_state")},
    ),
    (_compressor, r"start must be \[2\], got \[3\]", {"start": s("3", I32)}),
    (_compressor, r"pool codes must be \[2, 10, 64\], got", {"pool_nope": s("3 10 64", E4M3)}),
    (_compressor, r"pool rope must be \[2, 10, 32\], got", {"pool_rope": s("2 10 30")}),
    (
        _compressor,
        "norm must have at least the 98 rotary channels, got 96",
        {"frequencies": s("49", F32)},
    ),
    (
        _compressor,
        "pool must have a scale with codes and with nothing else, got one with bfloat16",
        {"pool_nope": s("2 10 64")},
    ),
    (
        _compressor,
        "pool must have a scale .*got none with float4_e2m1fn",
        {"index": IndexRows(s("2 10 96", E2M1), None)},
    ),
    (_compressor, r"jobs must be 1..2, got 3", {"jobs": 3}),
    (_compressor, r"jobs must be 1..2, got 0", {"jobs": 0}),
    (_compressor, r"jobs\[0\] ape must be", {"jobs": 2, "ape": s("3 192", F32)}),
    (_compressor, "ratio must be at least 1, got 0", {"ratio": 0}),
    (_index_topk, r"weight and n_visible must be \[2, 3, 4\]", {"weight": s("2 3 3")}),
    (_index_topk, r"weight and n_visible must be .*got .* \[2, 4\]", {"n_visible": s("2 4", I32)}),
    (_index_topk, r"keys must be \[2, s, 32\] .*got \[1, 100, 32\]", {"key": s("1 100 32", E2M1)}),
    (_index_topk, r"keys must be \[2, s, 32\] .*got \[2, 100, 64\]", {"key": s("2 100 64", E2M1)}),
    (_index_topk, "multiple of 128 entries where there is no kernel", {"rounding": "bfloat16"}),
    (
        _index_topk,
        "multiple of 128 entries .*got 100",
        {"q": s("2 3 4 32"), "q_scale": None, "key": s("2 100 32"), "scale": None},
    ),
    (_index_topk, "q must have a scale with .*got none with float4_e2m1fn", {"q_scale": None}),
    (_index_topk, "keys must have a scale with .*got none with float4_e2m1fn", {"scale": None}),
    (
        _index_topk,
        "q must have a scale with .*got one with bfloat16",
        {"q": s("2 3 4 32"), "key": s("2 100 32")},
    ),
    (_index_topk, "topk must be at least 1, got 0", {"topk": 0}),
    (_index_topk, "rounding must be one of", {"rounding": "bf16"}),
    (_attention, r"positions must be \[2, 3\] .*got \[2, 4\]", {"positions": s("2 4", I32)}),
    (_attention, r"sink must be \[4\] .*got \[3\]", {"sink": s("3", F32)}),
    (_attention, r"start must be \[2\] .*got \[3\]", {"start": s("3", I32)}),
    (_attention, r"n_visible must be \[2, 3\] .*got \[2, 4\]", {"n_visible": s("2 4", I32)}),
    (_attention, r"topk_idx must be \[2, 3, 9\] .*got \[2, 4, 9\]", {"topk_idx": s("2 4 9", I32)}),
    (_attention, r"ring must be \[2, s, ...\] with 96 channels", {"ring_rope": s("2 8 30")}),
    (_attention, r"ring must be .*got \[2, 8, 64\] and \[2, 7, 32\]", {"ring_rope": s("2 7 32")}),
    (_attention, r"chunk must be \[2, s, ...\] .*\[1, 3, 64\]", {"chunk_nope": s("1 3 64", E4M3)}),
    (
        _attention,
        r"pool must be .*96 channels .*, 64 of them nope, got \[2, 256, 32\]",
        {"pool_nope": s("2 256 32", E4M3), "pool_rope": s("2 256 64")},
    ),
    (
        _attention,
        "ring must have at least 9 slots for 3 tokens and window 10 with a",
        {"window": 10},
    ),
    (
        _attention,
        "ring must have at least 10 slots for 3 tokens and window 8 without a chunk, got 8",
        {"chunk": False, "start": None},
    ),
    (_attention, r"window must be 1..2147483647, got 0", {"window": 0}),
    (_attention, "window must be .*got 2147483648", {"window": 2**31}),
    (_attention, "chunk and start must be given together", {"chunk": False}),
    (_attention, "chunk and start must be given together", {"start": None}),
    (_attention, "pool must come with n_visible", {"n_visible": None}),
    (_attention, "pool must come with n_visible", {"pool": False}),
    (_attention, "topk_idx with pool", {"pool": False, "n_visible": None}),
    (
        _attention,
        r"frequencies must be half of the 32 rotary channels, got \[15\]",
        {"frequencies": s("15", F32)},
    ),
    (_attention, r"regime must be one of .*got 'auto'", {"regime": "auto"}),
    (_attention, "ring must have a scale with float8_e4m3fn .*got none", {"ring_scale": None}),
    (
        _attention,
        "pool must hold a multiple of 128 entries where there is no kernel, got 100",
        {"q": s("2 3 4 96", F32)}
        | {"pool_nope": s("2 100 64", E4M3), "pool_scale": s("2 100 1", UE8M0)}
        | {"pool_rope": s("2 100 32")},
    ),
    (_cache_write, r"rows and slots must be \[2, 3, 16\]", {"rows": s("2 3 15", E4M3)}),
    (_cache_write, r"rows and slots must be .*\[2, 4\]", {"slots": s("2 4", I32)}),
    (_cache_write, r"rows and slots must be .*\[1, 3\]", {"slots": s("1 3", I32)}),
    (_cache_write, r"rows and slots must be .*got \[1, 3, 16\]", {"rows": s("1 3 16", E4M3)}),
    (_cache_write, "rows must have the structure of cache", {"rows": [s("2 3 16", E4M3)]}),
    (
        _cache_write,
        "rows must have the structure of cache, .*KvRows.* got .*KvRows.*None",
        {"cache": kv("2 8"), "rows": kv("2 3")._replace(scale=None)},
    ),
    (
        _cache_write,
        "cache must hold 1..8 arrays, got 9",
        {"cache": [s("2 8 16", E4M3)] * 9, "rows": [s("2 3 16", E4M3)] * 9},
    ),
    (_cache_write, "cache must hold 1..8 arrays, got 0", {"cache": [], "rows": []}),
    (
        _cache_write,
        r"cache.scale must be \[2, 8, d\] like the store's first array, got \[1, 8, 7\]",
        {"cache": kv("2 8", scale="1 8 7"), "rows": kv("2 3", scale="1 3 7")},
    ),
    (
        _cache_write,
        r"cache.rope must be \[2, 8, d\] like the store's first array, got \[2, 9, 64\]",
        {"cache": kv("2 8", rope="2 9 64"), "rows": kv("2 3")},
    ),
    (
        _cache_write,
        r"rows.scale and slots must be \[2, 3, 7\] .*got \[2, 3, 6\]",
        {"cache": kv("2 8"), "rows": kv("2 3", scale="2 3 6")},
    ),
    (
        _cache_write,
        r"rows.rope and slots must be \[2, 4, 64\] and \[2, 4\] .*got .* and \[2, 3\]",
        {"cache": kv("2 8"), "rows": kv("2 3", rope="2 4 64")},
    ),
    (_query_finish, "q must have at least 32 channels, got 30", {"q": s("2 3 4 30")}),
    (_query_finish, r"positions must be \[2, 3\] .*got \[3, 2\]", {"positions": s("3 2", I32)}),
    (_query_finish, r"rounding must be one of .*got 'float16'", {"rounding": "float16"}),
    (_key_finish, r"weight must be \[96\], got \[95\]", {"weight": s("95")}),
    (_key_finish, r"start must be \[2\], got \[3\]", {"start": s("3", I32)}),
    (_key_finish, r"count must be \[2\], got \[3\]", {"count": s("3", I32)}),
    (
        _key_finish,
        r"kv must have more than 96 channels \(rotary\), got 96",
        {"frequencies": s("48", F32)},
    ),
    (_key_finish, r"ring nope must be \[2, 8, 64\], got", {"ring_nope": s("2 8 63", E4M3)}),
    (_key_finish, r"ring nope must be \[2, 8, 64\], got", {"ring_nope": s("3 8 64", E4M3)}),
    (_key_finish, r"ring rope must be \[2, 8, 32\], got", {"ring_rope": s("2 7 32")}),
    (_key_finish, r"query weight must be \[144\], got \[143\]", {"query": (s("5 144"), s("143"))}),
    (
        _key_finish,
        r"query x must have a multiple of 16 channels, 16..16384, got \[5, 136\]",
        {"query": (s("5 136"), s("136"))},
    ),
    (_key_finish, "ring and count must come together", {"ring": False}),
    (_key_finish, "ring and count must come together", {"count": None}),
    (
        _key_finish,
        "ring must have a scale in form fp8 and in no other, got one in bfloat16",
        {"form": "bfloat16", "ring_nope": s("2 8 64")},
    ),
    (_key_finish, r"form must be one of .*got 'mxfp4'", {"form": "mxfp4"}),
    (_key_finish, r"query_form must be one of .*got 'nvfp4'", {"query_form": "nvfp4"}),
    (_index_query_finish, "q must have at least 32 channels, got 16", {"q": s("2 3 4 16")}),
    (_index_query_finish, "heads must have at least 32 channels", {"heads": s("2 3 4 16")}),
    (_index_query_finish, r"positions must be \[2, 4\] for heads", {"heads": s("2 4 4 96")}),
    (_index_query_finish, "rounding must be one of .*got 'exact'", {"rounding": "exact"}),
    (
        _index_query_finish,
        r"positions must be \[2, 3\] .*got \[2, 4\]",
        {"positions": s("2 4", I32)},
    ),
    (_index_query_finish, r"form must be one of .*got 'fp4'", {"form": "fp4"}),
]
DTYPE: list[tuple[Callable[..., Any], str, dict[str, Any]]] = [
    (_rmsnorm, "x must be bfloat16 or float32, got float16", {"x": s("5 96", F16)}),
    (_rmsnorm, "weight must be .*got float16", {"weight": s("96", F16)}),
    (_rmsnorm_nvfp4, "x must be bfloat16, got float16", {"x": s("5 96", F16)}),
    (_rmsnorm_nvfp4, "x must be bfloat16, got float32", {"x": s("5 96", F32)}),
    (_rmsnorm_nvfp4, "weight must be bfloat16, got float32", {"weight": s("96", F32)}),
    (
        _rmsnorm_nvfp4,
        "global_scale must be float32, got bfloat16",
        {"global_scale": s("", BF16)},
    ),
    (_head_norm, "q must be .*got int32", {"q": s("5 3 64", I32)}),
    (_rope, "x must be .*got float16", {"x": s("2 3 24", F16)}),
    (_rope, "positions must be int32 or int64, got float32", {"positions": s("2 3", F32)}),
    (_mhc_pre, "streams must be .*got float16", {"streams": s("5 4 48", F16)}),
    (_mhc_pre, "fn must be float32, got bfloat16", {"fn": s("24 192")}),
    (_mhc_post, "branch must be .*got float16", {"branch": s("5 48", F16)}),
    (_mhc_post, "post must be float32, got bfloat16", {"post": s("5 4")}),
    (_mhc_head, "base must be float32, got bfloat16", {"base": s("4")}),
    (_mhc, "streams must be bfloat16, got float32", {"streams": s("5 4 256", F32)}),
    (_mhc, "branch must be bfloat16, got float32", {"branch": s("5 256", F32)}),
    (_mhc, "post must be float32, got bfloat16", {"post": s("5 4")}),
    (_mhc, "fn must be float32, got bfloat16", {"fn": s("24 1024")}),
    (_mhc, "norm must be bfloat16, got float32", {"norm": s("256", F32)}),
    (_mhc, "global_scale must be float32, got bfloat16", {"global_scale": s("")}),
    (_hadamard, "x must be .*got float8_e4m3fn", {"x": s("5 128", E4M3)}),
    (_router, "x must be .*got float16", {"x": s("5 96", F16)}),
    (_router, "bias must be float32, got bfloat16", {"bias": s("32")}),
    (
        _router,
        "expert_idx must be int32 or int64, got float32",
        {"bias": None, "expert_idx": s("5 6", F32)},
    ),
    (
        _router,
        "tokens must be int32 or int64, got float32",
        {"bias": None, "expert_idx": s("9 6", I32), "tokens": s("5", F32)},
    ),
    (_dense_linear, "weight must be .*got float8_e4m3fn", {"weight": s("40 96", E4M3)}),
    (_dense_linear, "x must be .*got float16", {"x": s("5 96", F16)}),
    (_dense_linear, "dtype must be .*got float16", {"dtype": F16}),
    (
        _dense_linears,
        r"weights\[0\] must be bfloat16 or float32, got float8_e4m3fn",
        {"weights": [s("40 96", E4M3), s("24 96")]},
    ),
    (
        _dense_linears,
        r"weights\[1\] must be bfloat16, got float32",
        {"weights": [s("40 96"), s("24 96", F32)]},
    ),
    (_dense_linears, "x must be .*got float16", {"x": s("5 96", F16)}),
    (_dense_linears, "dtype must be .*got float16", {"dtype": F16}),
    (_dense_linears, "dtype must be .*got float16", {"dtype": (F32, F16)}),
    (_fp8_linears, "dtype must be .*got float16", {"dtype": (F16, F32)}),
    (
        _fp8_linears,
        r"scales\[1\] must be .*got float32",
        {"scales": [s("2 2", UE8M0), s("1 2", F32)]},
    ),
    (_fp8_linear, "x must be .*got float16", {"x": s("5 192", F16)}),
    (_fp8_linear, "x that is quantised must not have up", coded("5 256", "5 2", **gated())),
    (_fp8_linear, "x with up must be bfloat16, got float32", gated(x=s("5 192", F32))),
    (_fp8_linear, "up must be bfloat16, got float32", gated(up=s("5 192", F32))),
    (_fp8_linear, "x must be bfloat16 or float32, got float8_e4m3fn", {"x": s("5 192", E4M3)}),
    (
        _fp8_linear,
        "x must be float8_e4m3fn, got uint8",
        coded("5 256", "5 2") | {"x": Fp8(s("5 256", U8), s("5 2", UE8M0))},
    ),
    (
        _fp8_linear,
        "scale of x must be float8_e8m0fnu, got float32",
        coded("5 256", "5 2") | {"x": Fp8(s("5 256", E4M3), s("5 2", F32))},
    ),
    (_fp8_linear, "dtype must be bfloat16 or float32, got float8_e4m3fn", {"dtype": E4M3}),
    (_fp8_linear, "weight must be float8_e4m3fn, got uint8", {"weight": s("160 192", U8)}),
    (_fp8_linear, "scale must be float8_e8m0fnu, got float32", {"scale": s("2 2", F32)}),
    (_mxfp4_linear, "weight must be float4_e2m1fn, got uint8", {"weight": s("40 96", U8)}),
    (_mxfp4_linear, "scale must be float8_e8m0fnu, got float8_e4m3fn", {"scale": s("40 6", E4M3)}),
    (_nvfp4_linear, "weight must be float4_e2m1fn, got uint8", {"weight": s("40 96", U8)}),
    (
        _nvfp4_linear,
        "block_scale must be float8_e4m3fn, got float8_e8m0fnu",
        {"block_scale": s("40 12", UE8M0)},
    ),
    (
        _nvfp4_linear,
        "global_scale must be float32, got bfloat16",
        {"global_scale": s("", BF16)},
    ),
    (_nvfp4_linear, "act_scale must be float32, got bfloat16", {"act_scale": s("", BF16)}),
    (_nvfp4_linear, "dtype must be .*got int32", {"dtype": I32}),
    (_nvfp4_linear, "x with up must be bfloat16, got float32", gated(x=s("5 192", F32))),
    (_nvfp4_linear, "up must be bfloat16, got float32", gated(up=s("5 192", F32))),
    (
        _nvfp4_linears,
        r"global_scales\[0\] must be float32, got bfloat16",
        {"global_scales": [s("", BF16), s("", F32)]},
    ),
    (_nvfp4_linears, "dtype must be .*got float16", {"dtype": (F16, F32)}),
    (_mxfp4_linear, "dtype must be .*got float16", {"dtype": F16}),
    (_swiglu, "up must be .*got float16", {"up": s("5 48", F16)}),
    (_moe, "x must be .*got float16", {"x": s("5 96", F16)}),
    (_moe, "expert_idx must be int32 or int64, got float32", {"expert_idx": s("5 3", F32)}),
    (_moe, "expert_weight must be float32, got bfloat16", {"expert_weight": s("5 3")}),
    (_moe, "valid must be bool, got int32", {"valid": s("5", I32)}),
    (_moe, "shared must be bfloat16, got float32", {"shared": s("5 96", F32)}),
    (_moe, "dtype must be .*got float16", {"dtype": F16}),
    (_moe, "up_act_scale must be float32, got bfloat16", W4A4 | {"up_act_scale": s("4")}),
    (_moe, "down_act_scale must be float32, got bfloat16", W4A4 | {"down_act_scale": s("4")}),
    (_moe, "w1 weight must be float4_e2m1fn, got uint8", {"w1_weight": s("4 64 48", U8)}),
    (_moe, "w2 scale must be float8_e8m0fnu, got uint8", {"w2_scale": s("4 96 2", U8)}),
    (_compressor, "gate must be float32, got bfloat16", {"gate": s("2 9 192")}),
    (_compressor, "kv_state must be float32, got bfloat16", {"kv_state": s("2 8 192")}),
    (_compressor, "norm must be bfloat16 or float32, got float16", {"norm": s("96", F16)}),
    (_compressor, "frequencies must be float32, got bfloat16", {"frequencies": s("16")}),
    (
        _compressor,
        "pool codes must be float8_e4m3fn or .*got uint8",
        {"pool_nope": s("2 10 64", U8)},
    ),
    (_compressor, "pool rope must be bfloat16, got float32", {"pool_rope": s("2 10 32", F32)}),
    (_compressor, "pool scale must be float8_e8m0fnu, got uint8", {"pool_scale": s("2 10 1", U8)}),
    (_compressor, "dtype must be bfloat16 or float32, got float16", {"dtype": F16}),
    (_compressor, "count must be int32 or int64, got float32", {"count": s("2", F32)}),
    (_index_topk, "q must be float4_e2m1fn or .*got uint8", {"q": s("2 3 4 32", U8)}),
    (_index_topk, "keys must be float4_e2m1fn, got float8_e4m3fn", {"key": s("2 100 32", E4M3)}),
    (_index_topk, "q scale must be float8_e8m0fnu, got uint8", {"q_scale": s("2 3 4 1", U8)}),
    (_index_topk, "weight must be .*got float16", {"weight": s("2 3 4", F16)}),
    (_index_topk, "n_visible must be int32 or int64, got float32", {"n_visible": s("2 3", F32)}),
    (_attention, "q must be bfloat16 or float32, got float16", {"q": s("2 3 4 96", F16)}),
    (_attention, "ring nope must be float8_e4m3fn or .*got uint8", {"ring_nope": s("2 8 64", U8)}),
    (_attention, "ring scale must be float8_e8m0fnu, got uint8", {"ring_scale": s("2 8 1", U8)}),
    (_attention, "ring rope must be bfloat16, got float32", {"ring_rope": s("2 8 32", F32)}),
    (_attention, "pool nope must be float8_e4m3fn, got bfloat16", {"pool_nope": s("2 256 64")}),
    (_attention, "positions must be int32 or int64, got float32", {"positions": s("2 3", F32)}),
    (_attention, "sink must be float32, got bfloat16", {"sink": s("4")}),
    (_attention, "start must be .*got float32", {"start": s("2", F32)}),
    (_attention, "n_visible must be .*got bool", {"n_visible": s("2 3", jnp.bool_)}),
    (_attention, "topk_idx must be .*got float32", {"topk_idx": s("2 3 9", F32)}),
    (_attention, "frequencies must be float32, got bfloat16", {"frequencies": s("16")}),
    (_cache_write, "rows must be float8_e4m3fn.*got bfloat16", {"rows": s("2 3 16")}),
    (_cache_write, "slots must be int32 or int64, got float32", {"slots": s("2 3", F32)}),
    (_cache_write, "slots must be int32 or int64, got bool", {"slots": s("2 3", jnp.bool_)}),
    (
        _cache_write,
        "cache must be bfloat16 or .* or float4_e2m1fn, got uint8",
        {"cache": s("2 8 16", U8), "rows": s("2 3 16", U8)},
    ),
    (
        _cache_write,
        "rows.scale must be float8_e8m0fnu like cache.scale, got uint8",
        {"cache": kv("2 8"), "rows": kv("2 3")._replace(scale=s("2 3 7", U8))},
    ),
    (_rmsnorm_fp8, "x must be bfloat16, got float32", {"x": s("5 96", F32)}),
    (_rmsnorm_fp8, "weight must be bfloat16, got float16", {"weight": s("96", F16)}),
    (_query_finish, "q must be bfloat16 or float32, got float16", {"q": s("2 3 4 96", F16)}),
    (_query_finish, "positions must be .*got float32", {"positions": s("2 3", F32)}),
    (_query_finish, "frequencies must be float32, got bfloat16", {"frequencies": s("16")}),
    (_key_finish, "query x must be bfloat16, got float32", {"query": (s("5 144", F32), s("144"))}),
    (_key_finish, "kv must be bfloat16 or float32, got float16", {"kv": s("2 3 96", F16)}),
    (_key_finish, "weight must be bfloat16 or float32, got float16", {"weight": s("96", F16)}),
    (_key_finish, "start must be int32 or int64, got float32", {"start": s("2", F32)}),
    (_key_finish, "count must be int32 or int64, got bool", {"count": s("2", jnp.bool_)}),
    (_key_finish, "frequencies must be float32, got bfloat16", {"frequencies": s("16")}),
    (_key_finish, "ring nope must be float8_e4m3fn, got uint8", {"ring_nope": s("2 8 64", U8)}),
    (_key_finish, "ring scale must be float8_e8m0fnu, got", {"ring_scale": s("2 8 1", U8)}),
    (_key_finish, "ring rope must be bfloat16, got float32", {"ring_rope": s("2 8 32", F32)}),
    (_index_query_finish, "q must be bfloat16 or float32, got", {"q": s("2 3 4 64", F16)}),
    (_index_query_finish, "positions must be .*got float32", {"positions": s("2 3", F32)}),
    (_index_query_finish, "frequencies must be float32, got", {"frequencies": s("16")}),
]
GROUPS: list[tuple[Callable[..., Any], str, dict[str, Any]]] = [
    (
        _index_topk,
        r"q must have a multiple of 32 channels, got \[2, 3, 4, 48\]",
        {"q": s("2 3 4 48", E2M1), "key": s("2 100 48", E2M1)},
    ),
    (
        _mxfp4_linear,
        "scale must be .*33 / 32",
        {"x": s("5 33"), "weight": s("40 33", E2M1), "scale": s("40 2", UE8M0)},
    ),
    (
        _mxfp4_linear,
        "scale must be .*48 / 32",
        {"x": s("5 48"), "weight": s("40 48", E2M1), "scale": s("40 2", UE8M0)},
    ),
    (
        _nvfp4_linear,
        "block_scale must be .*17 / 16",
        {"x": s("5 17"), "weight": s("40 17", E2M1), "block_scale": s("40 2", E4M3)},
    ),
    (
        _nvfp4_linear,
        "block_scale must be .*24 / 16",
        {"x": s("5 24"), "weight": s("40 24", E2M1), "block_scale": s("40 2", E4M3)},
    ),
    (
        _moe,
        "w1 scale must be .*in groups of 32",
        {"w1_weight": s("4 64 80", E2M1), "w1_scale": s("4 64 3", UE8M0)},
    ),
    (
        _moe,
        "w2 scale must be .*in groups of 32",
        {"w2_weight": s("4 96 48", E2M1), "w2_scale": s("4 96 2", UE8M0)},
    ),
    (_rmsnorm_fp8, "multiple of 16 .*got .*24", {"x": s("5 24"), "weight": s("24")}),
    (_rmsnorm_nvfp4, "multiple of 16 .*got .*24", {"x": s("5 24"), "weight": s("24")}),
    (_rmsnorm_nvfp4, "multiple of 16 .*got .*15", {"x": s("5 15"), "weight": s("15")}),
    (
        _cache_write,
        "even last axis",
        {"cache": s("2 8 15", E2M1), "rows": s("2 3 15", E2M1)},
    ),
    (
        _cache_write,
        r"cache\.key must have an even last axis .*got \[2, 8, 31\]",
        {
            "cache": IndexRows(s("2 8 31", E2M1), s("2 8 1", UE8M0)),
            "rows": IndexRows(s("2 3 31", E2M1), s("2 3 1", UE8M0)),
        },
    ),
    (
        _compressor,
        "pool must have a power of two of channels, at least 32, got 96",
        {"index": IndexRows(s("2 10 96", E2M1), s("2 10 3", UE8M0))},
    ),
    (
        _index_query_finish,
        "q must have a power of two of channels in form mxfp4, at least 32, got 96",
        {"q": s("2 3 4 96")},
    ),
    (
        _index_query_finish,
        "q must have a power of two of channels in form fp8, got 48",
        {"q": s("2 3 4 48"), "form": "fp8"},
    ),
]
SCALES: list[tuple[Callable[..., Any], str, dict[str, Any]]] = [
    (_fp8_linear, r"scale must be \[2, 2\] .*got \[2, 3\]", {"scale": s("2 3", UE8M0)}),
    (_fp8_linear, r"scale must be \[2, 2\] .*got \[1, 2\]", {"scale": s("1 2", UE8M0)}),
    (_fp8_linear, r"scale of x must be \[5, 2\] .*got \[5, 3\]", coded("5 256", "5 3")),
    (_fp8_linear, r"scale of x must be \[5, 2\] .*got \[4, 2\]", coded("5 256", "4 2")),
    (_fp8_linear, r"scale of x must be \[5, 2, 2\] .*\[5, 4\]", coded("5 2 256", "5 4")),
    (
        _fp8_linears,
        r"scales\[1\] must be \[1, 2\] for weights\[1\] \[24, 192\], got \[2, 2\]",
        {"scales": [s("2 2", UE8M0)] * 2},
    ),
    (_mxfp4_linear, r"scale must be .*got \[40, 5\]", {"scale": s("40 5", UE8M0)}),
    (_mxfp4_linear, r"scale must be .*got \[39, 6\]", {"scale": s("39 6", UE8M0)}),
    (_nvfp4_linear, r"block_scale must be .*got \[40, 6\]", {"block_scale": s("40 6", E4M3)}),
    (
        _nvfp4_linears,
        r"block_scales\[1\] must be \[24, 192 / 16\] for weights\[1\] .*got \[40, 12\]",
        {"block_scales": [s("40 12", E4M3)] * 2},
    ),
    (_moe, r"w3 scale must be \[4, 64, 3\] .*got \[4, 64, 4\]", {"w3_scale": s("4 64 4", UE8M0)}),
    (
        _index_topk,
        r"keys scale must be \[2, 100, 1\] .*\[2, 100, 2\]",
        {"scale": s("2 100 2", UE8M0)},
    ),
    (_index_topk, r"q scale must be \[2, 3, 4, 1\] .*got", {"q_scale": s("2 3 4 2", UE8M0)}),
    (_compressor, r"pool scale must be \[2, 10, 1\], got", {"pool_scale": s("2 10 2", UE8M0)}),
    (_attention, r"ring scale must be .*got \[2, 8, 2\]", {"ring_scale": s("2 8 2", UE8M0)}),
    (_attention, r"pool scale must be .*got \[2, 255, 1\]", {"pool_scale": s("2 255 1", UE8M0)}),
    (_key_finish, r"ring scale must be \[2, 8, 1\], got", {"ring_scale": s("2 8 2", UE8M0)}),
]
SPECIALISED: list[tuple[Callable[..., Any], str, dict[str, Any]]] = [
    (_rmsnorm_fp8, r"16..16384, got \[5, 16400\]", {"x": s("5 16400"), "weight": s("16400")}),
    (_rmsnorm_fp8, r"16..16384, got \[5, 0\]", {"x": s("5 0"), "weight": s("0")}),
    (_mhc, r"multiple of 128 up to 16384, got \[5, 2, 256\]", {"streams": s("5 2 256")}),
    (_mhc, r"multiple of 128 up to 16384, got \[5, 4, 192\]", {"streams": s("5 4 192")}),
    (_mhc, r"multiple of 128 up to 16384, got \[5, 4, 0\]", {"streams": s("5 4 0")}),
    (_mhc, r"multiple of 128 up to 16384, got \[5, 4, 16512\]", {"streams": s("5 4 16512")}),
    (_rmsnorm_nvfp4, r"16..16384, got \[5, 16400\]", {"x": s("5 16400"), "weight": s("16400")}),
    (_rmsnorm_nvfp4, r"16..16384, got \[5, 0\]", {"x": s("5 0"), "weight": s("0")}),
    (
        _router,
        r"weight must have 1..1024 experts, got \[1025, 96\]",
        {"weight": s("1025 96"), "bias": s("1025", F32)},
    ),
    (
        _router,
        r"weight must have 1..1024 experts, got \[0, 96\]",
        {"weight": s("0 96"), "bias": s("0", F32)},
    ),
]


def _params(row: str, table: list[tuple[Callable[..., Any], str, dict[str, Any]]]) -> list[Any]:
    names = ["-".join(broken).replace("_", "-") for _, _, broken in table]
    return [
        pytest.param(call, rule, broken, id=f"{row}-{call.__name__[1:]}-{name}-{at}")
        for at, ((call, rule, broken), name) in enumerate(zip(table, names, strict=True))
    ]


@pytest.mark.parametrize(("call", "operand", "broken"), _params("A1-rank", RANK))
def test_wrong_rank(call: Callable[..., Any], operand: str, broken: dict[str, Any]) -> None:
    """A1: the op and the operand are named, with the rule and the shape."""
    with pytest.raises(ValueError, match=rf"^{call.__name__[1:]}: .*{operand}.* must .*got .*\["):
        call(**broken)


@pytest.mark.parametrize(
    ("call", "rule", "broken"),
    [
        *_params("A2-axis-disagrees", AXIS),
        *_params("A4-group", GROUPS),
        *_params("A5-scale-shape", SCALES),
        *_params("A8-specialised", SPECIALISED),
    ],
)
def test_shapes_disagree(call: Callable[..., Any], rule: str, broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{call.__name__[1:]}: .*{rule}"):
        call(**broken)


@pytest.mark.parametrize(("call", "rule", "broken"), _params("A3-dtype", DTYPE))
def test_wrong_dtype(call: Callable[..., Any], rule: str, broken: dict[str, Any]) -> None:
    """A3: the accepted set is named."""
    with pytest.raises(TypeError, match=rf"^{call.__name__[1:]}: .*{rule}"):
        call(**broken)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("regime", "any"),
        ("regime", 1),
        ("wq_a", "fp4"),
        ("experts_power_of_two", "True"),
        ("experts_power_of_two", 1),
    ],
)
def test_precision_of_no_known_format(field: str, value: Any) -> None:
    """A2: what no op could serve is refused where it is named."""
    with pytest.raises(ValueError, match=rf"^Precision: {field} must be one of .*got {value!r}"):
        Precision(**{field: value})


def test_precision_of_other_experts_has_no_powers_of_two() -> None:
    """A2: MXFP4's scales always are, and no other format has an op that asks."""
    rule = "^Precision: experts_power_of_two is of nvfp4_w4a8 alone, got experts 'nvfp4_w4a4' and "
    with pytest.raises(ValueError, match=rule + "mtp_experts 'mxfp4_w4a8'"):
        Precision(experts="nvfp4_w4a4", experts_power_of_two=True)
    for field in ("experts", "mtp_experts"):
        Precision(**{field: "nvfp4_w4a8", "experts_power_of_two": True})


NAMES = list(CASES)
# The same program as under jit, compiled once more: the ops with the most in them.
AHEAD_OF_TIME = (
    "mhc-branch",
    "mhc_pre",
    "moe-mxfp4_w4a8",
    "attention-topk",
    "rmsnorm_nvfp4-dynamic",
    "dense_linear-several",
    "fp8_linear-several",
    "nvfp4_linear-w4a4",
    "nvfp4_linear-several",
    "cache_write-store",
    "key_finish-ring",
)


def run(case: OpCase, count: int = 3) -> Any:
    return case.fn(*case.rows(0, count))


@pytest.mark.parametrize("name", NAMES)
def test_every_way_to_run(name: str) -> None:
    """A21, A11: eager, jit twice, ahead of time, in a scan, with relayouted operands."""
    case = CASES[name]()
    rows, eager = case.rows(0, 3), run(case)
    jitted = jax.jit(case.fn)
    assert_same_tree(jitted(*rows), eager, "jit")
    assert_same_tree(jitted(*rows), eager, "jit again")
    if name in AHEAD_OF_TIME:
        assert_same_tree(jitted.lower(*rows).compile()(*rows), eager, "ahead of time")

    def relayout(*flipped: jax.Array) -> Any:
        """The op between transposes and arithmetic, and in a scan over two equal steps."""
        rows = tuple(jnp.swapaxes(x, 0, -1) if x.ndim > 1 else x for x in flipped)
        twice = tuple(jnp.stack([x, x]) for x in rows)
        _, scanned = jax.lax.scan(lambda c, x: (c, case.fn(*x)), 0, twice)
        return case.fn(*rows), scanned

    flipped = tuple(jnp.swapaxes(x, 0, -1) if x.ndim > 1 else x for x in rows)
    direct, scanned = jax.jit(relayout)(*flipped)
    assert_same_tree(direct, eager, "transposed")
    for step in (0, 1):
        assert_same_tree(row_of(scanned, step), eager, f"scan step {step}")


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_jax(name: str) -> None:
    """E9: 64-bit types, strict promotion and NaN checks at once; same bits, no error of ours."""
    case = CASES[name]()
    eager = run(case)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        assert_same_tree(jax.jit(lambda *rows: case.fn(*rows))(*case.rows(0, 3)), eager)


@pytest.mark.parametrize(
    "name",
    [
        "rmsnorm",
        "rmsnorm_nvfp4-dynamic",
        "rmsnorm_nvfp4-static",
        "rope",
        "mhc_pre",
        "mhc-branch",
        "router-score",
        "dense_linear-bfloat16",
        "dense_linear-groups",
        "dense_linear-several",
        "fp8_linear-w8a16-groups",
        "fp8_linear-quantised",
        "fp8_linear-gated",
        "fp8_linear-several",
        "mxfp4_linear-w4a8",
        "nvfp4_linear-w4a4-static",
        "nvfp4_linear-gated",
        "nvfp4_linear-several",
        "moe-mxfp4_w4a8",
        "moe-nvfp4_w4a16-shared",
        "compressor-4",
        "index_topk-mxfp4",
        "attention-topk",
        "query_finish-steps",
        "key_finish-ring",
        "index_query_finish-mxfp4",
        "cache_write",
        "cache_write-store",
    ],
)
def test_vmap(name: str) -> None:
    """A19: an op under `jax.vmap` gives the rows of its plain calls."""
    case = CASES[name]()
    plain = [case.fn(*case.rows(i, i + 2)) for i in (0, 2)]
    stacked = [jnp.stack([x[0:2], x[2:4]]) for x in case.arguments]
    mapped = jax.jit(jax.vmap(case.fn))(*stacked)
    for i in (0, 1):
        for got, want in zip(
            jax.tree.leaves(row_of(mapped, i)), jax.tree.leaves(plain[i]), strict=True
        ):
            # Tiles of another shape: an FP32 sum may differ in its last bit, then a rounding.
            np.testing.assert_allclose(f64(got), f64(want), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", NAMES)
def test_grad(name: str) -> None:
    """A20: inference only. Loops of unknown length have no reverse mode, foreign calls no
    derivative, and JAX says so.

    Known exceptions: E4M3 and E2M1 codes have no derivative, so that jnp ops whose only path is
    through them give zeros.
    """
    case = CASES[name]()
    rows = case.rows(0, 3)

    def loss(x: jax.Array) -> jax.Array:
        return sum(jnp.sum(y.astype(F32)) for y in jax.tree.leaves(case.fn(x, *rows[1:])))

    foreign = "ffi_call[" in str(jax.make_jaxpr(case.fn)(*rows))
    quiet = "w4a8" in name or "w8a8" in name
    if not foreign and (quiet or name == "nvfp4_linear-w4a4"):
        gradient = np.asarray(jax.grad(loss)(rows[0]).astype(F32))
        assert gradient.any() == (not quiet)
        return
    message = "cannot be differentiated" if foreign else "everse-mode differentiation does not work"
    with pytest.raises(ValueError, match=message):
        jax.grad(loss)(rows[0])
