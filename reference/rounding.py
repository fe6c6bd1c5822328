"""Which intermediate results are rounded (model.md sections 0, 3.1, 3.4, 3.5, 4.5).

All arrays stay FP32; where a rounding is on, their values are representable in the narrower format.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax


def bf(x: jax.Array) -> jax.Array:
    """Round to BF16, nearest-even, kept in FP32 (section 0).

    `reduce_precision` and not a pair of casts: XLA may cancel FP32 -> BF16 -> FP32.
    """
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The rounding points of the official code, each of which can be switched off.

    Attributes:
        bf16: The `bf()` that ends every step.
        act_fp8: Input of every FP8 and FP4 linear through `q8` with blocks of 128 (section 4.6).
        kv_fp8: Channels before the rotary part of window keys and compressed entries through `q8`,
            blocks of 64.
        index_fp4: Indexer queries and entries through `q4`, blocks of 32, after the Hadamard
            transform.
        bf16_scores: Index scores rounded to BF16 after the product, after the head weight and after
            the sum.
        bf16_q_norm: The weightless norm of each query head in BF16 steps instead of one rounding at
            the end.
        bf16_probs: `e_u` rounded to BF16 for the value product, but not in the denominator.
        expert_nvfp4: Inputs of routed experts through the NVFP4 recipe with a global scale per
            token, or with static ones (W4A4), instead of `act_fp8`. Not part of the official state.
        linear_nvfp4: The same for the inputs of the FP8 linears. Not part of the official state.
        bf16_products: Operands of every product enter as BF16, sums stay FP32: for training on
            tensor cores. Exact where both operands are representable in BF16 anyway, which `bf16`
            and weights of an official checkpoint see to.
    """

    bf16: bool = False
    act_fp8: bool = False
    kv_fp8: bool = False
    index_fp4: bool = False
    bf16_scores: bool = False
    bf16_q_norm: bool = False
    bf16_probs: bool = False
    expert_nvfp4: bool = False
    linear_nvfp4: bool = False
    bf16_products: bool = False

    def bf(self, x: jax.Array) -> jax.Array:
        """`bf(x)` when BF16 rounding is on, else `x`."""
        return bf(x) if self.bf16 else x

    def einsum(self, spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        """`jnp.einsum` of two operands, in FP32 or as `bf16_products` says.

        Every index of an operand must stand in the other one or in the result.
        """
        if self.bf16_products:
            return _bf16_einsum(spec, a, b)
        return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _bf16_einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Product of BF16 operands summed in FP32; its gradients are products of the same kind."""
    if jax.default_backend() == "cpu":  # XLA's CPU has no such product for every shape
        return jnp.einsum(spec, bf(a), bf(b), precision=lax.Precision.HIGHEST)
    return jnp.einsum(
        spec, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )


def _bf16_einsum_fwd(spec: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    if jax.default_backend() != "cpu":
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    return _bf16_einsum(spec, a, b), (a, b)


def _bf16_einsum_bwd(spec: str, operands: tuple, cotangent: jax.Array) -> tuple:
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    a, b = operands
    return (
        _bf16_einsum(f"{out},{right}->{left}", cotangent, b),
        _bf16_einsum(f"{left},{out}->{right}", a, cotangent),
    )


_bf16_einsum.defvjp(_bf16_einsum_fwd, _bf16_einsum_bwd)


FP32 = Rounding()
OFFICIAL = Rounding(
    bf16=True,
    act_fp8=True,
    kv_fp8=True,
    index_fp4=True,
    bf16_scores=True,
    bf16_q_norm=True,
    bf16_probs=True,
)
