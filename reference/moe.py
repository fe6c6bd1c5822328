"""Routed experts and the shared expert (model.md sections 5.2 and 5.3)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from reference.linear import lin4, lin8
from reference.rounding import FP32, Rounding, bf


def swiglu(a: jax.Array, b: jax.Array, limit: float) -> jax.Array:
    """`silu(min(a, limit)) * clamp(b, -limit, limit)`: the gate `a` is clamped above only."""
    return jax.nn.silu(jnp.minimum(a, limit)) * jnp.clip(b, -limit, limit)


def shared_expert(
    x: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    w3: jax.Array,
    limit: float,
    rounding: Rounding = FP32,
) -> jax.Array:
    """One FP8 expert with weight 1: `lin8(bf(swiglu(lin8(x; w1), lin8(x; w3))); w2)`.

    `x [t, dim]`, `w1, w3 [i, dim]`, `w2 [dim, i]` -> `[t, dim]`.
    """
    h = swiglu(lin8(x, w1, rounding), lin8(x, w3, rounding), limit)
    return lin8(rounding.bf(h), w2, rounding)


def routed_experts(
    x: jax.Array,
    expert_idx: jax.Array,
    expert_weight: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    w3: jax.Array,
    limit: float,
    rounding: Rounding = FP32,
    up_act_scale: jax.Array | None = None,
    down_act_scale: jax.Array | None = None,
) -> jax.Array:
    """`sum_i y_i` in FP32 with `y_i = lin4(bf(weight_i * swiglu(lin4(x; w1), lin4(x; w3))); w2)`.

    The routing weight enters before the activation of `w2` is quantised. Every expert is run on
    every token; where it was not picked its weight is 0 and so is its output.

    Args:
        x: `[t, dim]`.
        expert_idx: `[t, k]`, distinct in each row.
        expert_weight: `[t, k]`.
        w1: Gate, `[e, i, dim]`.
        w2: Down, `[e, dim, i]`.
        w3: Up, `[e, i, dim]`.
        limit: `swiglu_limit`.
        rounding: Rounding points.
        up_act_scale: Static scales of what enters `w1` and `w3`, `[e]` (section 9.2), with
            `rounding.expert_nvfp4`; None: one per token.
        down_act_scale: The same of what enters `w2`.
    """
    experts = jnp.arange(w1.shape[0])
    dense = jnp.sum(
        jnp.where(expert_idx[:, :, None] == experts, expert_weight[:, :, None], 0), axis=1
    )  # [t, e]

    def add_expert(total: jax.Array, expert: tuple[Any, ...]) -> tuple[jax.Array, None]:
        weight, w1, w2, w3, up_scale, down_scale = expert
        h = swiglu(lin4(x, w1, rounding, up_scale), lin4(x, w3, rounding, up_scale), limit)
        return total + lin4(rounding.bf(weight[:, None] * h), w2, rounding, down_scale), None

    stacks = dense.T, w1, w2, w3, up_act_scale, down_act_scale
    return lax.scan(add_expert, jnp.zeros_like(x), stacks)[0]


def moe(
    x: jax.Array,
    expert_idx: jax.Array,
    expert_weight: jax.Array,
    valid: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    w3: jax.Array,
    shared: jax.Array | None = None,
    up_act_scale: jax.Array | None = None,
    down_act_scale: jax.Array | None = None,
    *,
    limit: float,
    linear: str | None = None,
    first_expert: int = 0,
    dtype: DTypeLike = jnp.float32,
    regime: str | None = None,
    power_of_two: bool = False,
    rounding: Rounding = FP32,
) -> jax.Array:
    """`routed_experts(x) + shared`, the sum in FP32 and rounded once to `dtype`; `[t, dim]`.

    Args:
        x: `[t, dim]`.
        expert_idx: `[t, k]`, distinct in each row; ids outside `first_expert .. first_expert + e`
            add nothing.
        expert_weight: `[t, k]`.
        valid: `[t]`, false where the experts add nothing.
        w1: Gate, `[e, i, dim]`.
        w2: Down, `[e, dim, i]`.
        w3: Up, `[e, i, dim]`.
        shared: `[t, dim]`, or None.
        up_act_scale: As in `routed_experts`.
        down_act_scale: As in `routed_experts`.
        limit: `swiglu_limit`.
        linear: A format such as `mxfp4_w4a8`, whose rounding points replace those of `rounding`.
        first_expert: Id of the first expert of the stacks.
        dtype: Of the result's values; the array stays FP32.
        rounding: Rounding points.
    """
    if linear is not None:
        rounding = dataclasses.replace(
            rounding,
            bf16=linear != "float32",
            act_fp8=linear.endswith("a8"),
            expert_nvfp4=linear.endswith("a4"),
        )
    x = jnp.where(valid[:, None], x, 0)
    weight = jnp.where(valid[:, None], expert_weight, 0)
    total = routed_experts(
        x,
        expert_idx - first_expert,
        weight,
        w1,
        w2,
        w3,
        limit,
        rounding,
        up_act_scale,
        down_act_scale,
    )
    if shared is not None:
        total = total + shared
    return bf(total) if dtype == jnp.bfloat16 else total
