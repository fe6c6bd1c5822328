"""Handlers reached without their ops, and operands as XLA lays them; ids are rows of acceptance A.

A new op adds a `RawCall` to TARGETS, its faults to SHAPES, and a case to tests/support/op_cases.py.
"""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dsv4_jax import library
from dsv4_jax.ops.attention import attention
from dsv4_jax.ops.cache_write import cache_write
from dsv4_jax.ops.compressor import CompressorJob, compressor
from dsv4_jax.ops.dense_linear import dense_linear
from dsv4_jax.ops.fp8_linear import fp8_linear
from dsv4_jax.ops.index_query_finish import index_query_finish
from dsv4_jax.ops.index_topk import index_topk
from dsv4_jax.ops.key_finish import key_finish
from dsv4_jax.ops.mhc import Read, Write, mhc
from dsv4_jax.ops.moe import moe
from dsv4_jax.ops.mxfp4_linear import mxfp4_linear
from dsv4_jax.ops.nvfp4_linear import nvfp4_linear
from dsv4_jax.ops.query_finish import query_finish
from dsv4_jax.ops.rmsnorm_fp8 import rmsnorm_fp8
from dsv4_jax.ops.rmsnorm_nvfp4 import rmsnorm_nvfp4
from dsv4_jax.ops.router import router
from dsv4_jax.quant.kv import IndexRows, KvRows
from dsv4_jax.typing import E2M1, E4M3, UE8M0
from tests.support import programs
from tests.support.numerics import assert_same_tree
from tests.support.op_cases import CASES, OpCase

F16, F32, BF16 = jnp.float16, jnp.float32, jnp.bfloat16
I16, I32, U8 = jnp.int16, jnp.int32, jnp.uint8
Spec = jax.ShapeDtypeStruct


def s(shape: str, dtype: Any = BF16) -> Spec:
    """``s("5 4 48")``."""
    return Spec(tuple(int(n) for n in shape.split()), dtype)


@dataclasses.dataclass(frozen=True)
class RawCall:
    """A target, called past its op; operands are zeros. Scratch, of bytes, is not returned."""

    op: str
    operands: tuple[Spec, ...]
    results: tuple[Spec, ...]
    attributes: dict[str, Any]

    def __call__(self) -> Any:
        return self.run(self.jitted())

    def jitted(self) -> Callable[..., Any]:
        """A jit of its own: JAX would take the executable of an attribute that compares equal."""
        target = jax.ffi.ffi_call(f"dsv4.{self.op}", self.results)
        return jax.jit(lambda *operands: target(*operands, **self.attributes))

    def run(self, fn: Callable[..., Any]) -> list[jax.Array]:
        """On zeros of the host: on the device each shape would be one more program."""
        results = fn(*(np.zeros(x.shape, x.dtype) for x in self.operands))
        return [x for x in jax.block_until_ready(results) if x.dtype != U8]


Mutation = Callable[[RawCall], RawCall]


def _swap(specs: tuple[Spec, ...], at: int, spec: Spec) -> tuple[Spec, ...]:
    return (*specs[:at], spec, *specs[at + 1 :])


def operand(at: int, shape: str, dtype: Any = BF16) -> Mutation:
    """Operand ``at`` with another shape or dtype."""
    return lambda call: dataclasses.replace(
        call, operands=_swap(call.operands, at, s(shape, dtype))
    )


def result(at: int, shape: str, dtype: Any = BF16) -> Mutation:
    """Result ``at`` with another shape or dtype."""
    return lambda call: dataclasses.replace(call, results=_swap(call.results, at, s(shape, dtype)))


def first(operands: int | None = None, results: int | None = None) -> Mutation:
    """Only so many operands and results."""
    return lambda call: dataclasses.replace(
        call, operands=call.operands[:operands], results=call.results[:results]
    )


def more(operands: tuple[Spec, ...] = (), results: tuple[Spec, ...] = ()) -> Mutation:
    """Further operands and results."""
    return lambda call: dataclasses.replace(
        call, operands=call.operands + operands, results=call.results + results
    )


def all_of(*mutations: Mutation) -> Mutation:
    """One after the other."""

    def mutate(call: RawCall) -> RawCall:
        for mutation in mutations:
            call = mutation(call)
        return call

    return mutate


def attributes(**changed: Any) -> Mutation:
    """Attributes changed or, with None, left out."""

    def mutate(call: RawCall) -> RawCall:
        changes = call.attributes | changed
        return dataclasses.replace(
            call, attributes={name: x for name, x in changes.items() if x is not None}
        )

    return mutate


ABI = np.int32(library.ABI)
QUERY = (s("5 144"), s("144"))
QUERY_RESULTS = (s("5 144", E4M3), s("5 2", UE8M0))
"""A second job of key_finish."""
GIVEN = all_of(attributes(given=np.int32(1)), operand(1, "3 6", I32))
"""Ids in the place of the router's bias."""


def moe_call(form: int, act: int, *scales: Callable[[int, int], Spec]) -> RawCall:
    """One token more than experts, and scratch of exactly the size."""
    e, inter, d = 2, 32, 64
    leaves = []
    for rows, inputs in ((inter, d), (inter, d), (d, inter)):
        leaves += [s(f"{e} {rows} {inputs}", E2M1), *(scale(rows, inputs) for scale in scales)]
    operands = s("3 64"), s("3 2", I32), s("3 2", F32), s("3", U8), *leaves, s("3 64")
    scratch = (6 + 63 * e) * (2 * (128 + 128 + d + inter) + 32) + 4 * 6 + 4096
    attributes = {
        "abi": ABI,
        "form": np.int32(form),
        "act": np.int32(act),
        "regime": np.int32(0),
        "first_expert": np.int32(0),
        "has_shared": np.int32(1),
        "power_of_two": np.int32(0),
        "limit": np.float32(10),
    }
    return RawCall("moe", operands, (s("3 64"), s(f"{scratch}", U8)), attributes)


def stored_keys(s_: int) -> tuple[Spec, ...]:
    """A store of two rows: 64 + 32 channels."""
    return s(f"2 {s_} 64", E4M3), s(f"2 {s_} 1", UE8M0), s(f"2 {s_} 32")


def compressor_call(index: bool, ratio: int = 4) -> RawCall:
    """Two rows of three tokens: keys of 64 + 32 channels, MXFP4 index keys of 64."""
    halves = 2 if ratio == 4 else 1
    operands: list[Spec] = [s("2", I32), s("2", I32), s("16", F32)]
    results: list[Spec] = []
    for d, pool in ((96, stored_keys(10)), (64, (s("2 10 64", E2M1), s("2 10 2", UE8M0)))):
        n = halves * d
        operands += [s(f"2 3 {n}", F32)] * 2 + [s(f"{ratio} {n}", F32), s(f"{d}")]
        written = [s(f"2 {halves * ratio} {n}", F32)] * 2 + list(pool)
        operands += written
        results += written
        if not index:
            break
    attributes = {
        "abi": ABI,
        "ratio": np.int32(ratio),
        "form0": np.int32(1),
        "form1": np.int32(2 if index else 0),
        "eps": np.float32(1e-6),
    }
    return RawCall("compressor", tuple(operands), tuple(results), attributes)


NVFP4_MOE = moe_call(3, 2, lambda n, k: s(f"2 {n} {k // 16}", E4M3), lambda n, k: s("2", F32))
SCRATCH = s("33536", U8)  # of the linears below: 128 tokens of 128 inputs
SEVERAL = RawCall(
    "dense_linear",
    (s("3 32"), s("10 32"), s("5 32")),
    (s("3 10", F32), s("3 5", F32), SCRATCH),
    {"abi": ABI, "regime": np.int32(0)},
)
SEVERAL_FP8 = RawCall(
    "fp8_linear",
    (s("3 32"), s("10 32", E4M3), s("5 32", E4M3), s("1 1", UE8M0), s("1 1", UE8M0)),
    (s("3 10", F32), s("3 5"), SCRATCH),
    {"abi": ABI, "act": np.int32(1), "regime": np.int32(0), "limit": np.float32(0)},
)
SEVERAL_NVFP4 = RawCall(
    "nvfp4_linear",
    (
        *(s("3 32"), s("10 32", E2M1), s("5 32", E2M1)),
        *(s("10 2", E4M3), s("5 2", E4M3), s("", F32), s("", F32)),
    ),
    (s("3 10", F32), s("3 5"), SCRATCH),
    {"abi": ABI, "act": np.int32(2), "regime": np.int32(0), "limit": np.float32(0)},
)
GATED_NVFP4 = RawCall(
    "nvfp4_linear",
    (s("3 2 32"), s("10 32", E2M1), s("10 2", E4M3), s("", F32), s("", F32), s("3 2 32")),
    (s("3 2 5", F32), SCRATCH),
    {"abi": ABI, "act": np.int32(2), "regime": np.int32(0), "limit": np.float32(10)},
)
GATED_FP8 = RawCall(
    "fp8_linear",
    (s("3 2 32"), s("10 32", E4M3), s("1 1", UE8M0), s("3 2 32")),
    (s("3 2 5", F32), SCRATCH),
    {"abi": ABI, "act": np.int32(1), "regime": np.int32(0), "limit": np.float32(10)},
)
CODED_FP8 = RawCall(
    "fp8_linear",
    (
        *(s("3 2 256", E4M3), s("10 256", E4M3), s("6 256", E4M3)),
        *(s("1 2", UE8M0), s("1 2", UE8M0), s("3 2 2", UE8M0)),
    ),
    (s("3 2 5", F32), s("3 2 3"), SCRATCH),
    {"abi": ABI, "act": np.int32(1), "regime": np.int32(0), "limit": np.float32(0)},
)
LINEARS = ("dense_linear", "fp8_linear", "mxfp4_linear", "nvfp4_linear")
TARGETS = {
    call.op: call
    for call in [
        RawCall(
            "rmsnorm_nvfp4",
            (s("3 32"), s("32")),
            (s("3 32", E2M1), s("3 2", E4M3), s("3", F32)),
            {"abi": ABI, "eps": np.float32(1e-6)},
        ),
        RawCall(
            "cache_write",
            (
                s("2 3", I32),
                *(s("2 8 16", E4M3), s("2 8 7", UE8M0), s("2 8 6", E2M1)),
                *(s("2 3 16", E4M3), s("2 3 7", UE8M0), s("2 3 6", E2M1)),
            ),
            (s("2 8 16", E4M3), s("2 8 7", UE8M0), s("2 8 6", E2M1)),
            {"abi": ABI},
        ),
        RawCall(
            "rmsnorm_fp8",
            (s("3 144"), s("144")),
            (s("3 144", E4M3), s("3 2", UE8M0)),
            {"abi": ABI, "eps": np.float32(1e-6)},
        ),
        RawCall(
            "query_finish",
            (s("3 4 96"), s("3", I32), s("16", F32)),
            (s("3 4 96"),),
            {"abi": ABI, "eps": np.float32(1e-6), "bf16_steps": np.int32(1)},
        ),
        RawCall(
            "key_finish",
            (
                *(s("2 3 96"), s("96"), s("2", I32), s("16", F32), s("2", I32)),
                *stored_keys(8),
            ),
            (*stored_keys(3), *stored_keys(8)),
            {"abi": ABI, "eps": np.float32(1e-6)},
        ),
        RawCall(
            "index_query_finish",
            (s("3 4 64"), s("3", I32), s("16", F32)),
            (s("3 4 64", E2M1), s("3 4 2", UE8M0)),
            {
                "abi": ABI,
                "form": np.int32(1),
                "eps": np.float32(1e-6),
                "bf16_steps": np.int32(1),
            },
        ),
        RawCall(
            "router",
            (s("3 40", F32), s("40", F32)),
            (s("3 6", I32), s("3 6", F32)),
            {"abi": ABI, "given": np.int32(0), "scale": np.float32(2.5)},
        ),
        RawCall(
            "attention",
            (
                *(s("2 3 4 96"), s("2 3", I32), s("4", F32), *stored_keys(8)),
                *(*stored_keys(3), s("2", I32)),
                *(*stored_keys(10), s("2 3", I32), s("2 3 5", I32), s("16", F32)),
            ),
            (s("2 3 4 96"), s("2 3 4", F32)),
            {
                "abi": ABI,
                "window": np.int32(8),
                "regime": np.int32(0),
                "has_chunk": np.int32(1),
                "has_pool": np.int32(1),
                "has_topk": np.int32(1),
                "has_frequencies": np.int32(1),
            },
        ),
        RawCall(
            "index_topk",
            (
                *(s("2 3 4 64", E2M1), s("2 3 4 2", UE8M0), s("2 3 4", F32)),
                *(s("2 10 64", E2M1), s("2 10 2", UE8M0), s("2 3", I32)),
            ),
            (s("2 3 5", I32), s("2 3 10", F32), s("336", U8)),  # scratch of exactly the size
            {"abi": ABI, "weight_scale": np.float32(0.5)},
        ),
        compressor_call(True),
        RawCall(
            "mhc",
            (
                *(s("3 4 256"), s("3 256"), s("3 4", F32), s("3 4 4", F32)),
                *(s("24 1024", F32), s("24", F32), s("3", F32), s("256"), s("", F32)),
            ),
            (
                *(s("3 4 256"), s("3 4", F32), s("3 4 4", F32), s("3 256")),
                *(s("3 256", E2M1), s("3 16", E4M3), s("3", F32)),
                *(s("3 256", E4M3), s("3 2", UE8M0), s("672", U8)),  # scratch of exactly the size
            ),
            {
                "abi": ABI,
                "write": np.int32(1),
                "mixes": np.int32(24),
                "forms": np.int32(7),
                "iters": np.int32(20),
                "regime": np.int32(0),
                "hc_eps": np.float32(1e-6),
                "rms_eps": np.float32(1e-6),
            },
        ),
        moe_call(2, 1, lambda n, k: s(f"2 {n} {k // 32}", UE8M0)),
        RawCall(
            "dense_linear",
            (s("3 32"), s("10 32")),
            (s("3 10", F32), SCRATCH),
            {"abi": ABI, "regime": np.int32(0)},
        ),
        RawCall(
            "fp8_linear",
            (s("3 32"), s("10 32", E4M3), s("1 1", UE8M0)),
            (s("3 10", F32), SCRATCH),
            {"abi": ABI, "act": np.int32(1), "regime": np.int32(1), "limit": np.float32(0)},
        ),
        RawCall(
            "mxfp4_linear",
            (s("3 32"), s("10 32", E2M1), s("10 1", UE8M0)),
            (s("3 10"), SCRATCH),
            {"abi": ABI, "act": np.int32(1), "regime": np.int32(2)},
        ),
        RawCall(
            "nvfp4_linear",
            (s("3 32"), s("10 32", E2M1), s("10 2", E4M3), s("", F32)),
            (s("3 10"), SCRATCH),
            {"abi": ABI, "act": np.int32(2), "regime": np.int32(0), "limit": np.float32(0)},
        ),
    ]
}
OPS = list(TARGETS)


