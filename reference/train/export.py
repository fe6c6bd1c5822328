"""The trained weights as a checkpoint in the official format (model.md section 7.1)."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import TensorSpec, serialize_file

from dsv4_jax.quant import fp8, mxfp4
from reference.train.config import kind, shapes
from reference.train.data import BOS, SPECIAL_TOKENS
from reference.train.run import read_weights

# Bytes of tensors, in the release's spelling of the dtype.
_DTYPES = {"bf16": "bfloat16", "f32": "float32", "i64": "int64"}
GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def unstacked(weights: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Official names: `layers.N.ffn.experts.w1 [e, ...]` -> `layers.N.ffn.experts.E.w1.weight`."""
    for name, w in sorted(weights.items()):
        if ".ffn.experts." not in name:
            yield name, w
            continue
        prefix, which = name.rsplit(".", 1)
        for e, part in enumerate(w):
            yield f"{prefix}.{e}.{which}.weight", part


def official_tensors(
    config: dict[str, Any], weights: dict[str, np.ndarray], *, master: bool = False
) -> dict[str, tuple[str, np.ndarray]]:
    """Every tensor of the release with its dtype; with `master` in FP32 and without scales.

    Raises:
        ValueError: names or shapes differ from what the config says.
    """
    want = shapes(config)
    found = {name: w.shape for name, w in weights.items()}
    wrong = {name for name in {*want, *found} if found.get(name) != want.get(name)}
    if wrong:
        raise ValueError(f"export: missing, unexpected or of another shape: {sorted(wrong)[:5]}")
    out: dict[str, tuple[str, np.ndarray]] = {}
    for name, w in unstacked(weights):
        stored = kind(config, name)
        if master and stored != "i64":
            stored = "f32"
        scale_name = name.removesuffix("weight") + "scale"
        if stored == "fp8":
            q = fp8.quantize_weight(jnp.asarray(w))
            out[name] = ("float8_e4m3fn", np.asarray(q.code).view(np.uint8))
            out[scale_name] = ("float8_e8m0fnu", np.asarray(q.scale).view(np.uint8))
        elif stored == "mxfp4":
            q = mxfp4.quantize(jnp.asarray(w))
            codes = np.asarray(q.code).view(np.uint8)  # one code per byte on the host
            out[name] = ("int8", (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8))
            out[scale_name] = ("float8_e8m0fnu", np.asarray(q.scale).view(np.uint8))
        elif stored == "bf16":
            out[name] = (_DTYPES[stored], np.asarray(jnp.asarray(w, jnp.bfloat16)).view(np.uint16))
        else:
            dtype = np.int64 if stored == "i64" else np.float32
            out[name] = (_DTYPES[stored], w.astype(dtype))
    return out


def export(
    config: dict[str, Any], run: Path, data: Path, out: Path, *, master: bool = False
) -> int:
    """Writes the checkpoint directory; returns the bytes of `model.safetensors`.

    Args:
        config: Official config, written as `config.json`.
        run: Folder of `master-N.safetensors`.
        data: Folder of `tokenizer.json`.
        out: Folder to write into.
        master: Write the FP32 weights instead, for comparison.
    """
    out.mkdir(parents=True, exist_ok=True)
    arrays = {
        name: (dtype, np.ascontiguousarray(array))  # referred to by address below
        for name, (dtype, array) in official_tensors(
            config, read_weights(run), master=master
        ).items()
    }
    tensors = {
        name: TensorSpec(
            dtype=dtype,
            shape=list(array.shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, (dtype, array) in arrays.items()
    }
    path = out / "model.safetensors"
    serialize_file(tensors, path, {"format": "pt"})
    if master:
        config = {
            k: v for k, v in config.items() if k not in ("quantization_config", "expert_dtype")
        }
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    text = json.dumps(GENERATION, indent=1) + "\n"
    (out / "generation_config.json").write_text(text, encoding="utf-8")
    settings = {"add_bos_token": True, "bos_token": SPECIAL_TOKENS[BOS]}
    text = json.dumps(settings, indent=1, ensure_ascii=False) + "\n"
    (out / "tokenizer_config.json").write_text(text, encoding="utf-8")
    shutil.copyfile(data / "tokenizer.json", out / "tokenizer.json")
    return path.stat().st_size
