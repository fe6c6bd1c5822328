"""A safetensors shard as a stream of bytes: hashed, written and synced beside the computation."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from dsv4_jax.checkpoint.manifest import TEMPORARY, sync_directory
from dsv4_jax.checkpoint.read import DTYPE_BITS

__all__ = ["CHUNK_BYTES", "Output", "ShardWriter", "header"]

CHUNK_BYTES: Final = 8 * 2**20
"""Most bytes that are handed over at a time."""

_QUEUED: Final = 16
_SYNC_BYTES: Final = 512 * 2**20


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor of a shard to be."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its data."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def header(outputs: Sequence[Output]) -> bytes:
    """The head of a shard that holds these tensors back to back."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for output in outputs:
        end = offset + output.nbytes
        entries[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardWriter(contextlib.AbstractContextManager["ShardWriter"]):
    """Writes one file; two threads hash and write while the caller prepares what follows.

    At most 128 MiB wait for each. The file has its name after `finish` alone; without that it is
    removed.

    Args:
        path: the file.
        outputs: its tensors; `write` must be given exactly their bytes, in this order.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, outputs: Sequence[Output]) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + TEMPORARY)
        head = header(outputs)
        self._expected = len(head) + sum(output.nbytes for output in outputs)
        self._hash = hashlib.sha256()
        self._given = 0
        self._queues = [queue.Queue[memoryview | None](_QUEUED) for _ in range(2)]
        self._error: OSError | None = None
        self._whole = False
        self._descriptor = os.open(
            self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644
        )
        self._threads = [
            threading.Thread(target=run, args=(chunks,), name="dsv4-write", daemon=True)
            for run, chunks in zip((self._run, self._digest), self._queues, strict=True)
        ]
        for thread in self._threads:
            thread.start()
        self.write(np.frombuffer(head, np.uint8))

    def _digest(self, chunks: "queue.Queue[memoryview | None]") -> None:
        while (chunk := chunks.get()) is not None:
            self._hash.update(chunk)

    def _run(self, chunks: "queue.Queue[memoryview | None]") -> None:
        unsynced = 0
        while (chunk := chunks.get()) is not None:
            if self._error is not None:
                continue  # the caller must not block; it sees the error with its next chunk
            try:
                done = 0
                while done < len(chunk):
                    done += os.write(self._descriptor, chunk[done:])
                unsynced += len(chunk)
                if unsynced >= _SYNC_BYTES:  # or one sync at the end takes as long as all of it
                    os.fdatasync(self._descriptor)
                    unsynced = 0
            except OSError as error:
                self._error = error
        if self._whole and self._error is None:
            try:
                os.fsync(self._descriptor)  # here, because Ctrl-C waits for no system call
            except OSError as error:
                self._error = error

    def write(self, array: np.ndarray) -> None:
        """Takes the bytes of a contiguous array, which must not be changed any more."""
        view = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, len(view), CHUNK_BYTES):
            if self._error is not None:
                raise self._error
            chunk = view[start : start + CHUNK_BYTES]
            for waiting in self._queues:
                waiting.put(chunk.data)
            self._given += len(chunk)

    def _join(self) -> None:
        for thread, waiting in zip(self._threads, self._queues, strict=True):
            if thread.is_alive():
                waiting.put(None)
                thread.join()

    def finish(self) -> tuple[int, str]:
        """Syncs the file and gives it its name; its size and SHA-256."""
        self._whole = True
        self._join()
        if self._error is not None:
            raise self._error
        if self._given != self._expected:
            raise RuntimeError(
                f"{self._path.name}: got {self._given} bytes for {self._expected} announced"
            )
        self._temporary.rename(self._path)
        sync_directory(self._path.parent)
        return self._given, self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._join()
        os.close(self._descriptor)
        self._temporary.unlink(missing_ok=True)  # renamed already if all went well