def nvfp4(mutation: Mutation) -> Mutation:
    """Of the call with NVFP4 weights instead."""
    return lambda call: mutation(NVFP4_MOE)


def several(mutation: Mutation) -> Mutation:
    """Of the call with two weights instead."""
    return lambda call: mutation(SEVERAL)


def several_fp8(mutation: Mutation) -> Mutation:
    """The same of `fp8_linear`."""
    return lambda call: mutation(SEVERAL_FP8)


def several_nvfp4(mutation: Mutation) -> Mutation:
    """The same of `nvfp4_linear`."""
    return lambda call: mutation(SEVERAL_NVFP4)


def coded(mutation: Mutation) -> Mutation:
    """The same with ``x`` that is quantised, in two groups."""
    return lambda call: mutation(CODED_FP8)


def gated(mutation: Mutation) -> Mutation:
    """The same with ``x`` that is a gate, in two groups."""
    return lambda call: mutation(GATED_FP8)


def gated_nvfp4(mutation: Mutation) -> Mutation:
    """The same of `nvfp4_linear`, with a static scale."""
    return lambda call: mutation(GATED_NVFP4)


def _nine_weights(call: RawCall) -> RawCall:
    """One more than there may be."""
    x, weight = call.operands
    y, scratch = call.results
    return dataclasses.replace(call, operands=(x, *[weight] * 9), results=(*[y] * 9, scratch))


def _less_scratch(call: RawCall) -> RawCall:
    """A byte less than needed."""
    return result(1, str(call.results[1].shape[0] - 1), U8)(call)


def alone(mutation: Mutation) -> Mutation:
    """Of the compressor's call with one job, as HCA has it."""
    return lambda call: mutation(compressor_call(False, 16))


LAYER = "the FFI layer"  # speaks first, and without the name of the op

