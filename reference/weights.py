"""Official checkpoint bytes to FP32 weights (model.md section 7.1)."""

import numpy as np

from reference import formats

RawTensor = tuple[str, tuple[int, ...], np.ndarray]


def _plain(dtype: str, shape: tuple[int, ...], data: np.ndarray) -> np.ndarray:
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype == "F32":
        return data.view("<f4").reshape(shape)
    if dtype == "F16":
        return data.view("<f2").astype(np.float32).reshape(shape)
    if dtype == "I64":
        return data.view("<i8").astype(np.int32).reshape(shape)
    raise ValueError(
        f"dequantize_official: a tensor without scale must be BF16, F16, F32 or I64, got {dtype}"
    )


def dequantize_official(raw: dict[str, RawTensor]) -> dict[str, np.ndarray]:
    """Dequantise every tensor of an official checkpoint, exactly, and drop the scales.

    FP8: `E4M3[o, i] * scale[o // 128, i // 128]`. MXFP4: `E2M1[o, i] * scale[o, i // 32]`, low
    nibble first. Integers become int32, other floats FP32.

    Args:
        raw: Name -> (dtype as safetensors spells it, shape as stored, the bytes as 1-d uint8).

    Returns:
        Official name -> array; packed FP4 weights `[out, in / 2]` come out as `[out, in]`.
    """
    weights = {}
    for name, (dtype, shape, data) in raw.items():
        if name.endswith(".scale"):
            continue
        scale_name = name.removesuffix("weight") + "scale"
        if scale_name not in raw:
            weights[name] = _plain(dtype, shape, data)
            continue
        scale_dtype, scale_shape, scale_data = raw[scale_name]
        if scale_dtype != "F8_E8M0":
            raise ValueError(
                f"dequantize_official: {scale_name} must be F8_E8M0, got {scale_dtype}"
            )
        scale = formats.decode_ue8m0(scale_data).reshape(scale_shape)
        if dtype == "F8_E4M3":
            value = formats.decode_e4m3(data).reshape(shape)
            scale = scale.repeat(128, axis=0).repeat(128, axis=1)[: shape[0], : shape[1]]
        elif dtype == "I8":
            value = formats.decode_e2m1_packed(data.reshape(shape))
            scale = scale.repeat(32, axis=1)
        else:
            raise ValueError(
                f"dequantize_official: {name} has a scale and must be F8_E4M3 or I8, got {dtype}"
            )
        weights[name] = value * scale
    return weights
