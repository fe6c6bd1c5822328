"""Activations on their way into a quantised linear: quantised, then exact in BF16."""

from typing import NamedTuple

import jax.numpy as jnp

from dsv4_jax.precision import ActFormat
from dsv4_jax.quant import fp8, nvfp4
from dsv4_jax.typing import Array, BFloat16, Float, Float32

__all__ = ["QuantizedAct", "quantized_act"]


class QuantizedAct(NamedTuple):
    """``value`` (BF16, exact) times ``global_scale`` (FP32 per row, or ``None`` for 1)."""

    value: BFloat16[Array, "*lead k"]
    global_scale: Float32[Array, "*lead"] | None


def quantized_act(
    x: Float[Array, "*lead k"], act: ActFormat, act_scale: Float32[Array, ""] | None = None
) -> QuantizedAct:
    """Quantises each row on its own.

    ``fp8``: E4M3 with a power-of-two scale per 128 (``q8``, model.md 4.5). ``nvfp4``: E2M1 with
    E4M3 per 16 and one FP32 scale per row (9.2), or ``act_scale`` in 2^-100..2^100. ``bfloat16``:
    only the rounding to BF16.
    """
    if act == "bfloat16":
        return QuantizedAct(x.astype(jnp.bfloat16), None)
    wide = x.astype(jnp.float32)
    if act == "fp8":
        value = fp8.dequantize_act(fp8.quantize_act(wide, fp8.ACT_BLOCK), fp8.ACT_BLOCK)
        return QuantizedAct(value.astype(jnp.bfloat16), None)
    if act_scale is None:
        global_scale = nvfp4.token_global_scale(wide)
    else:
        global_scale = jnp.broadcast_to(nvfp4.static_global_scale(act_scale), x.shape[:-1])
    q = nvfp4.quantize(wide, global_scale)
    return QuantizedAct(nvfp4.dequantize_blocks(q).astype(jnp.bfloat16), global_scale)