# (op, its operand or result at fault, mutation, what the handler says)
SHAPES: list[tuple[str, str, Mutation, str]] = [
    ("rmsnorm_fp8", "x-rank", operand(0, "144"), r"x must be \[t, d\], got \[144\]"),
    (
        "rmsnorm_fp8",
        "x-channels",
        operand(0, "3 24"),
        r"x must have a multiple of 16 channels, 16..16384, got \[3, 24\]",
    ),
    ("rmsnorm_fp8", "x-none", operand(0, "3 0"), "x must have a multiple of 16 channels"),
    ("rmsnorm_fp8", "x-too-wide", operand(0, "3 16400"), "x must have .*16..16384, got"),
    ("rmsnorm_fp8", "x-dtype", operand(0, "3 144", F32), "x must be bfloat16, got float32"),
    ("rmsnorm_fp8", "weight-shape", operand(1, "143"), r"weight must be \[144\], got \[143\]"),
    ("rmsnorm_fp8", "weight-dtype", operand(1, "144", F32), "weight must be bfloat16, got"),
    ("rmsnorm_fp8", "code-shape", result(0, "3 128", E4M3), r"code must be \[3, 144\], got"),
    ("rmsnorm_fp8", "code-dtype", result(0, "3 144", UE8M0), "code must be float8_e4m3fn, got"),
    ("rmsnorm_fp8", "scale-shape", result(1, "3 1", UE8M0), r"scale must be \[3, 2\], got"),
    ("rmsnorm_fp8", "scale-dtype", result(1, "3 2", E4M3), "scale must be float8_e8m0fnu, got"),
    ("rmsnorm_fp8", "operands-too-few", first(operands=1), LAYER),
    ("rmsnorm_fp8", "results-too-many", more(results=(s("3", F32),)), LAYER),
    ("query_finish", "x-rank", operand(0, "12 96"), r"x must be \[t, h, d\], got \[12, 96\]"),
    (
        "query_finish",
        "x-channels",
        operand(0, "3 4 100"),
        r"x must have a multiple of 8 channels, 8..512, got \[3, 4, 100\]",
    ),
    ("query_finish", "x-none", operand(0, "3 4 0"), "x must have a multiple of 8 channels"),
    ("query_finish", "x-too-wide", operand(0, "3 4 520"), "x must have .*8..512, got"),
    ("query_finish", "x-dtype", operand(0, "3 4 96", F32), "x must be bfloat16, got float32"),
    (
        "query_finish",
        "positions-shape",
        operand(1, "4", I32),
        r"positions must be \[3\], got \[4\]",
    ),
    ("query_finish", "positions-dtype", operand(1, "3", F32), "positions must be int32, got"),
    (
        "query_finish",
        "frequencies-odd",
        operand(2, "6", F32),
        r"frequencies must be a multiple of 4, at most 32 and half of x's 96 channels, got \[6\]",
    ),
    ("query_finish", "frequencies-many", operand(2, "36", F32), "frequencies must be .*got"),
    (
        "query_finish",
        "frequencies-wider",
        all_of(operand(0, "3 4 8"), result(0, "3 4 8")),
        "frequencies must be .*x's 8 channels, got",
    ),
    ("query_finish", "frequencies-rank", operand(2, "4 4", F32), "frequencies must be .*got"),
    ("query_finish", "frequencies-dtype", operand(2, "16"), "frequencies must be float32, got"),
    ("query_finish", "bf16_steps", attributes(bf16_steps=np.int32(2)), "bf16_steps must be 0 or 1"),
    ("query_finish", "y-shape", result(0, "3 4 64"), r"y must be \[3, 4, 96\], got"),
    ("query_finish", "y-dtype", result(0, "3 4 96", F32), "y must be bfloat16, got float32"),
    ("query_finish", "operands-too-few", first(operands=2), LAYER),
    ("query_finish", "results-too-many", more(results=(s("3"),)), LAYER),
    ("key_finish", "x-rank", operand(0, "6 96"), r"x must be \[b, t, d\], got \[6, 96\]"),
    (
        "key_finish",
        "x-channels",
        operand(0, "2 3 104"),
        r"x must have a multiple of 64 channels before the rotary 32, .*got \[2, 3, 104\]",
    ),
    ("key_finish", "x-no-codes", operand(0, "2 3 32"), "x must have a multiple of 64 .*got"),
    ("key_finish", "x-too-wide", operand(0, "2 3 544"), "x must have .*at most 512 .*got"),
    ("key_finish", "x-dtype", operand(0, "2 3 96", F32), "x must be bfloat16, got float32"),
    ("key_finish", "weight-shape", operand(1, "95"), r"weight must be \[96\], got \[95\]"),
    ("key_finish", "weight-dtype", operand(1, "96", F32), "weight must be bfloat16, got float32"),
    ("key_finish", "start-shape", operand(2, "3", I32), r"start must be \[2\], got \[3\]"),
    ("key_finish", "start-dtype", operand(2, "2", F32), "start must be int32, got float32"),
    ("key_finish", "frequencies-odd", operand(3, "6", F32), "frequencies must be a multiple of 4"),
    ("key_finish", "frequencies-rank", operand(3, "4 4", F32), "frequencies must be .*got"),
    ("key_finish", "frequencies-dtype", operand(3, "16"), "frequencies must be float32, got"),
    ("key_finish", "count-shape", operand(4, "3", I32), r"count must be \[2\], got \[3\]"),
    ("key_finish", "count-dtype", operand(4, "2", F32), "count must be int32, got float32"),
    ("key_finish", "ring-rank", operand(5, "16 64", E4M3), r"ring nope must be \[b, s, nope\]"),
    (
        "key_finish",
        "ring-batch",
        operand(5, "1 8 64", E4M3),
        r"ring operand 0 must be \[2, 8, 64\], got \[1, 8, 64\]",
    ),
    ("key_finish", "ring-dtype", operand(5, "2 8 64", U8), "ring operand 0 must be float8_e4m3fn"),
    ("key_finish", "ring-scale", operand(6, "2 8 2", UE8M0), r"ring operand 1 must be \[2, 8, 1\]"),
    ("key_finish", "ring-rope", operand(7, "2 8 32", F32), "ring operand 2 must be bfloat16, got"),
    ("key_finish", "rows-nope", result(0, "2 3 32", E4M3), r"rows nope must be \[2, 3, 64\], got"),
    ("key_finish", "rows-scale", result(1, "2 3 1", E4M3), "rows scale must be float8_e8m0fnu"),
    ("key_finish", "rows-rope", result(2, "2 4 32"), r"rows rope must be \[2, 3, 32\], got"),
    (
        "key_finish",
        "ring-result",
        result(3, "2 9 64", E4M3),
        r"ring nope must be \[2, 8, 64\], got",
    ),
    (
        "key_finish",
        "ring-result-dtype",
        result(5, "2 8 32", F32),
        "ring rope must be bfloat16, got",
    ),
    ("key_finish", "ring-without-count", first(operands=7), "must have 4 operands .*got 7 and 6"),
    ("key_finish", "results-too-few", first(results=5), "must have 4 operands .*got 8 and 5"),
    ("key_finish", "rows-alone", first(operands=4), "must have 4 operands .*got 4 and 6"),
    ("key_finish", "operands-too-few", first(operands=3), LAYER),
    (
        "key_finish",
        "query-without-weight",
        more((s("5 144"),), QUERY_RESULTS),
        "must have 4 operands .*2 and 1 or 2 more with a query, got 9 and 8",
    ),
    (
        "key_finish",
        "query-without-results",
        more(QUERY),
        "must have 4 operands .*2 and 1 or 2 more with a query, got 10 and 6",
    ),
    *(
        ("key_finish", f"query-{name}", all_of(more(QUERY, QUERY_RESULTS), mutation), message)
        for name, mutation, message in (
            ("x-rank", operand(8, "1 5 144"), r"query x must be \[n, r\], got \[1, 5, 144\]"),
            ("x-dtype", operand(8, "5 144", F32), "query x must be bfloat16, got float32"),
            ("x-channels", operand(8, "5 136"), r"query x must have a multiple of 16 .*\[5, 136\]"),
            ("weight-shape", operand(9, "143"), r"query weight must be \[144\], got \[143\]"),
            ("weight-dtype", operand(9, "144", F32), "query weight must be bfloat16, got"),
            ("code-shape", result(6, "4 144", E4M3), r"query code must be \[5, 144\], got"),
            ("code-dtype", result(6, "5 144", U8), "query code must be float8_e4m3fn, got uint8"),
            ("scale-shape", result(7, "5 1", UE8M0), r"query scale must be \[5, 2\], got"),
            ("scale-dtype", result(7, "5 2", U8), "query scale must be float8_e8m0fnu, got"),
        )
    ),
    *(
        ("key_finish", f"query-y-{name}", more(QUERY, (s(*spec),)), message)
        for name, spec, message in (
            ("shape", ("4 144",), r"query y must be \[5, 144\], got \[4, 144\]"),
            ("dtype", ("5 144", F32), "query y must be bfloat16, got float32"),
        )
    ),
    ("index_query_finish", "x-rank", operand(0, "12 64"), r"x must be \[t, h, d\], got"),
    (
        "index_query_finish",
        "x-channels",
        operand(0, "3 4 96"),
        r"x must have 32, 64 or 128 channels, got \[3, 4, 96\]",
    ),
    ("index_query_finish", "x-dtype", operand(0, "3 4 64", F32), "x must be bfloat16, got float32"),
    (
        "index_query_finish",
        "positions-shape",
        operand(1, "4", I32),
        r"positions must be \[3\], got",
    ),
    ("index_query_finish", "positions-dtype", operand(1, "3", U8), "positions must be int32, got"),
    ("index_query_finish", "frequencies-odd", operand(2, "6", F32), "frequencies must be .*got"),
    ("index_query_finish", "frequencies-dtype", operand(2, "16"), "frequencies must be float32"),
    ("index_query_finish", "form", attributes(form=np.int32(3)), "form must be 1 .*got 3"),
    ("index_query_finish", "code-dtype", result(0, "3 4 64", E4M3), "code must be float4_e2m1fn"),
    ("index_query_finish", "code-form", attributes(form=np.int32(2)), "code must be float8_e4m3fn"),
    ("index_query_finish", "code-shape", result(0, "3 4 32", E2M1), r"code must be \[3, 4, 64\]"),
    ("index_query_finish", "scale-dtype", result(1, "3 4 2", E4M3), "scale must be float8_e8m0fnu"),
    ("index_query_finish", "scale-shape", result(1, "3 4 1", UE8M0), r"scale must be \[3, 4, 2\]"),
    ("index_query_finish", "operands-too-few", first(operands=2), LAYER),
    (
        "index_query_finish",
        "heads-without-result",
        more((s("3 2 96"),)),
        "must have 3 operands and 2 results, 1 and 1 more with heads, got 4 and 2",
    ),
    ("index_query_finish", "bf16_steps", attributes(bf16_steps=np.int32(2)), "bf16_steps must be"),
    *(
        (
            "index_query_finish",
            f"heads-{name}",
            all_of(more((s("3 2 96"),), (s("3 2 96"),)), mutation),
            message,
        )
        for name, mutation, message in (
            ("rank", operand(3, "6 96"), r"heads x must be \[t, n, c\] .*got \[6, 96\]"),
            ("tokens", operand(3, "4 2 96"), r"heads x must be \[3, 2, 96\], got \[4, 2, 96\]"),
            ("channels", operand(3, "3 2 92"), "heads x must be .*multiple of 8, rotary 32..512"),
            ("too-narrow", operand(3, "3 2 24"), "heads x must be .*multiple of 8, rotary 32..512"),
            ("dtype", operand(3, "3 2 96", F32), "heads x must be bfloat16, got float32"),
            ("result-shape", result(2, "3 2 95"), r"heads y must be \[3, 2, 96\], got"),
            ("result-dtype", result(2, "3 2 96", F32), "heads y must be bfloat16, got float32"),
        )
    ),
    ("index_query_finish", "results-too-few", first(results=1), LAYER),
    ("attention", "q-rank", operand(0, "6 4 96"), r"q must be \[b, t, h, d\], got \[6, 4, 96\]"),
    ("attention", "q-dtype", operand(0, "2 3 4 96", F32), "q must be bfloat16, got float32"),
    (
        "attention",
        "q-odd",
        operand(0, "2 3 4 97"),
        r"q must have an even number of channels, at most 2048, got \[2, 3, 4, 97\]",
    ),
    (
        "attention",
        "q-too-wide",
        operand(0, "2 3 4 2050"),
        r"q must have an even number of channels, at most 2048, got \[2, 3, 4, 2050\]",
    ),
    (
        "attention",
        "positions-shape",
        operand(1, "2 4", I32),
        r"positions must be \[2, 3\], got \[2, 4\]",
    ),
    (
        "attention",
        "positions-dtype",
        operand(1, "2 3", F32),
        "positions must be int32, got float32",
    ),
    ("attention", "sink-shape", operand(2, "3", F32), r"sink must be \[4\], got \[3\]"),
    ("attention", "sink-dtype", operand(2, "4"), "sink must be float32, got bfloat16"),
    (
        "attention",
        "ring-rank",
        operand(3, "16 64", E4M3),
        r"ring nope must be \[b, s, nope\] with a multiple of 64 .*q's 96, got \[16, 64\]",
    ),
    (
        "attention",
        "ring-block",
        operand(3, "2 8 32", E4M3),
        r"ring nope must be .*multiple of 64 channels.*got \[2, 8, 32\]",
    ),
    (
        "attention",
        "ring-wider-than-q",
        operand(3, "2 8 128", E4M3),
        r"ring nope must be .*at most q's 96, got \[2, 8, 128\]",
    ),
    (
        "attention",
        "ring-batch",
        operand(3, "1 8 64", E4M3),
        r"ring nope must be \[2, 8, 64\], got \[1, 8, 64\]",
    ),
    (
        "attention",
        "ring-dtype",
        operand(3, "2 8 64", U8),
        "ring nope must be float8_e4m3fn, got uint8",
    ),
    (
        "attention",
        "ring-scale-shape",
        operand(4, "2 8 2", UE8M0),
        r"ring scale must be \[2, 8, 1\], got \[2, 8, 2\]",
    ),
    (
        "attention",
        "ring-scale-dtype",
        operand(4, "2 8 1", E4M3),
        "ring scale must be float8_e8m0fnu, got float8_e4m3fn",
    ),
    (
        "attention",
        "ring-rope-shape",
        operand(5, "2 7 32"),
        r"ring rope must be \[2, 8, 32\], got \[2, 7, 32\]",
    ),
    (
        "attention",
        "ring-too-short",
        attributes(window=np.int32(10)),
        "ring must have at least 9 slots for 3 tokens and window 10, got 8",
    ),
    (
        "attention",
        "chunk-batch",
        operand(6, "3 3 64", E4M3),
        r"chunk nope must be \[2, 3, 64\], got \[3, 3, 64\]",
    ),
    (
        "attention",
        "chunk-rank",
        operand(6, "6 64", E4M3),
        r"chunk nope must be \[b, s, nope\], got \[6, 64\]",
    ),
    ("attention", "chunk-rope-dtype", operand(8, "2 3 32", F32), "chunk rope must be bfloat16"),
    ("attention", "start-shape", operand(9, "3", I32), r"start must be \[2\], got \[3\]"),
    (
        "attention",
        "pool-scale-shape",
        operand(11, "2 9 1", UE8M0),
        r"pool scale must be \[2, 10, 1\], got \[2, 9, 1\]",
    ),
    (
        "attention",
        "n_visible-dtype",
        operand(13, "2 3", I16),
        "n_visible must be int32, got another dtype",
    ),
    ("attention", "n_visible-shape", operand(13, "2 2", I32), r"n_visible must be \[2, 3\], got"),
    (
        "attention",
        "topk_idx-shape",
        operand(14, "2 4 5", I32),
        r"topk_idx must be \[2, 3, 5\], got \[2, 4, 5\]",
    ),
    (
        "attention",
        "topk_idx-rank",
        operand(14, "2 3", I32),
        r"topk_idx must be \[2, 3, 0\], got \[2, 3\]",
    ),
    (
        "attention",
        "frequencies-shape",
        operand(15, "15", F32),
        r"frequencies must be \[16\], got \[15\]",
    ),
    ("attention", "operands-too-few", first(operands=15), "must have 13 operands .*got 12"),
    ("attention", "operands-too-many", more((s("16", F32),)), "must have 13 operands .*got 14"),
    ("attention", "operands-none", first(operands=2), LAYER),
    (
        "attention",
        "chunk-unsaid",
        attributes(has_chunk=np.int32(0)),
        "must have 9 operands .*got 13",
    ),
    ("attention", "flag", attributes(has_pool=np.int32(2)), "has_pool must be 0 or 1, got 2"),
    (
        "attention",
        "topk-without-pool",
        attributes(has_pool=np.int32(0)),
        "has_topk must be 0 without has_pool, got 1",
    ),
    ("attention", "window", attributes(window=np.int32(0)), "window must be at least 1, got 0"),
    ("attention", "regime", attributes(regime=np.int32(4)), r"regime must be 0 .*got 4"),
    ("attention", "o-dtype", result(0, "2 3 4 96", F32), "o must be bfloat16, got float32"),
    ("attention", "o-shape", result(0, "2 3 4 64"), r"o must be \[2, 3, 4, 96\], got"),
    ("attention", "lse-dtype", result(1, "2 3 4"), "lse must be float32, got bfloat16"),
    ("attention", "lse-shape", result(1, "2 3 5", F32), r"lse must be \[2, 3, 4\], got"),
    ("attention", "results-too-few", first(results=1), LAYER),
    (
        "index_topk",
        "q-rank",
        operand(0, "6 4 64", E2M1),
        r"q must be \[b, t, h, d\], got \[6, 4, 64\]",
    ),
    (
        "index_topk",
        "q-dtype",
        operand(0, "2 3 4 64"),
        "q must be float4_e2m1fn or float8_e4m3fn, got bfloat16",
    ),
    (
        "index_topk",
        "q-block",
        operand(0, "2 3 4 48", E2M1),
        r"q must have a multiple of 32 channels, 1..1024, got \[2, 3, 4, 48\]",
    ),
    (
        "index_topk",
        "q-too-wide",
        operand(0, "2 3 4 1056", E2M1),
        r"q must have a multiple of 32 channels, 1..1024, got \[2, 3, 4, 1056\]",
    ),
    (
        "index_topk",
        "q-no-channels",
        all_of(operand(0, "2 3 4 0", E4M3), operand(3, "2 10 0", E4M3)),
        r"q must have a multiple of 1 channels, 1..1024, got \[2, 3, 4, 0\]",
    ),
    (
        "index_topk",
        "q-scale-dtype",
        operand(1, "2 3 4 2", U8),
        "q scale must be float8_e8m0fnu, got uint8",
    ),
    (
        "index_topk",
        "q-scale-shape",
        operand(1, "2 3 4 1", UE8M0),
        r"q scale must be \[2, 3, 4, 2\], got \[2, 3, 4, 1\]",
    ),
    (
        "index_topk",
        "weight-dtype",
        operand(2, "2 3 4", U8),
        "weight must be bfloat16 or float32, got uint8",
    ),
    (
        "index_topk",
        "weight-shape",
        operand(2, "2 3 5", F32),
        r"weight must be \[2, 3, 4\], got \[2, 3, 5\]",
    ),
    (
        "index_topk",
        "key-dtype",
        operand(3, "2 10 64", E4M3),
        "key must be float4_e2m1fn, got float8_e4m3fn",
    ),
    ("index_topk", "key-rank", operand(3, "20 64", E2M1), r"key must be \[b, s, d\] .*\[20, 64\]"),
    (
        "index_topk",
        "key-batch",
        operand(3, "1 10 64", E2M1),
        r"key must be \[2, 10, 64\], got \[1, 10, 64\]",
    ),
    (
        "index_topk",
        "key-channels",
        operand(3, "2 10 32", E2M1),
        r"key must be \[2, 10, 64\], got \[2, 10, 32\]",
    ),
    (
        "index_topk",
        "key-scale-shape",
        operand(4, "2 9 2", UE8M0),
        r"key scale must be \[2, 10, 2\], got \[2, 9, 2\]",
    ),
    (
        "index_topk",
        "key-scale-of-fp8",
        all_of(
            operand(0, "2 3 4 64", E4M3),
            operand(1, "2 3 4 1", UE8M0),
            operand(3, "2 10 64", E4M3),
        ),
        r"key scale must be \[2, 10, 1\], got \[2, 10, 2\]",
    ),
    (
        "index_topk",
        "n_visible-dtype",
        operand(5, "2 3", I16),
        "n_visible must be int32, got another dtype",
    ),
    ("index_topk", "n_visible-shape", operand(5, "2 2", I32), r"n_visible must be \[2, 3\], got"),
    ("index_topk", "operands-too-few", first(operands=5), LAYER),
    ("index_topk", "operands-too-many", more((s("2 3", I32),)), LAYER),
    ("index_topk", "results-too-few", first(results=2), LAYER),
    ("index_topk", "idx-dtype", result(0, "2 3 5", F32), "idx must be int32, got float32"),
    ("index_topk", "idx-rank", result(0, "6 5", I32), r"idx must be \[2, 3, 0\], got \[6, 5\]"),
    ("index_topk", "idx-shape", result(0, "2 4 5", I32), r"idx must be \[2, 3, 5\], got"),
    ("index_topk", "scores-dtype", result(1, "2 3 10"), "scores must be float32, got bfloat16"),
    (
        "index_topk",
        "scores-shape",
        result(1, "2 3 9", F32),
        r"scores must be \[2, 3, 10\], got \[2, 3, 9\]",
    ),
    (
        "index_topk",
        "no-scores-shape",
        result(1, "2 2 0", F32),
        r"scores must be \[2, 3, 0\], got \[2, 2, 0\]",
    ),
    ("index_topk", "scratch-dtype", result(2, "336", I32), "scratch must be uint8, got int32"),
    ("index_topk", "scratch-small", result(2, "335", U8), r"scratch must be at least \[336\], got"),
    ("index_topk", "scratch-rank", result(2, "1 336", U8), r"scratch must be .*got \[1, 336\]"),
    ("compressor", "start-rank", operand(0, "2 1", I32), r"start must be \[b\], got \[2, 1\]"),
    ("compressor", "start-dtype", operand(0, "2", F32), "start must be int32, got float32"),
    ("compressor", "count-shape", operand(1, "3", I32), r"count must be \[2\], got \[3\]"),
    ("compressor", "count-dtype", operand(1, "2", I16), "count must be int32, got another dtype"),
    ("compressor", "frequencies-rank", operand(2, "1 16", F32), r"frequencies must be \[f\], got"),
    ("compressor", "frequencies-dtype", operand(2, "16"), "frequencies must be float32, got"),
    (
        "compressor",
        "frequencies-length",
        operand(2, "15", F32),
        r"job 0 norm must have a multiple of 64 and the rotary 30 channels.*got \[96\]",
    ),
    (
        "compressor",
        "frequencies-too-many",
        operand(2, "49", F32),
        r"job 0 norm must have a multiple of 64 and the rotary 98 channels.*got \[96\]",
    ),
    ("compressor", "kv-rank", operand(3, "6 192", F32), r"job 0 kv must be \[b, t, c \* d\], got"),
    (
        "compressor",
        "kv-batch",
        operand(3, "3 3 192", F32),
        r"job 0 kv must be \[2, 3, 192\], got \[3, 3, 192\]",
    ),
    ("compressor", "kv-dtype", operand(3, "2 3 192"), "job 0 kv must be float32, got bfloat16"),
    (
        "compressor",
        "gate-shape",
        operand(4, "2 4 192", F32),
        r"job 0 gate must be \[2, 3, 192\], got \[2, 4, 192\]",
    ),
    (
        "compressor",
        "ape-shape",
        operand(5, "3 192", F32),
        r"job 0 ape must be \[4, 192\], got \[3, 192\]",
    ),
    ("compressor", "norm-rank", operand(6, "1 96"), r"job 0 norm must be \[d\], got \[1, 96\]"),
    ("compressor", "norm-dtype", operand(6, "96", F32), "job 0 norm must be bfloat16, got float32"),
    (
        "compressor",
        "norm-width",
        operand(6, "98"),
        r"job 0 norm must have a multiple of 64 .*a multiple of 4 and at most 512, got \[98\]",
    ),
    (
        "compressor",
        "norm-too-wide",
        operand(6, "608"),
        r"job 0 norm must have .*at most 512, got \[608\]",
    ),
    (
        "compressor",
        "state-rank",
        operand(7, "16 192", F32),
        r"job 0 kv_state must be \[b, ring, c \* d\] .*at least 8, got \[16, 192\]",
    ),
    (
        "compressor",
        "state-too-short",
        all_of(operand(7, "2 7 192", F32), operand(8, "2 7 192", F32)),
        r"job 0 kv_state must be .*ring of at least 8, got \[2, 7, 192\]",
    ),
    (
        "compressor",
        "state-of-gates",
        operand(8, "2 9 192", F32),
        r"job 0 gate_state must be \[2, 8, 192\], got \[2, 9, 192\]",
    ),
    (
        "compressor",
        "pool-rank",
        operand(9, "20 64", E4M3),
        r"job 0 pool must be \[b, s, ...\], got",
    ),
    (
        "compressor",
        "pool-batch",
        operand(9, "3 10 64", E4M3),
        r"job 0 nope must be \[2, 10, 64\], got \[3, 10, 64\]",
    ),
    (
        "compressor",
        "pool-dtype",
        operand(9, "2 10 64", U8),
        "job 0 nope must be float8_e4m3fn, got",
    ),
    (
        "compressor",
        "pool-scale",
        operand(10, "2 10 2", UE8M0),
        r"job 0 scale must be \[2, 10, 1\], got \[2, 10, 2\]",
    ),
    ("compressor", "pool-rope", operand(11, "2 9 32"), r"job 0 rope must be \[2, 10, 32\], got"),
    (
        "compressor",
        "second-tokens",
        all_of(operand(12, "2 4 128", F32), operand(13, "2 4 128", F32)),
        r"job 1 kv must be \[2, 3, 128\], got \[2, 4, 128\]",
    ),
    (
        "compressor",
        "index-width",
        operand(15, "48"),
        r"job 1 norm must have a power of two of channels, 32..128, .*got \[48\]",
    ),
    (
        "compressor",
        "index-form",
        attributes(form1=np.int32(3)),
        "job 1 key must be float8_e4m3fn, got float4_e2m1fn",
    ),
    (
        "compressor",
        "index-scale",
        operand(19, "2 10 1", UE8M0),
        r"job 1 scale must be \[2, 10, 2\], got \[2, 10, 1\]",
    ),
    ("compressor", "ratio", attributes(ratio=np.int32(0)), "ratio must be 1..128, got 0"),
    (
        "compressor",
        "ratio-too-long",
        attributes(ratio=np.int32(129)),
        "ratio must be 1..128, got 129",
    ),
    (
        "compressor",
        "ratio-of-index-keys",
        alone(all_of(attributes(form0=np.int32(2)), first(operands=11, results=4))),
        "job 0 index keys must have ratio 4, got 16",
    ),
    ("compressor", "form", attributes(form0=np.int32(0)), "form0 and form1 must be .*got 0 and 2"),
    ("compressor", "operands-too-few", first(operands=19), "must have 17 operands .*got 16 and 9"),
    ("compressor", "results-too-few", first(results=8), "must have 17 operands .*got 17 and 8"),
    ("compressor", "operands-none", first(operands=2), LAYER),
    (
        "compressor",
        "result-shape",
        result(0, "2 9 192", F32),
        r"result job 0 kv_state must be \[2, 8, 192\], got \[2, 9, 192\]",
    ),
    (
        "compressor",
        "result-dtype",
        result(7, "2 10 64", E4M3),
        "result job 1 key must be float4_e2m1fn, got float8_e4m3fn",
    ),
    (
        "compressor",
        "alone-too-short",
        alone(all_of(operand(7, "2 15 96", F32), operand(8, "2 15 96", F32))),
        r"job 0 kv_state must be .*ring of at least 16, got \[2, 15, 96\]",
    ),
    ("mhc", "streams-rank", operand(0, "3 1024"), r"streams must be \[t, 4, d\] .*got \[3, 1024\]"),
    ("mhc", "streams-dtype", operand(0, "3 4 256", F32), "streams must be bfloat16, got float32"),
    (
        "mhc",
        "streams-two",
        operand(0, "3 2 256"),
        r"streams must be \[t, 4, d\] .*got \[3, 2, 256\]",
    ),
    ("mhc", "streams-odd", operand(0, "3 4 192"), "streams must be .*up to 16384, got"),
    ("mhc", "streams-too-wide", operand(0, "3 4 16512"), "streams must be .*up to 16384, got"),
    ("mhc", "branch-shape", operand(1, "2 256"), r"branch must be \[3, 256\], got \[2, 256\]"),
    ("mhc", "branch-dtype", operand(1, "3 256", F32), "branch must be bfloat16, got float32"),
    ("mhc", "post-shape", operand(2, "3 3", F32), r"post must be \[3, 4\], got \[3, 3\]"),
    ("mhc", "comb-shape", operand(3, "3 16", F32), r"comb must be \[3, 4, 4\], got \[3, 16\]"),
    ("mhc", "fn-shape", operand(4, "24 256", F32), r"fn must be \[24, 1024\], got \[24, 256\]"),
    ("mhc", "fn-dtype", operand(4, "24 1024"), "fn must be float32, got bfloat16"),
    ("mhc", "base-shape", operand(5, "4", F32), r"base must be \[24\], got \[4\]"),
    ("mhc", "scale-shape", operand(6, "1", F32), r"scale must be \[3\], got \[1\]"),
    ("mhc", "norm-shape", operand(7, "128"), r"norm must be \[256\], got \[128\]"),
    ("mhc", "global-scale-shape", operand(8, "1", F32), r"global_scale must be \[\], got \[1\]"),
    ("mhc", "global-scale-dtype", operand(8, ""), "global_scale must be float32, got bfloat16"),
    (
        "mhc",
        "operands-too-few",
        first(operands=7),
        "must have 7 operands .* 10 results, got 6 and 10",
    ),
    ("mhc", "operands-none", first(operands=0), LAYER),
    ("mhc", "results-too-few", first(results=9), "must have 7 operands .* 10 results, got 8 and 9"),
    ("mhc", "write", attributes(write=np.int32(2)), "write must be 0 or 1, got 2"),
    ("mhc", "mixes", attributes(mixes=np.int32(20)), r"mixes must be 0 \(no read\), 4 .*got 20"),
    ("mhc", "forms", attributes(forms=np.int32(8)), "forms must be 1..7 with a read, .*got 8"),
    ("mhc", "forms-none", attributes(forms=np.int32(0)), "forms must be 1..7 with a read, .*got 0"),
    ("mhc", "regime", attributes(regime=np.int32(4)), r"regime must be 0 \(any\), .*got 4"),
    ("mhc", "iters", attributes(iters=np.int32(0)), "iters must be at least 1, got 0"),
    (
        "mhc",
        "nothing-to-do",
        attributes(write=np.int32(0), mixes=np.int32(0)),
        "write and mixes must not both be 0",
    ),
    ("mhc", "result-streams", result(0, "3 4 128"), r"new streams must be \[3, 4, 256\], got"),
    ("mhc", "result-post", result(1, "3 3", F32), r"next post must be \[3, 4\], got \[3, 3\]"),
    ("mhc", "result-x", result(3, "3 256", F32), "x must be bfloat16, got float32"),
    ("mhc", "result-code", result(4, "3 128", U8), "NVFP4 code must be float4_e2m1fn, got uint8"),
    ("mhc", "result-scale", result(8, "3 3", UE8M0), r"FP8 scale must be \[3, 2\], got \[3, 3\]"),
    ("mhc", "scratch", result(9, "671", U8), r"scratch must be \[672\], got \[671\]"),
    ("rmsnorm_nvfp4", "x-rank", operand(0, "96"), r"x must be \[t, d\], got \[96\]"),
    ("rmsnorm_nvfp4", "x-rank-3", operand(0, "1 3 32"), r"x must be \[t, d\], got \[1, 3, 32\]"),
    (
        "rmsnorm_nvfp4",
        "x-channels",
        operand(0, "3 24"),
        r"x must have a multiple of 16 channels, 16..16384, got \[3, 24\]",
    ),
    (
        "rmsnorm_nvfp4",
        "x-no-channels",
        operand(0, "3 0"),
        r"x must have a multiple of 16 channels, 16..16384, got \[3, 0\]",
    ),
    (
        "rmsnorm_nvfp4",
        "x-too-many-channels",
        operand(0, "3 16400"),
        r"x must have a multiple of 16 channels, 16..16384, got \[3, 16400\]",
    ),
    (
        "rmsnorm_nvfp4",
        "x-dtype",
        operand(0, "3 32", F32),
        "x must be bfloat16, got float32",
    ),
    (
        "rmsnorm_nvfp4",
        "x-dtype-f16",
        operand(0, "3 32", F16),
        r"x must be bfloat16, got .*\(10\)",
    ),
    ("rmsnorm_nvfp4", "weight-shape", operand(1, "31"), r"weight must be \[32\], got \[31\]"),
    ("rmsnorm_nvfp4", "weight-rank", operand(1, "1 32"), r"weight must be \[32\], got \[1, 32\]"),
    (
        "rmsnorm_nvfp4",
        "weight-dtype",
        operand(1, "32", F32),
        "weight must be bfloat16, got float32",
    ),
    (
        "rmsnorm_nvfp4",
        "global_scale-rank",
        more((s("3", F32),)),
        r"global_scale must be \[\], got \[3\]",
    ),
    (
        "rmsnorm_nvfp4",
        "global_scale-dtype",
        more((s("", BF16),)),
        "global_scale must be float32, got bfloat16",
    ),
    (
        "rmsnorm_nvfp4",
        "operands-too-many",
        more((s("", F32), s("", F32))),
        "must have at most one global_scale, got 2",
    ),
    ("rmsnorm_nvfp4", "operands-too-few", first(operands=1), LAYER),
    ("rmsnorm_nvfp4", "operands-none", first(operands=0), LAYER),
    ("rmsnorm_nvfp4", "results-too-few", first(results=2), LAYER),
    ("rmsnorm_nvfp4", "results-too-many", more(results=(s("3", F32),)), LAYER),
    (
        "rmsnorm_nvfp4",
        "code-dtype",
        result(0, "3 16", U8),
        "code must be float4_e2m1fn, got uint8",
    ),
    (
        "rmsnorm_nvfp4",
        "code-shape",
        result(0, "3 16", E2M1),
        r"code must be \[3, 32\], got \[3, 16\]",
    ),
    (
        "rmsnorm_nvfp4",
        "block_scale-dtype",
        result(1, "3 2", UE8M0),
        "block_scale must be float8_e4m3fn, got float8_e8m0fnu",
    ),
    (
        "rmsnorm_nvfp4",
        "block_scale-shape",
        result(1, "3 1", E4M3),
        r"block_scale must be \[3, 2\], got \[3, 1\]",
    ),
    (
        "rmsnorm_nvfp4",
        "token_scale-dtype",
        result(2, "3", BF16),
        "token_scale must be float32, got bfloat16",
    ),
    (
        "rmsnorm_nvfp4",
        "token_scale-shape",
        result(2, "3 1", F32),
        r"token_scale must be \[3\], got \[3, 1\]",
    ),
    ("cache_write", "slots-dtype", operand(0, "2 3", I16), "slots must be int32, got"),
    ("cache_write", "slots-dtype-u8", operand(0, "2 3", U8), "slots must be int32, got uint8"),
    ("cache_write", "slots-rank", operand(0, "", I32), r"slots must be \[..., t\], got \[\]"),
    (
        "cache_write",
        "slots-batch",
        operand(0, "1 3", I32),
        r"slots must be \[2, t\] like the caches' batch, got \[1, 3\]",
    ),
    (
        "cache_write",
        "slots-t",
        operand(0, "2 4", I32),
        r"cache\[0\] and rows\[0\] must be .* t = 4, got \[2, 8, 16\] and \[2, 3, 16\]",
    ),
    (
        "cache_write",
        "cache-rank",
        all_of(operand(1, "256", E4M3), result(0, "256", E4M3)),
        r"cache\[0\] must be \[..., s, d\], got \[256\]",
    ),
    (
        "cache_write",
        "cache-dtype",
        operand(1, "2 8 16", F16),
        r"cache\[0\] must be bfloat16 or .* or float4_e2m1fn, got .*\(10\)",
    ),
    (
        "cache_write",
        "cache-odd-codes",
        operand(3, "2 8 5", E2M1),
        r"cache\[2\] must have an even last axis .*got \[2, 8, 5\]",
    ),
    (
        "cache_write",
        "cache-batch",
        all_of(operand(2, "1 8 7", UE8M0), operand(5, "1 3 7", UE8M0), result(1, "1 8 7", UE8M0)),
        r"cache\[1\] and rows\[1\] must be .*batch and s of cache\[0\].* got \[1, 8, 7\]",
    ),
    (
        "cache_write",
        "cache-s",
        all_of(operand(2, "2 9 7", UE8M0), result(1, "2 9 7", UE8M0)),
        r"cache\[1\] and rows\[1\] must be .*batch and s of cache\[0\].* got \[2, 9, 7\]",
    ),
    (
        "cache_write",
        "rows-dtype",
        operand(5, "2 3 7", E4M3),
        r"rows\[1\] must be float8_e8m0fnu, got float8_e4m3fn",
    ),
    (
        "cache_write",
        "rows-t",
        operand(5, "2 2 7", UE8M0),
        r"cache\[1\] and rows\[1\] must be .* t = 3, got \[2, 8, 7\] and \[2, 2, 7\]",
    ),
    (
        "cache_write",
        "rows-d",
        operand(6, "2 3 4", E2M1),
        r"cache\[2\] and rows\[2\] must be .* got \[2, 8, 6\] and \[2, 3, 4\]",
    ),
    (
        "cache_write",
        "rows-batch",
        operand(4, "3 2 16", E4M3),
        r"cache\[0\] and rows\[0\] must be .* got \[2, 8, 16\] and \[3, 2, 16\]",
    ),
    (
        "cache_write",
        "result-dtype",
        result(1, "2 8 7", E4M3),
        r"result cache\[1\] must be float8_e8m0fnu, got float8_e4m3fn",
    ),
    (
        "cache_write",
        "result-shape",
        result(2, "2 8 8", E2M1),
        r"result cache\[2\] must be \[2, 8, 6\], got \[2, 8, 8\]",
    ),
    (
        "cache_write",
        "operands-too-few",
        first(operands=6),
        "must have slots, n caches and n row arrays .* got 5 arrays and 3 results",
    ),
    (
        "cache_write",
        "operands-too-many",
        more((s("2 3 6", E2M1),)),
        "must have slots, n caches and n row arrays .* got 7 arrays and 3 results",
    ),
    ("cache_write", "operands-none", first(operands=0), LAYER),
    (
        "cache_write",
        "results-too-few",
        first(results=2),
        "must have slots, n caches and n row arrays .* got 6 arrays and 2 results",
    ),
    (
        "cache_write",
        "parts-too-many",
        lambda call: dataclasses.replace(
            call,
            operands=(call.operands[0], *[call.operands[1]] * 9, *[call.operands[4]] * 9),
            results=(call.results[0],) * 9,
        ),
        "must have .* n = 1..8, got 18 arrays and 9 results",
    ),
    ("router", "logits-rank", operand(0, "40", F32), r"logits must be \[t, experts\] .*got \[40\]"),
    (
        "router",
        "logits-too-many",
        operand(0, "3 1025", F32),
        r"logits must be \[t, experts\] of 1..1024 experts, got \[3, 1025\]",
    ),
    ("router", "logits-none", operand(0, "3 0", F32), r"logits must be .*got \[3, 0\]"),
    ("router", "logits-dtype", operand(0, "3 40"), "logits must be float32, got bfloat16"),
    ("router", "bias-dtype", operand(1, "40"), "bias must be float32, got bfloat16"),
    ("router", "bias-shape", operand(1, "39", F32), r"bias must be \[40\], got \[39\]"),
    ("router", "bias-rank", operand(1, "3 40", F32), r"bias must be \[40\], got \[3, 40\]"),
    (
        "router",
        "given-dtype",
        all_of(attributes(given=np.int32(1)), operand(1, "3 6", F32)),
        "given ids must be int32, got float32",
    ),
    (
        "router",
        "given-shape",
        all_of(attributes(given=np.int32(1)), operand(1, "3 5", I32)),
        r"given ids must be \[3, 6\], got \[3, 5\]",
    ),
    ("router", "given-2", attributes(given=np.int32(2)), "given must be 0 or 1, got 2"),
    (
        "router",
        "picks-too-many",
        all_of(result(0, "3 33", I32), result(1, "3 33", F32)),
        r"expert_idx must be \[t, k\] with k 1..32 of 40 experts, got \[3, 33\]",
    ),
    (
        "router",
        "picks-more-than-experts",
        all_of(operand(0, "3 5", F32), operand(1, "5", F32)),
        r"expert_idx must be \[t, k\] with k 1..5 of 5 experts, got \[3, 6\]",
    ),
    ("router", "picks-none", result(0, "3 0", I32), r"expert_idx must be .*got \[3, 0\]"),
    ("router", "expert_idx-t", result(0, "4 6", I32), r"expert_idx must be \[3, 6\], got \[4, 6\]"),
    ("router", "expert_idx-dtype", result(0, "3 6", U8), "expert_idx must be int32, got uint8"),
    (
        "router",
        "expert_weight-shape",
        result(1, "3 5", F32),
        r"expert_weight must be \[3, 6\], got \[3, 5\]",
    ),
    (
        "router",
        "expert_weight-dtype",
        result(1, "3 6"),
        "expert_weight must be float32, got bfloat16",
    ),
    ("router", "operands-too-few", first(operands=1), LAYER),
    ("router", "tokens-with-bias", more((s("3", I32),)), "must have 2 operands, or 3 .*got 3"),
    (
        "router",
        "operands-too-many",
        all_of(GIVEN, more((s("3", I32), s("3", I32)))),
        "must have 2 operands, or 3 with tokens of given ids, got 4",
    ),
    (
        "router",
        "table-empty",
        all_of(GIVEN, operand(1, "0 6", I32), more((s("3", I32),))),
        r"given ids must be \[v, k\] with v 1..2\^31 for tokens, got \[0, 6\]",
    ),
    (
        "router",
        "table-shape",
        all_of(GIVEN, operand(1, "9 5", I32), more((s("3", I32),))),
        r"given ids must be \[9, 6\], got \[9, 5\]",
    ),
    (
        "router",
        "tokens-dtype",
        all_of(GIVEN, more((s("3", F32),))),
        "tokens must be int32, got float32",
    ),
    (
        "router",
        "tokens-shape",
        all_of(GIVEN, more((s("4", I32),))),
        r"tokens must be \[3\], got \[4\]",
    ),
    ("router", "results-too-few", first(results=1), LAYER),
    ("moe", "x-rank", operand(0, "1 3 64"), r"x must be \[t, d\], got \[1, 3, 64\]"),
    ("moe", "x-dtype", operand(0, "3 64", F32), "x must be bfloat16, got float32"),
    (
        "moe",
        "expert_idx-t",
        operand(1, "4 2", I32),
        r"expert_idx must be \[3, k\] with k at least 1, got \[4, 2\]",
    ),
    ("moe", "expert_idx-no-pick", operand(1, "3 0", I32), r"expert_idx must be .*got \[3, 0\]"),
    ("moe", "expert_idx-dtype", operand(1, "3 2", I16), "expert_idx must be int32, got"),
    (
        "moe",
        "expert_weight-shape",
        operand(2, "3 1", F32),
        r"expert_weight must be \[3, 2\], got \[3, 1\]",
    ),
    (
        "moe",
        "expert_weight-dtype",
        operand(2, "3 2"),
        "expert_weight must be float32, got bfloat16",
    ),
    ("moe", "valid-shape", operand(3, "2", U8), r"valid must be \[3\], got \[2\]"),
    ("moe", "valid-dtype", operand(3, "3", I32), "valid must be uint8, got int32"),
    (
        "moe",
        "w1-rank",
        operand(4, "32 64", E2M1),
        r"w1 weight must be \[e, inter, d\] with at least one expert, got \[32, 64\]",
    ),
    ("moe", "w1-no-expert", operand(4, "0 32 64", E2M1), r"w1 weight must be .*got \[0, 32, 64\]"),
    (
        "moe",
        "w1-inter",
        operand(4, "2 16 64", E2M1),
        r"w1 weight must be \[e, inter, d\] with multiples of 32, got \[2, 16, 64\]",
    ),
    (
        "moe",
        "x-d",
        all_of(operand(0, "3 48"), result(0, "3 48")),
        r"w1 weight must be .* multiples of 32, got \[2, 32, 64\]",
    ),
    (
        "moe",
        "x-other-d",
        all_of(operand(0, "3 96"), result(0, "3 96")),
        r"w1 weight must be \[2, 32, 96\]",
    ),
    ("moe", "w1-dtype", operand(4, "2 32 64", U8), "w1 weight must be float4_e2m1fn, got uint8"),
    (
        "moe",
        "w1-scale-dtype",
        operand(5, "2 32 2", E4M3),
        "w1 scale must be float8_e8m0fnu, got float8_e4m3fn",
    ),
    (
        "moe",
        "w1-scale-shape",
        operand(5, "2 32 4", UE8M0),
        r"w1 scale must be \[2, 32, 2\], got \[2, 32, 4\]",
    ),
    (
        "moe",
        "w3-shape",
        operand(6, "2 64 64", E2M1),
        r"w3 weight must be \[2, 32, 64\], got \[2, 64, 64\]",
    ),
    ("moe", "w3-scale", operand(7, "2 32 1", UE8M0), r"w3 scale must be \[2, 32, 2\], got"),
    (
        "moe",
        "w2-shape",
        operand(8, "2 32 64", E2M1),
        r"w2 weight must be \[2, 64, 32\], got \[2, 32, 64\]",
    ),
    ("moe", "w2-experts", operand(8, "1 64 32", E2M1), r"w2 weight must be \[2, 64, 32\], got"),
    ("moe", "w2-scale", operand(9, "2 64 2", UE8M0), r"w2 scale must be \[2, 64, 1\], got"),
    ("moe", "shared-shape", operand(10, "2 64"), r"shared must be \[3, 64\], got \[2, 64\]"),
    ("moe", "shared-dtype", operand(10, "3 64", F32), "shared must be bfloat16, got float32"),
    (
        "moe",
        "shared-missing",
        first(operands=10),
        r"must have 7 operands behind valid \(leaves of w1, w3, w2, shared\), got 6",
    ),
    (
        "moe",
        "shared-unasked",
        attributes(has_shared=np.int32(0)),
        r"must have 6 operands behind valid \(leaves of w1, w3, w2\), got 7",
    ),
    ("moe", "operands-too-few", first(operands=3), LAYER),
    ("moe", "results-too-few", first(results=1), LAYER),
    ("moe", "results-too-many", more(results=(s("3", F32),)), LAYER),
    ("moe", "y-dtype", result(0, "3 64", F16), "y must be float32 or bfloat16, got"),
    ("moe", "y-shape", result(0, "3 32"), r"y must be \[3, 64\], got \[3, 32\]"),
    ("moe", "scratch-dtype", result(1, "9999999", I32), "scratch must be uint8, got int32"),
    ("moe", "scratch-rank", result(1, "1 9999999", U8), r"scratch must be at least \[.*got \[1, "),
    ("moe", "scratch-small", _less_scratch, r"scratch must be at least \[(\d+)\], got"),
    ("moe", "form-bfloat16", attributes(form=np.int32(0)), r"form must be 2 .*or 3 .*got 0"),
    ("moe", "form-fp8", attributes(form=np.int32(1)), r"form must be 2 .*or 3 .*got 1"),
    ("moe", "form-unknown", attributes(form=np.int32(4)), r"form must be 2 .*or 3 .*got 4"),
    ("moe", "act-nvfp4", attributes(act=np.int32(2)), "act must be 0 .* got 2"),
    ("moe", "act-negative", attributes(act=np.int32(-1)), "act must be 0 .* got -1"),
    ("moe", "regime", attributes(regime=np.int32(4)), "regime must be 0 .* or 3 .*got 4"),
    ("moe", "regime-negative", attributes(regime=np.int32(-1)), "regime must be 0 .*got -1"),
    (
        "moe",
        "power_of_two-of-mxfp4",
        attributes(power_of_two=np.int32(1)),
        r"power_of_two must be 0 or, for NVFP4 with act 1 \(FP8\), 1, got 1",
    ),
    ("moe", "power_of_two", attributes(power_of_two=np.int32(-1)), "power_of_two must be .*got -1"),
    ("moe", "has_shared-2", attributes(has_shared=np.int32(2)), "has_shared must be 0 or 1, got 2"),
    (
        "moe",
        "first_expert-negative",
        attributes(first_expert=np.int32(-1)),
        "first_expert must be 0..2147483645 for 2 experts, got -1",
    ),
    (
        "moe",
        "first_expert-too-large",
        attributes(first_expert=np.int32(2**31 - 2)),
        "first_expert must be .* got 2147483646",
    ),
    (
        "moe",
        "nvfp4-leaves",
        attributes(form=np.int32(3)),
        "must have 10 operands behind valid .*, got 7",
    ),
    (
        "moe",
        "nvfp4-scale",
        nvfp4(operand(5, "2 32 4", UE8M0)),
        "w1 block_scale must be float8_e4m3fn, got float8_e8m0fnu",
    ),
    (
        "moe",
        "nvfp4-scale-shape",
        nvfp4(operand(11, "2 64 1", E4M3)),
        r"w2 block_scale must be \[2, 64, 2\], got \[2, 64, 1\]",
    ),
    (
        "moe",
        "nvfp4-global_scale-dtype",
        nvfp4(operand(6, "2")),
        "w1 global_scale must be float32, got bfloat16",
    ),
    (
        "moe",
        "nvfp4-global_scale-shape",
        nvfp4(operand(9, "1", F32)),
        r"w3 global_scale must be \[2\], got \[1\]",
    ),
    ("moe", "nvfp4-act", nvfp4(attributes(act=np.int32(3))), "act must be 0 .* got 3"),
    (
        "moe",
        "one-act_scale",
        nvfp4(more((s("2", F32),))),
        r"must have 10 operands .*, or two more \(up_act_scale, down_act_scale\), got 11",
    ),
    (
        "moe",
        "three-act_scales",
        nvfp4(more((s("2", F32),) * 3)),
        r"must have 10 operands .*, or two more .*, got 13",
    ),
    (
        "moe",
        "act_scales-of-another-act",
        nvfp4(all_of(more((s("2", F32),) * 2), attributes(act=np.int32(1)))),
        r"must have 10 operands behind valid \(leaves of w1, w3, w2, shared\), got 12",
    ),
    (
        "moe",
        "up_act_scale-shape",
        nvfp4(more((s("1", F32), s("2", F32)))),
        r"up_act_scale must be \[2\], got \[1\]",
    ),
    (
        "moe",
        "down_act_scale-dtype",
        nvfp4(more((s("2", F32), s("2")))),
        "down_act_scale must be float32, got bfloat16",
    ),
]


