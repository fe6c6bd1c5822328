"""Mixture-of-experts module: router, routed experts, shared expert (model.md 5)."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.config import ModelConfig
from dsv4_jax.model.linear import Linear, linear_leaves, linears, takes_up
from dsv4_jax.ops.moe import moe
from dsv4_jax.ops.router import router
from dsv4_jax.ops.swiglu import swiglu
from dsv4_jax.precision import ACT_SCALES, LinearFormat, Precision, Regime
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.typing import Array, Bool, Float, Float32, Int32

__all__ = ["MoE"]


class Experts(nn.Module):
    """Stacked routed experts ``w1``, ``w3 [e, i, d]`` and ``w2 [e, d, i]``.

    A checkpoint's static scales of NVFP4 activations are the parameters ``up_act_scale`` and
    ``down_act_scale [e]`` of `moe`; without them every token has its own.
    """

    config: ModelConfig
    form: LinearFormat
    regime: Regime | None
    power_of_two: bool

    def setup(self) -> None:
        c = self.config
        up = (c.n_routed_experts, c.moe_intermediate_size, c.hidden_size)
        down = (c.n_routed_experts, c.hidden_size, c.moe_intermediate_size)
        self.w1 = Leaves(up, self.form)
        self.w2 = Leaves(down, self.form)
        self.w3 = Leaves(up, self.form)
        scaled = self.form == "nvfp4_w4a4"
        self.act_scales = tuple(
            self.get_variable("params", name) if scaled else None for name in ACT_SCALES.values()
        )

    def __call__(
        self,
        x: Float[Array, "t d"],
        idx: Int32[Array, "t k"],
        weight: Float32[Array, "t k"],
        valid: Bool[Array, "t"],
        shared: Float[Array, "t d"],
    ) -> Float[Array, "t d"]:
        return moe(
            x,
            idx,
            weight,
            valid,
            self.w1(),
            self.w2(),
            self.w3(),
            shared,
            *self.act_scales,
            linear=self.form,
            limit=self.config.swiglu_limit,
            dtype=x.dtype,
            regime=self.regime,
            power_of_two=self.power_of_two,
        )


class Leaves(nn.Module):
    """The leaves of one stacked weight."""

    shape: tuple[int, ...]
    form: LinearFormat

    def setup(self) -> None:
        self.leaves = linear_leaves(self, self.shape, self.form)

    def __call__(self) -> dict[str, Array]:
        return dict(self.leaves)


class SharedExpert(nn.Module):
    """One more expert that every token takes, with weight 1 and the same clamp."""

    config: ModelConfig
    form: LinearFormat
    regime: Regime | None

    def setup(self) -> None:
        c = self.config
        self.w1 = Linear(c.moe_intermediate_size, c.hidden_size, self.form, self.regime)
        self.w2 = Linear(c.hidden_size, c.moe_intermediate_size, self.form, self.regime)
        self.w3 = Linear(c.moe_intermediate_size, c.hidden_size, self.form, self.regime)

    def __call__(self, x: Float[Array, "t d"], x_fp8: Fp8 | None = None) -> Float[Array, "t d"]:
        gate, up = linears(x, (self.w1, self.w3), x_fp8)
        gate, up = self.w1(x, gate), self.w3(x, up)
        limit = self.config.swiglu_limit
        if takes_up(self.form) and gate.dtype == jnp.bfloat16:
            return self.w2(gate, up=up, limit=limit)
        return self.w2(swiglu(gate, up, limit=limit))


class Gate(nn.Module):
    """Router parameters: a bias for selection, or the table of experts by token id."""

    config: ModelConfig
    dtype: str
    hashed: bool
    regime: Regime | None

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(0.02)
        shape = (c.n_routed_experts, c.hidden_size)
        self.weight = self.param("weight", normal, shape, jnp.dtype(self.dtype))
        if self.hashed:
            self.tid2eid = self.param(
                "tid2eid", _random_experts, (c.vocab_size, c.num_experts_per_tok), shape[0]
            )
        else:
            zeros = nn.initializers.zeros
            self.bias = self.param("bias", zeros, (c.n_routed_experts,), jnp.float32)

    def __call__(
        self, x: Float[Array, "t d"], tokens: Int32[Array, "t"]
    ) -> tuple[Int32[Array, "t k"], Float32[Array, "t k"]]:
        c = self.config
        return router(
            x,
            self.weight,
            None if self.hashed else self.bias,
            self.tid2eid if self.hashed else None,
            k=c.num_experts_per_tok,
            scale=c.routed_scaling_factor,
            tokens=tokens if self.hashed else None,
            regime=self.regime,
        )


def _random_experts(key: jax.Array, shape: tuple[int, int], experts: int) -> Int32[Array, "v k"]:
    """Distinct experts per token: a random first one and its successors."""
    first = jax.random.randint(key, (shape[0], 1), 0, experts, jnp.int32)
    return (first + jnp.arange(shape[1], dtype=jnp.int32)) % experts


class MoE(nn.Module):
    """``round(sum of routed experts + shared expert)``."""

    config: ModelConfig
    precision: Precision
    experts_form: LinearFormat
    hashed: bool

    def setup(self) -> None:
        c, p = self.config, self.precision
        self.gate = Gate(c, p.dense, self.hashed, p.regime)
        powers = self.experts_form == "nvfp4_w4a8" and bool(p.experts_power_of_two)
        self.experts = Experts(c, self.experts_form, p.regime, powers)
        self.shared_experts = SharedExpert(c, p.shared_expert, p.regime)

    def __call__(
        self,
        x: Float[Array, "t d"],
        x_fp8: Fp8 | None,
        tokens: Int32[Array, "t"],
        valid: Bool[Array, "t"],
    ) -> Float[Array, "t d"]:
        """``x_fp8``: ``x`` quantised, if it is there already (`BranchRead`)."""
        idx, weight = self.gate(x, tokens)
        return self.experts(x, idx, weight, valid, self.shared_experts(x, x_fp8))
