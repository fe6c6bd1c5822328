"""Bytes of a checkpoint onto the device, with bounded memory on the host."""

import collections
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.checkpoint.read import Reader, TensorInfo
from dsv4_jax.typing import Array

__all__ = [
    "SLAB_BYTES",
    "STAGING_BYTES",
    "Placer",
    "check_scale",
    "host_dtype",
    "read_global_scales",
    "write_slice",
]

SLAB_BYTES: Final = 128 * 2**20
"""Most bytes that are read before they are handed to the device."""

STAGING_BYTES: Final = 2 * SLAB_BYTES
"""Most bytes on their way (one expert may exceed it). With a pinned copy of each: 512 MiB."""

_NUMPY: Final[dict[str, Any]] = {
    "F32": np.float32,
    "BF16": jnp.bfloat16,
    "F16": np.float16,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "I8": np.uint8,
    "U8": np.uint8,
    "I64": np.int64,
}


def host_dtype(tensor: TensorInfo) -> np.dtype[Any]:
    """How its elements lie on the host: packed and 8-bit floats are bytes."""
    return np.dtype(_NUMPY[tensor.dtype])


def check_scale(tensor: TensorInfo, host: np.ndarray) -> None:
    """Looks at scales of quantised weights, whose dtype says what may not be there.

    Raises:
        CheckpointError: NaN, infinite or negative; names the first place.
    """
    if tensor.dtype == "F8_E8M0":
        bad, rule = host == 255, "finite, got NaN (byte 255)"
    elif tensor.dtype == "F8_E4M3":
        bad, rule = host >= 0x7F, "finite and not negative"
    else:
        bad, rule = ~((host >= 0) & np.isfinite(host)), "finite and not negative"
    if bad.any():
        first = np.argwhere(bad)[0].tolist()
        if tensor.dtype == "F8_E4M3":
            rule += f", got byte {host[tuple(first)]:#04x}"
        elif tensor.dtype != "F8_E8M0":
            rule += f", got {float(host[tuple(first)])}"
        raise CheckpointError(f"{tensor.file}: {tensor.raw}: scales must be {rule} at {first}")


def read_global_scales(
    reader: Reader, tensors: Sequence[TensorInfo], reciprocal: bool
) -> np.ndarray:
    """FP32 scalars ``[n]`` that multiply; ``reciprocal``: what the files hold divides.

    The one division is made here, in FP32, so that it has the same bits on every device.

    Raises:
        CheckpointError: one is not a positive finite number.
    """
    out = np.empty(len(tensors), np.float32)
    for i, tensor in enumerate(tensors):
        reader.read_into(tensor, out[i : i + 1])
        with np.errstate(divide="ignore", over="ignore"):
            value = np.float32(1) / out[i] if reciprocal else out[i]
        if not (0 < out[i] < np.inf and 0 < value < np.inf):
            raise CheckpointError(
                f"{tensor.file}: {tensor.raw}: global scale must be positive and finite, "
                f"got {float(out[i])}"
            )
        out[i] = value
    return out


@functools.partial(jax.jit, donate_argnames=("buffers",))
def write_slice(buffers: Any, slices: Any, start: Array | int) -> Any:
    """Writes ``slices`` at ``start`` of the leading axis of each (donated) buffer."""
    return jax.tree.map(
        lambda buffer, part: lax.dynamic_update_slice_in_dim(buffer, part, start, 0),
        buffers,
        slices,
    )


