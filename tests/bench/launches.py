"""Device launches of one decode layer of each kind, from a profile; run as a program on a GPU.

``python -m tests.bench.launches --out launches.md --dump launches.txt``. A model of the first five
layers of each size with few experts and random weights decodes one token of one sequence; of these
layers those with a neighbour on both sides are listed, so that what XLA does once a step is not
theirs. Command buffers are off: each launch is an event of its own. A launch belongs to the
instruction that made it and so to the module and the op that the compiled program names for it.
Attention, the indexer (selection, linears that go alone) and the MoE branch behind its read
(router, shared expert, experts) are listed and not counted.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsv4_jax import Cache, DeepseekV4, ModelConfig, Precision
from dsv4_jax.bench.profile import (
    WITHOUT_GRAPHS,
    Row,
    launches_of,
    layer_rows,
    op_names,
    traced,
)
from dsv4_jax.bench.weights import random_cache, random_params

__all__ = ["table"]

LAYERS = 5
"""SWA, SWA, CSA, HCA, CSA of Flash, HCA, HCA, CSA, HCA, CSA of Pro; the first two hash-routed."""
LISTED = (1, 2, 3)
EXPERTS, VOCABULARY = 16, 4096
POSITION = 32767
"""Where the indexer has more entries than it chooses."""
STEPS = 8


def table(title: str, rows: Sequence[Row]) -> str:
    """Markdown: a line a row, then the sums of the parts."""
    lines = [
        f"### {title}",
        "",
        "| kernel | op | launches | us | |",
        "|---|---|---|---|---|",
        *(
            f"| `{row.kernel}` | {row.op} | {row.count:g} | {row.us:.1f} | "
            f"{'' if row.part == 'counted' else row.part} |"
            for row in rows
        ),
    ]
    for part in ("counted", "attention", "indexer", "MoE"):
        some = [row for row in rows if row.part == part]
        count, us = sum(row.count for row in some), sum(row.us for row in some)
        name = "**launches that count**" if part == "counted" else f"{part}, not counted"
        lines.append(f"| {name} | | {count:g} | {us:.1f} | |")
    return "\n".join([*lines, ""])


def dumped(profile: Any) -> str:
    """Every event of the devices and the names of all planes and lines."""
    lines: list[str] = []
    for plane in profile.planes:
        lines.append(f"plane {plane.name} {list(plane.stats)}")
        for line in plane.lines:
            events = list(line.events)
            lines.append(f"  line {line.name}: {len(events)} events")
            if "device" in plane.name:
                lines += [
                    f"    {e.start_ns:.0f} {e.duration_ns:.0f} {e.name} {dict(e.stats)}"
                    for e in events
                ]
    return "\n".join([*lines, ""])


def small(config: ModelConfig) -> ModelConfig:
    """The first layers of a release, with few experts and tokens."""
    return dataclasses.replace(
        config,
        num_hidden_layers=LAYERS,
        compress_ratios=config.compress_ratios[:LAYERS],
        num_hash_layers=2,
        num_nextn_predict_layers=0,
        n_routed_experts=EXPERTS,
        vocab_size=VOCABULARY,
    )


def decode(model: DeepseekV4, params: Any, tokens: jax.Array, cache: Cache) -> Any:
    """A step; the model is static."""
    return model.apply({"params": params}, tokens, cache, logits="last")


def profile_of(model: DeepseekV4, position: int) -> tuple[Any, str]:
    """Some steps, and the compiled program."""
    params = random_params(model.config, model.precision)
    cache = random_cache(model, 1, position + 4 * STEPS, position)
    tokens = jnp.zeros((1, 1), jnp.int32)
    jitted = jax.jit(decode, static_argnames="model", donate_argnames="cache")
    compiled = jitted.lower(model, params, tokens, cache).compile(WITHOUT_GRAPHS)

    def steps(cache: Cache) -> Cache:
        for _ in range(STEPS):
            _, cache = compiled(params, tokens, cache)
        return jax.block_until_ready(cache)

    held = [steps(cache)]

    def some() -> None:
        held[0] = steps(held[0])

    return traced(some), compiled.as_text()


def main(arguments: Sequence[str] | None = None) -> str | None:
    """Prints the tables; returns what is wrong."""
    try:
        run(arguments)
    except ValueError as error:
        return f"launches: {error}"
    return None


def run(arguments: Sequence[str] | None) -> None:
    """Prints the tables.

    Raises:
        ValueError: there is no GPU, or its profile does not say what is needed.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["flash", "pro"], choices=["flash", "pro"])
    parser.add_argument("--precision", nargs="+", default=["official"])
    parser.add_argument("--position", type=int, default=POSITION)
    parser.add_argument("--out", type=Path, help="write the tables there as well")
    parser.add_argument("--dump", type=Path, help="write every event and the programs there")
    given = parser.parse_args(arguments)
    if jax.default_backend() != "gpu":
        raise ValueError(f"needs a GPU, got the backend {jax.default_backend()}")
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, one token, {given.position}\n")
    texts: list[str] = []
    for size in given.sizes:
        for precision in given.precision:
            config = small(getattr(ModelConfig, size)())
            model = DeepseekV4(config, Precision.preset(precision))
            profile, program = profile_of(model, given.position)
            if given.dump:
                with given.dump.open("a", encoding="utf-8") as file:
                    file.write(f"{size} {precision}\n{dumped(profile)}\n{program}\n")
            launches = launches_of(profile, op_names(program))
            if not any(launch.layer is not None for launch in launches):
                raise ValueError("no launch could be traced to its layer; --dump has them all")
            for layer in (*LISTED, None):
                kind = "outside of layers" if layer is None else config.layer_kind(layer).name
                hashed = layer is not None and config.is_hash_layer(layer)
                title = f"{size}, {precision}, {kind}{' (hash-routed)' if hashed else ''}"
                texts.append(table(title, layer_rows(launches, [layer], STEPS)))
                print(texts[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
