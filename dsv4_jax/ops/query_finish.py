"""What a query goes through between its projection and attention (model.md 3.1, 3.3)."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import library
from dsv4_jax.ops._check import FLOAT32, FLOATS, INTEGERS, as_int32, check_choice, check_operand
from dsv4_jax.ops.head_norm import head_norm
from dsv4_jax.ops.rope import rope
from dsv4_jax.typing import Array, Float, Float32, Int32

__all__ = ["CHUNK", "MAX_ROTARY", "MAX_WIDTH", "check_queries", "query_finish"]

CHUNK, MAX_WIDTH, MAX_ROTARY = 8, 512, 64
"""``kChunkChannels``, ``kRowMaxChannels`` and ``kMaxRotary`` of ffi/common/channels.h."""


@functools.partial(jax.jit, static_argnames=("eps", "rounding"))
def query_finish(
    q: Float[Array, "b t h d"],
    positions: Int32[Array, "b t"],
    frequencies: Float32[Array, "f"] | np.ndarray,
    eps: float,
    *,
    rounding: Literal["float32", "bfloat16"],
) -> Float[Array, "b t h d"]:
    """``rope(q_h * rsqrt(mean(q_h^2) + eps), position)``, every step rounded to ``q``'s dtype.

    BF16 queries of up to 512 channels are one foreign call, a head independent of all others; other
    dtypes and sizes are `head_norm` and `rope`. The call adds squares in an order of its own (the
    same on CPU and GPU), so that against those a value on a rounding tie may fall the other way.
    NaN and infinities stay in their head. No gradient. Under `jax.vmap` a call per element. Arrays
    on several devices are gathered unless the call is inside `jax.shard_map`.

    Args:
        frequencies: ``[rotary / 2]``: the last ``rotary`` channels are turned by the FP32 product
            ``position * frequency``.
        eps: added to the mean square.
        rounding: of the norm's steps, as `head_norm` has it.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, ``q`` has fewer channels than the rotation, or ``rounding`` is
            not one of the two.
    """
    frequencies = jnp.asarray(frequencies)
    check_choice("query_finish", "rounding", rounding, ("float32", "bfloat16"))
    if not check_queries("query_finish", "q", q, positions, frequencies):
        return rope(head_norm(q, eps, rounding=rounding), positions, frequencies)
    b, t, h, d = q.shape
    (y,) = library.call(
        "query_finish",
        [jax.ShapeDtypeStruct((b * t, h, d), q.dtype)],
        q.reshape(b * t, h, d),
        as_int32(positions).reshape(b * t),
        frequencies,
        eps=np.float32(eps),
        bf16_steps=np.int32(rounding == "bfloat16"),
    )
    return y.reshape(q.shape)


def check_queries(op: str, name: str, q: Array, positions: Array, frequencies: Array) -> bool:
    """Of ``[b, t, h, d]``; whether the foreign call takes them.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, or there are fewer channels than the rotation has.
    """
    check_operand(op, name, q, "b t h d", FLOATS)
    check_operand(op, "positions", positions, "b t", INTEGERS)
    check_operand(op, "frequencies", frequencies, "f", FLOAT32)
    (b, t, _, d), rotary = q.shape, 2 * frequencies.shape[0]
    if d < max(rotary, 1):
        raise ValueError(f"{op}: {name} must have at least {max(rotary, 1)} channels, got {d}")
    if positions.shape != (b, t):
        raise ValueError(
            f"{op}: positions must be [{b}, {t}] for {name} {list(q.shape)}, "
            f"got {list(positions.shape)}"
        )
    served = d % CHUNK == 0 and d <= MAX_WIDTH and rotary % CHUNK == 0 and rotary <= MAX_ROTARY
    return q.dtype == jnp.bfloat16 and served
