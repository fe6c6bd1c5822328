"""The memory that weights and cache take: computed from shapes, compared with what there is.

Nothing here allocates; only `available` asks a device.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax

from dsv4_jax.cache import init_cache
from dsv4_jax.checkpoint.errors import CheckpointError
from dsv4_jax.checkpoint.names import (
    Parameter,
    expected_tree,
    leaves,
    parameters,
    target_format,
    tree_bytes,
)
from dsv4_jax.checkpoint.place import STAGING_BYTES
from dsv4_jax.checkpoint.scan import SLAB_BYTES
from dsv4_jax.config import ModelConfig
from dsv4_jax.env import devices
from dsv4_jax.precision import PRESETS, Precision

__all__ = [
    "DECODED_BYTES",
    "OPTIONS",
    "Need",
    "OutOfMemory",
    "Plan",
    "available",
    "check",
    "exhausted",
    "need",
    "readable",
]

OPTIONS: Final[Mapping[str, str]] = {
    "max_len": "max_len",
    "batch_size": "batch_size",
    "precision": "precision",
    "mtp": "mtp",
}
"""What lowers the need -> what the caller calls it; what the caller lacks is left out."""

DECODED_BYTES: Final = 4 * SLAB_BYTES
"""Most bytes of FP32 values at a time when experts are converted."""

_CHUNK: Final = 256

_STORED_BITS: Final = {"bfloat16": 16, "float16": 16, "int64": 64, "mxfp4": 4, "nvfp4": 4}
"""Per value; ``fp8`` with any scales has 8, ``float32`` 32."""


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on the device.

    Attributes:
        weights: the params tree.
        cache: the cache.
        staging: what loading takes besides the tree, and gives back before there is a cache.
    """

    weights: int
    cache: int
    staging: int

    @property
    def total(self) -> int:
        """The most at any time; what a step computes with comes on top."""
        return self.weights + max(self.cache, self.staging)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model to be loaded and the cache it is to have.

    Attributes:
        config: the architecture.
        precision: the number formats.
        mtp: with the multi-token-prediction module.
        batch_size: rows of the cache.
        max_len: positions of a row; ``None``: no cache.
        layer_copies: how often each layer's part of the cache is held; empty: once.
        stored: parameter name -> format in the files, as ``Resolved.stored``; empty: the same as
            in the tree.
        act_scales: which experts have static activation scales, as ``Resolved.act_scales``.
    """

    config: ModelConfig
    precision: Precision
    mtp: bool = False
    batch_size: int = 1
    max_len: int | None = None
    layer_copies: tuple[int, ...] = ()
    stored: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    act_scales: frozenset[str] = frozenset()

    def cache_bytes(self) -> int:
        """Bytes of the cache.

        Raises:
            ValueError: ``batch_size`` or ``max_len`` is out of range.
        """
        if self.max_len is None:
            return 0
        make = functools.partial(
            init_cache, self.config, self.precision, self.batch_size, self.max_len, mtp=self.mtp
        )
        cache = jax.eval_shape(make)
        copies = self.layer_copies or (1,) * len(cache.layers)
        more = ((n - 1) * tree_bytes(layer) for n, layer in zip(copies, cache.layers, strict=True))
        return tree_bytes(cache) + sum(more)

    def need(self) -> Need:
        """Weights, cache and staging."""
        wanted = parameters(self.config, self.mtp)
        return Need(
            weights=tree_bytes(
                expected_tree(self.config, self.precision, self.mtp, self.act_scales)
            ),
            cache=self.cache_bytes(),
            staging=max(self._staging(parameter) for parameter in wanted),
        )

    def _staging(self, parameter: Parameter) -> int:
        """Most bytes beside the tree while a parameter is loaded (load.py)."""
        target = target_format(parameter, self.precision)
        stored = self.stored.get(parameter.name, target)
        found = {path[-1]: leaf for path, leaf in leaves(parameter, self.precision).items()}
        # Packed values get their dtype in a copy.
        packed = tree_bytes(found["weight"]) if target in ("mxfp4", "nvfp4") else 0
        if stored == target:
            return packed + min(tree_bytes(found), STAGING_BYTES)
        values = math.prod(parameter.shape) * max(parameter.experts, 1)
        bits = _STORED_BITS.get(stored, 8 if stored.startswith("fp8") else 32)
        raw, decoded = values * bits // 8, 4 * values
        if parameter.experts:
            raw, decoded = min(raw, STAGING_BYTES), min(decoded, DECODED_BYTES)
        return packed + raw + 2 * decoded


def need(plans: Sequence[Plan]) -> Need:
    """What several models take that are loaded one after the other and held together."""
    found = [plan.need() for plan in plans]
    return Need(
        sum(each.weights for each in found),
        sum(each.cache for each in found),
        max(each.staging for each in found),
    )


def readable(count: int) -> str:
    """Bytes for people."""
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):.2f} {unit}"
    return f"{count / 1024:.1f} KiB"


class OutOfMemory(CheckpointError, MemoryError):
    """Weights and cache do not fit the device.

    Attributes:
        need: what they take.
        have: bytes that were free; ``None``: unknown.
    """

    def __init__(
        self, plans: Sequence[Plan], have: int | None, source: str, reason: str = ""
    ) -> None:
        self.need = need(plans)
        self.have = have
        # Below 0: there seemed to be enough.
        self._limit = -1 if have is None or self.need.total <= have else have
        self._plans, self._source, self._reason = list(plans), source, reason
        super().__init__(self.explain())

    def explain(self, options: Mapping[str, str] = OPTIONS) -> str:
        """The message, with the caller's names for what lowers the need."""
        plan, found = self._plans[0], self.need
        parts = [f"weights {readable(found.weights)}"]
        if plan.max_len is not None:
            size = f"batch size {plan.batch_size}, {plan.max_len} positions"
            parts.append(f"cache {readable(found.cache)} ({size})")
        if found.staging > found.cache:
            parts.append(f"{readable(found.staging)} more while loading")
        have = "" if self.have is None else f", have {readable(self.have)}"
        text = (
            f"{self._source}: {self._reason}need {readable(found.total)}: {', '.join(parts)}{have}"
        )
        return f"{text}; {self._advice(options)}"

    def _advice(self, options: Mapping[str, str]) -> str:
        less = {
            "max_len": self._less_max_len,
            "batch_size": self._less_batch_size,
            "precision": self._less_precision,
            "mtp": self._less_mtp,
        }
        ways = [way for field, option in options.items() if (way := less[field](option))]
        return ", or ".join(ways) or "no setting makes it fit this device"

    def _fits(self, changed: Need) -> bool:
        """Whether that would do; where there seemed to be enough, whether it is less."""
        return changed.total < self.need.total if self._limit < 0 else changed.total <= self._limit

    def _lower(self, field: str, now: int, option: str) -> str:
        """The largest smaller value of a field of the plans that helps; '' without one."""

        def fits(value: int) -> bool:
            plans = (dataclasses.replace(plan, **{field: value}) for plan in self._plans)
            cache = sum(plan.cache_bytes() for plan in plans)
            return self._fits(dataclasses.replace(self.need, cache=cache))

        if now <= 1 or not fits(1):
            return ""
        if self._limit < 0:
            return f"lower {option}"
        most = _largest(now - 1, fits)
        if field == "max_len":  # lengths are rounded up to chunks (evaluate, compare)
            most = most // _CHUNK * _CHUNK or 1 << (most.bit_length() - 1)
        return f"lower {option} to {most} or less"

    def _less_max_len(self, option: str) -> str:
        return self._lower("max_len", self._plans[0].max_len or 1, option)

    def _less_batch_size(self, option: str) -> str:
        plan = self._plans[0]
        return "" if plan.max_len is None else self._lower("batch_size", plan.batch_size, option)

    def _less_precision(self, option: str) -> str:
        if len(self._plans) > 1:
            return ""
        plan = self._plans[0]
        fitting: list[str] = []
        for name, preset in PRESETS.items():
            with contextlib.suppress(ValueError):  # a width that the format does not take
                other = dataclasses.replace(plan, precision=preset)
                if preset != plan.precision and self._fits(other.need()):
                    fitting.append(name)
        return f"choose {option} {' or '.join(fitting)}" if fitting else ""

    def _less_mtp(self, option: str) -> str:
        plans = [dataclasses.replace(plan, mtp=False) for plan in self._plans]
        helps = any(plan.mtp for plan in self._plans) and self._fits(need(plans))
        return f"leave out {option}" if helps else ""


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest of 1 .. ``most`` that fits; 1 does, and below one that does all do."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def available() -> int | None:
    """Bytes that can still be allocated on the default device; ``None``: it does not say.

    On the CPU: the memory that the system can give without swapping.

    Raises:
        RuntimeError: there is no device.
    """
    chosen: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(chosen, str):
        chosen = jax.devices(chosen)[0]
    device = devices()[0] if chosen is None else chosen
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return _host_available() if device.platform == "cpu" else None


def _host_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except OSError:
        pass  # not Linux
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def check(plans: Sequence[Plan], *, source: str) -> int | None:
    """Refuses what cannot fit the default device.

    Returns:
        What `available` said.

    Raises:
        OutOfMemory: need, have, and what would lower the need.
        ValueError: a size of the cache is out of range.
    """
    have = available()
    if have is not None and need(plans).total > have:
        raise OutOfMemory(plans, have, source)
    return have


def exhausted(
    error: BaseException, plans: Sequence[Plan], *, source: str, have: int | None = None
) -> OutOfMemory | None:
    """What to raise where a device ran out of memory after all; ``None``: another error.

    Args:
        error: as caught.
        plans: as given to `check`.
        source: the checkpoint's name.
        have: what `check` returned.
    """
    if not isinstance(error, MemoryError) and not str(error).startswith("RESOURCE_EXHAUSTED"):
        return None
    return OutOfMemory(plans, have, source, "the device ran out of memory; ")
