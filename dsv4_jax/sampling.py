"""Choosing the next token: pure functions of logits and key.

Order of the filters, as in the common servers: temperature, then top-k, then top-p over the
probabilities that top-k left. Sampling adds Gumbel noise and takes the argmax, which draws from
the softmax (the release's own sampler does the same with exponential noise).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from dsv4_jax.typing import Array, Bool, Float, Float32, Int32

__all__ = ["Sampled", "SamplingParams", "choose", "sample", "step_keys"]

# Stated rather than left to `jax_default_prng_impl`: other generators give a row of a batch other
# bits than the same row alone.
_PRNG = "threefry2x32"


def _check(name: str, value: object) -> None:
    """Checks one setting that is a host number; arrays pass (they are checked nowhere)."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        if isinstance(value, jax.Array | np.ndarray):
            return
        raise ValueError(f"sample: {name} must be a number, got {value!r}")
    number = float(value)
    if name == "temperature" and not (math.isfinite(number) and number >= 0):
        raise ValueError(f"sample: temperature must be finite and >= 0, got {value}")
    if name == "top_p" and not 0 < number <= 1:
        raise ValueError(f"sample: top_p must be in (0, 1], got {value}")
    if name == "top_k" and not (number >= 0 and number == int(number) and number < 2**31):
        raise ValueError(f"sample: top_k must be an int >= 0 (0 = off), got {value}")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Checked sampling settings.

    Attributes:
        temperature: divides the logits; 0 is exact greedy and ignores the key.
        top_p: keeps the smallest set of tokens whose probability reaches this.
        top_k: keeps the k most likely tokens; 0 is off.

    Raises:
        ValueError: temperature is negative or not finite, top_p outside (0, 1], top_k negative.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float | np.number):
                raise ValueError(f"sample: {field.name} must be a number, got {value!r}")
            _check(field.name, value)


class Sampled(NamedTuple):
    """What ``sample`` returns; a row with invalid logits has token -1 and valid False."""

    tokens: Int32[Array, "b"]
    valid: Bool[Array, "b"]


def step_keys(seeds: Array | np.ndarray, positions: Array | np.ndarray) -> Array:
    """One key per sequence, a function of its seed and the position of the token to be drawn.

    Args:
        seeds: uint32 [b].
        positions: int32 [b]; the absolute position that the sampled token will take.

    Returns:
        Typed PRNG keys [b]. Neither the batch slot nor the other sequences enter.
    """

    def one(seed: Array, position: Array) -> Array:
        return jax.random.fold_in(jax.random.key(seed, impl=_PRNG), position)

    return jax.vmap(one)(jnp.asarray(seeds, jnp.uint32), jnp.asarray(positions, jnp.int32))


def sample(
    logits: Float[Array, "b v"],
    keys: Array,
    *,
    temperature: float | Float32[Array, "*b"],
    top_p: float | Float32[Array, "*b"] = 1.0,
    top_k: int | Int32[Array, "*b"] = 0,
) -> Sampled:
    """Draws one token per row; jittable, with every argument traced.

    A row whose logits hold NaN or +Inf, or only -Inf, is flagged invalid; -Inf in some places
    excludes those tokens. Ties go to the lower token id.

    Args:
        logits: next-token scores.
        keys: one key per row (``step_keys``), or one key for the batch, which is split by row.
        temperature: 0 for greedy; a number, or one per row.
        top_p: in (0, 1]; a number, or one per row. At least one token always stays.
        top_k: 0 for all tokens; a number, or one per row.

    Returns:
        Tokens and flags per row.

    Raises:
        ValueError: wrong rank, wrong number of keys, or a setting given as a host number that is
            out of range.
    """
    for name, value in (("temperature", temperature), ("top_p", top_p), ("top_k", top_k)):
        _check(name, value)
    if logits.ndim != 2 or logits.shape[-1] == 0:
        raise ValueError(f"sample: logits must be [b, vocab], got {list(logits.shape)}")
    b = logits.shape[0]
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        keys = jax.random.wrap_key_data(keys, impl=_PRNG)
    if keys.ndim == 0:
        keys = jax.random.split(keys, b)
    if keys.shape != (b,):
        raise ValueError(f"sample: need one key or one per row ({b}), got {list(keys.shape)}")

    return choose(logits, keys, temperature=temperature, top_p=top_p, top_k=top_k)


