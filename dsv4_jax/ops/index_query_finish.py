"""What an indexer query goes through between its projection and the scores (model.md 3.5)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import library
from dsv4_jax.ops._check import FLOAT32, FLOATS, INTEGERS, as_int32, check_choice, check_operand
from dsv4_jax.ops.hadamard import hadamard
from dsv4_jax.ops.query_finish import CHUNK, MAX_ROTARY
from dsv4_jax.ops.rope import rope
from dsv4_jax.quant import mxfp4
from dsv4_jax.quant.kv import IndexRows, index_quant
from dsv4_jax.typing import E2M1, E4M3, UE8M0, Array, Float, Float32, Int32

__all__ = ["index_query_finish"]

FORMS = ("mxfp4", "fp8", "bfloat16", "float32")
WIDTHS = (32, 64, 128)
"""That the foreign call takes."""


@functools.partial(jax.jit, static_argnames=("form",))
def index_query_finish(
    q: Float[Array, "b t h d"],
    positions: Int32[Array, "b t"],
    frequencies: Float32[Array, "f"] | np.ndarray,
    *,
    form: Literal["mxfp4", "fp8", "bfloat16", "float32"],
) -> IndexRows:
    """``index_quant(hadamard(rope(q_h, position)))``, every step rounded to ``q``'s dtype.

    Unquantised forms have no Hadamard transform: it only serves the rounding of the others, and
    cancels without. BF16 queries of 32, 64 or 128 channels in a quantised form are one foreign
    call, a head independent of all others; others are the ops of the formula, whose order of
    additions is the call's. NaN and infinities stay in their head, NaN in the scales of its codes.
    No gradient. Under `jax.vmap` a call per element. Arrays on several devices are gathered unless
    the call is inside `jax.shard_map`.

    Args:
        frequencies: ``[rotary / 2]``: the last ``rotary`` channels are turned by the FP32 product
            ``position * frequency``.
        form: as `index_quant` has it.

    Returns:
        ``key [b, t, h, d]`` with ``scale [b, t, h, d / 32]`` (``mxfp4``) or ``[b, t, h, 1]``
        (``fp8``).

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, ``q`` has fewer channels than the rotation, a quantised form
            does not have a power of two of channels (``mxfp4``: at least 32), or ``form`` is
            unknown.
    """
    check_operand("index_query_finish", "q", q, "b t h d", FLOATS)
    check_operand("index_query_finish", "positions", positions, "b t", INTEGERS)
    check_choice("index_query_finish", "form", form, FORMS)
    frequencies = jnp.asarray(frequencies)
    check_operand("index_query_finish", "frequencies", frequencies, "f", FLOAT32)
    (b, t, h, d), rotary = q.shape, 2 * frequencies.shape[0]
    if d < max(rotary, 1):
        raise ValueError(
            f"index_query_finish: q must have at least {max(rotary, 1)} channels, got {d}"
        )
    quantised = form in ("mxfp4", "fp8")
    if quantised and (d & (d - 1) or (form == "mxfp4" and d < mxfp4.BLOCK)):
        raise ValueError(
            f"index_query_finish: q must have a power of two of channels in form {form}"
            f"{', at least 32' if form == 'mxfp4' else ''}, got {d}"
        )
    if positions.shape != (b, t):
        raise ValueError(
            f"index_query_finish: positions must be [{b}, {t}] for q {list(q.shape)}, "
            f"got {list(positions.shape)}"
        )
    served = d in WIDTHS and rotary % CHUNK == 0 and rotary <= MAX_ROTARY
    if not quantised or q.dtype != jnp.bfloat16 or not served:
        turned = rope(q, positions, frequencies)
        return index_quant(hadamard(turned) if quantised else turned, form)
    blocks = d // mxfp4.BLOCK if form == "mxfp4" else 1
    code, scale = library.call(
        "index_query_finish",
        [
            jax.ShapeDtypeStruct((b * t, h, d), E2M1 if form == "mxfp4" else E4M3),
            jax.ShapeDtypeStruct((b * t, h, blocks), UE8M0),
        ],
        q.reshape(b * t, h, d),
        as_int32(positions).reshape(b * t),
        frequencies,
        form=np.int32(1 if form == "mxfp4" else 2),
    )
    return IndexRows(code.reshape(q.shape), scale.reshape(b, t, h, blocks))
