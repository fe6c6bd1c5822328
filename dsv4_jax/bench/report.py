"""A whole measurement of one model: what `dsv4 bench` and ``python -m dsv4_jax.bench`` print.

How long a layer takes comes from one of two places, which ``decode.layers_from`` names. ``models``:
models of one layer of each kind and of none are timed by the same loop, on weights of the whole
model; a layer is the difference. ``profile``: the launches of the whole model in a profile, without
the idle time between them.
"""

import bisect
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, Final

import jax

from dsv4_jax.bench.ceilings import Ceilings, measured_ceilings
from dsv4_jax.bench.floor import (
    GROUPS,
    OUTSIDE,
    cut,
    decode_bytes,
    prefill_work,
)
from dsv4_jax.bench.measure import (
    WARM_CALLS,
    Loop,
    profiled,
    profiled_prefill,
    time_decode,
    time_prefill,
)
from dsv4_jax.bench.profile import Launch, layer_rows
from dsv4_jax.bench.weights import random_params
from dsv4_jax.checkpoint.memory import Need, Plan, available
from dsv4_jax.config import LayerKind, ModelConfig
from dsv4_jax.generate import default_chunk
from dsv4_jax.loop import STEPS
from dsv4_jax.precision import Precision
from dsv4_jax.version import __version__

__all__ = ["BUNDLED", "Settings", "run"]

BUNDLED: Final = "bundled"
_RELEASES: Final = {"flash": ModelConfig.flash, "pro": ModelConfig.pro}
_PROFILED_CALLS: Final = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the fields are the options of ``dsv4 bench``.

    Attributes:
        model: ``flash``, ``pro``, ``bundled``, or a directory with a ``config.json``. Weights are
            random in any case.
        layers: only the first so many.
        batch: sequences.
        context: tokens that each holds before the first step; default: 4096, or what fits.
        precision: a preset; default: that of the model's files, ``official`` without any.
        prefill: tokens of a prompt to be timed; 0: none.
        chunk: tokens of a row in a call of the prefill; default: as `prefill` does it.
        tokens: steps to be timed, a multiple of `STEPS` at least.
        profile: whether to profile the launches of a step and of a prefill's first call (on a GPU).

    Raises:
        ValueError: a number is out of range.
    """

    model: str = BUNDLED
    layers: int | None = None
    batch: int = 1
    context: int | None = None
    precision: str | None = None
    prefill: int = 0
    chunk: int | None = None
    tokens: int = 64
    profile: bool = False

    def __post_init__(self) -> None:
        least = {"layers": 1, "batch": 1, "context": 0, "prefill": 0, "chunk": 1, "tokens": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"bench: {name} must be >= {minimum}, got {value}")

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a row in a call of the prefill."""
        return self.chunk or default_chunk(self.batch)

    @property
    def calls(self) -> int:
        """Of the loop, timed."""
        return -(-self.tokens // STEPS)


def _model(settings: Settings) -> tuple[ModelConfig, str]:
    """Configuration, all layers, and the preset's name."""
    if settings.model in _RELEASES:
        return _RELEASES[settings.model](), settings.precision or "official"
    from dsv4_jax.checkpoint import bundled_checkpoint
    from dsv4_jax.checkpoint.formats import detect
    from dsv4_jax.checkpoint.read import Reader, read_config

    path = bundled_checkpoint() if settings.model == BUNDLED else Path(settings.model)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"bench: model must be one of {[*_RELEASES, BUNDLED]} or a directory with a "
            f"config.json, got {settings.model!r}"
        )
    config = ModelConfig.from_hf(read_config(path), source=str(path / "config.json"))
    if settings.precision is not None:
        return config, settings.precision
    if not any(path.glob("*.safetensors")):
        return config, "official"
    with Reader(path) as reader:
        return config, detect(reader.tensors, source=str(path)).preset


def _is_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _check_memory(need: Need, config: ModelConfig, plan: Plan) -> None:
    """Before anything is made.

    Raises:
        ValueError: weights and cache alone do not fit; says how many layers would.
    """
    limit = available()
    if limit is None or need.weights + need.cache <= limit:
        return

    def needed(layers: int) -> int:
        fewer = dataclasses.replace(plan, config=cut(config, range(layers))).need()
        return fewer.weights + fewer.cache

    n = config.num_hidden_layers
    fits = bisect.bisect_right(range(n), limit, lo=1, key=needed) - 1
    raise ValueError(
        f"bench: weights and cache of {n} layers take {(need.weights + need.cache) / 1e9:.1f} GB, "
        f"{jax.devices()[0].device_kind} has {limit / 1e9:.1f} GB free for them: "
        + (f"layers must be <= {fits} (and less for temporaries)" if fits else "no layer fits")
    )


