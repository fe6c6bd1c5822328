"""Linear, norm and embedding modules: they declare parameters and call an op, nothing else."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from dsv4_jax.ops.dense_linear import dense_linear, dense_linears
from dsv4_jax.ops.fp8_linear import fp8_linear, fp8_linears
from dsv4_jax.ops.mxfp4_linear import mxfp4_linear
from dsv4_jax.ops.nvfp4_linear import nvfp4_linear, nvfp4_linears
from dsv4_jax.ops.rmsnorm import rmsnorm
from dsv4_jax.ops.rmsnorm_fp8 import rmsnorm_fp8
from dsv4_jax.precision import SCALE_LEAVES, LinearFormat, Regime, act_format, weight_format
from dsv4_jax.quant import fp8, mxfp4, nvfp4
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.typing import Array, Float

__all__ = ["Linear", "RMSNorm", "Weight", "linear", "linear_leaves", "linears", "takes_up"]

INIT_STD = 0.02


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return (jax.random.normal(key, shape, jnp.float32) * INIT_STD).astype(dtype)


def _quantized(key: jax.Array, shape: tuple[int, ...], form: str) -> dict[str, Array]:
    """Random weights of standard deviation 0.02 in a storage format."""
    w = jax.random.normal(key, shape, jnp.float32) * INIT_STD
    if form == "fp8":
        code, scale = fp8.quantize_weight(w)
        return {"weight": code, "scale": scale}
    if form == "mxfp4":
        code, scale = mxfp4.quantize(w)
        return {"weight": code, "scale": scale}
    lead = w.reshape(*shape[:-2], -1)
    global_scale = nvfp4.token_global_scale(lead)
    q = nvfp4.quantize(w, global_scale[..., None])
    return {"weight": q.code, "block_scale": q.block_scale, "global_scale": global_scale}


def linear_leaves(
    module: nn.Module, shape: tuple[int, ...], form: LinearFormat
) -> dict[str, Array]:
    """Declares the leaves of one (stacked) linear ``[*e, out, in]`` on ``module``.

    ``weight`` for unquantised formats; ``weight`` + ``scale`` for FP8 and MXFP4; ``weight`` +
    ``block_scale`` + ``global_scale`` for NVFP4.
    """
    stored = weight_format(form)
    if stored in ("float32", "bfloat16"):
        return {"weight": module.param("weight", _normal, shape, jnp.dtype(stored))}
    if not module.is_initializing():  # tracing the quantising initialisers costs seconds a model
        return {
            name: module.get_variable("params", name) for name in ("weight", *SCALE_LEAVES[stored])
        }
    parts = jax.eval_shape(lambda: _quantized(jax.random.key(0), shape, stored))

    def init(name: str) -> Callable[[jax.Array], Array]:
        # Every leaf of a weight is drawn from the same key, so that codes and scales belong
        # together; only the module's path distinguishes one weight from another.
        return lambda _: _quantized(key, shape, stored)[name]

    key = module.make_rng("params")
    return {name: module.param(name, init(name)) for name in parts}


def linear(
    x: Float[Array, "t *g k"] | Fp8,
    leaves: Mapping[str, Array],
    form: LinearFormat,
    dtype: DTypeLike = jnp.float32,
    regime: Regime | None = None,
    up: Float[Array, "t *g k"] | None = None,
    limit: float | None = None,
) -> Float[Array, "t *g n"]:
    """The op that serves a linear format; FP32 sums, rounded once to ``dtype``.

    ``up``, ``limit``: as of `fp8_linear` and `nvfp4_linear`.

    Raises:
        TypeError: ``x`` is quantised and ``form`` is not ``fp8_w8a8``, or has ``up`` and it is none
            that `takes_up`.
    """
    stored, act = weight_format(form), act_format(form)
    settings: dict[str, Any] = {"dtype": dtype, "regime": regime}
    if up is not None and not takes_up(form):
        raise TypeError(f"linear: x of {form} must not have up")
    if stored == "fp8":
        settings |= {"act": act, "up": up, "limit": limit}
        return fp8_linear(x, leaves["weight"], leaves["scale"], **settings)
    if isinstance(x, Fp8):
        raise TypeError(f"linear: x of {form} must not be quantised")
    if stored == "nvfp4":
        scales = leaves["block_scale"], leaves["global_scale"]
        settings |= {"act": act, "up": up, "limit": limit}
        return nvfp4_linear(x, leaves["weight"], *scales, **settings)
    if stored == "mxfp4":
        return mxfp4_linear(x, leaves["weight"], leaves["scale"], act=act, **settings)
    return dense_linear(x, leaves["weight"], **settings)


def takes_up(form: LinearFormat) -> bool:
    """Whether `linear` of the format takes a gate and its ``up``, both BF16."""
    return form in ("fp8_w8a8", "nvfp4_w4a4")


class Linear(nn.Module):
    """``round(x . W^T)`` in a given format, rounded to ``x``'s dtype; to BF16 if quantised."""

    features: int
    inputs: int
    form: LinearFormat
    regime: Regime | None = None

    def setup(self) -> None:
        self.leaves = linear_leaves(self, (self.features, self.inputs), self.form)

    def __call__(
        self,
        x: Float[Array, "t *g k"] | Fp8,
        y: Float[Array, "t *g n"] | None = None,
        *,
        up: Float[Array, "t *g k"] | None = None,
        limit: float | None = None,
    ) -> Float[Array, "t *g n"]:
        """Of ``x``, or the gate of ``up``; ``y`` is that if it is there already (`linears`)."""
        if y is not None:
            return y
        dtype = jnp.bfloat16 if isinstance(x, Fp8) else x.dtype
        return linear(x, self.leaves, self.form, dtype, self.regime, up, limit)


