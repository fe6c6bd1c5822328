"""The tiny official checkpoint in the formats of other publishers (model.md 7.3), by numpy."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.support import tiny
from tests.support.tiny import Raw, raw

EXPERT = re.compile(r"(layers\.\d+\.ffn\.experts\.\d+)\.(w[123])\.weight")
"""Weights of routed experts of the main layers, which NVFP4 checkpoints change."""

_RENAMED = {"weight": "weight_packed", "weight_scale_2": "weight_global_scale"}


def experts(tensors: Mapping[str, Raw]) -> list[str]:
    """``layers.0.ffn.experts.0`` and so on."""
    return list(dict.fromkeys(m[1] for name in tensors if (m := EXPERT.fullmatch(name))))


def exact_nvfp4(weight: Raw, scale: Raw, top: int) -> dict[str, Raw]:
    """MXFP4 -> NVFP4 by an exponent shift from ``top``, the largest exponent (model.md 9.3)."""
    block = np.exp2(scale.array(np.uint8).astype(np.float64) - 127 - top + 8)
    codes = {2.0**k: 8 * (k + 7) for k in range(-6, 9)} | {2.0**k: 2 ** (k + 9) for k in (-7, -8)}
    byte = np.vectorize(codes.__getitem__, otypes=[np.uint8])(block)
    return {
        "weight": raw("U8", weight.array(np.uint8)),
        "weight_scale": raw("F8_E4M3", byte.repeat(2, 1)),
        "weight_scale_2": raw("F32", np.asarray(2.0 ** (top - 8), np.float32)),
    }


def act_scale(module: str) -> np.float32:
    """A static activation scale of an expert's linear, the same for ``w1`` and ``w3``."""
    expert, weight = module.split(".")[-2:]
    return np.float32((2e-4 if weight == "w2" else 1e-3) * (1 + int(expert)))


def take_act_scales(params: Any) -> dict[tuple[str, str], Any]:
    """Takes the static activation scales out of a params tree: (layer, leaf) -> scales."""
    return {
        (layer, leaf): found["ffn"]["experts"].pop(leaf)
        for layer, found in params.items()
        if layer.startswith("layers_")
        for leaf in ("up_act_scale", "down_act_scale")
        if leaf in found["ffn"]["experts"]
    }


def modelopt(static: bool = True) -> tuple[dict[str, Any], dict[str, Raw]]:
    """As Model-Optimizer writes it: the same values as the official one, bit by bit."""
    config, tensors = tiny.official()
    out = dict(tensors)
    for expert in experts(tensors):
        scale = {w: tensors[f"{expert}.{w}.scale"] for w in ("w1", "w2", "w3")}
        top = {w: int(s.array(np.uint8).max()) - 127 for w, s in scale.items()}
        top["w1"] = top["w3"] = max(top["w1"], top["w3"])
        for w in scale:
            del out[f"{expert}.{w}.scale"]
            found = exact_nvfp4(tensors[f"{expert}.{w}.weight"], scale[w], top[w])
            if static:
                found["input_scale"] = raw("F32", np.asarray(act_scale(f"{expert}.{w}")))
            out.update({f"{expert}.{w}.{leaf}": tensor for leaf, tensor in found.items()})
    config = copy.deepcopy(config)
    config["quantization_config"] |= {
        "moe_quant_algo": "NVFP4",
        "quant_algo": "MIXED_PRECISION",
        "group_size": 16,
        "producer": {"name": "modelopt", "version": "0"},
        "ignore": ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"],
        "quantized_layers": {"layers.0.ffn.experts": {"quant_algo": "NVFP4", "group_size": 16}},
    }
    return config, out


def any_nvfp4(tensors: Mapping[str, Raw], seed: int = 0) -> dict[str, Raw]:
    """With block scales and global scales of any size, ``w1``'s and ``w3``'s apart."""
    rng = np.random.default_rng(seed)
    out = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(".weight_scale") and tensor.dtype == "F8_E4M3":
            byte = rng.integers(8, 0x7F, tensor.shape, dtype=np.uint8)
            out[name] = raw("F8_E4M3", byte)
        elif name.endswith(".weight_scale_2"):
            out[name] = raw("F32", np.asarray(rng.uniform(1e-3, 2e-3), np.float32))
    return out


