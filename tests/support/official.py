"""A tiny safetensors reader and the official golden model of tests/data."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

TINY = Path(__file__).parents[1] / "data" / "official-fp8-tiny"

RawTensor = tuple[str, tuple[int, ...], np.ndarray]


def read_raw(path: str | Path) -> dict[str, RawTensor]:
    """Read a safetensors file: name -> (dtype as spelled there, shape, the bytes as 1-d uint8)."""
    data = np.fromfile(path, np.uint8)
    (size,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + size].tobytes())
    body = data[8 + size :]
    return {
        name: (entry["dtype"], tuple(entry["shape"]), body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def tiny_config() -> dict[str, Any]:
    """The golden model's config.json."""
    return json.loads((TINY / "config.json").read_text())


def tiny_raw() -> dict[str, RawTensor]:
    """The golden model's tensors as stored."""
    return read_raw(TINY / "model.safetensors")


def tiny_golden() -> dict[str, np.ndarray]:
    """The golden outputs."""
    with np.load(TINY / "golden.npz") as arrays:
        return dict(arrays)