def _linear_faults(op: str) -> list[tuple[str, str, Mutation, str]]:
    """What every linear asks of its operands."""
    call = TARGETS[op]
    weight, y = call.operands[1].dtype, call.results[0].dtype
    dense = op == "dense_linear"
    accepted = "bfloat16" if dense else "bfloat16 or float32"
    number = {
        "dense_linear": "must have x and n weights for n results and scratch, .*got",
        "fp8_linear": "must have x, n weights and n scales, or one of each and up, for n results "
        "and scratch, .*got",
        "nvfp4_linear": "must have x, n weights, n block_scales, n global_scales and maybe "
        "act_scale, of one weight up, for n results and scratch, .*got",
    }.get(op, LAYER)
    return [
        (op, *fault)
        for fault in (
            ("x-rank", operand(0, "32"), r"x must be \[t, k\] or \[t, g, k\], got \[32\]"),
            ("x-rank-4", operand(0, "1 1 3 32"), r"x must be .*got \[1, 1, 3, 32\]"),
            ("x-dtype", operand(0, "3 32", F16), rf"x must be {accepted}, got .*\(10\)"),
            ("x-inputs", operand(0, "3 31"), r"x and weight must agree .*\[3, 31\] and \[10, 32\]"),
            (
                "no-inputs",
                all_of(operand(0, "3 0"), operand(1, "10 0", weight)),
                r"x and weight must agree .*at least 1, got \[3, 0\] and \[10, 0\]",
            ),
            (
                "x-groups",
                operand(0, "3 4 32"),
                r"weight must split evenly over x's 4 groups, got \[10, 32\]",
            ),
            (
                "x-no-groups",
                operand(0, "3 0 32"),
                r"weight must split evenly over x's 0 groups, got \[10, 32\]",
            ),
            (
                "weight-rank",
                operand(1, "1 10 32", weight),
                r"weight must be \[n, k\], got \[1, 10, 32\]",
            ),
            ("weight-dtype", operand(1, "10 32", U8), f"weight must be {weight.name}, got uint8"),
            ("y-dtype", result(0, "3 10", F16), "y must be bfloat16 or float32, got"),
            ("y-shape", result(0, "3 9", y), r"y must be \[3, 10\], got \[3, 9\]"),
            ("y-rank", result(0, "3 1 10", y), r"y must be \[3, 10\], got \[3, 1, 10\]"),
            ("y-groups", operand(0, "3 2 32"), r"y must be \[3, 2, 5\], got \[3, 10\]"),
            ("scratch-dtype", result(1, "33536", BF16), "scratch must be uint8, got bfloat16"),
            ("scratch-size", result(1, "33535", U8), r"scratch must be \[at least 33536\], got"),
            ("scratch-rank", result(1, "2 33536", U8), r"scratch must be .*got \[2, 33536\]"),
            ("regime", attributes(regime=np.int32(4)), "regime must be 0 .* or 3 .*got 4"),
            ("regime-negative", attributes(regime=np.int32(-1)), "regime must be .*got -1"),
            ("operands-too-few", first(operands=len(call.operands) - 1), number),
            ("operands-none", first(operands=0), LAYER),
            ("results-too-few", first(results=1), number),
            ("results-too-many", more(results=(SCRATCH,)), number),
        )
    ]


