"""Routed experts: clamped SwiGLU of every token's picks, summed (model.md 5.2, 5.3)."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsv4_jax import library
from dsv4_jax.ops._check import (
    BOOL,
    FLOAT32,
    FLOATS,
    INTEGERS,
    check_choice,
    check_operand,
)
from dsv4_jax.ops._linear import ACTS, REGIMES, check_result
from dsv4_jax.ops._moe_jax import moe_jax
from dsv4_jax.precision import (
    LINEAR_FORMATS,
    SCALE_LEAVES,
    LinearFormat,
    Regime,
    WeightFormat,
    act_format,
    weight_format,
)
from dsv4_jax.quant import fp8, mxfp4, nvfp4
from dsv4_jax.typing import E2M1, E4M3, UE8M0, Array, Bool, Float, Float32, Int32

__all__ = ["KERNEL_FORMATS", "moe"]

BFLOAT16 = (jnp.dtype(jnp.bfloat16),)
KERNEL_FORMATS = ("mxfp4_w4a8", "mxfp4_w4a16", "nvfp4_w4a4", "nvfp4_w4a8", "nvfp4_w4a16")
"""Formats that have a kernel, for BF16 activations."""

# Values of the C++ enum (ffi/common/linear.h).
_WEIGHT_FORM: dict[WeightFormat, np.int32] = {"mxfp4": np.int32(2), "nvfp4": np.int32(3)}
_INT32 = jnp.iinfo(jnp.int32)


@functools.partial(
    jax.jit, static_argnames=("linear", "limit", "first_expert", "dtype", "regime", "power_of_two")
)
def moe(
    x: Float[Array, "t d"],
    expert_idx: Int32[Array, "t k"],
    expert_weight: Float32[Array, "t k"],
    valid: Bool[Array, "t"],
    w1: Mapping[str, Array],
    w2: Mapping[str, Array],
    w3: Mapping[str, Array],
    shared: Float[Array, "t d"] | None = None,
    up_act_scale: Float32[Array, "e"] | None = None,
    down_act_scale: Float32[Array, "e"] | None = None,
    *,
    linear: LinearFormat,
    limit: float,
    first_expert: int = 0,
    dtype: DTypeLike = jnp.float32,
    regime: Regime | None = None,
    power_of_two: bool = False,
) -> Float[Array, "t d"]:
    """``sum_i w2_e(round(weight_i * swiglu(w1_e x, w3_e x))) + shared``, ``i`` a token's picks.

    The routing weight enters before the intermediate is quantised for ``w2``; products round to
    ``x``'s dtype as the official code does; picks are summed in FP32 in their order, ``shared``
    last, and the sum is rounded once. A token's result does not depend on the others.

    ``mxfp4_w4a8``, ``mxfp4_w4a16``, ``nvfp4_w4a4``, ``nvfp4_w4a8`` and ``nvfp4_w4a16`` with BF16
    ``x`` are one foreign call; the other formats and FP32 ``x`` are `jax.numpy`. No gradient.
    Arrays on several devices are gathered unless the call is inside `jax.shard_map`, where each
    device may hold some of the experts: the sum of the FP32 results of all is the whole.

    Args:
        expert_idx: ascending along the last axis (as `router` returns it).
        valid: tokens that are not padding; to the others the experts add nothing, and they touch no
            weights.
        w1, w2, w3: leaves of the stacked weights ``[e, i, d]``, ``[e, d, i]``, ``[e, i, d]``:
            ``weight`` and its scales.
        shared: what is added last, in ``x``'s dtype.
        up_act_scale: with ``nvfp4_w4a4``, the checkpoint's static scales of what enters ``w1`` and
            ``w3`` of an expert, clamped to 2^-100..2^100: ``x`` is rounded for each pick with the
            scale of its expert. ``max|x| / (6 * 448)`` of each token when ``None``.
        down_act_scale: the same of what enters ``w2``; given with ``up_act_scale`` or not at all.
        limit: of the gate from above, of the other factor from both sides.
        first_expert: id of the first expert of the stack; ids outside ``first_expert ..
            first_expert + e - 1`` add nothing.
        dtype: of the result: FP32, or BF16 (nearest even).
        regime: of the kernels on a GPU (`Precision`); ``None``: by the number of picks
            an expert. A token has the same bits in every call of one regime. Without effect on the
            CPU and on formats without a kernel.
        power_of_two: the caller's word that every block scale of ``nvfp4_w4a8`` is zero or a power
            of two (`nvfp4.scales_are_powers_of_two` looks), as in weights that were MXFP4 once:
            the scales then go into E4M3 exactly and the products run on FP8 tensor cores. Without
            effect on the CPU.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, there is no expert or no pick, ``linear`` is not a format or
            not that of the leaves, ``first_expert`` is not an id, ``regime`` is another one,
            ``power_of_two`` or static scales are given for another format, or one of these without
            the other.
    """
    check_choice("moe", "linear", linear, LINEAR_FORMATS)
    dtype = jnp.dtype(dtype)
    check_result("moe", dtype, regime)
    check_operand("moe", "x", x, "t d", FLOATS)
    check_operand("moe", "expert_idx", expert_idx, "t k", INTEGERS)
    check_operand("moe", "expert_weight", expert_weight, "t k", FLOAT32)
    check_operand("moe", "valid", valid, "t", BOOL)
    for name, leaves in {"w1": w1, "w2": w2, "w3": w3}.items():
        _check_leaves(name, leaves, weight_format(linear))
    if power_of_two and linear != "nvfp4_w4a8":
        raise ValueError(f"moe: power_of_two is of nvfp4_w4a8 alone, got linear {linear!r}")
    t, k = expert_idx.shape
    experts, inter, dim = w1["weight"].shape
    if x.shape != (t, dim):
        raise ValueError(f"moe: x must be {[t, dim]}, got {list(x.shape)}")
    if k == 0:
        raise ValueError(f"moe: expert_idx must hold at least one pick, got {[t, k]}")
    if expert_weight.shape != (t, k) or valid.shape != (t,):
        raise ValueError(
            f"moe: expert_weight and valid must be {[t, k]} and {[t]}, "
            f"got {list(expert_weight.shape)} and {list(valid.shape)}"
        )
    if w3["weight"].shape != (experts, inter, dim) or w2["weight"].shape != (experts, dim, inter):
        raise ValueError(
            f"moe: w1, w3 must be [e, i, d] and w2 [e, d, i], got {list(w1['weight'].shape)}, "
            f"{list(w3['weight'].shape)}, {list(w2['weight'].shape)}"
        )
    if 0 in (experts, inter, dim):
        raise ValueError(f"moe: w1 must not be empty, got {list(w1['weight'].shape)}")
    if not 0 <= first_expert <= _INT32.max - experts:
        raise ValueError(
            f"moe: first_expert must be 0..{_INT32.max - experts} for {experts} experts, "
            f"got {first_expert}"
        )
    if shared is not None:
        check_operand("moe", "shared", shared, "t d", (x.dtype,))
        if shared.shape != x.shape:
            raise ValueError(f"moe: shared must be {list(x.shape)}, got {list(shared.shape)}")
    act_scales = _check_act_scales(up_act_scale, down_act_scale, linear, experts)
    if linear not in KERNEL_FORMATS or x.dtype != jnp.bfloat16:
        return moe_jax(
            x,
            expert_idx,
            expert_weight,
            valid,
            w1,
            w2,
            w3,
            shared,
            up_act_scale,
            down_act_scale,
            linear=linear,
            limit=limit,
            first_expert=first_expert,
            dtype=dtype,
        )
    if expert_idx.dtype != jnp.int32:  # saturate instead of wrapping round onto an expert
        expert_idx = jnp.clip(expert_idx, _INT32.min, _INT32.max).astype(jnp.int32)
    form = weight_format(linear)
    scratch = (_scratch_bytes(t, k, experts, dim, inter),)
    y, _ = library.call(
        "moe",
        [jax.ShapeDtypeStruct((t, dim), dtype), jax.ShapeDtypeStruct(scratch, jnp.uint8)],
        x,
        expert_idx,
        expert_weight,
        valid.astype(jnp.uint8),
        *(w[leaf] for w in (w1, w3, w2) for leaf in ("weight", *SCALE_LEAVES[form])),
        *(() if shared is None else (shared,)),
        *act_scales,
        form=_WEIGHT_FORM[form],
        act=ACTS[act_format(linear)],
        regime=np.int32(REGIMES[regime]),
        first_expert=np.int32(first_expert),
        has_shared=np.int32(shared is not None),
        power_of_two=np.int32(power_of_two),
        limit=np.float32(limit),
    )
    return y


def late_operands(attributes: Mapping[str, np.generic]) -> frozenset[int]:
    """Places of the operands of the foreign call that only its last launch reads: ``shared``."""
    if not attributes["has_shared"]:
        return frozenset()
    stored, forms = attributes["form"], _WEIGHT_FORM.items()
    leaves = next(1 + len(SCALE_LEAVES[form]) for form, number in forms if number == stored)
    return frozenset({4 + 3 * leaves})  # behind x, picks, their weights, valid and three stacks


def _scratch_bytes(t: int, k: int, experts: int, dim: int, inter: int) -> int:
    """``MoeScratchBytes`` of ffi/moe/moe.h: sorted pairs, and room between the experts' runs."""
    pairs = t * k
    slots = pairs + 63 * min(experts, pairs)
    padded = -(-dim // 128) * 128 + -(-inter // 128) * 128
    return slots * (2 * (padded + dim + inter) + 32) + 4 * pairs + 4096


def _check_act_scales(
    up: Array | None, down: Array | None, linear: LinearFormat, experts: int
) -> tuple[Array, ...]:
    """Both scales, or none."""
    given = {"up_act_scale": up, "down_act_scale": down}
    missing = [name for name, scale in given.items() if scale is None]
    if len(missing) == len(given):
        return ()
    if missing:
        raise ValueError(
            f"moe: up_act_scale and down_act_scale must be given together, got no {missing[0]}"
        )
    if linear != "nvfp4_w4a4":
        raise ValueError(
            f"moe: up_act_scale must be None unless linear is 'nvfp4_w4a4', got linear {linear!r}"
        )
    scales = {name: scale for name, scale in given.items() if scale is not None}
    for name, scale in scales.items():
        check_operand("moe", name, scale, "e", FLOAT32)
        if scale.shape != (experts,):
            raise ValueError(f"moe: {name} must be {[experts]}, got {list(scale.shape)}")
    return tuple(scales.values())


def _check_leaves(name: str, leaves: Mapping[str, Array], form: WeightFormat) -> None:
    """Leaves, dtypes and scale shapes of one stacked weight."""
    want = {"weight", *SCALE_LEAVES[form]}
    if set(leaves) != want:
        raise ValueError(
            f"moe: {name} must have the leaves {sorted(want)} for {form}, got {sorted(leaves)}"
        )
    stored = {"fp8": E4M3, "mxfp4": E2M1, "nvfp4": E2M1}
    dtypes = (jnp.dtype(stored[form]),) if form in stored else FLOATS
    check_operand("moe", f"{name} weight", leaves["weight"], "e n k", dtypes)
    e, n, k = leaves["weight"].shape
    tiles = (e, -(-n // fp8.WEIGHT_BLOCK), -(-k // fp8.WEIGHT_BLOCK))
    expected: dict[str, tuple[tuple[int, ...], int, jnp.dtype]] = {}
    if form == "fp8":
        expected["scale"] = (tiles, 1, UE8M0)
    elif form == "mxfp4":
        expected["scale"] = ((e, n, k // mxfp4.BLOCK), mxfp4.BLOCK, UE8M0)
    elif form == "nvfp4":
        expected["block_scale"] = ((e, n, k // nvfp4.BLOCK), nvfp4.BLOCK, E4M3)
        expected["global_scale"] = ((e,), 1, jnp.float32)
    for leaf, (shape, block, dtype) in expected.items():
        check_operand("moe", f"{name} {leaf}", leaves[leaf], "*lead", (jnp.dtype(dtype),))
        if k % block or leaves[leaf].shape != shape:
            raise ValueError(
                f"moe: {name} {leaf} must be {list(shape)} for weight {[e, n, k]} in groups of "
                f"{block}, got {list(leaves[leaf].shape)}"
            )
