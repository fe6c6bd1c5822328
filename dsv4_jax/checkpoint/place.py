"""Bytes of a checkpoint onto the device, with bounded memory on the host."""

import collections
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from dsv4_jax.checkpoint.read import Reader, TensorInfo
from dsv4_jax.checkpoint.scan import HOST_DTYPE, SLAB_BYTES, Scan, slabs
from dsv4_jax.typing import Array

__all__ = ["STAGING_BYTES", "Placer", "read_global_scales", "write_slice"]


STAGING_BYTES: Final = 2 * SLAB_BYTES
"""Most bytes on their way (one expert may exceed it). With a pinned copy of each: 512 MiB."""


def read_global_scales(
    reader: Reader, scan: Scan, tensors: Sequence[TensorInfo], reciprocal: bool
) -> np.ndarray:
    """FP32 scalars ``[n]`` that multiply; ``reciprocal``: what the files hold divides.

    The one division is made here, in FP32, so that it has the same bits on every device.

    Raises:
        CheckpointError: one is not a positive finite number.
    """
    out = np.empty(len(tensors), np.float32)
    for i, tensor in enumerate(tensors):
        reader.read_into(tensor, out[i : i + 1])
        scan.check(tensor, out[i : i + 1].reshape(tensor.shape))
    return np.float32(1) / out if reciprocal else out


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
        scan: looks at all that is read, before it is put on the device.
    """

    def __init__(self, reader: Reader, advance: Callable[[int], None], scan: Scan) -> None:
        self._reader = reader
        self._scan = scan
        self._advance = advance
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

    def drop(self) -> None:
        """Forgets all transfers without waiting for them."""
        self._pending.clear()
        self._pending_bytes = 0

    def _read(self, tensor: TensorInfo, host: np.ndarray, skip: int = 0) -> None:
        self._reader.read_into(tensor, host, skip)
        self._advance(host.nbytes)
        self._scan.check(tensor, host, skip)

    def tensor(self, tensor: TensorInfo, view: DTypeLike | None = None) -> Array:
        """One tensor in its storage dtype (packed and 8-bit floats as uint8), in slabs of rows.

        With ``view`` the bytes of a tensor of one slab have that 8-bit dtype from the start.
        """
        dtype = np.dtype(HOST_DTYPE[tensor.dtype])
        pieces = list(slabs(tensor))
        if len(pieces) == 1:
            self._make_room(tensor.nbytes)
            host = np.empty(tensor.shape, dtype)
            self._read(tensor, host)
            return self._put(host if view is None else host.view(view))
        buffer = jnp.zeros(tensor.shape, dtype)
        for slab in pieces:
            host = np.empty(slab.shape, dtype)
            self._make_room(host.nbytes)
            self._read(tensor, host, slab.skip)
            buffer = write_slice(buffer, self._put(host), slab.row)
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
            dtype = np.dtype(HOST_DTYPE[stack[0].dtype])
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
        return self._put(self._scalars(tensors, reciprocal))

    def act_scales(
        self, stacks: Sequence[Sequence[TensorInfo]], reciprocal: bool
    ) -> tuple[Array, np.ndarray]:
        """Of weights that read the same the largest scale of each expert, and where they differ."""
        self._make_room(4 * len(stacks[0]))
        hosts = np.stack([self._scalars(stack, reciprocal) for stack in stacks])
        most = hosts.max(axis=0)
        return self._put(most), np.flatnonzero((hosts != most).any(axis=0))

    def _scalars(self, tensors: Sequence[TensorInfo], reciprocal: bool) -> np.ndarray:
        host = read_global_scales(self._reader, self._scan, tensors, reciprocal)
        self._advance(host.nbytes)
        return host

    def hash_table(self, tensor: TensorInfo) -> Array:
        """``tid2eid`` as int32."""
        host = np.empty(tensor.shape, np.int64)
        self._read(tensor, host)
        return self._put(host.astype(np.int32))
