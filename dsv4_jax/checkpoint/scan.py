"""Values that no checkpoint may hold: bad scales, hash tables' entries, NaN in weights.

What a scale may be (model.md 4.5, 7.1, 9):

- ``F8_E8M0``, of FP8 and MXFP4 weights: everything but byte 255, which is NaN. The format has no
  zero and no sign; byte 0 is 2^-127.
- ``F8_E4M3``, block scales of NVFP4: positive and finite. Hardware reads them without a sign, so -0
  is refused too. +0 is legal over a block whose 16 codes are all zero, where a lossless cast from
  MXFP4 may leave it; over other codes it has lost their values.
- ``F32`` and ``BF16``, of tensors and blocks: positive and finite; of a global scale that is
  stored as its reciprocal (compressed-tensors) both. So are static scales of the experts'
  activations, where they are used.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import jax.numpy as jnp
import numpy as np

from dsv4_jax.checkpoint.errors import LISTED, CheckpointError, Problems, shown
from dsv4_jax.checkpoint.read import Reader, TensorInfo
from dsv4_jax.typing import E4M3

__all__ = ["HOST_DTYPE", "SLAB_BYTES", "BadValueError", "Scan", "Slab", "slabs"]

SLAB_BYTES: Final = 128 * 2**20
"""Most bytes that are read at a time."""

HOST_DTYPE: Final[dict[str, Any]] = {
    "F32": np.float32,
    "BF16": jnp.bfloat16,
    "F16": np.float16,
    "F4": np.uint8,
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "I8": np.uint8,
    "U8": np.uint8,
    "I64": np.int64,
}
"""How bytes of a dtype are held on the host: what is packed and 8-bit floats as bytes."""

_FLOATS: Final = ("F32", "BF16", "F16")
# The dot tells the scales of linears from `hc_attn_scale`, a parameter.
_SCALE: Final = re.compile(r"(.*)\.(block_|global_|act_)?scale")
_CODES: Final = np.uint64(0x7777_7777_7777_7777)
_SINKS: Final = ("attn_sink", "sinks")


class BadValueError(CheckpointError):
    """The first bad value of a tensor; `Scan.raise_all` finds those of the others."""


class Slab(NamedTuple):
    """Whole rows of a tensor: the first one, their shape, the bytes before them."""

    row: int
    shape: tuple[int, ...]
    skip: int


def slabs(tensor: TensorInfo) -> Iterator[Slab]:
    """Pieces of at most ``SLAB_BYTES``, but for a longer row."""
    if tensor.nbytes <= SLAB_BYTES:
        yield Slab(0, tensor.shape, 0)
        return
    rows, *rest = tensor.shape
    row_bytes = tensor.nbytes // rows
    step = max(1, SLAB_BYTES // row_bytes)
    for start in range(0, rows, step):
        yield Slab(start, (min(step, rows - start), *rest), start * row_bytes)


class Scan:
    """Looks at the bytes of tensors as they are read: always at scales and hash tables.

    Args:
        reader: the open checkpoint, for the codes under zero scales.
        tensors: official name -> tensor, as ``Resolved.tensors``.
        experts: number of routed experts.
        reciprocal: the files hold reciprocals of global scales, as ``Naming.reciprocal``.
        verify: look for NaN and Inf in weights and other parameters too; -Inf is legal in a sink.
    """

    def __init__(
        self,
        reader: Reader,
        tensors: Mapping[str, TensorInfo],
        experts: int,
        *,
        reciprocal: bool = False,
        verify: bool = False,
    ) -> None:
        self._reader = reader
        self._tensors = tensors
        self._experts = experts
        self._verify = verify
        self._weights: dict[TensorInfo, TensorInfo | None] = {}  # scale -> its weight
        self._reciprocals: set[TensorInfo] = set()
        for name, tensor in tensors.items():
            match = _SCALE.fullmatch(name)
            if match:
                self._weights[tensor] = tensors.get(f"{match[1]}.weight")
                if reciprocal and match[2] in ("global_", "act_"):
                    self._reciprocals.add(tensor)

    def check(self, tensor: TensorInfo, host: np.ndarray, skip: int = 0) -> None:
        """Looks at bytes ``skip ...`` of a tensor, in whole rows.

        Args:
            tensor: where they lie.
            host: they, as ``HOST_DTYPE`` says.
            skip: how many bytes come before them.

        Raises:
            BadValueError: names the tensor and the first bad position.
        """
        if tensor.dtype == "I64":
            bad = (host < 0) | (host >= self._experts)
            self._refuse(tensor, host, skip, bad, f"entries must be in [0, {self._experts})")
        elif tensor.dtype == "F8_E8M0":
            self._refuse(tensor, host, skip, host == 255, "scales must be finite")
        elif tensor in self._weights:
            self._check_scale(tensor, host, skip)
        elif self._verify:
            self._check_weight(tensor, host, skip)

    def _check_scale(self, tensor: TensorInfo, host: np.ndarray, skip: int) -> None:
        rule = "scales must be positive and finite"
        if tensor.dtype == "F8_E4M3":
            bad = host >= 0x7F  # NaN, and everything negative
            zero = host == 0
            weight = self._weights[tensor]
            if weight is not None and zero.any() and weight.nbytes == 8 * tensor.nbytes:
                codes = np.empty(host.shape, np.uint64)  # 16 of them each
                self._reader.read_into(weight, codes, 8 * skip)
                zero &= (codes & _CODES) != 0
                rule += " (zero where all codes of the block are)"
            self._refuse(tensor, host, skip, bad | zero, rule)
        elif tensor.dtype in _FLOATS:
            value = np.asarray(host, np.float32)
            bad = ~(value > 0) | np.isinf(value)
            if tensor in self._reciprocals:
                rule += ", and so must their reciprocals"
                with np.errstate(divide="ignore", over="ignore"):
                    bad |= np.isinf(np.float32(1) / value)
            self._refuse(tensor, host, skip, bad, rule)

    def _check_weight(self, tensor: TensorInfo, host: np.ndarray, skip: int) -> None:
        if tensor.dtype == "F8_E4M3":
            self._refuse(tensor, host, skip, (host & 0x7F) == 0x7F, "must not be NaN")
        elif tensor.dtype in _FLOATS:
            bad = ~np.isfinite(host)
            if tensor.raw.endswith(_SINKS):
                bad &= ~(host < 0)
            self._refuse(tensor, host, skip, bad, "must be finite")

    def _refuse(
        self,
        tensor: TensorInfo,
        host: np.ndarray,
        skip: int,
        bad: Any,
        rule: str,
    ) -> None:
        if not bad.any():
            return
        flat = int(bad.argmax())
        at = [int(i) for i in np.unravel_index(flat, host.shape)]
        value = str(host[tuple(at)])
        if tensor.dtype == "F8_E8M0":
            value = "NaN (byte 255)"
        elif tensor.dtype == "F8_E4M3":
            byte = host[tuple(at)]
            value = f"{float(byte.view(E4M3))} (byte {byte})"
        if at:
            at[0] += skip // (host.nbytes // host.shape[0])
        position = tensor.offset + skip + flat * host.itemsize
        raise BadValueError(
            f"{tensor.file}: {shown(tensor.raw)}: {rule}, got {value} at {at} (byte {position} of "
            "the file)"
        )

    def _kind(self, tensor: TensorInfo) -> str:
        if tensor.dtype == "I64":
            return "table"
        return "scale" if tensor.dtype == "F8_E8M0" or tensor in self._weights else "weight"

    def raise_all(self, source: str) -> None:
        """Looks for all bad values there are, in up to ``LISTED`` tensors a class.

        Raises:
            CheckpointError: lists the first of each tensor.
        """
        problems = Problems(source)
        cut = False
        for tensor in sorted(self._tensors.values(), key=lambda t: (t.file, t.offset)):
            kind = self._kind(tensor)
            if kind == "weight" and not self._verify:
                continue
            if problems.count(kind) == LISTED:
                cut = True
                continue
            try:
                for slab in slabs(tensor):
                    host = np.empty(slab.shape, HOST_DTYPE[tensor.dtype])
                    self._reader.read_into(tensor, host, slab.skip)
                    self.check(tensor, host, slab.skip)
            except BadValueError as error:
                problems.add(kind, str(error))
        problems.raise_any("more were not looked for" if cut else "")
