"""Expert selection and weights (model.md 5.1)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv4_jax import library
from dsv4_jax.ops._check import FLOAT32, FLOATS, INTEGERS, as_int32, check_operand
from dsv4_jax.ops.dense_linear import dense_linear
from dsv4_jax.precision import Regime
from dsv4_jax.typing import Array, Float, Float32, Int32

__all__ = ["MAX_EXPERTS", "MAX_PICKS", "router"]

MAX_EXPERTS = 1024
MAX_PICKS = 32
"""Limits of the kernel (``ffi/router/router.h``)."""


@functools.partial(jax.jit, static_argnames=("k", "scale", "regime"))
def router(
    x: Float[Array, "t d"],
    weight: Float[Array, "e d"],
    bias: Float32[Array, "e"] | None,
    expert_idx: Int32[Array, "_ k"] | None,
    *,
    k: int,
    scale: float,
    tokens: Int32[Array, "t"] | None = None,
    regime: Regime | None = None,
) -> tuple[Int32[Array, "t k"], Float32[Array, "t k"]]:
    """Expert ids in ascending order and their weights.

    ``score = sqrt(softplus(weight . x))``; the ``k`` largest ``score + bias`` are taken, ties to
    the lower id, or ``expert_idx``, or its rows ``tokens`` when the layer routes by token id;
    ``expert_weight = score / sum(score over the picks) * scale``, the sum in the order of the ids.

    One launch after the product. An id outside the experts has weight 0 and no part in the sum.
    NaN, of a logit or a bias, counts as the largest score, and a pick with a NaN logit makes all
    weights of its token NaN. A score below 2^-126 is 0. No gradient. Arrays on several devices are
    gathered unless the call is inside `jax.shard_map`.

    Args:
        expert_idx: ids of each token; with ``tokens`` of each token id, at least one row.
        k: picks of a token, at most 32.
        scale: of the weights.
        tokens: rows of ``expert_idx``, one outside of it held to the first or the last.
        regime: of the product, as in `dense_linear`, ``None``: ``"decode"`` for any number of
            tokens; the rest has one kernel.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: neither or both of ``bias`` and ``expert_idx`` are given, or ``tokens`` without
            ``expert_idx``, a shape disagrees, there are more than 1024 experts, or ``k`` exceeds
            them or 32.
    """
    if (bias is None) == (expert_idx is None):
        raise ValueError("router: give exactly one of bias and expert_idx")
    if tokens is not None and expert_idx is None:
        raise ValueError("router: tokens must come with expert_idx")
    check_operand("router", "x", x, "t d", FLOATS)
    check_operand("router", "weight", weight, "e d", FLOATS)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"router: x and weight must agree on the last axis, got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    t, experts = x.shape[0], weight.shape[0]
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(
            f"router: weight must have 1..{MAX_EXPERTS} experts, got {list(weight.shape)}"
        )
    most = min(experts, MAX_PICKS)
    if not 1 <= k <= most:
        raise ValueError(f"router: k must be 1..{most} (of {experts} experts), got {k}")
    if bias is not None:
        check_operand("router", "bias", bias, "e", FLOAT32)
    if expert_idx is not None:
        check_operand("router", "expert_idx", expert_idx, "t k", INTEGERS)
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"router: bias must be [{experts}], got {list(bias.shape)}")
    if expert_idx is not None:
        rows = t if tokens is None else max(expert_idx.shape[0], 1)
        if expert_idx.shape != (rows, k):
            raise ValueError(
                f"router: expert_idx must be {[rows, k]}, got {list(expert_idx.shape)}"
            )
        expert_idx = as_int32(expert_idx)
    if tokens is not None:
        check_operand("router", "tokens", tokens, "t", INTEGERS)
        if tokens.shape != (t,):
            raise ValueError(f"router: tokens must be [{t}], got {list(tokens.shape)}")
        tokens = as_int32(tokens)
    # Scores are compared with each other: sums in parts, which round less than one long sum does.
    logits = dense_linear(x, weight, regime=regime or "decode")
    selectors = [operand for operand in (bias, expert_idx, tokens) if operand is not None]
    idx, picked = library.call(
        "router",
        [jax.ShapeDtypeStruct((t, k), jnp.int32), jax.ShapeDtypeStruct((t, k), jnp.float32)],
        logits,
        *selectors,
        given=np.int32(expert_idx is not None),
        scale=np.float32(scale),
    )
    return idx, picked