SHAPES += [fault for op in LINEARS for fault in _linear_faults(op)]
SHAPES += [
    ("dense_linear", "x-dtype-f32", operand(0, "3 32", F32), "x must be bfloat16, got float32"),
    (
        "dense_linear",
        "operands-too-many",
        more((s("", F32),)),
        "must have .* n = 1..8, got 2 weights and 2 results",
    ),
    (
        "dense_linear",
        "weights-too-many",
        _nine_weights,
        "must have .* n = 1..8, got 9 weights and 10 results",
    ),
    (
        "dense_linear",
        "several-results-too-few",
        several(first(results=2)),
        "must have .*got 2 weights and 2 results",
    ),
    (
        "dense_linear",
        "several-results-too-many",
        several(more(results=(SCRATCH,))),
        "must have .*got 2 weights and 4 results",
    ),
    (
        "dense_linear",
        "several-scratch-first",
        several(lambda call: dataclasses.replace(call, results=call.results[::-1])),
        r"y\[0\] must be bfloat16 or float32, got uint8",
    ),
    (
        "dense_linear",
        "several-weight-dtype",
        several(operand(2, "5 32", F32)),
        r"weight\[1\] must be bfloat16, got float32",
    ),
    (
        "dense_linear",
        "several-weight-rank",
        several(operand(1, "320")),
        r"weight\[0\] must be \[n, k\], got \[320\]",
    ),
    (
        "dense_linear",
        "several-weight-inputs",
        several(operand(2, "5 31")),
        r"x and weight\[1\] must agree .*got \[3, 32\] and \[5, 31\]",
    ),
    (
        "dense_linear",
        "several-weight-groups",
        several(all_of(operand(0, "3 2 32"), result(0, "3 2 5", F32), result(2, "66816", U8))),
        r"weight\[1\] must split evenly over x's 2 groups, got \[5, 32\]",
    ),
    (
        "dense_linear",
        "several-y-shape",
        several(result(1, "3 10", F32)),
        r"y\[1\] must be \[3, 5\], got \[3, 10\]",
    ),
    (
        "dense_linear",
        "several-y-dtype",
        several(result(1, "3 5", F16)),
        r"y\[1\] must be bfloat16 or float32, got",
    ),
    (
        "fp8_linear",
        "scale-dtype",
        operand(2, "1 1", E4M3),
        "scale must be float8_e8m0fnu, got float8_e4m3fn",
    ),
    (
        "fp8_linear",
        "scale-shape",
        operand(2, "1 2", UE8M0),
        r"scale must be \[1, 1\], got \[1, 2\]",
    ),
    ("fp8_linear", "act", attributes(act=np.int32(2)), r"act must be 0 .* or 1 \(fp8\), got 2"),
    (
        "fp8_linear",
        "operands-too-many",
        more((s("", F32), s(""))),
        "must have .* n = 1..8, got 4 operands beside x and 2 results",
    ),
    (
        "fp8_linear",
        "weights-too-many",
        lambda call: dataclasses.replace(
            call,
            operands=(call.operands[0], *call.operands[1:] * 9),
            results=(*call.results[:1] * 9, SCRATCH),
        ),
        "must have .* n = 1..8, got 18 operands beside x and 10 results",
    ),
    (
        "fp8_linear",
        "coded-without-scale",
        coded(first(operands=5)),
        "must have x, n weights, n scales and x_scale .*got 4 operands beside x and 3 results",
    ),
    (
        "fp8_linear",
        "coded-act",
        coded(attributes(act=np.int32(0))),
        r"x as float8_e4m3fn must come with act 1 .*got act 0 and \[3, 2, 256\]",
    ),
    (
        "fp8_linear",
        "coded-inputs",
        lambda call: dataclasses.replace(
            call,
            operands=(s("3 32", E4M3), *call.operands[1:], s("3 1", UE8M0)),
        ),
        r"x as float8_e4m3fn must come with .*multiple of 128 .*got act 1 and \[3, 32\]",
    ),
    (
        "fp8_linear",
        "coded-scale-shape",
        coded(operand(5, "3 2 3", UE8M0)),
        r"x_scale must be \[3, 2, 2\], got \[3, 2, 3\]",
    ),
    (
        "fp8_linear",
        "coded-scale-rank",
        coded(operand(5, "6 2", UE8M0)),
        r"x_scale must be \[3, 2, 2\], got \[6, 2\]",
    ),
    (
        "fp8_linear",
        "coded-scale-dtype",
        coded(operand(5, "3 2 2", F32)),
        "x_scale must be float8_e8m0fnu, got float32",
    ),
    (
        "fp8_linear",
        "coded-x-dtype",
        coded(operand(0, "3 2 256", U8)),
        "must have x, n weights and n scales.*got 5 operands beside x and 3 results",
    ),
    (
        "fp8_linear",
        "up-dtype",
        gated(operand(3, "3 2 32", F32)),
        "up must be bfloat16, got float32",
    ),
    (
        "fp8_linear",
        "up-shape",
        gated(operand(3, "3 2 31")),
        r"up must be \[3, 2, 32\], got \[3, 2, 31\]",
    ),
    ("fp8_linear", "up-rank", gated(operand(3, "6 32")), r"up must be \[3, 2, 32\], got \[6, 32\]"),
    ("fp8_linear", "up-to-none", more((s("3 31"),)), r"up must be \[3, 32\], got \[3, 31\]"),
    (
        "fp8_linear",
        "gate-dtype",
        gated(operand(0, "3 2 32", F32)),
        "x with up must be bfloat16, got float32",
    ),
    (
        "fp8_linear",
        "gate-act",
        gated(attributes(act=np.int32(0))),
        r"up must come with act 1 \(fp8\), got act 0",
    ),
    (
        "fp8_linear",
        "up-of-several",
        several_fp8(more((s("3 32"),))),
        "must have .* one of each and up, .*got 5 operands beside x and 3 results",
    ),
    (
        "fp8_linear",
        "several-scale-shape",
        several_fp8(operand(4, "1 2", UE8M0)),
        r"scale\[1\] must be \[1, 1\], got \[1, 2\]",
    ),
    (
        "fp8_linear",
        "several-scales-first",
        several_fp8(
            lambda call: dataclasses.replace(
                call, operands=(call.operands[0], *call.operands[:2:-1], *call.operands[2:0:-1])
            )
        ),
        r"weight\[0\] must be float8_e4m3fn, got float8_e8m0fnu",
    ),
    (
        "fp8_linear",
        "several-weight-inputs",
        several_fp8(operand(2, "5 31", E4M3)),
        r"x and weight\[1\] must agree .*got \[3, 32\] and \[5, 31\]",
    ),
    (
        "fp8_linear",
        "several-y-shape",
        several_fp8(result(0, "3 5", F32)),
        r"y\[0\] must be \[3, 10\], got \[3, 5\]",
    ),
    (
        "mxfp4_linear",
        "scale-dtype",
        operand(2, "10 1", E4M3),
        "scale must be float8_e8m0fnu, got float8_e4m3fn",
    ),
    (
        "mxfp4_linear",
        "scale-shape",
        operand(2, "10 2", UE8M0),
        r"scale must be \[10, 1\], got \[10, 2\]",
    ),
    (
        "mxfp4_linear",
        "weight-inputs",
        all_of(operand(0, "3 48"), operand(1, "10 48", E2M1)),
        r"weight must have a multiple of 32 inputs, got \[10, 48\]",
    ),
    ("mxfp4_linear", "act", attributes(act=np.int32(-1)), r"act must be 0 .* or 1 \(fp8\), got -1"),
    ("mxfp4_linear", "operands-too-many", more((s("", F32),)), LAYER),
    (
        "nvfp4_linear",
        "block_scale-dtype",
        operand(2, "10 2", UE8M0),
        "block_scale must be float8_e4m3fn, got float8_e8m0fnu",
    ),
    (
        "nvfp4_linear",
        "block_scale-shape",
        operand(2, "10 1", E4M3),
        r"block_scale must be \[10, 2\], got \[10, 1\]",
    ),
    (
        "nvfp4_linear",
        "weight-inputs",
        all_of(operand(0, "3 24"), operand(1, "10 24", E2M1)),
        r"weight must have a multiple of 16 inputs, got \[10, 24\]",
    ),
    (
        "nvfp4_linear",
        "global_scale-dtype",
        operand(3, ""),
        "global_scale must be float32, got bfloat16",
    ),
    ("nvfp4_linear", "global_scale-rank", operand(3, "1", F32), r"global_scale must be \[\], got"),
    ("nvfp4_linear", "act", attributes(act=np.int32(3)), r"act must be 0 .* or 2 \(nvfp4\), got 3"),
    ("nvfp4_linear", "act_scale-rank", more((s("3", F32),)), r"act_scale must be \[\], got \[3\]"),
    (
        "nvfp4_linear",
        "act_scale-dtype",
        more((s("", BF16),)),
        "act_scale must be float32, got bfloat16",
    ),
    (
        "nvfp4_linear",
        "act_scale-of-another-act",
        all_of(more((s("", F32),)), attributes(act=np.int32(1))),
        r"act_scale must come with act 2 \(nvfp4\), got act 1",
    ),
    (
        "nvfp4_linear",
        "operands-too-many",
        more((s("", F32), s("", F32))),
        "must have .* n = 1..8, got 5 operands beside x and 2 results",
    ),
    (
        "nvfp4_linear",
        "up-dtype",
        gated_nvfp4(operand(5, "3 2 32", F32)),
        "up must be bfloat16, got float32",
    ),
    (
        "nvfp4_linear",
        "up-shape",
        gated_nvfp4(operand(5, "3 2 31")),
        r"up must be \[3, 2, 32\], got \[3, 2, 31\]",
    ),
    (
        "nvfp4_linear",
        "up-rank",
        gated_nvfp4(operand(5, "6 32")),
        r"up must be \[3, 2, 32\], got \[6, 32\]",
    ),
    (
        "nvfp4_linear",
        "up-to-none",
        more((s("3 31"),)),
        r"up must be \[3, 32\], got \[3, 31\]",
    ),
    (
        "nvfp4_linear",
        "up-behind-act_scale-rank",
        gated_nvfp4(operand(4, "1", F32)),
        r"act_scale must be \[\], got \[1\]",
    ),
    (
        "nvfp4_linear",
        "gate-dtype",
        gated_nvfp4(operand(0, "3 2 32", F32)),
        "x with up must be bfloat16, got float32",
    ),
    (
        "nvfp4_linear",
        "gate-act",
        gated_nvfp4(attributes(act=np.int32(1))),
        r"up must come with act 2 \(nvfp4\), got act 1",
    ),
    (
        "nvfp4_linear",
        "up-of-several",
        several_nvfp4(more((s("3 32"),))),
        r"act_scale must be float32, got bfloat16",
    ),
    (
        "nvfp4_linear",
        "weights-too-many",
        lambda call: dataclasses.replace(
            call,
            operands=(call.operands[0], *call.operands[1:] * 9),
            results=(*call.results[:1] * 9, SCRATCH),
        ),
        "must have .* n = 1..8, got 27 operands beside x and 10 results",
    ),
    (
        "nvfp4_linear",
        "several-results-too-few",
        several_nvfp4(first(results=2)),
        "must have .*got 6 operands beside x and 2 results",
    ),
    (
        "nvfp4_linear",
        "several-block_scale-shape",
        several_nvfp4(operand(4, "10 2", E4M3)),
        r"block_scale\[1\] must be \[5, 2\], got \[10, 2\]",
    ),
    (
        "nvfp4_linear",
        "several-global_scale-rank",
        several_nvfp4(operand(6, "1", F32)),
        r"global_scale\[1\] must be \[\], got \[1\]",
    ),
    (
        "nvfp4_linear",
        "several-act_scale-dtype",
        several_nvfp4(more((s("", BF16),))),
        "act_scale must be float32, got bfloat16",
    ),
    (
        "nvfp4_linear",
        "several-y-shape",
        several_nvfp4(result(0, "3 5", F32)),
        r"y\[0\] must be \[3, 10\], got \[3, 5\]",
    ),
]


