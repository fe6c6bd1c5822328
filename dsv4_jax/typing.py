"""Array aliases, storage dtypes and the axis vocabulary used in annotations.

Axis names: ``b`` batch rows, ``t`` tokens, ``s`` cache slots, ``h`` heads, ``d`` head dim, ``dim``
model width, ``hc`` hyper-connection streams, ``e`` experts, ``k`` picks, ``v`` vocabulary.
"""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import AbstractDtype, BFloat16, Bool, Float, Float32, Int32

__all__ = [
    "E2M1",
    "E4M3",
    "UE8M0",
    "Array",
    "BFloat16",
    "Bool",
    "Float",
    "Float4e2m1fn",
    "Float8e4m3fn",
    "Float8e8m0fnu",
    "Float32",
    "Int32",
    "Params",
    "StoredFloat",
]

Array = jax.Array

E2M1 = jnp.float4_e2m1fn
E4M3 = jnp.float8_e4m3fn
UE8M0 = jnp.float8_e8m0fnu

Params = dict[str, Any]
"""A nested dict of typed arrays, as Flax Linen takes it under ``{"params": ...}``."""


if TYPE_CHECKING:  # as jaxtyping does for its own names
    from typing import Annotated as Float4e2m1fn
    from typing import Annotated as Float8e4m3fn
    from typing import Annotated as Float8e8m0fnu
    from typing import Annotated as StoredFloat
else:

    class Float4e2m1fn(AbstractDtype):
        """jaxtyping has no name for the packed 4-bit E2M1 dtype yet."""

        dtypes = ["float4_e2m1fn"]  # noqa: RUF012 (the declared form of jaxtyping)

    class Float8e4m3fn(AbstractDtype):
        """8-bit E4M3 without infinities, largest value 448."""

        dtypes = ["float8_e4m3fn"]  # noqa: RUF012

    class Float8e8m0fnu(AbstractDtype):
        """Power-of-two scale, exponent bias 127, byte 255 = NaN."""

        dtypes = ["float8_e8m0fnu"]  # noqa: RUF012

    class StoredFloat(AbstractDtype):
        """Any dtype of a cache array."""

        dtypes = [  # noqa: RUF012
            "bfloat16",
            "float32",
            "float4_e2m1fn",
            "float8_e4m3fn",
            "float8_e8m0fnu",
        ]