def _memory(loop: Loop) -> dict[str, Any]:
    """Most bytes in use and who says so; what the loop needs: arguments, results, temporaries."""
    found: Any = loop.compiled.memory_analysis()
    size = None
    if found is not None:
        passed = found.argument_size_in_bytes + found.output_size_in_bytes
        size = passed - found.alias_size_in_bytes + found.temp_size_in_bytes
    stats: dict[str, Any] | None = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        # That of making the weights too.
        peak, source = stats["peak_bytes_in_use"], "allocator, so far in this process"
    else:
        peak, source = size, "not available" if size is None else "compiled decode loop"
    return {"loop_bytes": size, "peak_bytes": peak, "peak_from": source}


def _cpu_ceilings() -> Ceilings:
    """XLA's sum is bound by its additions there: bytes are read no slower than they are copied."""
    found = measured_ceilings(size=512, read_bytes=256 << 20)
    return dataclasses.replace(found, read=max(found.read, found.copy))


def _representatives(config: ModelConfig) -> dict[LayerKind, int]:
    """A layer of each kind, score-routed where there is one."""
    found: dict[LayerKind, int] = {}
    for layer in range(config.num_hidden_layers - 1, -1, -1):
        kind = config.layer_kind(layer)
        if kind not in found or not config.is_hash_layer(layer):
            found[kind] = layer
    return {kind: found[kind] for kind in LayerKind if kind in found}


def _by_models(
    model: Any, params: dict[str, Any], settings: Settings, context: int
) -> tuple[dict[LayerKind, float], float]:
    """us of a layer of each kind, and of what is outside of layers."""
    outside = {name: x for name, x in params.items() if not name.startswith("layers_")}

    def us(layers: list[int]) -> float:
        small = dataclasses.replace(model, config=cut(model.config, layers))
        own = {f"layers_{i}": params[f"layers_{layer}"] for i, layer in enumerate(layers)}
        times, _ = time_decode(small, outside | own, settings.batch, context, settings.calls)
        return times.us

    none = us([])
    kinds = _representatives(model.config)
    return {kind: us([layer]) - none for kind, layer in kinds.items()}, none


def _by_place(launches: list[Launch], steps: int, config: ModelConfig) -> dict[str, Any]:
    """Launches of a step: by kind of layer, and outside of layers."""
    places: dict[str, list[int | None]] = {}
    for layer in range(config.num_hidden_layers):
        places.setdefault(config.layer_kind(layer).name, []).append(layer)
    places["outside"] = [None]
    found: dict[str, Any] = {}
    for name, layers in places.items():
        rows = layer_rows(launches, layers, steps)
        groups: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
        for row in rows:
            groups[row.group] += row.us
        found[name] = {
            "layers": len(layers) if name != "outside" else 0,
            "launches": sum(row.count for row in rows),
            "us": sum(row.us for row in rows),
            "gap_us": sum(row.gap_us for row in rows),
            "groups_us": groups if name != "outside" else {OUTSIDE: sum(groups.values())},
            "ops": [
                {
                    "op": row.op,
                    "kernel": row.kernel,
                    "launches": row.count,
                    "us": row.us,
                    "gap_us": row.gap_us,
                }
                for row in rows
            ],
        }
    return found


