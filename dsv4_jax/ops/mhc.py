"""mHC in one step: write-back, the next read, its norm and quantisation (model.md 2.2-2.4)."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsv4_jax import library
from dsv4_jax.ops._check import FLOAT32, check_choice, check_operand
from dsv4_jax.ops._linear import REGIMES
from dsv4_jax.precision import Regime
from dsv4_jax.quant import fp8, nvfp4
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.quant.nvfp4 import Nvfp4
from dsv4_jax.typing import E2M1, E4M3, UE8M0, Array, BFloat16, Float32

__all__ = ["MAX_DIM", "Form", "Mixed", "Read", "Write", "mhc", "mhc_takes"]

BFLOAT16 = (jnp.dtype(jnp.bfloat16),)
STREAMS = 4
MIXES, HEAD_MIXES = 24, 4
TILE = 128
SUM_STRIDE = 28
MAX_DIM = 16384
"""Most channels of a stream."""

Form = Literal["bfloat16", "nvfp4", "fp8"]
FORMS: dict[Form, int] = {"bfloat16": 1, "nvfp4": 2, "fp8": 4}


class Write(NamedTuple):
    """A branch's output ``[t, d]`` and the weights that its read gave."""

    branch: BFloat16[Array, "t d"]
    post: Float32[Array, "t 4"]
    comb: Float32[Array, "t 4 4"]


class Read(NamedTuple):
    """Parameters of a branch (24 mixes, 3 scales) or of the head (4 mixes, 1 scale)."""

    fn: Float32[Array, "m hcd"]
    base: Float32[Array, "m"]
    scale: Float32[Array, "s"]
    norm: BFloat16[Array, "d"]


class Mixed(NamedTuple):
    """What a call gives; ``None`` for what was not asked for."""

    streams: BFloat16[Array, "t 4 d"]
    post: Float32[Array, "t 4"] | None
    comb: Float32[Array, "t 4 4"] | None
    x: BFloat16[Array, "t d"] | None
    nvfp4: Nvfp4 | None
    fp8: Fp8 | None


def mhc_takes(hc: int, d: int) -> bool:
    """Whether there are 4 streams, of a multiple of 128 channels up to `MAX_DIM`."""
    return hc == STREAMS and d % TILE == 0 and TILE <= d <= MAX_DIM


