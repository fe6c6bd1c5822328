"""Routed experts: clamped SwiGLU of every token's picks, summed (model.md 5.2, 5.3)."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.ops._act import quantized_act
from dsv4_jax.ops._check import (
    BOOL,
    FLOAT32,
    FLOATS,
    INTEGERS,
    check_choice,
    check_operand,
)
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import ROW_TILE, tile_dot
from dsv4_jax.ops.swiglu import clamped_swiglu
from dsv4_jax.precision import LINEAR_FORMATS, LinearFormat, act_format, weight_format
from dsv4_jax.quant import bits, fp8, mxfp4, nvfp4
from dsv4_jax.typing import E2M1, E4M3, UE8M0, Array, Bool, Float, Float32, Int32

__all__ = ["moe"]


@functools.partial(jax.jit, static_argnames=("linear", "limit"))
def moe(
    x: Float[Array, "t d"],
    expert_idx: Int32[Array, "t k"],
    expert_weight: Float32[Array, "t k"],
    valid: Bool[Array, "t"],
    w1: Mapping[str, Array],
    w2: Mapping[str, Array],
    w3: Mapping[str, Array],
    *,
    linear: LinearFormat,
    limit: float,
) -> Float32[Array, "t d"]:
    """``sum_i w2_e(round(weight_i * swiglu(w1_e x, w3_e x)))`` over each token's picks, FP32.

    The routing weight enters before the intermediate is quantised for ``w2``; products round to
    ``x``'s dtype as the official code does; picks are summed in ascending expert order. Pairs of
    (token, pick) are grouped by expert into tiles of ``ROW_TILE`` rows, one expert each, so a
    row's result does not depend on the other tokens of the call.

    Args:
        expert_idx: ascending along the last axis (as `router` returns it); an id outside the
            experts contributes nothing.
        valid: tokens that are not padding; the others get zeros and touch no weights.
        w1, w2, w3: leaves of the stacked weights: ``weight`` and its scales.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes disagree, or ``linear`` is not a format or not that of the leaves.
    """
    check_choice("moe", "linear", linear, LINEAR_FORMATS)
    check_operand("moe", "x", x, "t d", FLOATS)
    check_operand("moe", "expert_idx", expert_idx, "t k", INTEGERS)
    check_operand("moe", "expert_weight", expert_weight, "t k", FLOAT32)
    check_operand("moe", "valid", valid, "t", BOOL)
    for name, leaves in {"w1": w1, "w2": w2, "w3": w3}.items():
        _check_leaves(name, leaves, weight_format(linear))
    t, k = expert_idx.shape
    experts, inter, dim = w1["weight"].shape
    if x.shape != (t, dim):
        raise ValueError(f"moe: x must be {[t, dim]}, got {list(x.shape)}")
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
    if t == 0:
        return jnp.zeros((0, dim), jnp.float32)
    # XLA widens a whole FP8, FP4 or BF16 stack to slice one expert of it; bytes it leaves alone.
    gate_w, down_w, up_w = (jax.tree.map(bits.byte_view, dict(w)) for w in (w1, w2, w3))

    # Tiles: pairs sorted by expert, every expert's run padded to whole tiles.
    pairs = t * k
    pair_expert = jnp.where(valid[:, None], expert_idx, experts).reshape(-1)
    pair_expert = jnp.where((pair_expert >= 0) & (pair_expert < experts), pair_expert, experts)
    order = jnp.argsort(pair_expert, stable=True)
    count = jnp.zeros(experts + 1, jnp.int32).at[pair_expert].add(1)
    first_pair = jnp.cumsum(count) - count
    tiles = (count[:experts] + ROW_TILE - 1) // ROW_TILE
    last_tile = jnp.cumsum(tiles)
    first_tile = jnp.concatenate([last_tile - tiles, last_tile[-1:]])
    sorted_expert = pair_expert[order]
    rank = jnp.arange(pairs, dtype=jnp.int32) - first_pair[sorted_expert]
    slot_sorted = first_tile[sorted_expert] * ROW_TILE + rank
    max_tiles = pairs // ROW_TILE + min(experts, pairs)
    slots = max_tiles * ROW_TILE
    tile_expert = jnp.searchsorted(last_tile, jnp.arange(max_tiles, dtype=jnp.int32), side="right")
    slot_sorted = jnp.where(sorted_expert < experts, slot_sorted, slots)
    slot_pair = (
        jnp.full(slots, pairs, jnp.int32).at[slot_sorted].set(order.astype(jnp.int32), mode="drop")
    )
    pair_slot = jnp.full(pairs, slots, jnp.int32).at[order].set(slot_sorted.astype(jnp.int32))

    quantized = _activation(x, linear)
    value = jnp.concatenate([quantized[0], jnp.zeros_like(quantized[0][:1])])
    token_scale = jnp.concatenate([quantized[1], jnp.ones_like(quantized[1][:1])])
    pair_weight = jnp.concatenate([expert_weight.reshape(-1), jnp.zeros(1, jnp.float32)])

    def run_tile(i: Array, out: Array) -> Array:
        expert = tile_expert[i]
        pair = lax.dynamic_slice_in_dim(slot_pair, i * ROW_TILE, ROW_TILE)
        token = pair // k  # the sentinel pair lands on the appended zero row
        rows, scale = value[token], token_scale[token][:, None]
        gate = round_to(_product(rows, gate_w, expert, linear) * scale, x.dtype)
        up = round_to(_product(rows, up_w, expert, linear) * scale, x.dtype)
        h = clamped_swiglu(gate, up, limit)
        h = round_to(pair_weight[pair][:, None] * h, x.dtype)
        h_value, h_scale = _activation(h, linear)
        y = _product(h_value, down_w, expert, linear) * h_scale[:, None]
        return lax.dynamic_update_slice_in_dim(out, round_to(y, x.dtype), i * ROW_TILE, axis=0)

    # One more row, never written: the zeros of pairs that have no slot.
    out = lax.fori_loop(0, last_tile[-1], run_tile, jnp.zeros((slots + 1, dim), x.dtype))
    pick_slot = pair_slot.reshape(t, k)
    total = out[pick_slot[:, 0]].astype(jnp.float32)
    for i in range(1, k):
        total = total + out[pick_slot[:, i]].astype(jnp.float32)
    return total


def _check_leaves(name: str, leaves: Mapping[str, Array], form: str) -> None:
    """Leaves, dtypes and scale shapes of one stacked weight."""
    scales = {"fp8": ["scale"], "mxfp4": ["scale"], "nvfp4": ["block_scale", "global_scale"]}
    want = {"weight", *scales.get(form, [])}
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


def _activation(x: Array, linear: LinearFormat) -> tuple[Array, Array]:
    """Operand of the product and its FP32 scale per row."""
    ones = jnp.ones(x.shape[:1], jnp.float32)
    if linear == "float32":
        return x.astype(jnp.float32), ones
    q = quantized_act(x, act_format(linear))
    return q.value, ones if q.global_scale is None else q.global_scale


def _product(rows: Array, view: Mapping[str, Array], expert: Array, linear: LinearFormat) -> Array:
    """``rows . W_expert^T`` in FP32, the weight's own global scale applied."""
    leaf = {
        name: lax.dynamic_index_in_dim(array, expert, keepdims=False)
        for name, array in view.items()
    }
    form = weight_format(linear)
    if form == "mxfp4":
        scale = bits.decode_ue8m0(bits.ue8m0_from_exponent(leaf["scale"]))
        wide = bits.decode_e2m1_bytes(leaf["weight"]) * jnp.repeat(scale, mxfp4.BLOCK, axis=-1)
    elif form == "nvfp4":
        scale = bits.decode_e4m3(lax.bitcast_convert_type(leaf["block_scale"], E4M3))
        wide = bits.decode_e2m1_bytes(leaf["weight"]) * jnp.repeat(scale, nvfp4.BLOCK, axis=-1)
        return tile_dot(rows, wide.astype(jnp.bfloat16)) * leaf["global_scale"]
    elif form == "fp8":
        code = lax.bitcast_convert_type(leaf["weight"], E4M3)
        wide = fp8.dequantize_weight(fp8.Fp8(code, bits.ue8m0_from_exponent(leaf["scale"])))
    else:
        weight = bits.from_byte_view(leaf["weight"], jnp.dtype(form))
        return tile_dot(rows, weight.astype(rows.dtype))
    return tile_dot(rows, wide.astype(jnp.bfloat16))