def linears(
    x: Float[Array, "t *g k"] | Fp8, modules: Sequence[Linear], x_fp8: Fp8 | None = None
) -> tuple[Float[Array, "t *g _"], ...]:
    """Every module's result, in one call of an op that takes several weights of their format.

    ``x``: as of `Linear`. ``x_fp8``: ``x`` quantised, read in its place by ``fp8_w8a8``.
    """

    def read_by(form: LinearFormat) -> Array | Fp8:
        return x if x_fp8 is None or form != "fp8_w8a8" else x_fp8

    first = modules[0]
    dtype = jnp.bfloat16 if isinstance(x, Fp8) else x.dtype
    stored = weight_format(first.form)
    alike = all((m.form, m.regime) == (first.form, first.regime) for m in modules)
    if not alike or stored == "mxfp4":
        return tuple(linear(read_by(m.form), m.leaves, m.form, dtype, m.regime) for m in modules)
    weights = [module.leaves["weight"] for module in modules]
    settings: dict[str, Any] = {"dtype": dtype, "regime": first.regime}
    if stored == "fp8":
        scales = [module.leaves["scale"] for module in modules]
        settings["act"] = act_format(first.form)
        return fp8_linears(read_by(first.form), weights, scales, **settings)
    if isinstance(x, Fp8):
        raise TypeError(f"linears: x of {first.form} must not be quantised")
    if stored == "nvfp4":
        scales = [[m.leaves[name] for m in modules] for name in SCALE_LEAVES[stored]]
        return nvfp4_linears(x, weights, *scales, act=act_format(first.form), **settings)
    return dense_linears(x, weights, **settings)


class Weight(nn.Module):
    """A bare ``weight`` parameter (norms, embedding, and linears whose result stays FP32)."""

    shape: tuple[int, ...]
    dtype: str

    def setup(self) -> None:
        self.weight = self.param("weight", _normal, self.shape, jnp.dtype(self.dtype))

    def __call__(self) -> Array:
        return self.weight


class RMSNorm(nn.Module):
    """`rmsnorm` with its own weight, or `rmsnorm_fp8`; ``y`` is that if it is there already."""

    features: int
    dtype: str
    eps: float

    def setup(self) -> None:
        self.weight = self.param(
            "weight", nn.initializers.ones, (self.features,), jnp.dtype(self.dtype)
        )

    @overload
    def __call__(self, x: Float[Array, "*lead d"]) -> Float[Array, "*lead d"]: ...

    @overload
    def __call__(
        self, x: Float[Array, "*lead d"], quantised: bool, y: Fp8 | None = None
    ) -> Float[Array, "*lead d"] | Fp8: ...

    def __call__(
        self, x: Float[Array, "*lead d"], quantised: bool = False, y: Fp8 | None = None
    ) -> Float[Array, "*lead d"] | Fp8:
        if y is not None:
            return y
        if quantised:
            return rmsnorm_fp8(x, self.weight, self.eps)
        return rmsnorm(x, self.weight, self.eps)