@functools.partial(jax.jit, static_argnames=("iters", "hc_eps", "rms_eps", "forms", "regime"))
def mhc(
    streams: BFloat16[Array, "t 4 d"],
    write: Write | None,
    read: Read | None,
    global_scale: Float32[Array, ""] | None = None,
    *,
    iters: int,
    hc_eps: float,
    rms_eps: float,
    forms: tuple[Form, ...] = ("bfloat16",),
    regime: Regime | None = None,
) -> Mixed:
    """Writes a branch back into the streams and reads the next branch's input from them.

    ``S_k = bf(post_k f + sum_j comb[j, k] S_j)``, in place where ``streams`` is donated; then of
    these ``x = bf(norm * rms(bf(sum_j pre_j S_j)))`` in the asked for forms, and, for a branch, the
    ``post`` and ``comb`` of its own write-back. Without ``write`` the streams stay as they are;
    without ``read`` there is no ``x``.

    A token depends on no other. Sums run in an order of the op's own (ffi/mhc/mhc.h; the same on
    CPU and GPU but for the regime ``"prefill"``), so that against `mhc_post`, `mhc_pre`, `mhc_head`
    and `rmsnorm` values on a rounding tie may fall the other way. NaN or Inf in a token's streams
    stays in its results; a token of zeros has codes 0 and finite scales. Under `jax.vmap` a launch
    per element. No gradient. Arrays on several devices are gathered unless the call is inside
    `jax.shard_map`.

    Args:
        streams: the residual streams.
        write: what to write back.
        read: parameters of the read; its rows say whether of a branch or of the head.
        global_scale: static scale of NVFP4, clamped to 2^-100..2^100; each token takes ``max|x| /
            (6 * 448)`` of its own when ``None``.
        iters: column normalisations of ``comb`` in total; >= 1.
        hc_eps: added to ``pre`` and inside the normalisations.
        rms_eps: added to both mean squares.
        regime: of the kernels on a GPU: ``"prefill"`` multiplies by ``fn`` on tensor cores (exact
            products, FP32 sums), ``"decode"`` and ``"exact"`` do not; ``None``: for more than 8
            tokens.
        forms: of ``x``: ``"bfloat16"``, ``"nvfp4"`` (model.md 9.2), ``"fp8"`` (per 128, 4.5).

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: there are not 4 streams, ``d`` is not a multiple of 128 in 128..16384, shapes
            disagree, or there is nothing to do.
    """
    check_operand("mhc", "streams", streams, "t hc d", BFLOAT16)
    check_choice("mhc", "regime", regime, tuple(REGIMES))
    t, hc, d = streams.shape
    if not mhc_takes(hc, d):
        raise ValueError(
            f"mhc: streams must be [t, 4, d] with d a multiple of {TILE} up to {MAX_DIM}, "
            f"got {list(streams.shape)}"
        )
    if write is None and read is None:
        raise ValueError("mhc: one of write and read must be given, got None for both")
    operands: list[Array] = [streams]
    results: list[jax.ShapeDtypeStruct] = []

    def result(dtype: DTypeLike, *shape: int) -> None:
        results.append(jax.ShapeDtypeStruct(shape, dtype))

    if write is not None:
        _check("branch", write.branch, BFLOAT16, (t, d), streams)
        _check("post", write.post, FLOAT32, (t, hc), streams)
        _check("comb", write.comb, FLOAT32, (t, hc, hc), streams)
        operands += write
        result(jnp.bfloat16, t, hc, d)
    mixes = 0
    if read is not None:
        check_operand("mhc", "fn", read.fn, "m hcd", FLOAT32)
        mixes = read.fn.shape[0]
        check_choice("mhc", "rows of fn", mixes, (MIXES, HEAD_MIXES))
        _check("fn", read.fn, FLOAT32, (mixes, hc * d), streams)
        _check("base", read.base, FLOAT32, (mixes,), streams)
        _check("scale", read.scale, FLOAT32, (3 if mixes == MIXES else 1,), streams)
        _check("norm", read.norm, BFLOAT16, (d,), streams)
        operands += read
        _check_forms(forms, global_scale)
        if iters < 1:
            raise ValueError(f"mhc: iters must be at least 1, got {iters}")
    elif global_scale is not None:
        raise ValueError("mhc: global_scale must come with a read into nvfp4")
    if global_scale is not None:
        operands.append(global_scale)
    if mixes == MIXES:
        result(jnp.float32, t, hc)
        result(jnp.float32, t, hc, hc)
    asked = set(forms) if read is not None else set()
    if "bfloat16" in asked:
        result(jnp.bfloat16, t, d)
    if "nvfp4" in asked:
        result(E2M1, t, d)
        result(E4M3, t, d // nvfp4.BLOCK)
        result(jnp.float32, t)
    if "fp8" in asked:
        result(E4M3, t, d)
        result(UE8M0, t, d // fp8.ACT_BLOCK)
    if read is not None:
        result(jnp.uint8, t * (d // TILE) * SUM_STRIDE * 4)
    parts = iter(
        library.call(
            "mhc",
            results,
            *operands,
            aliases={0: 0} if write is not None else None,
            write=np.int32(write is not None),
            mixes=np.int32(mixes),
            forms=np.int32(sum(FORMS[form] for form in asked)),
            iters=np.int32(iters),
            regime=np.int32(REGIMES[regime]),
            hc_eps=np.float32(hc_eps),
            rms_eps=np.float32(rms_eps),
        )
    )
    return Mixed(
        next(parts) if write is not None else streams,
        *((next(parts), next(parts)) if mixes == MIXES else (None, None)),
        next(parts) if "bfloat16" in asked else None,
        Nvfp4(next(parts), next(parts), next(parts)) if "nvfp4" in asked else None,
        Fp8(next(parts), next(parts)) if "fp8" in asked else None,
    )


def _check(
    name: str,
    x: Array,
    dtypes: tuple[jnp.dtype, ...],
    shape: tuple[int, ...],
    streams: Array,
) -> None:
    check_operand("mhc", name, x, "*lead", dtypes)
    if x.shape != shape:
        raise ValueError(
            f"mhc: {name} must be {list(shape)} for streams {list(streams.shape)}, "
            f"got {list(x.shape)}"
        )


def _check_forms(forms: tuple[Form, ...], global_scale: Array | None) -> None:
    if not forms:
        raise ValueError("mhc: forms must name at least one form of x, got ()")
    for form in forms:
        check_choice("mhc", "forms", form, tuple(FORMS))
    if global_scale is None:
        return
    if "nvfp4" not in forms:
        raise ValueError(f"mhc: global_scale must come with the form nvfp4, got {list(forms)}")
    check_operand("mhc", "global_scale", global_scale, "*lead", FLOAT32)
    if global_scale.shape != ():
        raise ValueError(f"mhc: global_scale must be a scalar, got {list(global_scale.shape)}")
