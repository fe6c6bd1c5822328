"""Keys in their storage formats: window and compressed entries, indexer keys (model.md 4.4)."""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from dsv4_jax.quant import fp8, mxfp4
from dsv4_jax.typing import Array, Float, Float8e8m0fnu, Float32, StoredFloat

__all__ = [
    "IndexRows",
    "KvRows",
    "index_dequant",
    "index_quant",
    "kv_dequant",
    "kv_quant",
]


class KvRows(NamedTuple):
    """Keys (= values) split where their formats differ.

    ``nope [..., 448]`` E4M3 with ``scale [..., 7]`` UE8M0, or BF16/FP32 without scale;
    ``rope [..., 64]`` BF16 or FP32.
    """

    nope: Float[Array, "*lead dn"]
    scale: Float8e8m0fnu[Array, "*lead blocks"] | None
    rope: Float[Array, "*lead dr"]


class IndexRows(NamedTuple):
    """Indexer keys ``[..., 128]``: E2M1 with UE8M0 per 32, E4M3 with one UE8M0, or unscaled."""

    key: StoredFloat[Array, "*lead di"]
    scale: Float8e8m0fnu[Array, "*lead blocks"] | None


def kv_quant(
    kv: Float[Array, "*lead d"], rotary: int, form: Literal["fp8", "bfloat16", "float32"]
) -> KvRows:
    """Splits off the last ``rotary`` channels; ``fp8``: ``q8`` per 64 on the rest."""
    nope, rope = kv[..., :-rotary], kv[..., -rotary:]
    if form == "fp8":
        q = fp8.quantize_act(nope.astype(jnp.float32), fp8.KV_BLOCK)
        return KvRows(q.code, q.scale, rope.astype(jnp.bfloat16))
    dtype = jnp.dtype(form)
    return KvRows(nope.astype(dtype), None, rope.astype(dtype))


def kv_dequant(rows: KvRows, dtype: DTypeLike) -> Float[Array, "*lead d"]:
    """The full vectors in ``dtype`` (BF16 holds every stored value exactly)."""
    if rows.scale is None:
        nope = rows.nope.astype(dtype)
    else:
        nope = fp8.dequantize_act(fp8.Fp8(rows.nope, rows.scale), fp8.KV_BLOCK).astype(dtype)
    return jnp.concatenate([nope, rows.rope.astype(dtype)], axis=-1)


def index_quant(
    x: Float[Array, "*lead di"], form: Literal["mxfp4", "fp8", "bfloat16", "float32"]
) -> IndexRows:
    """Indexer queries or keys (after the Hadamard transform) in their storage format."""
    wide = x.astype(jnp.float32)
    if form == "mxfp4":
        return IndexRows(*mxfp4.quantize(wide))
    if form == "fp8":
        return IndexRows(*fp8.quantize_act(wide, x.shape[-1]))
    return IndexRows(x.astype(jnp.dtype(form)), None)


def index_dequant(rows: IndexRows) -> Float32[Array, "*lead di"]:
    """The values in FP32; the two quantised forms are exact in BF16."""
    if rows.scale is None:
        return rows.key.astype(jnp.float32)
    if rows.key.dtype == jnp.float4_e2m1fn:
        return mxfp4.dequantize(mxfp4.Mxfp4(rows.key, rows.scale))
    return fp8.dequantize_act(fp8.Fp8(rows.key, rows.scale), rows.key.shape[-1])
