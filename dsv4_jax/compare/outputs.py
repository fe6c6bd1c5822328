"""The outputs of all modules of one call, as rows that two models can be compared by."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from dsv4_jax.cache import LayerCache
from dsv4_jax.model.compressor import Compressor
from dsv4_jax.model.hc import HcHead, HyperConnection
from dsv4_jax.model.linear import Weight
from dsv4_jax.model.moe import Gate, Leaves
from dsv4_jax.ops._blocks import gather_rows, view_rows
from dsv4_jax.quant import fp8
from dsv4_jax.quant.fp8 import Fp8
from dsv4_jax.quant.kv import KvRows, index_dequant, kv_dequant
from dsv4_jax.typing import Array

__all__ = ["Outputs", "Recorder"]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "rows"], meta_fields=["names"]
)
@dataclasses.dataclass(frozen=True)
class Outputs:
    """Outputs of modules: names, values ``[rows, width]`` and which rows count."""

    names: tuple[str, ...]
    values: tuple[Array, ...]
    rows: tuple[Array, ...]


class Recorder:
    """Keeps every module's output of one `apply`; parameters that modules hand out are not kept."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._modules: list[tuple[tuple[str, ...], type[nn.Module]]] = []

    def keep(self, module: nn.Module, method: str) -> bool:
        """The filter for ``capture_intermediates``; notes the order of the calls."""
        kept = method == "__call__" and not isinstance(module, (Weight, Leaves))
        if kept and module.path:
            self._modules.append((module.path, type(module)))
        return kept and bool(module.path)

    def outputs(self, kept: Mapping[str, Any], valid: Array) -> Outputs:
        """The kept outputs as rows; ``valid [t]`` are the real tokens of the only sequence."""
        names: list[str] = []
        values: list[Array] = []
        rows: list[Array] = []

        def add(name: str, value: Array, real: Array) -> None:
            names.append(name)
            values.append(value.reshape(real.shape[0], -1))
            rows.append(real)

        found = {path: _output(kept, path) for path, _ in self._modules}
        for path, module in self._modules:
            name, value = "/".join(path), found[path]
            if issubclass(module, Compressor):  # an entry per window that closes
                _, windows = value
                add(name, _entries(found, path, windows), windows.reshape(-1) >= 0)
            elif issubclass(module, HyperConnection):
                for part in ("x", "post", "comb"):
                    add(f"{name}:{part}", getattr(value, part), valid)
            elif issubclass(module, HcHead):
                add(name, value[1], valid)
            elif issubclass(module, Gate):
                picks, weights = value
                add(f"{name}:picks", picks, valid)
                token = jnp.arange(picks.shape[0])[:, None]
                spread = jnp.zeros((picks.shape[0], self._experts), jnp.float32)
                add(f"{name}:weights", spread.at[token, picks].set(weights, mode="drop"), valid)
            elif isinstance(value, Fp8):
                add(name, fp8.dequantize_act(value, fp8.ACT_BLOCK), valid)
            elif name.endswith("indexer"):
                if value is not None:
                    add(f"{name}:picks", value, valid)
            else:
                add(name, value[0] if isinstance(value, tuple) else value, valid)
        return Outputs(tuple(names), tuple(values), tuple(rows))


def _output(kept: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for name in path:
        kept = kept[name]
    return kept["__call__"][0]


def _entries(found: Mapping[tuple[str, ...], Any], path: tuple[str, ...], windows: Array) -> Array:
    """Values of a compressor's entries, out of the cache that the attention around it returns."""
    (cache,) = (
        value[1]
        for outer, value in found.items()
        if path[: len(outer)] == outer
        and isinstance(value, tuple)
        and isinstance(value[-1], LayerCache)
    )
    pool = cache.index if path[-2:] == ("indexer", "compressor") else cache.pool
    rows = gather_rows(view_rows(pool), pool, windows[:, None])
    return kv_dequant(rows, jnp.float32) if isinstance(rows, KvRows) else index_dequant(rows)
