"""Compressor: windows of tokens pooled into one entry each, as they close (model.md 3.5, 4.2)."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsv4_jax import library
from dsv4_jax.ops._check import FLOAT32, FLOATS, INTEGERS, as_int32, check_operand
from dsv4_jax.ops._compressor_jax import compressor_jax
from dsv4_jax.quant import fp8, mxfp4
from dsv4_jax.quant.kv import IndexRows, KvRows
from dsv4_jax.typing import E2M1, E4M3, UE8M0, Array, Float, Float32, Int32

__all__ = ["Compressed", "CompressorJob", "compressor"]

MAX_JOBS = 2
MAX_RATIO, MAX_WIDTH, MAX_INDEX_WIDTH = 128, 512, 128
"""``kCompressorMax...`` of ffi/compressor/compressor.h."""
OVERLAP_RATIO = 4


class CompressorJob(NamedTuple):
    """One compressor of a layer; ``c`` is 2 for ratio 4, else 1.

    ``kv``, ``gate``: the chunk's projections, ``gate`` without ``ape``. ``norm``: weight of the
    norm. ``kv_state``, ``gate_state``: rings of earlier positions, position ``p`` in row ``p % r``,
    the gate's with ``ape``. ``pool``: entries, window ``w`` in slot ``w``.
    """

    kv: Float32[Array, "b t cd"]
    gate: Float32[Array, "b t cd"]
    ape: Float32[Array, "m cd"]
    norm: Float[Array, "d"]
    kv_state: Float32[Array, "b r cd"]
    gate_state: Float32[Array, "b r cd"]
    pool: KvRows | IndexRows


class Compressed(NamedTuple):
    """What a job leaves behind."""

    kv_state: Float32[Array, "b r cd"]
    gate_state: Float32[Array, "b r cd"]
    pool: KvRows | IndexRows


@functools.partial(jax.jit, static_argnames=("ratio", "eps", "dtype"))
def compressor(
    jobs: Sequence[CompressorJob],
    start: Int32[Array, "b"],
    count: Int32[Array, "b"],
    frequencies: Float32[Array, "f"] | np.ndarray,
    *,
    ratio: int,
    eps: float,
    dtype: DTypeLike = jnp.bfloat16,
) -> list[Compressed]:
    """``c_w = sum_s softmax_s(gate_s + ape) * kv_s`` per channel over the slots of window ``w``.

    The entry of a window that closes inside the chunk is ``rope(rmsnorm(round(c_w)), w * ratio)``,
    every step rounded to ``dtype``, in the pool's format: keys with E4M3 codes per 64, index keys
    after a Hadamard transform with E2M1 codes per 32 or E4M3 codes per row, or either unquantised.
    Then the states take the chunk's last positions. Ratio 4 (CSA, two halves of channels): slots
    are the previous window's first-half channels and the window's own second-half channels.
    Otherwise (HCA): the window's own positions.

    BF16 entries and norms with quantised pools are one foreign call for all jobs, in place: states
    and pools that are donated to the enclosing jit keep their buffers, and only rows of real tokens
    and of closed windows are touched. Other dtypes and sizes are `jax.numpy`, their updates in
    place too. On the CPU, and in the foreign call anywhere, a row's bits do not depend on how its
    tokens are cut into chunks. No gradient. Under `jax.vmap` a call per element. Arrays on several
    devices are gathered unless the call is inside `jax.shard_map`.

    Args:
        jobs: the compressors of a layer, 1 or 2; ``b`` and ``t`` are the same.
        start: length of each row before the chunk; a row with a negative one takes nothing.
        count: real tokens of each row in the chunk, held to ``0 .. t``.
        frequencies: ``[rotary / 2]``.
        dtype: of the entries before they are stored.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, ``ratio`` < 1, there are no jobs or too many, or a ring is
            shorter than a window's slots.
    """
    if jnp.dtype(dtype) not in FLOATS:
        raise TypeError(f"compressor: dtype must be bfloat16 or float32, got {jnp.dtype(dtype)}")
    if ratio < 1:
        raise ValueError(f"compressor: ratio must be at least 1, got {ratio}")
    if not 1 <= len(jobs) <= MAX_JOBS:
        raise ValueError(f"compressor: jobs must be 1..{MAX_JOBS}, got {len(jobs)}")
    check_operand("compressor", "kv", jobs[0].kv, "b t cd", FLOAT32)
    for name, x in {"start": start, "count": count}.items():
        check_operand("compressor", name, x, "b", INTEGERS)
        _check_shape(name, x, jobs[0].kv.shape[:1])
    frequencies = jnp.asarray(frequencies)
    check_operand("compressor", "frequencies", frequencies, "f", FLOAT32)
    rotary = 2 * frequencies.shape[0]
    for i, job in enumerate(jobs):
        _check_job(f"jobs[{i}] " if len(jobs) > 1 else "", job, jobs[0], ratio, rotary)

    start, count = (as_int32(x) for x in (start, count))
    forms = [_form(job, ratio, rotary, dtype) for job in jobs]
    served = [i for i, form in enumerate(forms) if form]
    written: dict[int, Compressed] = {}
    if served:
        new = _call(
            [jobs[i] for i in served],
            [forms[i] for i in served],
            start,
            count,
            frequencies,
            ratio,
            eps,
        )
        written.update(zip(served, new, strict=True))
    for i in set(range(len(jobs))) - set(served):
        job = jobs[i]
        states, pool = compressor_jax(
            *(job.kv, job.gate, job.ape, job.norm, (job.kv_state, job.gate_state), job.pool),
            *(start, count, frequencies),
            ratio=ratio,
            eps=eps,
            dtype=dtype,
        )
        written[i] = Compressed(*states, pool)
    return [written[i] for i in range(len(jobs))]


def _call(
    jobs: Sequence[CompressorJob],
    forms: Sequence[int],
    start: Array,
    count: Array,
    frequencies: Array,
    ratio: int,
    eps: float,
) -> list[Compressed]:
    """The foreign call; what follows a job's norm is written."""
    operands: list[Array] = [start, count, frequencies]
    aliases: dict[int, int] = {}
    written = [Compressed(*job[4:]) for job in jobs]
    for job, new in zip(jobs, written, strict=True):
        operands += job[:4]
        for leaf in jax.tree.leaves(new):
            aliases[len(operands)] = len(aliases)
            operands.append(leaf)
    leaves, structure = jax.tree.flatten(written)
    results = library.call(
        "compressor",
        [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves],
        *operands,
        aliases=aliases,
        ratio=np.int32(ratio),
        form0=np.int32(forms[0]),
        form1=np.int32(forms[1] if len(forms) > 1 else 0),
        eps=np.float32(eps),
    )
    return jax.tree.unflatten(structure, results)