class Placer:
    """Reads tensors and puts them on the default device.

    Args:
        reader: an open checkpoint.
        advance: called with the number of bytes after each read.
        scales: names in the files of the tensors that `check_scale` looks at.
    """

    def __init__(
        self, reader: Reader, advance: Callable[[int], None], scales: Collection[str] = ()
    ) -> None:
        self._reader = reader
        self._advance = advance
        self._scales = scales
        self._pending: collections.deque[tuple[Array, int]] = collections.deque()
        self._pending_bytes = 0

    def _put(self, host: np.ndarray) -> Array:
        array = jax.device_put(host)  # `jnp.asarray` would compile a program per shape
        self._pending.append((array, host.nbytes))
        self._pending_bytes += host.nbytes
        return array

    def _make_room(self, nbytes: int) -> None:
        """Waits until ``nbytes`` more may be staged."""
        while self._pending and self._pending_bytes + nbytes > STAGING_BYTES:
            array, size = self._pending.popleft()
            array.block_until_ready()
            self._pending_bytes -= size

    def finish(self) -> None:
        """Waits for all transfers."""
        while self._pending:
            self._pending.popleft()[0].block_until_ready()
        self._pending_bytes = 0

    def _read(self, tensor: TensorInfo, host: np.ndarray, skip: int = 0) -> None:
        self._reader.read_into(tensor, host, skip)
        self._advance(host.nbytes)
        if tensor.dtype == "F8_E8M0" or tensor.raw in self._scales:
            check_scale(tensor, host)

    def tensor(self, tensor: TensorInfo, view: DTypeLike | None = None) -> Array:
        """One tensor in its storage dtype (packed and 8-bit floats as uint8), in slabs of rows.

        With ``view`` the bytes of a tensor of one slab have that 8-bit dtype from the start.
        """
        dtype = np.dtype(_NUMPY[tensor.dtype])
        rows = tensor.shape[0] if tensor.shape else 1
        if tensor.nbytes <= SLAB_BYTES:
            self._make_room(tensor.nbytes)
            host = np.empty(tensor.shape, dtype)
            self._read(tensor, host)
            return self._put(host if view is None else host.view(view))
        row_bytes = tensor.nbytes // rows
        step = max(1, SLAB_BYTES // row_bytes)
        buffer = jnp.zeros(tensor.shape, dtype)
        for start in range(0, rows, step):
            count = min(step, rows - start)
            self._make_room(count * row_bytes)
            host = np.empty((count, *tensor.shape[1:]), dtype)
            self._read(tensor, host, start * row_bytes)
            buffer = write_slice(buffer, self._put(host), start)
        return buffer

    def stacks(
        self,
        stacks: Mapping[Any, Sequence[TensorInfo]],
        views: Mapping[Any, DTypeLike],
    ) -> dict[Any, Array]:
        """Several stacks of equal tensors at once, read in the order of the file.

        The bytes of a stack in ``views`` have that 8-bit dtype from the start.
        """
        self._make_room(sum(tensor.nbytes for stack in stacks.values() for tensor in stack))
        hosts: dict[Any, np.ndarray] = {}
        reads: list[tuple[str, int, TensorInfo, np.ndarray]] = []
        for key, stack in stacks.items():
            dtype = np.dtype(_NUMPY[stack[0].dtype])
            hosts[key] = np.empty((len(stack), *stack[0].shape), dtype)
            for i, tensor in enumerate(stack):
                reads.append((tensor.file, tensor.offset, tensor, hosts[key][i]))
        for _, _, tensor, host in sorted(reads, key=lambda read: read[:2]):
            self._read(tensor, host)
        return {
            key: self._put(host.view(views[key]) if key in views else host)
            for key, host in hosts.items()
        }

    def global_scales(self, tensors: Sequence[TensorInfo], reciprocal: bool) -> Array:
        """`read_global_scales` on the device."""
        self._make_room(4 * len(tensors))
        host = read_global_scales(self._reader, tensors, reciprocal)
        self._advance(host.nbytes)
        return self._put(host)

    def hash_table(self, tensor: TensorInfo, experts: int) -> Array:
        """``tid2eid`` as int32.

        Raises:
            CheckpointError: an entry is not an expert.
        """
        host = np.empty(tensor.shape, np.int64)
        self._read(tensor, host)
        bad = (host < 0) | (host >= experts)
        if bad.any():
            first = np.argwhere(bad)[0]
            raise CheckpointError(
                f"{tensor.file}: {tensor.raw}: entries must be in [0, {experts}), "
                f"got {host[tuple(first)]} at {first.tolist()}"
            )
        return self._put(host.astype(np.int32))
