"""Checkpoints: names, files, checks, conversions, placement.

The submodules are imported where they are used: ``config.py`` needs only the exception, and they
need ``config.py``.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4_jax.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from dsv4_jax.checkpoint.load import Progress
    from dsv4_jax.model import DeepseekV4
    from dsv4_jax.precision import Precision
    from dsv4_jax.typing import Params

__all__ = ["CheckpointError", "bundled_checkpoint", "from_checkpoint"]


def bundled_checkpoint() -> Path:
    """Directory of the small model that comes with the package, for ``from_checkpoint``.

    Its ``README.md`` says what it was trained on and what it can do.

    Raises:
        CheckpointError: this installation lacks the files.
    """
    # Resolved: Bazel and uv install links, which a checkpoint must not consist of.
    path = (Path(__file__).parents[1] / "data" / "stdlib" / "config.json").resolve().parent
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: this installation lacks the bundled model; install the package again, or "
            "name another checkpoint"
        )
    return path


def from_checkpoint(
    path: str | os.PathLike[str],
    *,
    precision: "Precision | str | None" = None,
    sharding: Any = None,
    mtp: bool = False,
    progress: "Progress" = None,
    verify: bool = False,
    batch_size: int = 1,
    max_len: int | None = None,
) -> "tuple[DeepseekV4, Params]":
    """Model and params of a checkpoint directory (model.md section 7).

    Prints to stderr which preset was chosen when ``precision`` is ``None``, what conversions did to
    the weights, and ``experts_power_of_two`` of the model's precision where it was found out.

    Args:
        path: directory with ``config.json`` and safetensors, official or from transformers.
        precision: number formats, a preset's name, or ``None`` for the one that fits the files.
        sharding: only ``None`` works for now.
        mtp: also load the multi-token-prediction module.
        progress: progress bar on stderr: ``True``, ``False``, ``None`` (on a terminal), or a
            callable taking (bytes done, bytes in total).
        verify: look for NaN and Inf in weights too; bad scales are always found.
        batch_size: rows of the cache that must fit the device beside the weights.
        max_len: its positions; ``None``: only the weights must fit. What does not is refused
            before anything is read; the cache is made by ``model.init_cache`` as ever.

    Raises:
        CheckpointError: the checkpoint is malformed, unsupported, or does not fit its config, or
            ``experts_power_of_two`` is ``True`` and not so.
        OutOfMemory: weights and cache do not fit the device (a ``CheckpointError`` too).
        ValueError: ``sharding`` is not ``None``; no such preset; a width does not fit a format; no
            cache can have these sizes.
    """
    from dsv4_jax.checkpoint.load import load_params_from
    from dsv4_jax.checkpoint.read import Reader, read_config
    from dsv4_jax.checkpoint.validate import detect_precision
    from dsv4_jax.config import ModelConfig
    from dsv4_jax.precision import Precision

    if sharding is not None:
        raise ValueError(f"from_checkpoint: sharding: only None works for now, got {sharding!r}")
    if isinstance(precision, str):
        precision = Precision.preset(precision)
    source = os.fspath(path)
    config = ModelConfig.from_hf(read_config(path), source=os.path.join(source, "config.json"))
    with Reader(path) as reader:
        if precision is None:
            preset = detect_precision(reader.tensors, source=source)
            why = {
                "official": "FP8 linears and MXFP4 experts",
                "bfloat16": "unquantised BF16 weights",
                "float32": "unquantised FP32 weights",
            }[preset]
            print(f'dsv4: precision "{preset}": {source} holds {why}', file=sys.stderr)
            precision = Precision.preset(preset)
        params, precision = load_params_from(
            reader,
            config,
            precision,
            mtp=mtp,
            progress=progress,
            source=source,
            verify=verify,
            batch_size=batch_size,
            max_len=max_len,
        )
    from dsv4_jax.model import DeepseekV4

    return DeepseekV4(config=config, precision=precision, mtp=mtp), params