def _attribute_faults(op: str) -> list[tuple[str, str, Mutation, str]]:
    """A10 for every attribute a target has."""
    call = TARGETS[op]
    faults = [(op, "unknown", attributes(colour=np.int32(3)), "number of attributes: expected")]
    for name, value in call.attributes.items():
        wrong = np.float64(2.5) if isinstance(value, np.integer) else np.int64(3)
        faults += [
            (op, f"{name}-missing", attributes(**{name: None}), "number of attributes: expected"),
            (
                op,
                f"{name}-misspelt",
                attributes(**{name: None, f"{name}s": value}),
                f"name mismatch: .*{name}s",
            ),
            (op, f"{name}-wrong-type", attributes(**{name: wrong}), "Wrong .*type: expected"),
            (op, f"{name}-string", attributes(**{name: "a"}), "Wrong .*type: expected .*string"),
        ]
    return faults


ATTRIBUTES = [fault for op in OPS for fault in _attribute_faults(op)]


def _params(row: str, faults: list[tuple[str, str, Mutation, str]]) -> list[Any]:
    return [
        pytest.param(TARGETS[op], mutation, message, id=f"{row}-{op}-{name}")
        for op, name, mutation, message in faults
    ]


def test_every_target_is_here() -> None:
    assert sorted(TARGETS) == sorted(programs.OPS)
    assert {fault[0] for fault in SHAPES} == set(TARGETS)


