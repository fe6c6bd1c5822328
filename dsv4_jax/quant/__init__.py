"""Number formats as data: encode, decode, layout facts. Ops and the loader share them."""

from dsv4_jax.quant import bits, fp8, kv, mxfp4, nvfp4

__all__ = ["bits", "fp8", "kv", "mxfp4", "nvfp4"]
