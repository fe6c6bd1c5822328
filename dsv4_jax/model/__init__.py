"""The model as Flax Linen modules; the maths lives in `dsv4_jax.ops`."""

from dsv4_jax.model.model import DeepseekV4

__all__ = ["DeepseekV4"]
