"""Grouped low-rank output projection of attention (model.md section 3.6)."""

import jax

from reference import linear
from reference.rounding import FP32, Rounding


def output_projection(
    o: jax.Array, wo_a: jax.Array, wo_b: jax.Array, groups: int, rounding: Rounding = FP32
) -> jax.Array:
    """`u_g = bf(wo_a[g] o_g)`, `f = lin8(concat_g u_g; wo_b)`.

    Group `g` holds consecutive heads, concatenated; the input of `wo_a` is not quantised.
    `o [t, h, d]`, `wo_a [groups * rank, h * d / groups]`, `wo_b [dim, groups * rank]` ->
    `[t, dim]`.
    """
    o = o.reshape(o.shape[0], groups, -1)
    wo_a = wo_a.reshape(groups, -1, o.shape[-1])
    u = rounding.bf(rounding.einsum("tgi,gri->tgr", o, wo_a))
    return linear.lin8(u.reshape(len(o), -1), wo_b, rounding)
