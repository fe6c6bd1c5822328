"""Tiny checkpoints to load and to break: raw safetensors in and out, without ``dsv4_jax``."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OFFICIAL = Path(__file__).parents[1] / "data" / "official-fp8-tiny"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)


class Raw(NamedTuple):
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def array(self, dtype: Any) -> np.ndarray:
        """The bytes as a numpy array of a plain dtype."""
        return np.frombuffer(self.data, dtype).reshape(self.shape)


def raw(dtype: str, array: np.ndarray) -> Raw:
    """A tensor of ``dtype`` from an array that already holds its bytes."""
    return Raw(dtype, tuple(array.shape), np.ascontiguousarray(array).tobytes())


def read_shard(path: Path) -> dict[str, Raw]:
    """All tensors of a shard."""
    blob = path.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    header.pop("__metadata__", None)
    out = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = blob[8 + length + begin : 8 + length + end]
        out[name] = Raw(entry["dtype"], tuple(entry["shape"]), data)
    return out


def write_shard(path: Path, tensors: Mapping[str, Raw]) -> None:
    """Writes tensors back to back, in the given order."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(tensor.data)],
        }
        offset += len(tensor.data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.writelines(tensor.data for tensor in tensors.values())


def official() -> tuple[dict[str, Any], dict[str, Raw]]:
    """Config and tensors of the tiny official checkpoint (FP8 + MXFP4, with an MTP module)."""
    return json.loads((OFFICIAL / "config.json").read_text()), read_shard(OFFICIAL / SINGLE)


def write(
    path: Path, config: Mapping[str, Any], tensors: Mapping[str, Raw], shards: int = 1
) -> Path:
    """Writes a checkpoint; with ``shards`` > 1 the tensors are dealt out like cards, with index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_shard(path / SINGLE, tensors)
        return path
    weight_map = {}
    for i in range(shards):
        file = shard_name(i, shards)
        part = dict(list(tensors.items())[i::shards])
        write_shard(path / file, part)
        weight_map |= dict.fromkeys(part, file)
    write_index(path, weight_map)
    return path


def shard_name(i: int, shards: int) -> str:
    """``model-00001-of-00003.safetensors`` for ``i`` = 0."""
    return f"model-{i + 1:05d}-of-{shards:05d}.safetensors"


def write_index(path: Path, weight_map: Mapping[str, Any]) -> None:
    """Writes the index alone."""
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def half(tensors: Mapping[str, Raw]) -> dict[str, Raw]:
    """The checkpoint with every number as ``F16``, a format that no preset names."""
    return {
        name: raw("F16", tensor.array(np.float32).astype(np.float16))
        if tensor.dtype == "F32"
        else tensor
        for name, tensor in unquantised(tensors, "F32").items()
    }


def unquantised(tensors: Mapping[str, Raw], dtype: str) -> dict[str, Raw]:
    """The checkpoint with every number as ``F32`` or ``BF16`` (exact values), scales gone."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith(".scale"):
            continue
        if tensor.dtype == "I64":
            out[name] = tensor
            continue
        value = decode(tensors, name).astype(np.float32)
        bits = value.view(np.uint32)
        if dtype == "BF16":
            bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        out[name] = raw(dtype, bits)
    return out


def decode(tensors: Mapping[str, Raw], name: str) -> np.ndarray:
    """Values of a tensor of an official checkpoint in FP64, scales applied (model.md 7.1)."""
    tensor = tensors[name]
    if tensor.dtype == "F32":
        return tensor.array(np.float32).astype(np.float64)
    if tensor.dtype == "BF16":
        return (tensor.array(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    scale_raw = tensors[name.removesuffix(".weight") + ".scale"]
    scale = np.exp2(scale_raw.array(np.uint8).astype(np.float64) - 127)
    if tensor.dtype == "F8_E4M3":
        value = e4m3(tensor.array(np.uint8))
        rows, cols = value.shape
        return value * scale.repeat(128, 0)[:rows].repeat(128, 1)[:, :cols]
    return e2m1(tensor.array(np.uint8)) * scale.repeat(32, 1)


def e4m3(code: np.ndarray) -> np.ndarray:
    """E4M3 bytes -> FP64."""
    code = code.astype(np.int64)
    exponent, mantissa = (code >> 3) & 15, code & 7
    value = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent - 10.0))
    value = np.where((code & 127) == 127, np.nan, value)
    return np.where(code >= 128, -value, value)


def e2m1(packed: np.ndarray) -> np.ndarray:
    """Bytes ``[..., n/2]`` of E2M1 pairs, low nibble first -> FP64 ``[..., n]``."""
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    return np.where(codes >= 8, -1.0, 1.0) * _E2M1[codes & 7]


def drop(tensors: Mapping[str, Raw], names: Iterable[str]) -> dict[str, Raw]:
    """Without some tensors."""
    gone = set(names)
    return {name: tensor for name, tensor in tensors.items() if name not in gone}
