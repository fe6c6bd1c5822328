"""Random weights and caches in storage formats, made on the device: no checkpoint, no host copy.

Everything is a hash of a seed and the place; `jax.random` takes XLA ten times as long to compile.
Weights are scaled by their inputs, so that activations keep their size through any number of
layers.
"""

import dataclasses
import functools
import math
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import lax

from dsv4_jax.cache import Cache
from dsv4_jax.checkpoint.names import (
    Parameter,
    leaves,
    parameters,
    set_path,
    target_format,
)
from dsv4_jax.config import ModelConfig
from dsv4_jax.precision import Precision
from dsv4_jax.quant import bits
from dsv4_jax.typing import E2M1, E4M3, UE8M0, Array

__all__ = ["any_leaf", "any_leaves", "random_cache", "random_params"]

_RMS: Final = {"mxfp4": 2.93, "nvfp4": 2.93, "fp8": 0.6, "bfloat16": 1.155, "float32": 1.155}
"""Of the codes that `any_leaf` makes for a format: any of E2M1, E4M3 below 2, others in [-2, 2]."""


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def any_leaf(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Finite values of size about one, a function of seed and place alone, made on the device.

    Any bytes as uint8. `jax.random` takes XLA ten times as long to compile.
    """
    dtype = jnp.dtype(dtype)
    size = shape[-1] // 2 if dtype == E2M1 else shape[-1]
    padded = -(-size // 4) * 4 if dtype != jnp.float32 else size
    words = padded if dtype == jnp.float32 else padded // 4
    x = jnp.zeros((), jnp.uint32)
    for axis, n in enumerate((*shape[:-1], words)):
        x = x * jnp.uint32(n) + lax.broadcasted_iota(jnp.uint32, (*shape[:-1], words), axis)
    # Two rounds of a hash of the place, the seed between them.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B) + jnp.uint32(seed) * jnp.uint32(0x9E3779B9)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    x = (x ^ (x >> 16)) * jnp.uint32(0x846CA68B)
    x ^= x >> 15
    if dtype == jnp.float32:
        return (x >> 8).astype(jnp.float32) * 2.0**-22 - 2
    byte = lax.bitcast_convert_type(x, jnp.uint8).reshape(*shape[:-1], padded)[..., :size]
    if dtype == jnp.uint8:
        return byte
    if dtype == E2M1:
        return bits.bytes_to_e2m1(byte)
    if dtype == E4M3:
        return lax.bitcast_convert_type(byte & 0xBF, E4M3)  # below 2
    if dtype == UE8M0:
        return lax.bitcast_convert_type(126 + (byte & 1), UE8M0)
    return ((byte.astype(jnp.float32) - 127.5) / 64).astype(dtype)


def any_leaves(tree: Any) -> Any:
    """Arrays of a tree of shapes, by one program; leaf ``i`` is `any_leaf` of ``i + 1``."""
    leaves, structure = jax.tree.flatten(tree)

    def make() -> Any:
        made = [any_leaf(i, x.shape, x.dtype) for i, x in enumerate(leaves, 1)]
        return jax.tree.unflatten(structure, made)

    return jax.jit(make)()


def random_params(config: ModelConfig, precision: Precision) -> dict[str, Any]:
    """The params tree of `expected_tree` without MTP, a program per distinct leaf.

    Products of a weight and inputs of size one have size one, norms are near one, what is no matrix
    is small. A token's experts in the hash tables are distinct. Block scales of NVFP4 are powers of
    two.
    """
    tree: dict[str, Any] = {}
    for i, parameter in enumerate(parameters(config, False)):
        for j, (path, leaf) in enumerate(leaves(parameter, precision).items()):
            form = target_format(parameter, precision)
            made = _made(parameter, form, path[-1], leaf, 4 * i + j, config.n_routed_experts)
            set_path(tree, path, made)
    return tree


def _made(parameter: Parameter, form: str, name: str, leaf: Any, seed: int, experts: int) -> Array:
    if form == "int32":
        return _hash_table(seed, leaf.shape, experts)
    size = _RMS[form] * math.sqrt(parameter.shape[-1])
    if leaf.dtype == UE8M0:
        return _exponents(seed, leaf.shape, 127 - round(math.log2(size)))
    if name == "block_scale":
        return _one_or_two(seed, leaf.shape)
    if name == "global_scale":
        return jnp.full(leaf.shape, 1 / (1.6 * size), leaf.dtype)
    if leaf.dtype in (E2M1, E4M3):
        return any_leaf(seed, leaf.shape, leaf.dtype)
    norm = parameter.name.endswith("norm.weight")
    matrix = len(parameter.shape) > 1
    factor = 1 / size if matrix else 0.05
    return _real(seed, factor, 1.0 if norm else 0.0, leaf.shape, leaf.dtype)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _real(seed: int, factor: float, centre: float, shape: tuple[int, ...], dtype: Any) -> Array:
    return (any_leaf(seed, shape, dtype).astype(jnp.float32) * factor + centre).astype(dtype)


@functools.partial(jax.jit, static_argnames="shape")
def _exponents(seed: int, shape: tuple[int, ...], code: int) -> Array:
    """UE8M0 of a code or the one below."""
    low = any_leaf(seed, shape, jnp.uint8) & 1
    return lax.bitcast_convert_type(jnp.uint8(code) - low, UE8M0)


@functools.partial(jax.jit, static_argnames="shape")
def _one_or_two(seed: int, shape: tuple[int, ...]) -> Array:
    """E4M3."""
    high = any_leaf(seed, shape, jnp.uint8) & 8
    return lax.bitcast_convert_type(jnp.uint8(0x38) + high, E4M3)


@functools.partial(jax.jit, static_argnames=("shape", "experts"))
def _hash_table(seed: int, shape: tuple[int, ...], experts: int) -> Array:
    """``[vocab, k]``: from any first expert on, evenly spread."""
    tokens, k = shape
    first = jnp.abs(any_leaf(seed, (tokens, 1), jnp.float32)) * (experts / 2)
    return (first.astype(jnp.int32) + jnp.arange(k) * (experts // k)) % experts


def random_cache(model: Any, batch_size: int, max_len: int, length: int) -> Cache:
    """A cache whose rows all hold ``length`` tokens, of any finite content."""
    cache = jax.eval_shape(lambda: model.init_cache(batch_size=batch_size, max_len=max_len))
    parts, structure = jax.tree.flatten(cache.layers)
    made = [any_leaf(i, x.shape, x.dtype) for i, x in enumerate(parts, 1)]
    return dataclasses.replace(
        cache,
        layers=jax.tree.unflatten(structure, made),
        lengths=jnp.full(batch_size, length, jnp.int32),
        overflow=jnp.zeros(batch_size, bool),
    )
