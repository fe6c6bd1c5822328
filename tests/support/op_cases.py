"""Every op as a function of independent rows, for what all of them promise alike.

`OpCase.fn` treats the leading axis of all its arguments row by row (a row of an attention op is
one sequence); weights are closed over. `OpCase.rows(n)` are the first ``n`` of fixed random rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
from dsv4_jax.quant import fp8, mxfp4, nvfp4
from dsv4_jax.quant.kv import IndexRows, KvRows, index_quant, kv_quant

__all__ = ["CASES", "MAX_ROWS", "OpCase", "expert_leaves", "normal"]

MAX_ROWS = 17
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class OpCase:
    """One op on independent rows; `poisoned` is the argument that takes a NaN row."""

    fn: Callable[..., Any]
    arguments: tuple[jax.Array, ...]
    poisoned: int = 0

    def rows(self, start: int, stop: int) -> tuple[jax.Array, ...]:
        """Rows ``start .. stop - 1`` of every argument, cut on the host: no program per size."""
        return tuple(jax.device_put(np.asarray(x)[start:stop]) for x in self.arguments)


def normal(seed: int, *shape: int, scale: float = 1.0, dtype: Any = jnp.float32) -> jax.Array:
    """Standard normal values, a function of the seed alone."""
    x = np.random.default_rng(seed).standard_normal(shape) * scale
    # On the host, and put: `astype` and `jnp.asarray` of JAX compile a program for every shape.
    return jax.device_put(x.astype(np.float32).astype(dtype))


def expert_leaves(seed: int, shape: tuple[int, int, int], form: str) -> dict[str, jax.Array]:
    """A stacked weight ``[e, out, in]`` in a storage format, its leaves named as in the model."""
    return _leaves(normal(seed, *shape, scale=shape[-1] ** -0.5), form)


@functools.partial(jax.jit, static_argnames="form")
def _leaves(w: jax.Array, form: str) -> dict[str, jax.Array]:
    if form == "mxfp4":
        return dict(zip(("weight", "scale"), mxfp4.quantize(w), strict=True))
    if form == "fp8":
        return dict(zip(("weight", "scale"), fp8.quantize_weight(w), strict=True))
    if form == "nvfp4":
        scale = nvfp4.token_global_scale(w.reshape(w.shape[0], -1))
        q = nvfp4.quantize(w, scale[:, None])
        return {"weight": q.code, "block_scale": q.block_scale, "global_scale": scale}
    return {"weight": w.astype(jnp.dtype(form))}


def _rmsnorm() -> OpCase:
    weight = normal(1, 96, dtype=jnp.bfloat16)
    return OpCase(lambda x: rmsnorm(x, weight, EPS), (normal(0, MAX_ROWS, 96, dtype=jnp.bfloat16),))


def _rmsnorm_nvfp4(static: bool) -> OpCase:
    weight, scale = normal(1, 96, dtype=jnp.bfloat16), jnp.float32(0.0123) if static else None
    x = normal(0, MAX_ROWS, 96, dtype=jnp.bfloat16)
    return OpCase(lambda x: rmsnorm_nvfp4(x, weight, EPS, scale), (x,))


def _rmsnorm_fp8() -> OpCase:
    weight = normal(1, 144, dtype=jnp.bfloat16)
    x = normal(0, MAX_ROWS, 144, dtype=jnp.bfloat16)
    return OpCase(lambda x: rmsnorm_fp8(x, weight, EPS), (x,))


def _head_norm(rounding: Any) -> OpCase:
    x = normal(0, MAX_ROWS, 3, 64, dtype=jnp.bfloat16)
    return OpCase(lambda x: head_norm(x, EPS, rounding=rounding), (x,))


def _rope() -> OpCase:
    frequencies = (10000.0 ** -(np.arange(0, 16, 2) / 16)).astype(np.float32)
    positions = jnp.asarray(np.random.default_rng(1).integers(0, 1 << 20, (MAX_ROWS, 2)), jnp.int32)
    x = normal(0, MAX_ROWS, 2, 3, 24, dtype=jnp.bfloat16)
    return OpCase(lambda x, p: rope(x, p, frequencies), (x, positions))


def _query_finish(rounding: Any, dtype: Any = jnp.bfloat16) -> OpCase:
    frequencies = (10000.0 ** -(np.arange(8) / 8)).astype(np.float32)
    x = normal(0, MAX_ROWS, 2, 3, 64, dtype=dtype)
    return OpCase(
        lambda x, p: query_finish(x, p, frequencies, EPS, rounding=rounding), (x, _positions())
    )


def _index_query_finish(form: Any, dtype: Any = jnp.bfloat16, heads: bool = False) -> OpCase:
    frequencies = (10000.0 ** -(np.arange(8) / 8)).astype(np.float32)
    x = normal(0, MAX_ROWS, 2, 3, 64, dtype=dtype)
    if heads:
        return OpCase(
            lambda x, p, h: index_query_finish(x, p, frequencies, form=form, heads=h, eps=EPS),
            (x, _positions(), normal(1, MAX_ROWS, 2, 2, 96, dtype=dtype)),
        )
    return OpCase(lambda x, p: index_query_finish(x, p, frequencies, form=form), (x, _positions()))


def _positions() -> jax.Array:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(0, 1 << 20, (MAX_ROWS, 2)), jnp.int32)


def _key_finish_query(form: Any = "fp8") -> OpCase:
    """A key and low-rank queries of each token."""
    frequencies = (10000.0 ** -(np.arange(16) / 16)).astype(np.float32)
    weights = [(1 + normal(1, d, scale=0.2)).astype(jnp.bfloat16) for d in (96, 144)]
    kv = normal(0, MAX_ROWS, 1, 96, dtype=jnp.bfloat16)
    start = jnp.asarray(np.random.default_rng(2).integers(0, 1 << 20, MAX_ROWS), jnp.int32)

    def fn(kv: jax.Array, start: jax.Array, x: jax.Array) -> Any:
        query = QueryNorm(x, weights[1])
        settings: dict[str, Any] = {"form": "fp8", "query": query, "query_form": form}
        done = key_finish(kv, weights[0], start, frequencies, EPS, **settings)
        return done.rows, done.query

    return OpCase(fn, (kv, start, normal(3, MAX_ROWS, 144, dtype=jnp.bfloat16)))


def _key_finish(ring: bool, form: Any = "fp8") -> OpCase:
    """Three tokens a row, into rings of 8 slots or none."""
    frequencies = (10000.0 ** -(np.arange(16) / 16)).astype(np.float32)
    dtype = jnp.float32 if form == "float32" else jnp.bfloat16
    weight = (1 + normal(1, 96, scale=0.2)).astype(dtype)
    rng = np.random.default_rng(2)
    start = jnp.asarray(rng.integers(0, 1 << 20, MAX_ROWS), jnp.int32)
    kv = normal(0, MAX_ROWS, 3, 96, dtype=dtype)
    settings: dict[str, Any] = {"form": form}
    if not ring:
        return OpCase(
            lambda kv, start: key_finish(kv, weight, start, frequencies, EPS, **settings).rows,
            (kv, start),
        )
    count = jnp.asarray(rng.integers(0, 4, MAX_ROWS), jnp.int32)
    old = jax.jit(lambda x: kv_quant(x, 32, form))(normal(3, MAX_ROWS, 8, 96))
    parts, structure = jax.tree.flatten(old)

    def fn(kv: jax.Array, start: jax.Array, count: jax.Array, *parts: jax.Array) -> Any:
        ring = jax.tree.unflatten(structure, parts)
        return key_finish(kv, weight, start, frequencies, EPS, **settings, ring=ring, count=count)

    return OpCase(fn, (kv, start, count, *parts))


def _mhc_pre() -> OpCase:
    fn, base = normal(1, 24, 4 * 48, scale=0.2), normal(2, 24)
    scale = jnp.array([0.7, 1.1, 0.9], jnp.float32)
    return OpCase(
        lambda s: mhc_pre(s, fn, base, scale, iters=20, hc_eps=EPS, rms_eps=EPS),
        (normal(0, MAX_ROWS, 4, 48, dtype=jnp.bfloat16),),
    )


def _mhc_post() -> OpCase:
    rows = (
        normal(0, MAX_ROWS, 48, dtype=jnp.bfloat16),
        normal(1, MAX_ROWS, 4, 48, dtype=jnp.bfloat16),
        normal(2, MAX_ROWS, 4),
        normal(3, MAX_ROWS, 4, 4),
    )
    return OpCase(mhc_post, rows)


def _mhc_head() -> OpCase:
    fn, base, scale = normal(1, 4, 4 * 48, scale=0.2), normal(2, 4), normal(3, 1)
    return OpCase(
        lambda s: mhc_head(s, fn, base, scale, hc_eps=EPS, rms_eps=EPS),
        (normal(0, MAX_ROWS, 4, 48, dtype=jnp.bfloat16),),
    )


def _mhc(mixes: int) -> OpCase:
    d = 256
    read = Read(
        normal(4, mixes, 4 * d, scale=0.1),
        normal(5, mixes),
        jnp.array([0.7, 1.1, 0.9], jnp.float32)[: 3 if mixes == 24 else 1],
        normal(6, d, dtype=jnp.bfloat16),
    )
    rows = (
        normal(0, MAX_ROWS, 4, d, dtype=jnp.bfloat16),
        normal(1, MAX_ROWS, d, dtype=jnp.bfloat16),
        normal(2, MAX_ROWS, 4),
        normal(3, MAX_ROWS, 4, 4),
    )
    forms = ("bfloat16", "nvfp4", "fp8") if mixes == 24 else ("bfloat16",)

    def fn(streams: jax.Array, *write: jax.Array) -> Any:
        eps = {"hc_eps": EPS, "rms_eps": EPS}
        return mhc(streams, Write(*write), read, iters=20, **eps, forms=forms)

    return OpCase(fn, rows)


def _mhc_write() -> OpCase:
    def fn(streams: jax.Array, *write: jax.Array) -> jax.Array:
        return mhc(streams, Write(*write), None, iters=1, hc_eps=EPS, rms_eps=EPS).streams

    return OpCase(fn, _mhc(24).arguments)


def _hadamard() -> OpCase:
    return OpCase(hadamard, (normal(0, MAX_ROWS, 128, dtype=jnp.bfloat16),))


def _router(hashed: bool) -> OpCase:
    weight, bias = normal(1, 32, 96, scale=0.1, dtype=jnp.bfloat16), normal(2, 32, scale=0.1)
    x = normal(0, MAX_ROWS, 96, dtype=jnp.bfloat16)
    settings: dict[str, Any] = {"k": 6, "scale": 1.5}
    if not hashed:
        return OpCase(lambda x: router(x, weight, bias, None, **settings), (x,))
    rng = np.random.default_rng(3)
    idx = jnp.asarray([rng.permutation(32)[:6] for _ in range(MAX_ROWS)], jnp.int32)
    return OpCase(lambda x, idx: router(x, weight, None, idx, **settings), (x, idx))


def _router_table() -> OpCase:
    """Ids by token id, some outside of the table."""
    rng = np.random.default_rng(3)
    weight = normal(1, 32, 96, scale=0.1, dtype=jnp.bfloat16)
    table = jnp.asarray([rng.permutation(32)[:6] for _ in range(9)], jnp.int32)
    tokens = jnp.asarray(rng.integers(-2, 12, MAX_ROWS), jnp.int32)

    def fn(x: jax.Array, tokens: jax.Array) -> Any:
        return router(x, weight, None, table, k=6, scale=1.5, tokens=tokens)

    return OpCase(fn, (normal(0, MAX_ROWS, 96, dtype=jnp.bfloat16), tokens))


def _dense_linear(stored: Any, groups: int = 0, **settings: Any) -> OpCase:
    weight = normal(1, 40, 96, dtype=stored)
    x = _linear_x(96, groups, stored)
    return OpCase(lambda x: dense_linear(x, weight, **settings), (x,))


def _dense_linears() -> OpCase:
    weights = [normal(i, n, 96, dtype=jnp.bfloat16) for i, n in enumerate((40, 5, 24), 1)]
    dtype = jnp.float32, jnp.bfloat16, jnp.float32
    return OpCase(lambda x: dense_linears(x, weights, dtype=dtype), (_linear_x(96, 0),))


def _linear_x(k: int, groups: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    shape = (MAX_ROWS, groups, k) if groups else (MAX_ROWS, k)
    return normal(0, *shape, dtype=dtype)


def _fp8_linear(groups: int = 0, **settings: Any) -> OpCase:
    code, scale = jax.jit(fp8.quantize_weight)(normal(1, 160, 192))
    return OpCase(lambda x: fp8_linear(x, code, scale, **settings), (_linear_x(192, groups),))


def _fp8_linear_quantised() -> OpCase:
    code, scale = jax.jit(fp8.quantize_weight)(normal(1, 160, 256))
    ones = jnp.ones(256, jnp.bfloat16)
    return OpCase(
        lambda x: fp8_linear(rmsnorm_fp8(x, ones, EPS), code, scale), (_linear_x(256, 0),)
    )


def _fp8_linear_gated() -> OpCase:
    code, scale = jax.jit(fp8.quantize_weight)(normal(1, 160, 192))
    return OpCase(
        lambda gate, up: fp8_linear(gate, code, scale, up=up, limit=2.0),
        (_linear_x(192, 0), normal(2, MAX_ROWS, 192, dtype=jnp.bfloat16)),
    )


def _fp8_linears() -> OpCase:
    pairs = [jax.jit(fp8.quantize_weight)(normal(i, n, 192)) for i, n in enumerate((160, 24), 1)]
    codes, scales = zip(*pairs, strict=True)
    return OpCase(lambda x: fp8_linears(x, codes, scales), (_linear_x(192, 0),))


def _mxfp4_linear(groups: int = 0, **settings: Any) -> OpCase:
    code, scale = jax.jit(mxfp4.quantize)(normal(1, 40, 192))
    return OpCase(lambda x: mxfp4_linear(x, code, scale, **settings), (_linear_x(192, groups),))


def _nvfp4_linear(groups: int = 0, static: bool = False, **settings: Any) -> OpCase:
    q = jax.jit(lambda w: nvfp4.quantize(w, nvfp4.tensor_global_scale(w)))(normal(1, 40, 192))
    scales = (jnp.float32(0.0123),) if static else ()
    return OpCase(lambda x: nvfp4_linear(x, *q, *scales, **settings), (_linear_x(192, groups),))


def _nvfp4_linear_gated() -> OpCase:
    q = jax.jit(lambda w: nvfp4.quantize(w, nvfp4.tensor_global_scale(w)))(normal(1, 40, 192))
    return OpCase(
        lambda gate, up: nvfp4_linear(gate, *q, up=up, limit=2.0),
        (_linear_x(192, 0), normal(2, MAX_ROWS, 192, dtype=jnp.bfloat16)),
    )


def _nvfp4_linears() -> OpCase:
    quantised = jax.jit(lambda w: nvfp4.quantize(w, nvfp4.tensor_global_scale(w)))
    weights = zip(*(quantised(normal(i, n, 192)) for i, n in enumerate((40, 24), 1)), strict=True)
    stored = tuple(weights)
    return OpCase(lambda x: nvfp4_linears(x, *stored), (_linear_x(192, 0),))


def _swiglu() -> OpCase:
    gate = normal(0, MAX_ROWS, 48, scale=8.0, dtype=jnp.bfloat16)
    up = normal(1, MAX_ROWS, 48, scale=8.0, dtype=jnp.bfloat16)
    return OpCase(functools.partial(swiglu, limit=10.0), (gate, up))


def _moe(linear: Any, shared: bool = False) -> OpCase:
    form = linear.split("_")[0]
    w1, w3 = (expert_leaves(seed, (5, 64, 96), form) for seed in (1, 3))
    w2 = expert_leaves(2, (5, 96, 64), form)
    rng = np.random.default_rng(4)
    idx = jnp.asarray([np.sort(rng.permutation(5)[:3]) for _ in range(MAX_ROWS)], jnp.int32)
    weight = jnp.asarray(rng.uniform(0.1, 1, (MAX_ROWS, 3)), jnp.float32)
    dtype = jnp.float32 if linear == "float32" else jnp.bfloat16
    x = normal(0, MAX_ROWS, 96, dtype=dtype)
    rows = x, idx, weight, jnp.arange(MAX_ROWS) != 2
    settings: dict[str, Any] = {"linear": linear, "limit": 10.0}
    if not shared:
        return OpCase(lambda *rows: moe(*rows, w1, w2, w3, **settings), rows)
    settings |= {"first_expert": 1, "dtype": dtype}
    return OpCase(
        lambda *rows: moe(*rows[:4], w1, w2, w3, rows[4], **settings),
        (*rows, normal(6, MAX_ROWS, 96, dtype=dtype)),
    )


def _compressor(ratio: int, dtype: Any = jnp.bfloat16) -> OpCase:
    """CSA's two jobs, HCA's one; every row has states and pools of its own."""
    halves, rotary = 2 if ratio == 4 else 1, 32
    t, ring, slots = ratio + 3, halves * ratio, 8
    count = np.random.default_rng(5).integers(0, t + 1, MAX_ROWS)
    start = np.random.default_rng(6).integers(0, 3 * ratio, MAX_ROWS)
    frequencies = (10000.0 ** -(np.arange(rotary // 2) / 16)).astype(np.float32)
    form = "fp8" if dtype == jnp.bfloat16 else "float32"
    keys, index = normal(4, MAX_ROWS, slots, 96), normal(5, MAX_ROWS, slots, 64)
    pools: list[Any] = [jax.jit(lambda x: kv_quant(x, rotary, form))(keys)]
    if ratio == 4:
        pools.append(jax.jit(lambda x: index_quant(x, "mxfp4"))(index))
    widths = (96, 64)[: len(pools)]
    constants = [
        (normal(6, ratio, halves * d), (1 + normal(7, d, scale=0.1)).astype(dtype)) for d in widths
    ]
    rows: list[Any] = [jnp.asarray(start, jnp.int32), jnp.asarray(count, jnp.int32)]
    for seed, d in enumerate(widths):
        rows += [normal(10 * seed + i, MAX_ROWS, t, halves * d) for i in (20, 21)]
        rows += [normal(10 * seed + i, MAX_ROWS, ring, halves * d) for i in (22, 23)]
    parts, structure = jax.tree.flatten(pools)
    rows += parts

    def fn(first: jax.Array, *rest: jax.Array) -> Any:
        # The argument that takes a NaN comes first, as for all ops.
        start, count, others = rest[0], rest[1], (first, *rest[2:])
        stores = jax.tree.unflatten(structure, others[4 * len(pools) :])
        jobs: list[CompressorJob] = []
        for i, (constant, store) in enumerate(zip(constants, stores, strict=True)):
            kv, gate, kv_state, gate_state = others[4 * i : 4 * i + 4]
            jobs.append(CompressorJob(kv, gate, *constant, kv_state, gate_state, store))
        return compressor(jobs, start, count, frequencies, ratio=ratio, eps=EPS, dtype=dtype)

    return OpCase(fn, (rows[2], rows[0], rows[1], *rows[3:]))


def _index_topk(form: Any) -> OpCase:
    quantized = jax.jit(lambda x: index_quant(x, form))
    q, keys = quantized(normal(0, MAX_ROWS, 2, 4, 32)), quantized(normal(2, MAX_ROWS, 256, 32))
    n_visible = jnp.asarray(np.random.default_rng(3).integers(1, 257, (MAX_ROWS, 2)), jnp.int32)
    parts, structure = jax.tree.flatten((q, keys))

    def fn(weight: jax.Array, n_visible: jax.Array, *parts: jax.Array) -> Any:
        q, keys = jax.tree.unflatten(structure, parts)
        return index_topk(q, weight, keys, n_visible, topk=24, return_scores=True)

    return OpCase(fn, (normal(1, MAX_ROWS, 2, 4), n_visible, *parts))


def _attention(kind: str, form: Any = "fp8") -> OpCase:
    t, heads, dim, window, slots = 2, 3, 96, 8, 256
    rng = np.random.default_rng(7)
    start = jnp.asarray(rng.integers(0, 1000, MAX_ROWS), jnp.int32)
    positions = start[:, None] + jnp.arange(t, dtype=jnp.int32)
    dtype = jnp.float32 if form == "float32" else jnp.bfloat16
    q = normal(0, MAX_ROWS, t, heads, dim, dtype=dtype)
    sink = normal(2, heads)
    quantized = jax.jit(lambda x: kv_quant(x, 32, form))
    rings = quantized(normal(1, MAX_ROWS, window, dim)), quantized(normal(4, MAX_ROWS, t, dim))
    parts, structure = jax.tree.flatten(rings)
    rows: tuple[jax.Array, ...] = q, positions, start, *parts
    settings: dict[str, Any] = {"window": window}
    if kind == "topk":
        settings["frequencies"] = (10000.0 ** -(np.arange(16) / 16)).astype(np.float32)
    pool, far = jax.tree.flatten(None)
    if kind != "window":
        n_visible = rng.integers(0, slots + 1, (MAX_ROWS, t))
        idx = rng.integers(-1, slots, (MAX_ROWS, t, 140))
        pool, far = jax.tree.flatten(quantized(normal(3, MAX_ROWS, slots, dim)))
        rows += (*pool, jnp.asarray(n_visible, jnp.int32), jnp.asarray(idx, jnp.int32))

    def fn(q: jax.Array, positions: jax.Array, start: jax.Array, *rest: jax.Array) -> Any:
        ring, chunk = jax.tree.unflatten(structure, rest[: len(parts)])
        rest = rest[len(parts) :]
        extra: dict[str, Any] = {"chunk": chunk, "start": start}
        if kind != "window":
            extra["pool"] = jax.tree.unflatten(far, rest[: len(pool)])
            extra["n_visible"] = rest[len(pool)]
        if kind == "topk":
            extra["topk_idx"] = rest[len(pool) + 1]
        return attention(q, ring, positions, sink, **settings, **extra, return_lse=True)

    return OpCase(fn, rows if kind != "all" else rows[:-1])


def _cache_write() -> OpCase:
    cache = normal(0, MAX_ROWS, 8, 16).astype(jnp.float8_e4m3fn)
    rows = normal(1, MAX_ROWS, 3, 16).astype(jnp.float8_e4m3fn)
    return OpCase(cache_write, (cache, rows, _slots()), poisoned=1)


def _cache_write_store() -> OpCase:
    """A store of five parts: keys with 7 scale bytes a row, and packed index keys."""

    @jax.jit
    def quantized(keys: jax.Array, index: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves((kv_quant(keys, 16, "fp8"), index_quant(index, "mxfp4")))

    def parts(seed: int, t: int) -> list[jax.Array]:
        keys = normal(seed, MAX_ROWS, t, 7 * 64 + 16)
        return quantized(keys, normal(seed + 1, MAX_ROWS, t, 64))

    def fn(*leaves: jax.Array) -> Any:
        cache, rows = ((KvRows(*x[:3]), IndexRows(*x[3:])) for x in (leaves[:5], leaves[5:10]))
        return cache_write(cache, rows, leaves[10])

    return OpCase(fn, (*parts(0, 8), *parts(2, 3), _slots()), poisoned=5)


def _slots() -> jax.Array:
    """Three of -1..9 for every row, for caches of 8 slots."""
    slots = np.array([np.random.default_rng(i).permutation(11)[:3] - 1 for i in range(MAX_ROWS)])
    return jnp.asarray(slots, jnp.int32)


CASES: dict[str, Callable[[], OpCase]] = {
    name: functools.cache(make)
    for name, make in {
        "rmsnorm": _rmsnorm,
        "rmsnorm_fp8": _rmsnorm_fp8,
        "rmsnorm_nvfp4-dynamic": lambda: _rmsnorm_nvfp4(False),
        "rmsnorm_nvfp4-static": lambda: _rmsnorm_nvfp4(True),
        "head_norm-float32": lambda: _head_norm("float32"),
        "head_norm-bfloat16": lambda: _head_norm("bfloat16"),
        "rope": _rope,
        "query_finish-steps": lambda: _query_finish("bfloat16"),
        "query_finish-once": lambda: _query_finish("float32"),
        "query_finish-float32": lambda: _query_finish("float32", jnp.float32),
        "key_finish-rows": lambda: _key_finish(False),
        "key_finish-ring": lambda: _key_finish(True),
        "key_finish-query": _key_finish_query,
        "key_finish-query-bfloat16": lambda: _key_finish_query("bfloat16"),
        "key_finish-ring-float32": lambda: _key_finish(True, "float32"),
        "index_query_finish-mxfp4": lambda: _index_query_finish("mxfp4"),
        "index_query_finish-heads": lambda: _index_query_finish("mxfp4", heads=True),
        "index_query_finish-fp8": lambda: _index_query_finish("fp8"),
        "index_query_finish-float32": lambda: _index_query_finish("float32", jnp.float32),
        "mhc_pre": _mhc_pre,
        "mhc_post": _mhc_post,
        "mhc_head": _mhc_head,
        "mhc-branch": lambda: _mhc(24),
        "mhc-head": lambda: _mhc(4),
        "mhc-write": _mhc_write,
        "hadamard": _hadamard,
        "router-score": lambda: _router(False),
        "router-hash": lambda: _router(True),
        "router-table": _router_table,
        "dense_linear-bfloat16": lambda: _dense_linear(jnp.bfloat16),
        "dense_linear-float32": lambda: _dense_linear(jnp.float32),
        "dense_linear-groups": lambda: _dense_linear(jnp.bfloat16, 2, dtype=jnp.bfloat16),
        "dense_linear-several": _dense_linears,
        "fp8_linear-w8a8": lambda: _fp8_linear(dtype=jnp.bfloat16, regime="decode"),
        "fp8_linear-w8a16-groups": lambda: _fp8_linear(2, act="bfloat16"),
        "fp8_linear-quantised": _fp8_linear_quantised,
        "fp8_linear-gated": _fp8_linear_gated,
        "fp8_linear-several": _fp8_linears,
        "mxfp4_linear-w4a8": lambda: _mxfp4_linear(),
        "mxfp4_linear-w4a16": lambda: _mxfp4_linear(act="bfloat16", regime="prefill"),
        "nvfp4_linear-w4a4": lambda: _nvfp4_linear(),
        "nvfp4_linear-w4a4-static": lambda: _nvfp4_linear(static=True, dtype=jnp.bfloat16),
        "nvfp4_linear-w4a8-groups": lambda: _nvfp4_linear(2, act="fp8"),
        "nvfp4_linear-w4a16": lambda: _nvfp4_linear(act="bfloat16"),
        "nvfp4_linear-gated": _nvfp4_linear_gated,
        "nvfp4_linear-several": _nvfp4_linears,
        "swiglu": _swiglu,
        "moe-mxfp4_w4a8": lambda: _moe("mxfp4_w4a8"),
        "moe-nvfp4_w4a4": lambda: _moe("nvfp4_w4a4"),
        "moe-nvfp4_w4a16-shared": lambda: _moe("nvfp4_w4a16", True),
        "compressor-4": lambda: _compressor(4),
        "compressor-128": lambda: _compressor(128),
        "compressor-4-float32": lambda: _compressor(4, jnp.float32),
        "index_topk-mxfp4": lambda: _index_topk("mxfp4"),
        "index_topk-fp8": lambda: _index_topk("fp8"),
        "index_topk-float32": lambda: _index_topk("float32"),
        "attention-window": lambda: _attention("window"),
        "attention-all": lambda: _attention("all"),
        "attention-topk": lambda: _attention("topk"),
        "attention-topk-float32": lambda: _attention("topk", "float32"),
        "cache_write": _cache_write,
        "cache_write-store": _cache_write_store,
    }.items()
}