@pytest.mark.parametrize("op", OPS)
def test_good_raw_call(op: str) -> None:
    """The call that every case below breaks in one place works."""
    _, got = good(op)
    for x, want in zip(got, (x for x in TARGETS[op].results if x.dtype != U8), strict=True):
        assert (x.shape, x.dtype) == (want.shape, want.dtype)


@functools.cache
def good(op: str) -> tuple[Callable[..., Any], Any]:
    """The good call, compiled once, and what it gave first."""
    fn = TARGETS[op].jitted()
    return fn, TARGETS[op].run(fn)


def assert_refused(call: RawCall, mutation: Mutation, message: str) -> None:
    """Refused as INVALID_ARGUMENT; the process lives, and a good call gives what it always gave."""
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"^INVALID_ARGUMENT: ") as caught:
        mutation(call)()
    assert re.search(message, str(caught.value), re.DOTALL), str(caught.value)
    fn, want = good(call.op)
    assert_same_tree(call.run(fn), want)


@pytest.mark.parametrize(("call", "mutation", "message"), _params("A9", SHAPES))
def test_bad_shapes(call: RawCall, mutation: Mutation, message: str) -> None:
    """A9: the handler names itself, the operand, the rule and what it got.

    Operands and results that its binding does not know are refused before it is asked.
    """
    if message == LAYER:
        message = "Wrong number of (arguments|results): expected"
    else:
        message = rf"^INVALID_ARGUMENT: dsv4\.{call.op}: {message}"
    assert_refused(call, mutation, message)


@pytest.mark.parametrize(("call", "mutation", "message"), _params("A10", ATTRIBUTES))
def test_bad_attributes(call: RawCall, mutation: Mutation, message: str) -> None:
    """A10: the FFI layer compares names, number and types."""
    assert_refused(call, mutation, message)


@pytest.mark.parametrize("abi", [library.ABI - 1, library.ABI + 1, -1])
@pytest.mark.parametrize("op", OPS, ids=lambda op: f"E12-{op}")
def test_other_abi(op: str, abi: int) -> None:
    """E12: an executable that a compilation cache kept from another version is not run."""
    message = (
        rf"^INVALID_ARGUMENT: dsv4\.{op}: abi must be {library.ABI} .*got {abi}: .*another "
        rf"version of dsv4_jax; clear the compilation cache"
    )
    assert_refused(TARGETS[op], attributes(abi=np.int32(abi)), message)


CASE_NAMES = [
    # FP32 goes to XLA.
    name
    for name in CASES
    if name.split("-")[0] in OPS and not name.endswith("-float32")
]


def test_every_target_has_a_case() -> None:
    assert {name.split("-")[0] for name in CASE_NAMES} == set(OPS)


