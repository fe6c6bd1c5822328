"""Training state on disk: exactly, or packed for the way to another machine.

Exact: every array as it is. Packed: weights in 16 bits and moments in 8, linear in blocks of 256
with one FP32 scale each (second moments by their square roots), at most `PACKED_LIMIT` bytes.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from reference.train.steps import State

PACKED_LIMIT = 40 * 2**20
BLOCK = 256


def _leaves(state: State) -> dict[str, Any]:
    paths, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path): leaf for path, leaf in paths}


def _fill(like: State, arrays: dict[str, np.ndarray]) -> State:
    paths, tree = jax.tree.flatten_with_path(like)
    names = [jax.tree_util.keystr(path) for path, _ in paths]
    if set(names) != set(arrays):
        odd = sorted(set(names) ^ set(arrays))
        raise ValueError(f"state: the file and the model differ in {odd[:5]}")
    for name, (_, leaf) in zip(names, paths, strict=True):
        if np.shape(leaf) != np.shape(arrays[name]):
            raise ValueError(
                f"state: {name} must be {list(np.shape(leaf))}, got {list(np.shape(arrays[name]))}"
            )
    return jax.tree.unflatten(tree, [jnp.asarray(arrays[name]) for name in names])


def _write(arrays: dict[str, np.ndarray], path: Path) -> None:
    """All of the file or none of it."""
    partial = path.with_suffix(".partial")
    save_file(arrays, partial)
    partial.replace(path)


def save_exact(state: State, path: Path) -> None:
    """Every leaf, bit by bit."""
    _write({name: np.asarray(leaf) for name, leaf in _leaves(state).items()}, path)


def load_exact(like: State, path: Path) -> State:
    """What `save_exact` wrote; `like` gives the structure."""
    return _fill(like, load_file(path))


def _pack(x: np.ndarray, bits: int, *, up: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales; with `up` nothing that is not zero becomes zero."""
    top = 2 ** (bits - 1) - 1
    blocks = np.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / top).astype(np.float32)
    codes = np.rint(blocks / np.where(scale == 0, 1, scale))
    if up:
        codes = np.where(blocks > 0, np.maximum(codes, 1), codes)
    return codes.astype(f"i{bits // 8}").reshape(-1)[: x.size], scale[:, 0]


def _unpack(codes: np.ndarray, scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    value = codes.astype(np.float32) * np.repeat(scale, BLOCK)[: codes.size]
    return value.reshape(shape)


def _is_second_moment(name: str) -> bool:
    return ".nu[" in name


def save_packed(state: State, path: Path) -> int:
    """The state in at most `PACKED_LIMIT` bytes; returns how many.

    Raises:
        ValueError: it takes more; nothing is written.
    """
    out: dict[str, np.ndarray] = {}
    for name, leaf in _leaves(state).items():
        x = np.asarray(leaf)
        if x.dtype != np.float32 or x.size < BLOCK:
            out[name] = x
            continue
        # Adam divides by the roots of the second moments: one that vanished would be a leap.
        second = _is_second_moment(name)
        packed = _pack(np.sqrt(x) if second else x, 8 if "moments" in name else 16, up=second)
        out[name + "#codes"], out[name + "#scale"] = packed
    size = sum(x.nbytes for x in out.values())
    if size > PACKED_LIMIT:
        raise ValueError(f"state: packed takes {size} bytes, the limit is {PACKED_LIMIT}")
    _write(out, path)
    return size


def load_packed(like: State, path: Path) -> State:
    """What `save_packed` wrote, with its rounding."""
    packed = load_file(path)
    arrays = {name: x for name, x in packed.items() if "#" not in name}
    shapes = {name: np.shape(leaf) for name, leaf in _leaves(like).items()}
    for name in (key.removesuffix("#codes") for key in packed if key.endswith("#codes")):
        codes, scale = packed[name + "#codes"], packed[name + "#scale"]
        shape = shapes.get(name, codes.shape)
        if codes.size != math.prod(shape):
            raise ValueError(f"state: {name} must be {list(shape)}, got {codes.size} elements")
        value = _unpack(codes, scale, shape)
        arrays[name] = np.square(value) if _is_second_moment(name) else value
    return _fill(like, arrays)
