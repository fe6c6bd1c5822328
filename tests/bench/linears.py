"""What the benchmarks of linears and experts share: shapes, bars, inputs, checks, baselines.

Bars are those that the kernels were written for: fractions of the read ceiling where weights are
large, a few us beside their bytes where they are small. The modules ``bench_<op>`` are programs as
well: ``python -m tests.bench.bench_fp8_linear --models flash --tokens 1 8``.
"""

import argparse
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from dsv4_jax.bench.ceilings import Rate
from dsv4_jax.precision import act_format, weight_format
from dsv4_jax.quant import bits, fp8, nvfp4
from dsv4_jax.typing import E2M1, E4M3
from tests.bench import timing
from tests.support import products as support

__all__ = [
    "DENSE",
    "LARGEST",
    "MORE_TOKENS",
    "QUANTIZED",
    "TOKENS",
    "Case",
    "Row",
    "baseline",
    "baseline_cases",
    "compared",
    "dequantized",
    "linear_cases",
    "measure",
    "poisoned",
    "program",
    "skip_when_late",
]

Op = Callable[..., jax.Array]

TOKENS = (1, 8, 32, 128, 4096)
MORE_TOKENS = (1, 2, 5, 8, 16, 32, 64, 128, 256, 1024, 4096)
CHECKED_ROWS, CHECKED_TOKENS = 256, 64
"""Of a result, spread over all of it."""
CALL_US, REPLAYS = 15_000.0, 9
"""Of `timing.measure`: there are hundreds of cases."""
FEW_X_TOKENS = 1024
"""From here on two different inputs do: each is larger than what else stays in the L2."""
SMALL_RESULT = 32e6
"""Bytes."""
LATEST_BASELINE = 300.0
"""Seconds after the import: baselines are compiled and tuned by XLA for minutes, and must not push
a run over its time limit."""

_begin = time.monotonic()


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight of a model, or several of the same shape in one call."""

    model: str
    name: str
    n: int  # of all weights
    k: int
    groups: int = 1
    weights: int = 1


def _rows(model: str, d: int, q: int, heads: int, groups: int, inter: int) -> list[Row]:
    return [
        Row(model, "wq_a", q, d),
        Row(model, "wkv", 512, d),
        Row(model, "wq_b", heads * 512, q),
        Row(model, "wo_a", groups * 1024, heads * 512 // groups, groups),
        Row(model, "wo_b", d, groups * 1024),
        Row(model, "shared_w13", 2 * inter, d),
        Row(model, "shared_w2", d, inter),
    ]


QUANTIZED = [*_rows("flash", 4096, 1024, 64, 8, 2048), *_rows("pro", 7168, 1536, 128, 16, 3072)]
DENSE = [
    Row(model, name, n, d)
    for model, d in (("flash", 4096), ("pro", 7168))
    # wkv or wgate of a compressor: CSA keeps two halves.
    for name, n in (("csa", 1024), ("csa_index", 256), ("hca", 512), ("head", 129280))
]
DENSE += [
    dataclasses.replace(row, name=f"{row.name}_x2", n=2 * row.n, weights=2)  # wkv and wgate
    for row in DENSE
    if row.name != "head"
]
LARGEST = ("wq_b", "wo_b", "head")
"""Rows that baselines and second contracts are run on unless others are asked for."""

PEER_US = {
    ("flash", "wq_a"): 3.9,
    ("flash", "wkv"): 5.6,
    ("flash", "wq_b"): 10.3,
    ("flash", "wo_b"): 12.8,
    ("pro", "wkv"): 6.8,
    ("pro", "wq_b"): 26.7,
    ("pro", "wo_b"): 29.0,
}
"""At one token, the fastest of the kernels of others, on an H200."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the table."""

    row: Row
    form: str  # a format of dsv4_jax.precision, or xla_...
    t: int

    @property
    def name(self) -> str:
        """What the line is called."""
        return f"{self.row.model} {self.row.name} {self.form} t={self.t}"

    @property
    def id(self) -> str:
        """For pytest."""
        return self.name.replace(" ", "-").replace("=", "")

    @property
    def storage(self) -> str:
        """Format of the weight."""
        return weight_format(self.form.removeprefix("xla_"))

    @property
    def act(self) -> str:
        """How ``x`` enters the product."""
        return act_format(self.form.removeprefix("xla_"))

    @property
    def dtype(self) -> Any:
        """Of the result, in the model."""
        return jnp.float32 if self.row in DENSE else jnp.bfloat16

    @property
    def weight_bytes(self) -> float:
        """With scales."""
        return self.row.n * self.row.k * support.BYTES[self.storage]

    @property
    def launch_bytes(self) -> float:
        """Weights and ``x`` read, ``y`` written."""
        x = 2 * self.row.groups * self.row.k
        return self.weight_bytes + self.t * (x + np.dtype(self.dtype).itemsize * self.row.n)

    @property
    def flops(self) -> float:
        return 2.0 * self.t * self.row.n * self.row.k

    @property
    def flops_at(self) -> Rate:
        """FP8 products where the weight is, or can be, FP8 as well."""
        return "fp8" if self.act == "fp8" else "bf16"

    @property
    def bars(self) -> tuple[float | None, float | None]:
        """us and fraction."""
        if self.form.startswith("xla_"):
            return None, None
        max_us = PEER_US.get((self.row.model, self.row.name)) if self.t == 1 else None
        large, fractions = {
            "bfloat16": (100e6, {1: 0.85, 8: 0.85, 32: 0.8}),
            "fp8": (30e6, {1: 0.75, 8: 0.75, 32: 0.75, 128: 0.65, 4096: 0.6}),
        }.get(self.storage, (18e6, {1: 0.7, 8: 0.7, 32: 0.7, 4096: 0.6}))
        if self.weight_bytes >= large:
            return max_us, fractions.get(self.t)
        extra = {1: 2.5, 8: 2.5, 32: 3.0}.get(self.t)
        if extra is not None and self.weight_bytes >= 2e6:
            latency = round(timing.H200.us(self.launch_bytes, "read") + extra, 2)
            max_us = latency if max_us is None else min(max_us, latency)
        return max_us, None


