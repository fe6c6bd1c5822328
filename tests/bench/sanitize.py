"""Every registered op on small shapes, for compute-sanitizer; `.ci/gpu --sanitize` runs it.

    compute-sanitizer --tool racecheck --kernel-name kns=dsv4 python -m tests.bench.sanitize

Needs ``XLA_FLAGS=--xla_gpu_enable_command_buffer=`` and ``XLA_PYTHON_CLIENT_ALLOCATOR=platform``:
plain launches, and allocations of their own that memcheck can see the ends of. With ``--fault`` an
op is handed an address that nobody allocated: what the checker must find, or it looks elsewhere.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import library
from dsv4_jax.ops.attention import attention
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.compressor import CompressorJob, compressor
from dsv4_jax.ops.dense_linear import dense_linear, dense_linears
from dsv4_jax.ops.fp8_linear import fp8_linear, fp8_linears
from dsv4_jax.ops.index_query_finish import index_query_finish
from dsv4_jax.ops.index_topk import index_topk
from dsv4_jax.ops.key_finish import QueryNorm, key_finish
from dsv4_jax.ops.mhc import Read, Write, mhc
from dsv4_jax.ops.moe import moe
from dsv4_jax.ops.mxfp4_linear import mxfp4_linear
from dsv4_jax.ops.nvfp4_linear import nvfp4_linear, nvfp4_linears
from dsv4_jax.ops.query_finish import query_finish
from dsv4_jax.ops.rmsnorm_fp8 import rmsnorm_fp8
from dsv4_jax.ops.rmsnorm_nvfp4 import rmsnorm_nvfp4
from dsv4_jax.ops.router import router
from dsv4_jax.program import fused
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.quant.kv import IndexRows, KvRows
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.bench.timing import random_bytes

__all__ = ["CASES", "fault", "run", "view_of_address"]

NOWHERE = 0x10000
"""No GPU allocation begins this low; aligned as XLA wants its buffers."""


def _rmsnorm_nvfp4() -> Iterator[Any]:
    """Half a warp, several warps with a tail, most threads; more tokens than thread blocks."""
    rng = np.random.default_rng(0)
    for t, d in ((3, 16), (2, 528), (3, 7168), (2, 16384), (1200, 2064)):
        x = jnp.asarray(rng.standard_normal((t, d)), jnp.bfloat16)
        weight = jnp.asarray(rng.standard_normal(d), jnp.bfloat16)
        yield rmsnorm_nvfp4(x, weight, 1e-6)
        yield rmsnorm_nvfp4(x, weight, 1e-6, jnp.float32(0.01))


def _rmsnorm_fp8() -> Iterator[Any]:
    """As the norm into NVFP4, and a last scale of fewer channels."""
    rng = np.random.default_rng(0)
    for t, d in ((3, 16), (2, 528), (3, 7168), (2, 16384), (1200, 2064), (300, 1024)):
        x = jnp.asarray(rng.standard_normal((t, d)), jnp.bfloat16)
        yield rmsnorm_fp8(x, jnp.asarray(rng.standard_normal(d), jnp.bfloat16), 1e-6)


def _cache_write() -> Iterator[Any]:
    """Units of 1, 4 and 16 bytes, packed codes, slots outside the cache, several arrays."""
    b, t, s = 3, 5, 4
    slots = jnp.asarray([[-1, 0, 3, 4, 1], [2**31 - 1, 2, -(2**31), 0, 9], [3, 2, 1, 0, -1]])
    forms = {"nope": (448, E4M3), "scale": (7, UE8M0), "rope": (64, jnp.bfloat16)}
    forms |= {"codes": (14, E2M1), "state": (33, jnp.float32)}
    cache = {name: random_bytes(0, (b, s, d), dtype) for name, (d, dtype) in forms.items()}
    rows = {name: random_bytes(1, (b, t, d), dtype) for name, (d, dtype) in forms.items()}
    yield cache_write(cache, rows, slots)
    yield jax.jit(lambda c, r, j: cache_write(c, r, j), donate_argnums=0)(cache, rows, slots)


def _attention() -> Iterator[Any]:
    """Every regime; widths of the model and others; windows that fill, wild lengths and ids."""
    rng = np.random.default_rng(0)
    wild = np.array([-1, -(2**31), 2**31 - 1, 0], np.int32)

    def store(b: int, s: int, nope: int, rotary: int) -> KvRows:
        return KvRows(
            random_bytes(0, (b, s, nope), E4M3),
            random_bytes(1, (b, s, nope // 64), UE8M0),
            random_bytes(2, (b, s, rotary), jnp.bfloat16),
        )

    for t, b, h, nope, rotary in (
        *((1, 1, 64, 448, 64), (1, 3, 128, 448, 64), (2, 1, 8, 448, 64), (9, 2, 96, 448, 64)),
        *((70, 1, 64, 448, 64), (130, 1, 128, 448, 64), (3, 2, 3, 64, 32), (40, 1, 5, 128, 6)),
    ):
        q = jnp.asarray(rng.standard_normal((b, t, h, nope + rotary)), jnp.bfloat16)
        sink = jnp.asarray(rng.standard_normal(h), jnp.float32)
        start = np.asarray([0, 300, 70][:b], np.int32)
        positions = start[:, None] + np.arange(t, dtype=np.int32)
        ring, chunk = store(b, 128 + t, nope, rotary), store(b, t, nope, rotary)
        pool = store(b, 300, nope, rotary)
        n_visible = rng.integers(0, 301, (b, t)).astype(np.int32)
        idx = rng.integers(-1, 300, (b, t, 200)).astype(np.int32)
        idx[..., :4] = wild
        frequencies = np.ones(rotary // 2, np.float32)
        far: dict[str, Any] = {"pool": pool, "n_visible": n_visible}
        near: dict[str, Any] = {"chunk": chunk, "start": start}
        common: dict[str, Any] = {"window": 128, "return_lse": True}
        operands = q, ring, positions, sink
        yield attention(*operands, **common)
        yield attention(*operands, **near, **common, frequencies=frequencies)
        # With many tokens only what loops over them: racecheck takes seconds a launch.
        for regime in ("decode", "prefill", "exact") if t < 40 else ("prefill",):
            settings = common | {"regime": regime}
            yield attention(*operands, **near, **far, **settings)
            yield attention(*operands, **near, **far, topk_idx=idx, **settings)
        nowhere = np.resize(wild, (b, t))
        lost = near | {"start": np.resize(wild, b)}
        yield attention(q, ring, nowhere, sink, **lost, pool=pool, n_visible=nowhere, **common)


def _index_topk() -> Iterator[Any]:
    """Every kernel; the model's sizes and others; any bytes, any counts; ends inside blocks."""
    rng = np.random.default_rng(0)
    wild = np.array([-1, -(2**31), 2**31 - 1, 0, 5], np.int32)

    def store(seed: int, shape: tuple[int, ...], dim: int, form: str) -> IndexRows:
        dtype, blocks = (E2M1, dim // 32) if form == "mxfp4" else (E4M3, 1)
        codes = random_bytes(seed, (*shape, dim), dtype)
        return IndexRows(codes, random_bytes(seed + 1, (*shape, blocks), UE8M0))

    for form, b, t, heads, dim, slots, topk in (
        *(("mxfp4", 1, 1, 64, 128, 3000, 1024), ("mxfp4", 3, 1, 64, 128, 5000, 512)),
        *(("mxfp4", 1, 70, 64, 128, 1500, 1024), ("fp8", 2, 1, 64, 128, 3000, 2048)),
        *(("fp8", 1, 9, 64, 128, 1100, 512), ("mxfp4", 2, 3, 3, 32, 45, 16)),
        *(("fp8", 1, 2, 5, 37, 2000, 7), ("mxfp4", 1, 2, 2, 1024, 70, 100)),
    ):
        q, keys = store(0, (b, t, heads), dim, form), store(2, (b, slots), dim, form)
        weight = jnp.asarray(rng.standard_normal((b, t, heads)), jnp.float32)
        n_visible = rng.integers(0, slots + 1, (b, t)).astype(np.int32)
        for n in (np.full((b, t), slots, np.int32), n_visible, np.resize(wild, (b, t))):
            yield index_topk(q, weight, keys, n, topk=topk)
        yield index_topk(q, weight, keys, n_visible, topk=topk, return_scores=True)
    # Two queries that share keys; choices of few queries (a row in registers, kept whole, from the
    # groups that reach a bound) and of many (from vectors that reach it, from groups, from the row
    # itself), and of everything.
    for form, t, slots, topk in (
        *(("mxfp4", 3, 400, 100), ("fp8", 2, 400, 100), ("mxfp4", 133, 100, 16)),
        *(("mxfp4", 1, 8400, 512), ("mxfp4", 1, 65600, 512), ("mxfp4", 133, 8208, 256)),
        *(("mxfp4", 133, 8208, 1024), ("fp8", 3, 64, 100)),
    ):
        q, keys = store(0, (1, t, 64), 128, form), store(2, (1, slots), 128, form)
        weight = jnp.asarray(rng.standard_normal((1, t, 64)), jnp.float32)
        n_visible = rng.integers(0, slots + 1, (1, t)).astype(np.int32)
        n_visible[0, 0] = slots
        yield index_topk(q, weight, keys, n_visible, topk=topk)


def _compressor() -> Iterator[Any]:
    """Both kernels; widths of the model and others; windows from ring and chunk; wild lengths."""
    rng = np.random.default_rng(0)

    def job(ratio: int, t: int, d: int, form: str) -> CompressorJob:
        columns, b, slots = (2 if ratio == 4 else 1) * d, 4, 7
        ring = columns // d * ratio + 1
        rows = [
            jnp.asarray(rng.standard_normal(shape), jnp.float32)
            for shape in (*((b, t, columns),) * 2, (ratio, columns))
        ]
        norm = jnp.asarray(rng.standard_normal(d), jnp.bfloat16)
        states = [random_bytes(i, (b, ring, columns), jnp.float32) for i in (3, 4)]
        pool: Any = IndexRows(
            random_bytes(5, (b, slots, d), E2M1 if form == "mxfp4" else E4M3),
            random_bytes(6, (b, slots, d // 32 if form == "mxfp4" else 1), UE8M0),
        )
        if form == "kv":
            pool = KvRows(
                random_bytes(5, (b, slots, d - 32), E4M3),
                random_bytes(6, (b, slots, (d - 32) // 64), UE8M0),
                random_bytes(7, (b, slots, 32), jnp.bfloat16),
            )
        return CompressorJob(*(*rows, norm, *states, pool))

    frequencies = np.ones(16, np.float32)
    for ratio, forms, t in (
        *((4, ((480, "kv"), (128, "mxfp4")), t) for t in (1, 3, 70)),
        *((4, ((96, "kv"), (64, "fp8")), t) for t in (1, 21)),
        *((128, ((480, "kv"),), t) for t in (1, 5, 300)),
        *((128, ((96, "kv"),), 130), (16, ((32, "kv"),), 40)),
    ):
        jobs = [job(ratio, t, d, form) for d, form in forms]
        for start, count in (
            ([0, ratio - 1, 2 * ratio - 1, 3 * ratio], [t, t, t, 0]),
            ([-1, -(2**31), 2**31 - 1, 7 * ratio - 1], [t, 1, 2**31 - 1, -5]),
        ):
            lengths = jnp.asarray(start, jnp.int32), jnp.asarray(count, jnp.int32)
            yield compressor(jobs, *lengths, frequencies, ratio=ratio, eps=1e-6)


def _router() -> Iterator[Any]:
    """Less than a warp of experts and the most, more tokens than thread blocks, wild ids."""
    rng = np.random.default_rng(0)
    for t, experts, k in ((1, 5, 5), (3, 256, 6), (40, 384, 6), (3000, 40, 2), (7, 1024, 32)):
        x = jnp.asarray(rng.standard_normal((t, 64)), jnp.bfloat16)
        weight = jnp.asarray(rng.standard_normal((experts, 64)), jnp.bfloat16)
        bias = jnp.asarray(rng.standard_normal(experts), jnp.float32)
        given = rng.integers(0, experts, (t, k))
        given[::3, 0] = 2**31 - 1
        given[1::3, 0] = -1
        yield router(x.at[0, 0].set(jnp.nan), weight, bias, None, k=k, scale=2.5)
        given = jnp.asarray(given, jnp.int32)
        yield router(x, weight, None, given, k=k, scale=2.5)
        tokens = jnp.asarray(rng.integers(-2, t + 2, t), jnp.int32)
        yield router(x, weight, None, given, k=k, scale=2.5, tokens=tokens)


def _moe_weights(form: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Random codes ``[e, out, in]`` with scales around one."""
    block, dtype = (32, UE8M0) if form == "mxfp4" else (16, E4M3)
    name = "scale" if form == "mxfp4" else "block_scale"
    exponents = np.random.default_rng(1).integers(-4, 1, (*shape[:2], shape[2] // block))
    scale = jnp.asarray(2.0**exponents, jnp.float32).astype(dtype)
    leaves = {"weight": random_bytes(2, shape, E2M1), name: scale}
    return leaves if form == "mxfp4" else leaves | {"global_scale": jnp.full(shape[0], 0.1)}


def _moe() -> Iterator[Any]:
    """Every regime and format; sizes that fill the tiles and that do not; any routing; thread
    blocks that are halved."""
    rng = np.random.default_rng(0)
    for form in ("mxfp4_w4a8", "nvfp4_w4a4", "nvfp4_w4a8"):
        picks, inter, d = 3, 3072, 6144  # 144 tiles of w1 and w3, as many of w2
        w1, w3 = (_moe_weights(form.split("_")[0], (picks, inter, d)) for _ in range(2))
        w2 = _moe_weights(form.split("_")[0], (picks, d, inter))
        x = jnp.asarray(rng.standard_normal((1, d)), jnp.bfloat16)
        idx, weight = jnp.arange(picks, dtype=jnp.int32)[None], jnp.ones((1, picks))
        power = {"power_of_two": True} if form == "nvfp4_w4a8" else {}
        yield moe(x, idx, weight, jnp.ones(1, bool), w1, w2, w3, linear=form, limit=10.0, **power)
    experts, k = 6, 3
    for form in ("mxfp4_w4a8", "nvfp4_w4a4", "nvfp4_w4a16", "nvfp4_w4a8"):
        stored = form.split("_")[0]
        odd = (96, 160) if stored == "mxfp4" else (48, 80)
        for inter, d in ((512, 512), odd):
            w1, w3 = (_moe_weights(stored, (experts, inter, d)) for _ in range(2))
            w2 = _moe_weights(stored, (experts, d, inter))
            for t in (1, 40, 400):
                x = jnp.asarray(rng.standard_normal((t, d)), jnp.bfloat16)
                weight = jnp.asarray(rng.uniform(0.1, 1, (t, k)), jnp.float32)
                spread = np.sort(rng.permuted(np.tile(np.arange(experts), (t, 1)), axis=1)[:, :k])
                wild = spread.copy()
                wild[::3, 0], wild[1::3, 2] = -(2**31), 2**31 - 1
                one = np.full((t, k), 2)  # all to one expert
                routings = ((spread, np.ones(t, bool)), (wild, np.arange(t) % 4 != 1))
                for idx, valid in (*routings, (one, np.ones(t, bool)))[: 2 if t < 400 else 3]:
                    operands = (
                        x,
                        jnp.asarray(idx, jnp.int32),
                        weight,
                        jnp.asarray(valid),
                        w1,
                        w2,
                        w3,
                    )
                    settings = {"linear": form, "limit": 10.0}
                    if form == "nvfp4_w4a4":
                        scale = jnp.linspace(1e-3, 1e-2, experts, dtype=jnp.float32)
                        static = {"up_act_scale": scale, "down_act_scale": scale[::-1]}
                        yield moe(*operands, **settings, **static)
                    if form == "nvfp4_w4a8":
                        yield moe(*operands, **settings, power_of_two=True)
                    elif t == 40:
                        yield moe(*operands, **settings, first_expert=1, regime="prefill")
                    else:
                        yield moe(*operands, x, **settings, dtype=jnp.bfloat16)


LINEAR_SHAPES = (
    # (t, groups (0: no axis), k, n)
    *((t, 0, 512, 208) for t in (1, 3, 9, 40, 200)),
    *((t, 0, 352, 137) for t in (1, 3, 9, 40, 200)),
    *((t, 4, 256, 512) for t in (1, 9, 200)),
    (3, 2, 96, 46),
    (2, 0, 4096, 64),
    (2, 0, 256, 8),
    (8, 4, 512, 384),
)
"""Inputs a multiple of 128 and not, rows a multiple of 16 and not, groups that end inside tiles."""


def _linear(
    op: Callable[..., Any],
    weights: Callable[[int, int], tuple[Any, ...]],
    acts: tuple[str, ...],
    shapes: tuple[tuple[int, int, int, int], ...] = LINEAR_SHAPES,
) -> Iterator[Any]:
    """Every activation format and regime, both dtypes of ``x`` and of the result."""
    for i, (t, groups, k, n) in enumerate(shapes):
        stored = weights(n, k)
        x = np.random.default_rng(i).standard_normal((t, groups, k) if groups else (t, k))
        for act in acts:
            settings: dict[str, Any] = {"act": act} if act else {}
            wide = act != "" and i % 2 == 1  # dense_linear takes BF16 only
            for regime, dtype in (
                (None, jnp.bfloat16),
                ("decode", jnp.float32),
                ("prefill", jnp.float32 if i % 2 else jnp.bfloat16),
            ):
                operand = jnp.asarray(x, jnp.float32 if wide else jnp.bfloat16)
                yield op(operand, *stored, dtype=dtype, regime=regime, **settings)
                if act == "nvfp4":
                    scale = jnp.float32(0.01)
                    yield op(operand, *stored, scale, dtype=dtype, regime=regime, **settings)


def _dense_linear() -> Iterator[Any]:
    """Any number of inputs, too, and two weights at once."""
    weights = lambda n, k: (random_bytes(0, (n, k), jnp.bfloat16),)  # noqa: E731
    shapes = (*LINEAR_SHAPES, (3, 0, 37, 19), (20, 3, 45, 21))
    yield from _linear(dense_linear, weights, ("",), shapes)
    two = lambda x, w, **settings: dense_linears(x, (w, jnp.tile(w, (2, 1))), **settings)  # noqa: E731
    yield from _linear(two, weights, ("",), LINEAR_SHAPES)
    equal = lambda x, w, **settings: dense_linears(x, (w, w), **settings)  # noqa: E731
    yield from _linear(equal, weights, ("",), LINEAR_SHAPES)


def _fp8_linear() -> Iterator[Any]:
    """Edge tiles, any number of inputs, two weights at once, x that is quantised or a gate."""

    def weights(n: int, k: int) -> tuple[Any, ...]:
        return random_bytes(0, (n, k), E4M3), random_bytes(1, (-(-n // 128), -(-k // 128)), UE8M0)

    shapes = (*LINEAR_SHAPES, (3, 0, 37, 19), (20, 3, 45, 21))
    yield from _linear(fp8_linear, weights, ("fp8", "bfloat16"), shapes)
    two = lambda x, w, s, **settings: fp8_linears(x, (w, w), (s, s), **settings)  # noqa: E731
    yield from _linear(two, weights, ("fp8", "bfloat16"))
    for t, groups, k, n in ((1, 0, 384, 19), (2, 2, 512, 130), (9, 0, 128, 48), (140, 0, 640, 136)):
        lead = (t, groups) if groups else (t,)
        x = Fp8(random_bytes(2, (*lead, k), E4M3), random_bytes(3, (*lead, k // 128), UE8M0))
        for regime in ("decode", "prefill", "exact"):
            yield two(x, *weights(n * max(groups, 1), k), regime=regime)
    for t, groups, k, n in (
        *((1, 0, 384, 19), (3, 2, 256, 128), (5, 0, 256, 136), (130, 0, 640, 136)),
        *((5, 0, 37, 19), (40, 2, 136, 24)),
    ):
        lead = (t, groups) if groups else (t,)
        gate, up = (random_bytes(seed, (*lead, k), jnp.bfloat16) for seed in (4, 5))
        for regime in ("decode", "prefill", "exact"):
            settings: dict[str, Any] = {"up": up, "limit": 10.0, "regime": regime}
            yield fp8_linear(gate, *weights(n * max(groups, 1), k), **settings)


def _mxfp4_linear() -> Iterator[Any]:
    def weights(n: int, k: int) -> tuple[Any, ...]:
        return random_bytes(0, (n, k), E2M1), random_bytes(1, (n, k // 32), UE8M0)

    return _linear(mxfp4_linear, weights, ("fp8", "bfloat16"))


def _nvfp4_linear() -> Iterator[Any]:
    """Rows of 16 inputs more than a multiple of 32, two weights at once, x that is a gate."""

    def weights(n: int, k: int) -> tuple[Any, ...]:
        codes, scales = random_bytes(0, (n, k), E2M1), random_bytes(1, (n, k // 16), E4M3)
        return codes, scales, jnp.float32(0.01)

    shapes = (*LINEAR_SHAPES, (3, 0, 16, 8), (20, 0, 176, 24))
    acts = "nvfp4", "fp8", "bfloat16"
    yield from _linear(nvfp4_linear, weights, acts, shapes)

    def two(x: Any, w: Any, s: Any, s2: Any, *act_scale: Any, **settings: Any) -> Any:
        return nvfp4_linears(x, (w, w), (s, s), (s2, s2), *act_scale, **settings)

    yield from _linear(two, weights, acts)
    for t, groups, k, n in ((1, 0, 512, 19), (3, 2, 256, 128), (5, 0, 176, 24), (130, 0, 640, 136)):
        lead = (t, groups) if groups else (t,)
        gate, up = (random_bytes(seed, (*lead, k), jnp.bfloat16) for seed in (4, 5))
        for regime in ("decode", "prefill", "exact"):
            settings: dict[str, Any] = {"up": up, "limit": 10.0, "regime": regime}
            yield nvfp4_linear(gate, *weights(n * max(groups, 1), k), **settings)


def _query_finish() -> Iterator[Any]:
    """Heads of every kind: whole, narrow, one a warp and several, a group that is not full."""
    rng = np.random.default_rng(0)
    for t, h, d, rotary in ((1, 64, 512, 64), (3, 5, 96, 32), (2, 3, 264, 0), (300, 67, 512, 64)):
        q = jnp.asarray(rng.standard_normal((1, t, h, d)), jnp.bfloat16)
        positions = jnp.asarray(rng.integers(-(2**31), 2**31, (1, t)), jnp.int32)
        frequencies = jnp.asarray(rng.random(rotary // 2), jnp.float32)
        yield query_finish(q, positions, frequencies, 1e-6, rounding="bfloat16")
        yield query_finish(q, positions, frequencies, 1e-6, rounding="float32")


def _key_finish() -> Iterator[Any]:
    """Whole and narrow keys; no ring, rings shorter and longer than the chunk, wild lengths; also
    queries, in the same launch and in one of their own."""
    rng = np.random.default_rng(0)
    wild = np.array([-1, -(2**31), 2**31 - 1, 0, 5], np.int32)
    for b, t, d, rotary in ((1, 1, 512, 64), (3, 9, 96, 32), (5, 150, 512, 64)):
        kv = jnp.asarray(rng.standard_normal((b, t, d)), jnp.bfloat16)
        weight = jnp.asarray(rng.standard_normal(d), jnp.bfloat16)
        frequencies = jnp.asarray(rng.random(rotary // 2), jnp.float32)
        operands = kv, weight, jnp.asarray(np.resize(wild, b)), frequencies, 1e-6
        for n, r in ((1, 1536), (3, 16), (300, 1024), (2, 2064)):
            x = jnp.asarray(rng.standard_normal((n, r)), jnp.bfloat16)
            for form in ("fp8", "bfloat16"):
                query = QueryNorm(x, x[0])
                yield key_finish(*operands, form="fp8", query=query, query_form=form)
        yield key_finish(*operands, form="fp8")
        for s in (1, 8, 128):
            nope = d - rotary
            forms = (nope, E4M3), (nope // 64, UE8M0), (rotary, jnp.bfloat16)
            ring = KvRows(*(random_bytes(s, (b, s, n), dtype) for n, dtype in forms))
            for count in (np.full(b, t), np.resize(wild[::-1], b)):
                yield key_finish(
                    *operands, form="fp8", ring=ring, count=jnp.asarray(count, jnp.int32)
                )


def _index_query_finish() -> Iterator[Any]:
    """Every width and form; a warp that is not full, several heads a thread."""
    rng = np.random.default_rng(0)
    for t, h, d, rotary in ((1, 64, 128, 64), (3, 5, 64, 32), (2, 3, 32, 0), (300, 61, 128, 64)):
        q = jnp.asarray(rng.standard_normal((1, t, h, d)), jnp.bfloat16)
        positions = jnp.asarray(rng.integers(-(2**31), 2**31, (1, t)), jnp.int32)
        frequencies = jnp.asarray(rng.random(rotary // 2), jnp.float32)
        yield index_query_finish(q, positions, frequencies, form="mxfp4")
        for n, c in ((3, 512), (1, 72)):
            heads = jnp.asarray(rng.standard_normal((1, t, n, c)), jnp.bfloat16)
            yield index_query_finish(q, positions, frequencies, form="fp8", heads=heads)
        yield index_query_finish(q, positions, frequencies, form="fp8")


def _mhc() -> Iterator[Any]:
    """One and several groups of tiles, tokens left over; sums by FMA and on tensor cores, whose
    blocks are of two sizes; one launch for one token and for pairs of them; every form, reads
    without writes and the reverse."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    eps = {"hc_eps": 1e-6, "rms_eps": 1e-6}
    shapes = ((3, 128), (2, 640), (1, 2048), (2, 4224), (20, 640), (40, 128), (130, 256))
    for t, d in (*shapes, (1, 4096), (7, 4096)):
        streams = normal(t, 4, d, dtype=jnp.bfloat16)
        write = Write(normal(t, d, dtype=jnp.bfloat16), normal(t, 4), normal(t, 4, 4))
        norm = normal(d, dtype=jnp.bfloat16)
        branch = Read(normal(24, 4 * d), normal(24), normal(3), norm)
        head = Read(normal(4, 4 * d), normal(4), normal(1), norm)
        forms = ("bfloat16", "nvfp4", "fp8")
        yield mhc(streams, write, branch, iters=20, **eps, forms=forms)
        scale = jnp.float32(0.01)
        yield mhc(streams, None, branch, scale, iters=20, **eps, forms=("nvfp4",))
        yield mhc(streams, write, head, iters=1, **eps)
        yield mhc(streams, write, None, iters=1, **eps)


def _program() -> Iterator[Any]:
    """Two lanes; the last call waits for both, and writes in place what one of them made."""

    @jax.jit
    @fused
    def calls(x: Any, weights: list[Any], slots: Any) -> Any:
        first, second = (dense_linear(x, w, dtype=jnp.bfloat16) for w in weights)
        shape = (1, *first.shape)
        return cache_write(first.reshape(shape), second.reshape(shape), slots), second

    rng = np.random.default_rng(0)
    for t, d in ((3, 256), (130, 512)):
        x, *weights = (
            jnp.asarray(rng.standard_normal((rows, d)), jnp.bfloat16) for rows in (t, d, d)
        )
        yield calls(x, weights, jnp.arange(t)[None, ::-1])


CASES: dict[str, Callable[[], Iterator[Any]]] = {
    "dsv4.attention": _attention,
    "dsv4.cache_write": _cache_write,
    "dsv4.index_query_finish": _index_query_finish,
    "dsv4.index_topk": _index_topk,
    "dsv4.key_finish": _key_finish,
    "dsv4.compressor": _compressor,
    "dsv4.mhc": _mhc,
    "dsv4.moe": _moe,
    "dsv4.dense_linear": _dense_linear,
    "dsv4.fp8_linear": _fp8_linear,
    "dsv4.mxfp4_linear": _mxfp4_linear,
    "dsv4.nvfp4_linear": _nvfp4_linear,
    "dsv4.program": _program,
    "dsv4.query_finish": _query_finish,
    "dsv4.rmsnorm_fp8": _rmsnorm_fp8,
    "dsv4.rmsnorm_nvfp4": _rmsnorm_nvfp4,
    "dsv4.router": _router,
}
"""One function per target of the library; a target without one is an error."""


class _Dtype(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", _Dtype),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        # The rest of DLManagedTensor.
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class _Exporter:
    """What `jax.dlpack.from_dlpack` asks of an array, for FP32 at any address."""

    def __init__(self, address: int, shape: tuple[int, ...]) -> None:
        self.dims = (ctypes.c_int64 * len(shape))(*shape)
        self.device = (2, 0) if jax.default_backend() == "gpu" else (1, 0)  # kDLCUDA, kDLCPU
        # Called at the end of the view, maybe of the process: C code without an effect.
        deleter = ctypes.cast(ctypes.CDLL(None).abs, ctypes.c_void_p)
        self.tensor = _Tensor(
            address, *self.device, len(shape), _Dtype(2, 32, 1), self.dims, None, 0, None, deleter
        )

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **_: Any) -> Any:
        new = ctypes.pythonapi.PyCapsule_New
        new.restype = ctypes.py_object
        new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


_alive: list[_Exporter] = []  # a view has no owner that could free it


def view_of_address(address: int, shape: tuple[int, ...]) -> jax.Array:
    """FP32 at any address of the default device, allocated or not."""
    _alive.append(_Exporter(address, shape))
    return jax.dlpack.from_dlpack(_alive[-1])


def fault() -> None:
    """Rows to write, read from nowhere; ends the process."""
    cache, slots = jnp.zeros((1, 4, 64)), jnp.zeros((1, 1), jnp.int32)
    jax.block_until_ready(cache_write(cache, jnp.zeros((1, 1, 64)), slots))  # a sound one first
    try:
        jax.block_until_ready(cache_write(cache, view_of_address(NOWHERE, (1, 1, 64)), slots))
        print("no error")
    except jax.errors.JaxRuntimeError as error:
        print(error)
    sys.stdout.flush()
    os._exit(0)  # nothing on this device can be torn down any more


def run() -> dict[str, int]:
    """Calls every op; how many launches each made."""
    missing = sorted(set(library.targets()) ^ set(CASES))
    if missing:
        raise SystemExit(f"tests/bench/sanitize.py: cases and targets differ in {missing}")
    done: dict[str, int] = {}
    for target, calls in CASES.items():
        results = [jax.block_until_ready(result) for result in calls()]
        done[target] = len(results)
        captured, eager = library.launch_counts()[target]
        if jax.default_backend() == "gpu" and (captured or eager < len(results)):
            raise SystemExit(f"{target}: {eager} launches of {len(results)}, {captured} captured")
    return done


if __name__ == "__main__":
    if sys.argv[1:] == ["--fault"]:
        fault()
    else:
        for name, count in run().items():
            print(f"{name}: {count} calls on {jax.default_backend()}")