def choose(
    logits: Float[Array, "b v"],
    keys: Array,
    *,
    temperature: float | Float32[Array, "*b"] | None,
    top_p: float | Float32[Array, "*b"] | None,
    top_k: int | Int32[Array, "*b"] | None,
) -> Sampled:
    """`sample` of checked arguments; with None for what is off, and not in the program.

    No temperature is greedy; neither ``top_p`` nor ``top_k`` is all tokens.
    """
    b = logits.shape[0]

    def rows(value: float | Array | None, dtype: DTypeLike) -> Array | None:
        return None if value is None else jnp.broadcast_to(jnp.asarray(value, dtype), (b,))

    filters = top_p is not None or top_k is not None
    mass = rows(1.0 if filters and top_p is None else top_p, jnp.float32)
    k = rows(0 if filters and top_k is None else top_k, jnp.int32)
    return _sample(logits.astype(jnp.float32), keys, rows(temperature, jnp.float32), mass, k)


@jax.jit
def _sample(
    logits: Float32[Array, "b v"],
    keys: Array,
    temp: Float32[Array, "b"] | None,
    mass: Float32[Array, "b"] | None,
    k: Int32[Array, "b"] | None,
) -> Sampled:
    best = jnp.max(logits, axis=-1)
    valid = jnp.isfinite(best) & ~jnp.isnan(logits).any(axis=-1)
    # Invalid rows go on as zeros, so that no NaN is made from them (jax_debug_nans).
    logits = jnp.where(valid[:, None], logits, 0.0)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if temp is None:
        return Sampled(jnp.where(valid, greedy, -1), valid)

    def draw() -> Array:
        shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
        limits = jnp.finfo(jnp.float32)
        scaled = shifted / jnp.clip(temp, float(limits.tiny), float(limits.max))[:, None]
        if mass is not None and k is not None:
            filtered = ((mass < 1.0) | (k > 0)).any()
            scaled = _where_cheap(filtered, _filter, lambda x, *_: x, scaled, mass, k)
        noise = jax.vmap(lambda key: _gumbel(key, logits.shape[-1]))(keys)
        return jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)

    drawn = _where_cheap((temp > 0.0).any(), draw, lambda: greedy)
    tokens = jnp.where(temp > 0.0, drawn, greedy)
    return Sampled(jnp.where(valid, tokens, -1), valid)


def _where_cheap(
    needed: Bool[Array, ""], work: Callable[..., Array], idle: Callable[..., Array], *args: Array
) -> Array:
    """``work``, or ``idle`` where that gives the same; by a branch if the device can take one.

    On a GPU the host would take it, and the device would wait for it.
    """
    if jax.default_backend() == "cpu":
        return jax.lax.cond(needed, work, idle, *args)
    return work(*args)


def _gumbel(key: Array, size: int) -> Float32[Array, "v"]:
    # "high" spends twice the bits so that very unlikely tokens keep their share.
    return jax.random.gumbel(key, (size,), jnp.float32, mode="high")


def _filter(
    scaled: Float32[Array, "b v"], mass: Float32[Array, "b"], k: Int32[Array, "b"]
) -> Float32[Array, "b v"]:
    """Sets every score outside top-k, then outside top-p, to -Inf."""
    order = jnp.argsort(-scaled, axis=-1, stable=True).astype(jnp.int32)
    ranked = jnp.take_along_axis(scaled, order, axis=-1)
    rank = jnp.arange(scaled.shape[-1], dtype=jnp.int32)[None, :]
    keep = (k[:, None] <= 0) | (rank < k[:, None])
    prob = jax.nn.softmax(jnp.where(keep, ranked, -jnp.inf), axis=-1)
    # A token stays while the mass before it is short of top_p: the smallest set that reaches it.
    before = jnp.pad(jnp.cumsum(prob, axis=-1)[:, :-1], ((0, 0), (1, 0)))
    keep &= (mass[:, None] >= 1.0) | (before < mass[:, None])
    keep |= rank == 0
    row = jnp.arange(scaled.shape[0], dtype=jnp.int32)[:, None]
    keep = jnp.zeros(scaled.shape, jnp.bool_).at[row, order].set(keep, unique_indices=True)
    return jnp.where(keep, scaled, -jnp.inf)