@pytest.mark.parametrize("name", CASE_NAMES, ids=lambda name: f"A11-{name}")
def test_transposed_operands(name: str) -> None:
    """A11: every operand lies transposed in memory; XLA relays it for the handler."""
    case = CASES[name]()
    rows = case.rows(0, 3)
    want = case.fn(*rows)
    flipped = [np.ascontiguousarray(np.asarray(x).swapaxes(0, -1)) for x in rows]
    got = jax.jit(lambda *xs: case.fn(*(jnp.swapaxes(x, 0, -1) for x in xs)))(*flipped)
    assert_same_tree(got, want, "transposed under jit")
    laid = []
    for x in rows:
        order = tuple(range(x.ndim))  # the first axis is the one that varies fastest
        packed = x.dtype == E2M1  # two codes of a byte stay neighbours
        layout = Format(Layout(order if packed else order[::-1]), x.sharding)
        laid.append(jax.device_put(x, layout))
        assert packed or laid[-1].format.layout.major_to_minor == order[::-1]
    assert_same_tree(jax.jit(case.fn)(*laid), want, "laid out by columns")


@pytest.mark.parametrize("name", CASE_NAMES, ids=lambda name: f"A12-{name}")
def test_slices_of_larger_buffers(name: str) -> None:
    """A12: operands that begin somewhere inside another buffer, under jit and as numpy views."""
    case = CASES[name]()
    want = case.fn(*case.rows(1, 4))

    @jax.jit
    def sliced(start: jax.Array, *whole: jax.Array) -> Any:
        pieces = [jax.lax.dynamic_slice_in_dim(x, start, 3) for x in whole]
        return case.fn(*pieces), case.fn(*(x[1:4] for x in whole))

    for got in sliced(jnp.int32(1), *case.arguments):
        assert_same_tree(got, want, "slices")
    for offset in (1, 2, 3, 4, 8, 16):
        assert_same_tree(
            case.fn(*(at_offset(x, offset) for x in case.rows(1, 4))), want, f"{offset}"
        )


def at_offset(x: jax.Array, offset: int) -> np.ndarray:
    """The same values in a buffer that begins ``offset`` bytes behind an aligned address."""
    host = np.asarray(x)
    buffer = np.empty(host.nbytes + offset + 64, np.uint8)
    begin = -buffer.ctypes.data % 64 + offset
    view = buffer[begin : begin + host.nbytes].view(host.dtype).reshape(host.shape)
    view[...] = host
    assert view.ctypes.data % 64 == offset
    return view


def refuses(check: Callable[[], None]) -> str:
    """What went wrong, or nothing."""
    try:
        check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def check_case_on_two_devices(case: OpCase) -> None:
    """Rows on two devices: gathered by XLA, or each device its own under `jax.shard_map`."""
    rows = case.rows(0, 4)
    want = case.fn(*rows)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh, spec = jax.make_mesh((2,), ("b",), axis_types=(kind,)), PartitionSpec("b")
        sharded = jax.device_put(rows, NamedSharding(mesh, spec))
        assert_same_tree(jax.jit(case.fn)(*sharded), want, f"gathered, {kind}")
        local = jax.jit(jax.shard_map(case.fn, mesh=mesh, in_specs=spec, out_specs=spec))
        got = local(*sharded)
        assert_same_tree(got, want, f"shard_map, {kind}")
        assert all(len(x.sharding.device_set) == 2 for x in jax.tree.leaves(got))
        assert "all-gather" not in str(local.lower(*sharded).compile().as_text())
    mesh = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Auto,))
    last = [
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "b")))
        if x.shape[-1] % 4 == 0
        else x
        for x in rows
    ]
    assert_same_tree(jax.jit(case.fn)(*last), want, "gathered along the last axis")


def check_donated_on_two_devices(mapped: bool) -> None:
    """A sharded cache that is donated: its shards stay in place, or are gathered and put back."""
    case = CASES["cache_write-store"]()
    rows = case.rows(0, 4)
    cache, rest = rows[:5], rows[5:]
    want = case.fn(*rows)
    mesh, spec = jax.make_mesh((2,), ("b",), axis_types=(AxisType.Auto,)), PartitionSpec("b")
    sharding = NamedSharding(mesh, spec)
    fn = lambda cache, *rest: case.fn(*cache, *rest)  # noqa: E731
    if mapped:
        fn = jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=spec)
    cache = jax.jit(lambda x: x, out_shardings=sharding)(cache)  # buffers of JAX's own
    places = [[shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards] for x in cache]
    got = jax.jit(fn, donate_argnums=0, out_shardings=sharding)(cache, *rest)
    assert_same_tree(got, want, "donated")
    assert all(x.is_deleted() for x in cache)
    if mapped:
        for x, place in zip(jax.tree.leaves(got), places, strict=True):
            assert [shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards] == place


ON_TWO_DEVICES: dict[str, Callable[[], None]] = {
    **{name: lambda name=name: check_case_on_two_devices(CASES[name]()) for name in CASE_NAMES},
    "cache_write-donated": lambda: check_donated_on_two_devices(False),
    "cache_write-donated-shard_map": lambda: check_donated_on_two_devices(True),
}


def on_two_devices() -> None:
    """In a process of two CPU devices: what went wrong, by name, as JSON."""
    assert len(jax.devices()) == 2
    print(json.dumps({name: refuses(check) for name, check in ON_TWO_DEVICES.items()}))


ON_TWO = "from tests.fault.test_ffi_faults import on_two_devices; on_two_devices()"


@pytest.fixture(scope="module")
def two_devices() -> dict[str, str]:
    """`on_two_devices`, run once: XLA reads the number of devices when it starts."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ON_TWO],
        cwd=Path(__file__).parents[2],
        env=os.environ | flags,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ON_TWO_DEVICES, ids=lambda name: f"A22-{name}")
def test_sharded_operands(name: str, two_devices: dict[str, str]) -> None:
    """A22: without `jax.shard_map` gathered, with it local; never a wrong value."""
    assert not two_devices[name], two_devices[name]


# (op, arguments of more than 2^31 elements, shapes of the results)
LARGE: list[tuple[Callable[..., Any], tuple[Spec, ...], list[tuple[int, ...]]]] = [
    (
        lambda x, w: rmsnorm_nvfp4(x, w, 1e-6),
        (s("1 1048576 4096"), s("4096")),
        [(1, 1 << 20, 4096), (1, 1 << 20, 256), (1, 1 << 20)],
    ),
    (
        lambda x, f, post, comb, *read: mhc(
            *(x, Write(f, post, comb), Read(*read)), iters=20, hc_eps=1e-6, rms_eps=1e-6
        )[:4],
        (
            *(s("262144 4 4096"), s("262144 4096"), s("262144 4", F32), s("262144 4 4", F32)),
            *(s("24 16384", F32), s("24", F32), s("3", F32), s("4096")),
        ),
        [(1 << 18, 4, 4096), (1 << 18, 4), (1 << 18, 4, 4), (1 << 18, 4096)],
    ),
    (
        lambda x, w, b: router(x, w, b, None, k=6, scale=1.0),
        (s("67108864 64"), s("8 64"), s("8", F32)),
        [(1 << 26, 6), (1 << 26, 6)],
    ),
    (
        lambda x, idx, weight, valid, *leaves: moe(
            *(x, idx, weight, valid),
            *(
                {"weight": w, "scale": scale}
                for w, scale in zip(leaves[::2], leaves[1::2], strict=True)
            ),
            linear="mxfp4_w4a8",
            limit=10.0,
        ),
        (
            *(s("1048576 4096"), s("1048576 6", I32), s("1048576 6", F32)),
            *(s("1048576", jnp.bool_), s("256 2048 4096", E2M1), s("256 2048 128", UE8M0)),
            *(s("256 4096 2048", E2M1), s("256 4096 64", UE8M0)),
            *(s("256 2048 4096", E2M1), s("256 2048 128", UE8M0)),
        ),
        [(1 << 20, 4096)],
    ),
    (
        lambda q, n, scale, r, sink, positions: attention(
            q,
            KvRows(n[:, :128], scale[:, :128], r[:, :128]),
            positions,
            sink,
            window=128,
            pool=KvRows(n, scale, r),
            n_visible=positions,
        ),
        (
            *(s("65536 1 128 512"), s("65536 256 448", E4M3), s("65536 256 7", UE8M0)),
            *(s("65536 256 64"), s("128", F32), s("65536 1", I32)),
        ),
        [(1 << 16, 1, 128, 512)],
    ),
    (
        lambda q, scale, weight, key, key_scale, n: index_topk(
            IndexRows(q, scale), weight, IndexRows(key, key_scale), n, topk=1024
        ),
        (
            *(s("1 1048576 64 128", E2M1), s("1 1048576 64 4", UE8M0), s("1 1048576 64", F32)),
            *(s("1 262144 128", E2M1), s("1 262144 4", UE8M0), s("1 1048576", I32)),
        ),
        [(1, 1 << 20, 1024)],
    ),
    (
        cache_write,
        (s("1 1048576 4096", E4M3), s("1 2 4096", E4M3), s("1 2", I32)),
        [(1, 1 << 20, 4096)],
    ),
    (
        cache_write,
        (s("1 1048576 4096", E2M1), s("1 1048576 4096", E2M1), s("1 1048576", I32)),
        [(1, 1 << 20, 4096)],
    ),
    (
        lambda nope, scale, rope, kv, ape, norm, state, start: compressor(
            [CompressorJob(kv, kv, ape, norm, state, state, KvRows(nope, scale, rope))],
            *(start, start, np.ones(32, np.float32)),
            ratio=4,
            eps=1e-6,
        ),
        (
            *(s("1 5242880 448", E4M3), s("1 5242880 7", UE8M0), s("1 5242880 64")),
            *(s("1 2097160 1024", F32), s("4 1024", F32), s("512"), s("1 8 1024", F32)),
            s("1", I32),
        ),
        [*[(1, 8, 1024)] * 2, (1, 5242880, 448), (1, 5242880, 7), (1, 5242880, 64)],
    ),
    (
        lambda x, w: rmsnorm_fp8(x, w, 1e-6),
        (s("1 1048576 4096"), s("4096")),
        [(1, 1 << 20, 4096), (1, 1 << 20, 32)],
    ),
    (
        lambda q, p, f: query_finish(q, p, f, 1e-6, rounding="bfloat16"),
        (s("1 65536 128 512"), s("1 65536", I32), s("32", F32)),
        [(1, 65536, 128, 512)],
    ),
    (
        lambda kv, w, start, f: key_finish(kv, w, start, f, 1e-6, form="fp8").rows,
        (s("2 4194304 512"), s("512"), s("2", I32), s("32", F32)),
        [(2, 1 << 22, 448), (2, 1 << 22, 7), (2, 1 << 22, 64)],
    ),
    (
        lambda q, p, f: index_query_finish(q, p, f, form="fp8"),
        (s("1 524288 64 128"), s("1 524288", I32), s("32", F32)),
        [(1, 1 << 19, 64, 128), (1, 1 << 19, 64, 1)],
    ),
    (dense_linear, (s("65536 32784"), s("16384 32784")), [(65536, 16384)]),
    (
        lambda x, *w: fp8_linear(x, *w, act="bfloat16"),
        (s("65536 32784"), s("65536 32784", E4M3), s("512 257", UE8M0)),
        [(65536, 65536)],
    ),
    (
        lambda x, *w: mxfp4_linear(x, *w, dtype=BF16),
        (s("1048576 2 4096"), s("1024 4096", E2M1), s("1024 128", UE8M0)),
        [(1 << 20, 2, 512)],
    ),
    (
        nvfp4_linear,
        (s("65536 65536"), s("32784 65536", E2M1), s("32784 4096", E4M3), s("", F32)),
        [(65536, 32784)],
    ),
]
LARGE_IDS = [
    *("A23-rmsnorm_nvfp4", "A23-mhc", "A23-router", "A23-moe", "A23-attention", "A23-index_topk"),
    *("A23-cache_write", "A23-cache_write-packed", "A23-compressor"),
    *("A23-rmsnorm_fp8", "A23-query_finish", "A23-key_finish", "A23-index_query_finish"),
    *("A23-dense_linear", "A23-fp8_linear", "A23-mxfp4_linear", "A23-nvfp4_linear"),
]


@pytest.mark.parametrize(("fn", "arguments", "shapes"), LARGE, ids=LARGE_IDS)
def test_more_than_2_31_elements(
    fn: Callable[..., Any], arguments: tuple[Spec, ...], shapes: list[tuple[int, ...]]
) -> None:
    """A23: traced, lowered and compiled, without data; ffi/*/*_test.cc hold the 64-bit offsets."""
    assert arguments[0].size > 2**31
    lowered = jax.jit(fn).lower(*arguments)
    assert [x.shape for x in jax.tree.leaves(lowered.out_info)] == shapes
    assert [x.shape for x in jax.tree.leaves(jax.eval_shape(fn, *arguments))] == shapes
    assert lowered.compile().memory_analysis().output_size_in_bytes >= 2**31