def linear_cases(
    rows: Iterable[Row], forms: Callable[[Row], Sequence[str]], tokens: Sequence[int] = TOKENS
) -> list[Case]:
    """Row by row, so that neighbours share weights."""
    return [Case(row, form, t) for row in rows for form in forms(row) for t in tokens]


def baseline_cases(cases: Iterable[Case]) -> list[Case]:
    """What XLA makes of the same."""
    return [dataclasses.replace(case, form=f"xla_{case.form}") for case in cases]


def compared(cases: Iterable[Case]) -> list[Case]:
    """Baselines that belong to a run of everything; XLA tunes each for seconds."""
    return [case for case in cases if case.row.name in LARGEST]


@functools.lru_cache(maxsize=1)
def _weights(row: Row, form: str) -> list[dict[str, jax.Array]]:
    """Enough that the first has left the L2 when its turn comes again."""
    count = math.ceil(timing.ROTATED_BYTES / (row.n * row.k * support.BYTES[form]))
    count = min(max(count, 2), timing.MOST_SETS)
    return [support.random_weight(i, form, (row.n, row.k)) for i in range(count)]


def _spread(count: int, most: int) -> np.ndarray:
    """Indices from first to last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


@functools.lru_cache(maxsize=2)
def _decoded(row: Row, form: str, i: int) -> np.ndarray:
    """The rows that are looked at of weight ``i``."""
    leaves = _weights(row, form)[i]
    return support.decoded_rows(form, leaves, _spread(row.n, CHECKED_ROWS))


def _x(case: Case, i: int) -> np.ndarray:
    shape = (case.row.groups, case.row.k) if case.row.groups > 1 else (case.row.k,)
    return support.normal_values(i + 1, case.t, *shape)


def _check(case: Case, weight: int, x: np.ndarray, y: jax.Array) -> None:
    """Some tokens and rows against FP64."""
    rows, tokens = _spread(case.row.n, CHECKED_ROWS), _spread(case.t, CHECKED_TOKENS)

    def take(y: jax.Array, tokens: jax.Array, rows: jax.Array) -> jax.Array:
        return y.reshape(case.t, case.row.n)[tokens][:, rows]

    indices = tokens.astype(np.int32), rows.astype(np.int32)
    actual = jax.device_get(support.compiled_call(("take", case.t), take, y, *indices))
    wide = _decoded(case.row, case.storage, weight)
    x = x[tokens].reshape(len(tokens), case.row.groups, case.row.k)
    group = rows // (case.row.n // case.row.groups)
    exact = np.empty(actual.shape)
    for g in np.unique(group):
        exact[:, group == g] = support.product(x[:, g], wide[group == g], case.act)
    # XLA sums with other roundings than ours.
    fp8_sums = case.flops_at == "fp8" or case.form.startswith("xla_")
    support.assert_product(actual, exact, case.name, fp8=fp8_sums)


def poisoned(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A result full of 0xFF; a small one comes from the host, where nothing is compiled for it."""
    size = np.dtype(dtype).itemsize
    if math.prod(shape) * size > SMALL_RESULT:
        return timing.filled(0xFF, shape, dtype)
    data = np.full((*shape[:-1], shape[-1] * size), 0xFF, np.uint8)
    return jax.device_put(data.view(dtype))


