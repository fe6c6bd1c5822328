"""What an indexer query goes through between its projection and the scores (model.md 3.5)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import library
from dsv4_jax.ops._check import as_int32, check_choice
from dsv4_jax.ops.hadamard import hadamard
from dsv4_jax.ops.query_finish import check_queries, query_finish
from dsv4_jax.ops.rope import rope
from dsv4_jax.quant import mxfp4
from dsv4_jax.quant.kv import IndexRows, index_quant
from dsv4_jax.typing import E2M1, E4M3, UE8M0, Array, Float, Float32, Int32

__all__ = ["index_query_finish"]

FORMS = ("mxfp4", "fp8", "bfloat16", "float32")
WIDTHS = (32, 64, 128)
"""That the foreign call takes."""


@functools.partial(jax.jit, static_argnames=("form", "eps", "rounding"))
def index_query_finish(
    q: Float[Array, "b t h d"],
    positions: Int32[Array, "b t"],
    frequencies: Float32[Array, "f"] | np.ndarray,
    *,
    form: Literal["mxfp4", "fp8", "bfloat16", "float32"],
    heads: Float[Array, "b t n c"] | None = None,
    eps: float = 0.0,
    rounding: Literal["float32", "bfloat16"] = "float32",
) -> IndexRows | tuple[IndexRows, Float[Array, "b t n c"]]:
    """``index_quant(hadamard(rope(q_h, position)))``, every step rounded to ``q``'s dtype.

    Unquantised forms have no Hadamard transform: it only serves the rounding of the others, and
    cancels without. BF16 queries of 32, 64 or 128 channels in a quantised form are one foreign
    call, a head independent of all others; others are the ops of the formula, whose order of
    additions is the call's. ``heads`` go through `query_finish` besides, bit for bit; where it is a
    foreign call too both are one, and of up to 32 tokens one launch. NaN and infinities stay in
    their head, NaN in the scales of its codes.
    No gradient. Under `jax.vmap` a call per element. Arrays on several devices are gathered unless
    the call is inside `jax.shard_map`.

    Args:
        frequencies: ``[rotary / 2]``: the last ``rotary`` channels are turned by the FP32 product
            ``position * frequency``.
        form: as `index_quant` has it.
        heads: the layer's own queries of the same tokens.
        eps, rounding: of `query_finish`.

    Returns:
        ``key [b, t, h, d]`` with ``scale [b, t, h, d / 32]`` (``mxfp4``) or ``[b, t, h, 1]``
        (``fp8``); with ``heads`` also what `query_finish` returns.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, ``q`` has fewer channels than the rotation, a quantised form
            does not have a power of two of channels (``mxfp4``: at least 32), or ``form`` is
            unknown.
    """
    frequencies = jnp.asarray(frequencies)
    check_choice("index_query_finish", "form", form, FORMS)
    check_choice("index_query_finish", "rounding", rounding, ("float32", "bfloat16"))
    served = check_queries("index_query_finish", "q", q, positions, frequencies)
    together = False
    if heads is not None:
        operands = heads, positions, frequencies
        together = check_queries("index_query_finish", "heads", *operands)
    b, t, h, d = q.shape
    quantised = form in ("mxfp4", "fp8")
    if quantised and (d & (d - 1) or (form == "mxfp4" and d < mxfp4.BLOCK)):
        raise ValueError(
            f"index_query_finish: q must have a power of two of channels in form {form}"
            f"{', at least 32' if form == 'mxfp4' else ''}, got {d}"
        )
    served = served and quantised and d in WIDTHS
    if heads is not None and not (served and together):
        done = query_finish(heads, positions, frequencies, eps, rounding=rounding)
        return index_query_finish(q, positions, frequencies, form=form), done
    if not served:
        turned = rope(q, positions, frequencies)
        return index_quant(hadamard(turned) if quantised else turned, form)
    blocks = d // mxfp4.BLOCK if form == "mxfp4" else 1
    more = [] if heads is None else [heads.reshape(b * t, *heads.shape[2:])]
    code, scale, *done = library.call(
        "index_query_finish",
        [
            jax.ShapeDtypeStruct((b * t, h, d), E2M1 if form == "mxfp4" else E4M3),
            jax.ShapeDtypeStruct((b * t, h, blocks), UE8M0),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in more),
        ],
        q.reshape(b * t, h, d),
        as_int32(positions).reshape(b * t),
        frequencies,
        *more,
        form=np.int32(1 if form == "mxfp4" else 2),
        eps=np.float32(eps),
        bf16_steps=np.int32(rounding == "bfloat16"),
    )
    rows = IndexRows(code.reshape(q.shape), scale.reshape(b, t, h, blocks))
    return rows if heads is None else (rows, done[0].reshape(heads.shape))
