"""Measuring a whole step: random weights on the device, the loop of generation, floors, profiles.

``python -m dsv4_jax.bench flash layers=24 batch=8`` needs no more than JAX, Flax and safetensors.
"""

from dsv4_jax.bench.report import Settings, run

__all__ = ["Settings", "run"]