def measure(name: str, op: Op, case: Case, **settings: Any) -> timing.Result:
    """One line of a linear's benchmark: of ``op``, or for an ``xla_`` form of its `baseline`.

    With several weights ``op`` takes and returns as many.
    """
    ours, count = not case.form.startswith("xla_"), case.row.weights
    part = dataclasses.replace(case.row, n=case.row.n // count, weights=1)
    act = {} if case.storage == "bfloat16" else {"act": case.act}
    function = functools.partial(op, dtype=case.dtype, **act) if ours else baseline(case)
    weights = _weights(part, case.storage)
    sets = max(len(weights), timing.FEWEST_SETS)
    different = sets if case.t < FEW_X_TOKENS else 2
    hosts = [_x(case, i) for i in range(different)]
    xs = jax.device_put(hosts)
    names = support.leaves_of(case.storage)
    groups = (case.row.groups,) if case.row.groups > 1 else ()
    shape = (case.t, *groups, part.n // part.groups)

    def chosen(i: int) -> list[int]:
        return [(i * count + p) % len(weights) for p in range(count)]

    def run(carry: Any, *inputs: jax.Array) -> Any:
        return function(*inputs) if ours else function(timing.held(carry), *inputs)

    def make_set(i: int) -> timing.Set:
        leaves = (weights[w][name] for w in chosen(i) for name in names)
        results = tuple(poisoned(shape, case.dtype) for _ in range(count))
        return results if count > 1 else results[0], (xs[i % different], *leaves)

    def check(i: int, y: Any) -> None:
        of_part = dataclasses.replace(case, row=part)
        for w, result in zip(chosen(i), y if count > 1 else [y], strict=True):
            _check(of_part, w, hosts[i % different], result)

    max_us, min_fraction = case.bars
    return timing.measure(
        name,
        case.name,
        run,
        make_set,
        check,
        target=name if ours else None,
        launch_bytes=case.launch_bytes,
        bytes_at="read",
        flops=case.flops,
        flops_at=case.flops_at,
        max_us=max_us,
        min_fraction=min_fraction,
        **{"sets": sets, "call_us": CALL_US, "replays": REPLAYS, "evict_bytes": 0.0, **settings},
    )


def _quantized(x: jax.Array, act: str) -> tuple[jax.Array, jax.Array]:
    """BF16 values and a scale per row, as the ops of version 0.3 made them."""
    wide = x.astype(jnp.float32)
    if act == "nvfp4":
        s2 = nvfp4.token_global_scale(wide)
        value = nvfp4.dequantize_blocks(nvfp4.quantize(wide, s2))
        return value.astype(jnp.bfloat16), s2
    if act == "fp8":
        wide = fp8.dequantize_act(fp8.quantize_act(wide, fp8.ACT_BLOCK), fp8.ACT_BLOCK)
    return wide.astype(jnp.bfloat16), jnp.ones(x.shape[:-1], jnp.float32)


def dequantized(zero: jax.Array, form: str, *leaves: jax.Array) -> jax.Array:
    """The weight in BF16 without a global scale; ``zero`` keeps it in the loop."""
    codes, scale = leaves[0], leaves[1]
    if codes.dtype == E2M1:
        wide = bits.decode_e2m1_bytes(bits.e2m1_to_bytes(codes) ^ zero)
    else:
        view = lax.bitcast_convert_type(codes, jnp.uint8) ^ zero
        wide = bits.decode_e4m3(lax.bitcast_convert_type(view, E4M3))
    value = bits.decode_e4m3(scale) if form == "nvfp4" else bits.decode_ue8m0(scale)
    block = support.BLOCK[form]
    value = jnp.repeat(value, block, axis=-1)[..., : wide.shape[-1]]
    if form == "fp8":
        value = jnp.repeat(value, block, axis=-2)[..., : wide.shape[-2], :]
    return (wide * value).astype(jnp.bfloat16)


def baseline(case: Case) -> Op:
    """Dequantise + dot in `jax.numpy`, the ops of version 0.3; for BF16 the dot alone."""

    def op(zero: jax.Array, x: jax.Array, *leaves: jax.Array) -> jax.Array:
        if case.storage == "bfloat16":
            view = lax.bitcast_convert_type(x, jnp.uint16) ^ zero.astype(jnp.uint16)
            value, wide = lax.bitcast_convert_type(view, jnp.bfloat16), leaves[0]
            scale = jnp.ones(x.shape[:-1], jnp.float32)
        else:
            value, scale = _quantized(x, case.act)
            wide = dequantized(zero, case.storage, *leaves)
        if case.storage == "nvfp4":
            scale = scale * leaves[2]
        if x.ndim == 3:
            wide = wide.reshape(x.shape[1], -1, x.shape[2])
        spec = "tgk,gmk->tgm" if x.ndim == 3 else "tk,nk->tn"
        y = jnp.einsum(spec, value, wide, preferred_element_type=jnp.float32)
        return (y if case.storage != "nvfp4" else y * scale[..., None]).astype(case.dtype)

    return op


def skip_when_late() -> None:
    """Leaves a baseline out of a run that has been long."""
    if time.monotonic() - _begin > LATEST_BASELINE:
        pytest.skip(f"baselines start within {LATEST_BASELINE:.0f} s of a run")


def program(
    cases: Sequence[Any],
    every: Sequence[Any],
    run: Callable[[Any], timing.Result],
    baselines: Sequence[Any] = (),
    arguments: Sequence[str] | None = None,
) -> int:
    """The cases that the command line names, one table; exit status 1 when one failed.

    Without ``--forms`` and ``--tokens`` those of ``cases``, else of ``every``. A line goes into
    $BENCH_JSONL when that is set.
    """
    parser = argparse.ArgumentParser(description="Times the cases that match every option given.")
    fields: dict[str, Callable[[Any], str]] = {
        "models": lambda case: case.row.model,
        "rows": lambda case: case.row.name,
        "forms": lambda case: case.form.removeprefix("xla_"),
        "tokens": lambda case: str(case.t),
    }
    for name, value in fields.items():
        choices = list(dict.fromkeys(map(value, [*every, *baselines])))
        parser.add_argument(f"--{name}", nargs="+", choices=choices, metavar=name[:-1].upper())
    parser.add_argument("--baselines", action="store_true", help="XLA's too")
    parser.add_argument("--only-baselines", action="store_true")
    options = parser.parse_args(arguments)
    forms, tokens = {(case.row, case.form) for case in cases}, {case.t for case in cases}

    def usual(case: Any) -> bool:
        """Of the table, or asked for by name."""
        if not options.forms and not options.tokens:
            return case in cases
        form = options.forms or (case.row, case.form) in forms
        return bool(form) and bool(options.tokens or case.t in tokens)

    chosen = [] if options.only_baselines else [case for case in every if usual(case)]
    chosen += baselines if options.baselines or options.only_baselines else []
    for name, value in fields.items():
        wanted = getattr(options, name)
        chosen = [case for case in chosen if wanted is None or value(case) in wanted]
    results: list[timing.Result] = []
    failed = 0
    begin = time.monotonic()
    for case in chosen:
        try:
            result = run(case)
            if "BENCH_JSONL" in os.environ:
                result.append(timing.default_path())
            result.require()
        except (AssertionError, jax.errors.JaxRuntimeError) as error:
            failed += 1
            print(f"FAILED {case.name}: {error}", flush=True)
            continue
        results.append(result)
    print(f"\n{timing.table(results)}")
    print(f"{len(chosen)} cases in {time.monotonic() - begin:.0f} s, {failed} failed")
    return int(failed > 0)