def compressed_tensors(static: bool = True) -> tuple[dict[str, Any], dict[str, Raw]]:
    """As compressed-tensors writes it: reciprocals, FP8 scales in BF16, a BF16 shared expert.

    The global scales are those of `any_nvfp4`, so that inverting rounds.
    """
    config, tensors = modelopt()
    out: dict[str, Raw] = {}
    wide = tiny.unquantised(tiny.official()[1], "BF16")
    for name, tensor in any_nvfp4(tensors).items():
        module, _, leaf = name.rpartition(".")
        if name.startswith("mtp."):
            continue  # such checkpoints have none, or one in BF16
        if ".ffn.experts." in name:
            new = {"weight": "weight_packed", "weight_scale_2": "weight_global_scale"}.get(
                leaf, leaf
            )
            if leaf == "weight_scale_2":
                tensor = raw("F32", (1 / tensor.array(np.float32)).reshape(1))
            elif leaf == "input_scale":
                if not static:
                    continue
                new = "input_global_scale"
                tensor = raw("F32", (1 / tensor.array(np.float32)).reshape(1))
            out[f"{module}.{new}"] = tensor
        elif ".shared_experts." in name:
            if leaf == "weight":
                out[name] = wide[name]
        elif leaf == "scale":
            power = tensor.array(np.uint8).astype(np.uint16) << 7  # BF16 bits of 2^(byte - 127)
            out[f"{module}.weight_scale"] = raw("BF16", power)
        else:
            out[name] = tensor
    config["num_nextn_predict_layers"] = 0
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {"group_0": {"format": "nvfp4-pack-quantized"}},
        "ignore": ["head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
    }
    return config, out


def base(scale: str, power_of_two: bool = True) -> tuple[dict[str, Any], dict[str, Raw]]:
    """As the ``-Base`` releases: experts in FP8, all FP8 scales as ``F32`` or ``F8_E8M0``."""
    config, tensors = tiny.official()
    rng = np.random.default_rng(0)
    out = dict(tensors)
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and tensor.dtype == "I8":
            rows, cols = tensor.shape[0], 2 * tensor.shape[1]
            code = rng.integers(0, 256, (rows, cols), dtype=np.uint8)
            out[name] = raw("F8_E4M3", np.where(code & 0x7F == 0x7F, 0x3A, code).astype(np.uint8))
            tiles = (-(-rows // 128), -(-cols // 128))
            exponent = rng.integers(115, 122, tiles, dtype=np.uint8)
            out[f"{module}.scale"] = raw("F8_E8M0", exponent)
    if scale == "F32":
        for name, tensor in out.items():
            if tensor.dtype == "F8_E8M0":
                value = np.exp2(tensor.array(np.uint8).astype(np.float32) - 127)
                if not power_of_two:
                    value = value * np.float32(1.3)
                out[name] = raw("F32", value.astype(np.float32))
    return config | {"expert_dtype": "fp8"}, out


def decode_nvfp4(tensors: Mapping[str, Raw], module: str) -> np.ndarray:
    """Values of a linear in either convention, in FP64 but for the FP32 global scale."""
    if f"{module}.weight_packed" in tensors:
        stored = tensors[f"{module}.weight_global_scale"].array(np.float32).reshape(())
        weight, factor = tensors[f"{module}.weight_packed"], np.float32(1) / stored
    else:
        weight = tensors[f"{module}.weight"]
        factor = tensors[f"{module}.weight_scale_2"].array(np.float32).reshape(())
    block = tiny.e4m3(tensors[f"{module}.weight_scale"].array(np.uint8))
    return tiny.e2m1(weight.array(np.uint8)) * block.repeat(16, 1) * np.float64(factor)