def _form(job: CompressorJob, ratio: int, rotary: int, dtype: DTypeLike) -> int:
    """``EntryForm`` of ffi/compressor/compressor.h, 0 for what has no kernel."""
    d = job.norm.shape[0]
    if jnp.dtype(dtype) != jnp.bfloat16 or job.norm.dtype != jnp.bfloat16 or ratio > MAX_RATIO:
        return 0
    if isinstance(job.pool, KvRows):
        fits = (d - rotary) % fp8.KV_BLOCK == 0 and d % 4 == 0 and 0 < d <= MAX_WIDTH
        return 1 if job.pool.scale is not None and fits else 0
    if job.pool.scale is None or ratio != OVERLAP_RATIO or not mxfp4.BLOCK <= d <= MAX_INDEX_WIDTH:
        return 0
    return 2 if job.pool.key.dtype == E2M1 else 3


def _check_shape(name: str, x: Array, want: Sequence[int]) -> None:
    if x.shape != tuple(want):
        raise ValueError(f"compressor: {name} must be {list(want)}, got {list(x.shape)}")


def _check_job(
    prefix: str, job: CompressorJob, first: CompressorJob, ratio: int, rotary: int
) -> None:
    """Dtypes and sizes of one job; ``b`` and ``t`` are those of the first."""
    floats = {"kv": job.kv, "gate": job.gate, "kv_state": job.kv_state}
    for name, x in (floats | {"gate_state": job.gate_state}).items():
        check_operand("compressor", prefix + name, x, "b t cd", FLOAT32)
    check_operand("compressor", prefix + "ape", job.ape, "m cd", FLOAT32)
    check_operand("compressor", prefix + "norm", job.norm, "d", FLOATS)
    (b, t), d = first.kv.shape[:2], job.norm.shape[0]
    overlap = 2 if ratio == OVERLAP_RATIO else 1
    ring, columns = job.kv_state.shape[1], overlap * d
    if d < rotary:
        raise ValueError(
            f"compressor: {prefix}norm must have at least the {rotary} rotary channels, got {d}"
        )
    for name, x, want in (
        ("kv", job.kv, (b, t, columns)),
        ("gate", job.gate, (b, t, columns)),
        ("ape", job.ape, (ratio, columns)),
        ("kv_state", job.kv_state, (b, ring, columns)),
        ("gate_state", job.gate_state, (b, ring, columns)),
    ):
        _check_shape(prefix + name, x, want)
    if ring < overlap * ratio:
        raise ValueError(
            f"compressor: {prefix}kv_state must hold at least {overlap * ratio} rows for ratio "
            f"{ratio}, got {ring}"
        )
    _check_pool(prefix + "pool", job.pool, b, d, rotary)


def _check_pool(name: str, pool: KvRows | IndexRows, b: int, d: int, rotary: int) -> None:
    """``[b, s, ...]`` in one of the storage formats."""
    codes = pool.nope if isinstance(pool, KvRows) else pool.key
    quantised = (jnp.dtype(E4M3),) if isinstance(pool, KvRows) else (jnp.dtype(E4M3), E2M1)
    check_operand("compressor", f"{name} codes", codes, "b s n", (*quantised, *FLOATS))
    s = codes.shape[1]
    parts = {"codes": (codes, d), "scale": (pool.scale, -1)}
    if isinstance(pool, KvRows):
        accepted = FLOATS if pool.scale is None else (jnp.dtype(jnp.bfloat16),)
        check_operand("compressor", f"{name} rope", pool.rope, "b s n", accepted)
        parts = {"codes": (codes, d - rotary), "scale": (pool.scale, -1)}
        parts["rope"] = (pool.rope, rotary)
    if (pool.scale is not None) != (codes.dtype not in FLOATS):
        raise ValueError(
            f"compressor: {name} must have a scale with codes and with nothing else, got "
            f"{'none' if pool.scale is None else 'one'} with {codes.dtype}"
        )
    if pool.scale is not None:
        check_operand("compressor", f"{name} scale", pool.scale, "b s n", (jnp.dtype(UE8M0),))
        if isinstance(pool, KvRows):
            blocks = -(-(d - rotary) // fp8.KV_BLOCK)
        else:
            blocks = d // mxfp4.BLOCK if codes.dtype == E2M1 else 1
            if d & (d - 1) or d % mxfp4.BLOCK:
                raise ValueError(
                    f"compressor: {name} must have a power of two of channels, at least "
                    f"{mxfp4.BLOCK}, got {d}"
                )
        parts["scale"] = (pool.scale, blocks)
    for part, (x, width) in parts.items():
        if x is not None:
            _check_shape(f"{name} {part}", x, (b, s, width))