def run(**settings: Any) -> dict[str, Any]:
    """Measures; `Settings` has the arguments. The result can be written as JSON.

    Times are in us. ``us_per_token`` is a step: what each sequence waits for its next token;
    ``tokens_per_s`` counts those of all sequences. ``bytes_per_token`` is what a step must read
    (`floor`), for all sequences together. On a GPU and on the CPU alike the ceilings are measured
    in the same process; only fractions of ceilings of the same run are meant to be compared.

    Raises:
        ValueError: a setting is out of range, the model does not fit the device, logits were not
            finite, or a profile was asked for and there is no GPU.
    """
    chosen = Settings(**settings)
    device, gpu = jax.devices()[0], _is_gpu()
    if chosen.profile and not gpu:
        raise ValueError(
            "bench: profile: launches can be seen on a GPU only, got the backend "
            f"{jax.default_backend()}"
        )
    config, preset = _model(chosen)
    precision = Precision.preset(preset)
    layers = config.num_hidden_layers if chosen.layers is None else chosen.layers
    if layers > config.num_hidden_layers:
        raise ValueError(
            f"bench: layers must be <= {config.num_hidden_layers} ({chosen.model}), got {layers}"
        )
    config = cut(config, range(layers))
    steps = STEPS * (WARM_CALLS + max(chosen.calls, _PROFILED_CALLS))
    context = chosen.context
    if context is None:
        context = min(4096, max(config.max_position_embeddings - steps, 0))
    for name, length in (("context", context + steps), ("prefill", chosen.prefill)):
        if length > config.max_position_embeddings:
            raise ValueError(
                f"bench: {name}: {length} positions are needed, the model has "
                f"{config.max_position_embeddings}"
            )
    max_len = max(context + steps, chosen.prefill)
    plan = Plan(config, precision, batch_size=chosen.batch, max_len=max_len)
    need = plan.need()
    _check_memory(need, config, plan)

    from dsv4_jax.model import DeepseekV4

    model = DeepseekV4(config, precision)
    params = jax.block_until_ready(random_params(config, precision))
    times, loop = time_decode(model, params, chosen.batch, context, chosen.calls)
    compile_s = loop.compile_s
    loop.cache = None
    prompt = _prefill(model, params, chosen) if chosen.prefill else None
    memory = _memory(loop)
    del loop
    profile = None
    if chosen.profile:
        profile = _by_place(
            *profiled(model, params, chosen.batch, context, _PROFILED_CALLS), config
        )
    if profile is None:
        kinds_us, outside_us = _by_models(model, params, chosen, context)
    else:
        kinds_us = {k: profile[k.name]["us"] for k in LayerKind if k.name in profile}
        outside_us = profile["outside"]["us"]
    del params
    ceilings = measured_ceilings() if gpu else _cpu_ceilings()

    read, outside_bytes = decode_bytes(config, precision, context, chosen.batch)
    total = sum(sum(groups.values()) for groups in read) + outside_bytes
    count = Counter(config.layer_kind(layer) for layer in range(layers))
    kinds: list[dict[str, Any]] = []
    for kind, us in kinds_us.items():
        own = [read[i] for i in range(layers) if config.layer_kind(i) is kind]
        mean = {group: sum(x[group] for x in own) / len(own) for group in GROUPS}
        floor = ceilings.us(sum(mean.values()), "read")
        kinds.append(
            {
                "kind": kind.name,
                "layers": count[kind],
                "us": us,
                "bytes": sum(mean.values()),
                "floor_us": floor,
                "fraction": floor / us if us > 0 else None,
                "launches": profile[kind.name]["launches"] if profile else None,
                "groups_bytes": mean,
            }
        )
    split = sum(kind["us"] * kind["layers"] for kind in kinds) + outside_us
    if prompt is not None:
        _add_floor(prompt, config, precision, chosen, ceilings)
    return {
        "model": chosen.model,
        "layers": layers,
        "precision": preset,
        "batch": chosen.batch,
        "context": context,
        "device": device.device_kind,
        "jax": jax.__version__,
        "dsv4_jax": __version__,
        "ceilings": dataclasses.asdict(ceilings),
        "decode": {
            "tokens": chosen.calls * STEPS,
            "us_per_token": times.us,
            "tokens_per_s": chosen.batch * 1e6 / times.us,
            "spread": times.spread,
            "bytes_per_token": total,
            "floor_us": ceilings.us(total, "read"),
            "fraction": ceilings.us(total, "read") / times.us,
            "compile_s": compile_s,
            "layers_from": "profile" if profile else "models",
            "kinds": kinds,
            "outside_us": outside_us,
            "outside_bytes": outside_bytes,
            "unexplained_us": times.us - split,
        },
        "prefill": prompt,
        "memory": {
            "weights_bytes": need.weights,
            "cache_bytes": need.cache,
            **memory,
        },
        "profile": profile,
    }


def _prefill(model: Any, params: dict[str, Any], settings: Settings) -> dict[str, Any]:
    rows, tokens, chunk = settings.batch, settings.prefill, settings.prefill_chunk
    times, first_s = time_prefill(model, params, rows, tokens, chunk)
    profile = None
    if settings.profile:
        launches = profiled_prefill(model, params, rows, min(tokens, chunk))
        profile = _by_place(launches, 1, model.config)
    return {
        "tokens": tokens,
        "chunk": chunk,
        "us": times.us,
        "spread": times.spread,
        "tokens_per_s": rows * tokens * 1e6 / times.us,
        "first_s": first_s,
        "profile": profile,
    }


def _add_floor(
    prompt: dict[str, Any],
    config: ModelConfig,
    precision: Precision,
    settings: Settings,
    ceilings: Ceilings,
) -> None:
    """The longer of reading and computing."""
    rows, tokens, chunk = settings.batch, settings.prefill, settings.prefill_chunk
    work = prefill_work(config, precision, rows, tokens, chunk)
    compute = ceilings.us(work.fp8_flops, "fp8") + ceilings.us(work.bf16_flops, "bf16")
    floor = max(ceilings.us(work.bytes, "read"), compute)
    prompt |= dataclasses.asdict(work)
    prompt |= {"floor_us": floor, "fraction": floor / prompt["us"]}
