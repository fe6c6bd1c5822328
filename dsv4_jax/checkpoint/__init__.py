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

    Names and dtypes of the tensors tell the number formats: FP8 and MXFP4 of the release, NVFP4 as
    Model-Optimizer, compressed-tensors or ``dsv4 convert`` write it, FP8 throughout (``-Base``,
    scales in E8M0, FP32 or BF16), BF16 and FP32. Routed experts in ``nvfp4_w4a4`` use static
    activation scales, other linears do not.

    Prints to stderr which preset was chosen when ``precision`` is ``None``, what conversions did to
    the weights, which static activation scales are used and which are not, and
    ``experts_power_of_two`` of the model's precision where it was found out.

    Args:
        path: directory with ``config.json`` and safetensors, in any spelling that `formats` knows.
        precision: number formats, a preset's name, or ``None`` for every linear as it is stored.
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
    from dsv4_jax.checkpoint.formats import detect
    from dsv4_jax.checkpoint.load import load_params_from
    from dsv4_jax.checkpoint.manifest import check_converted
    from dsv4_jax.checkpoint.read import Reader, read_config
    from dsv4_jax.config import ModelConfig
    from dsv4_jax.precision import Precision

    if sharding is not None:
        raise ValueError(f"from_checkpoint: sharding: only None works for now, got {sharding!r}")
    if isinstance(precision, str):
        precision = Precision.preset(precision)
    source = os.fspath(path)
    check_converted(path)
    data = read_config(path)
    config = ModelConfig.from_hf(data, source=os.path.join(source, "config.json"))
    with Reader(path) as reader:
        if precision is None:
            found = detect(reader.tensors, source=source)
            changes = "".join(f", {field}={form}" for field, form in found.changes.items())
            print(
                f'dsv4: precision "{found.preset}"{changes}: {source} holds {found.holds}',
                file=sys.stderr,
            )
            precision = found.precision
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
            data=data,
        )
    from dsv4_jax.model import DeepseekV4

    return DeepseekV4(config=config, precision=precision, mtp=mtp), params
