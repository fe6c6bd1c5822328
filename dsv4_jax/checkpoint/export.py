"""What a converted checkpoint looks like to others: names, dtypes and config.

Official names. NVFP4 as Model-Optimizer writes it, without ``input_scale``: activation scales are
then per token (model.md 7.3, 9.2). Those of a source are dropped, with a line.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Final

from dsv4_jax.checkpoint.names import Parameter, target_format
from dsv4_jax.checkpoint.write import Output
from dsv4_jax.config import QUANTIZATION
from dsv4_jax.precision import Precision
from dsv4_jax.version import __version__

__all__ = ["outputs_of", "quantizer_config", "target_config"]

_FLOATS: Final = {"float32": "F32", "bfloat16": "BF16"}


def outputs_of(parameter: Parameter, name: str, target: str) -> list[Output]:
    """Tensors of one parameter (of one expert), in the order in which they are written."""
    if target == "int32":  # the hash table keeps the type that the release has
        return [Output(name, "I64", parameter.shape)]
    weight = f"{name}.weight" if parameter.is_linear else name
    if target in _FLOATS:
        return [Output(weight, _FLOATS[target], parameter.shape)]
    rows, cols = parameter.shape
    if target == "fp8":
        tiles = (-(-rows // 128), -(-cols // 128))
        scale = Output(f"{name}.scale", "F8_E8M0", tiles)
        return [Output(weight, "F8_E4M3", (rows, cols)), scale]
    if target == "mxfp4":
        scale = Output(f"{name}.scale", "F8_E8M0", (rows, cols // 32))
        return [Output(weight, "I8", (rows, cols // 2)), scale]
    return [
        Output(weight, "U8", (rows, cols // 2)),
        Output(f"{weight}_scale", "F8_E4M3", (rows, cols // 16)),
        Output(f"{weight}_scale_2", "F32", ()),
    ]


def _nvfp4_modules(parameters: Iterable[Parameter], precision: Precision) -> list[str]:
    """Modules of NVFP4 weights, the experts of a layer as one."""
    found = (
        p.name.partition(".{e}")[0]
        for p in parameters
        if p.is_linear and target_format(p, precision) == "nvfp4"
    )
    return list(dict.fromkeys(found))


def quantizer_config(
    parameters: Iterable[Parameter], precision: Precision
) -> dict[str, Any] | None:
    """Contents of ``hf_quant_config.json``; ``None``: nothing is in NVFP4."""
    parameters = list(parameters)
    modules = _nvfp4_modules(parameters, precision)
    if not modules:
        return None
    linears = {p.name.partition(".{e}")[0] for p in parameters if p.is_linear}
    layers = {module: {"quant_algo": "NVFP4", "group_size": 16} for module in modules}
    patterns = {
        "*.attn.*": any(".attn." in name for name in linears.intersection(modules)),
        "*.ffn.shared_experts.*": any(".shared_experts." in name for name in modules),
        "head": False,
        "mtp.*": any(name.startswith("mtp.") for name in modules),
    }
    return {
        "producer": {"name": "dsv4_jax", "version": __version__},
        "quantization": {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": [pattern for pattern, used in patterns.items() if not used],
            "quantized_layers": layers,
        },
    }


def target_config(
    data: Mapping[str, Any], parameters: Iterable[Parameter], precision: Precision
) -> dict[str, Any]:
    """``config.json`` of the result: that of the source, with the number formats of the result."""
    parameters = list(parameters)
    out = copy.deepcopy(dict(data))
    forms = {
        p.rule: target_format(p, precision)
        for p in parameters
        if p.is_linear and not p.name.startswith("mtp.")
    }
    for field in ("quantization_config", "expert_dtype"):
        out.pop(field, None)
    if not {"fp8", "mxfp4", "nvfp4"}.intersection(forms.values()):
        dtype = "dtype" if "dtype" in out and "torch_dtype" not in out else "torch_dtype"
        return out | {dtype: precision.dense}
    section = copy.deepcopy(QUANTIZATION)
    quantizer = quantizer_config(parameters, precision)
    if quantizer is not None:
        found = quantizer["quantization"]
        section |= {
            "quant_algo": found["quant_algo"],
            "group_size": found["group_size"],
            "ignore": found["exclude_modules"],
            "quantized_layers": found["quantized_layers"],
            "producer": quantizer["producer"],
        }
        if forms["experts"] == "nvfp4":
            section["moe_quant_algo"] = "NVFP4"
    expert_dtype = {"mxfp4": "fp4", "nvfp4": "fp4", "fp8": "fp8"}.get(forms["experts"], "bf16")
    return out | {"expert_dtype": expert_dtype, "quantization_config": section}
