"""`moe` in `jax.numpy`: for the formats without a kernel, and for FP32 activations."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from dsv4_jax.ops._act import quantized_act
from dsv4_jax.ops._round import round_to
from dsv4_jax.ops._rows import ROW_TILE, tile_dot
from dsv4_jax.ops.swiglu import clamped_swiglu
from dsv4_jax.precision import LinearFormat, act_format, weight_format
from dsv4_jax.quant import bits, fp8, mxfp4, nvfp4
from dsv4_jax.typing import E4M3, Array

__all__ = ["moe_jax"]


def moe_jax(
    x: Array,
    expert_idx: Array,
    expert_weight: Array,
    valid: Array,
    w1: Mapping[str, Array],
    w2: Mapping[str, Array],
    w3: Mapping[str, Array],
    shared: Array | None,
    up_act_scale: Array | None = None,
    down_act_scale: Array | None = None,
    *,
    linear: LinearFormat,
    limit: float,
    first_expert: int,
    dtype: DTypeLike,
) -> Array:
    """`moe` on checked operands.

    Pairs of (token, pick) are grouped by expert into tiles of ``ROW_TILE`` rows, one expert each,
    so a row's result does not depend on the other tokens of the call.
    """
    t, k = expert_idx.shape
    experts, _, dim = w1["weight"].shape
    if t == 0:
        return jnp.zeros((0, dim), dtype)
    # XLA widens a whole FP8, FP4 or BF16 stack to slice one expert of it; bytes it leaves alone.
    gate_w, down_w, up_w = (jax.tree.map(bits.byte_view, dict(w)) for w in (w1, w2, w3))

    # Tiles: pairs sorted by expert, every expert's run padded to whole tiles.
    pairs = t * k
    ours = (expert_idx >= first_expert) & (expert_idx < first_expert + experts) & valid[:, None]
    pair_expert = jnp.where(ours, expert_idx - first_expert, experts).reshape(-1)
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

    # Under static scales a token is rounded for each of its experts, else once.
    value, token_scale = (x, None) if up_act_scale is not None else _activation(x, linear)
    value = jnp.concatenate([value, jnp.zeros_like(value[:1])])
    if token_scale is not None:
        token_scale = jnp.concatenate([token_scale, jnp.ones_like(token_scale[:1])])
    pair_weight = jnp.concatenate([expert_weight.reshape(-1), jnp.zeros(1, jnp.float32)])

    def run_tile(i: Array, out: Array) -> Array:
        expert = tile_expert[i]
        pair = lax.dynamic_slice_in_dim(slot_pair, i * ROW_TILE, ROW_TILE)
        token = pair // k  # the sentinel pair lands on the appended zero row
        if token_scale is None:
            rows, scale = _activation(value[token], linear, _of(up_act_scale, expert))
        else:
            rows, scale = value[token], token_scale[token]
        scale = scale[:, None]
        gate = round_to(_product(rows, gate_w, expert, linear) * scale, x.dtype)
        up = round_to(_product(rows, up_w, expert, linear) * scale, x.dtype)
        h = clamped_swiglu(gate, up, limit)
        h = round_to(pair_weight[pair][:, None] * h, x.dtype)
        h_value, h_scale = _activation(h, linear, _of(down_act_scale, expert))
        y = _product(h_value, down_w, expert, linear) * h_scale[:, None]
        return lax.dynamic_update_slice_in_dim(out, round_to(y, x.dtype), i * ROW_TILE, axis=0)

    # One more row, never written: the zeros of pairs that have no slot.
    out = lax.fori_loop(0, last_tile[-1], run_tile, jnp.zeros((slots + 1, dim), x.dtype))
    pick_slot = pair_slot.reshape(t, k)
    total = out[pick_slot[:, 0]].astype(jnp.float32)
    for i in range(1, k):
        total = total + out[pick_slot[:, i]].astype(jnp.float32)
    if shared is not None:
        total = total + shared.astype(jnp.float32)
    return round_to(total, dtype)


def _of(scales: Array | None, expert: Array) -> Array | None:
    return None if scales is None else scales[expert]


def _activation(
    x: Array, linear: LinearFormat, act_scale: Array | None = None
) -> tuple[Array, Array]:
    """Operand of the product and its FP32 scale per row."""
    ones = jnp.ones(x.shape[:1], jnp.float32)
    if linear == "float32":
        return x.astype(jnp.float32), ones
    q = quantized_act(x, act_format(linear), act_scale)
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
