"""Device launches of one decode layer of each kind, from a profile; run as a program on a GPU.

``python -m tests.bench.launches --out launches.md --dump launches.txt``. A model of the first five
layers of each size with few experts and random weights decodes one token of one sequence; of these
layers those with a neighbour on both sides are listed, so that what XLA does once a step is not
theirs. Command buffers are off: each launch is an event of its own. A launch belongs to the
instruction that made it and so to the module and the op that the compiled program names for it.
Attention, the indexer (its linears, query finish, selection) and the MoE branch behind its read
(router, shared expert, experts) are listed and not counted.
"""

import argparse
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from dsv4_jax import Cache, DeepseekV4, ModelConfig, Precision
from dsv4_jax.checkpoint.names import expected_tree
from tests.support.stored import any_leaf

__all__ = ["Launch", "Row", "launches_of", "layer_rows", "op_names", "table"]

LAYERS = 5
"""SWA, SWA, CSA, HCA, CSA of Flash, HCA, HCA, CSA, HCA, CSA of Pro; the first two hash-routed."""
LISTED = (1, 2, 3)
EXPERTS, VOCABULARY = 16, 4096
POSITION = 32767
"""Where the indexer has more entries than it chooses."""
STEPS = 8
NO_GRAPHS = "--xla_gpu_enable_command_buffer="

Part = Literal["counted", "attention", "indexer", "MoE"]


@dataclasses.dataclass(frozen=True)
class Launch:
    """An event of a device's stream: ``path`` is the ``op_name`` of its instruction, or empty."""

    kernel: str
    path: str
    start_ns: float
    us: float

    @property
    def layer(self) -> int | None:
        """The layer in its path."""
        found = re.search(r"(?:^|/)layer_(\d+)/", self.path)
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Row:
    """Launches of one kernel for one op of a layer, per step."""

    kernel: str
    op: str
    part: Part
    count: float
    us: float


def where(path: str) -> tuple[tuple[str, ...], str]:
    """Modules inside of the layer, and the op: the first jitted function, or the primitive."""
    inside = re.sub(r"^.*?(?:^|/)layer_\d+/|^jit\(\w+\)/", "", path)
    modules: list[str] = []
    *outer, last = inside.split("/")
    for name in outer:
        if called := re.fullmatch(r"jit\((\w+)\)", name):
            return tuple(modules), called[1]
        # Methods and the scopes of the two branches say nothing that modules do not.
        if re.fullmatch(r"(?!layers_\d+$|attention$|moe$|DeepseekV4$)\w+", name):
            modules.append(name)
    called = re.fullmatch(r"jit\((\w+)\)", last)
    return tuple(modules), called[1] if called else last


def part_of(modules: Sequence[str], op: str) -> Part:
    """What the launches of an op are summed as."""
    if "ffn" in modules:
        return "MoE"
    if "indexer" in modules and "compressor" not in modules:
        return "indexer"
    return "attention" if op == "attention" else "counted"


def short(kernel: str) -> str:
    """A kernel's name without its namespaces, parameters and long template arguments."""
    name = re.sub(r"\(anonymous namespace\)::|\bdsv4::|^void ", "", kernel)
    name = re.sub(r"\(.*", "", name)
    return name if len(name) <= 60 else f"{name[:57]}..."


def op_names(hlo: str) -> dict[str, str]:
    """``op_name`` by instruction, from the text of a compiled module."""
    found = re.findall(r'^\s*(?:ROOT )?%?([\w.\-]+) = [^\n]*op_name="([^"\n]*)"', hlo, re.M)
    return dict(found)


def layers_of(launches: Sequence[Launch]) -> list[int | None]:
    """The layer of each launch, in order of time.

    One without an instruction that is known (a copy) belongs where its next neighbour does. One
    with an instruction outside of the layers belongs to the step.
    """
    layers: list[int | None] = []
    behind: int | None = None
    for launch in reversed(launches):
        if launch.path:
            behind = launch.layer
        layers.append(behind)
    return layers[::-1]


def parts_of(launches: Sequence[Launch]) -> list[Part]:
    """The part of each launch, in order of time; counted if its instruction is not known, unless
    it lies inside of another part."""
    known = [part_of(*where(launch.path)) if launch.path else None for launch in launches]
    parts: list[Part] = []
    for i, part in enumerate(known):
        before = next((p for p in known[:i][::-1] if p), "counted")
        behind = next((p for p in known[i:] if p), "counted")
        parts.append(part or (before if before == behind else "counted"))
    return parts


def layer_rows(launches: Iterable[Launch], layer: int | None, steps: int) -> list[Row]:
    """Launches of one layer, or of what is outside of them, per step in order of time."""
    ordered = sorted(launches, key=lambda launch: launch.start_ns)
    found: dict[tuple[str, str, Part], list[float]] = {}
    owners = zip(ordered, layers_of(ordered), parts_of(ordered), strict=True)
    for launch, owner, part in owners:
        if owner != layer:
            continue
        modules, op = where(launch.path) if launch.path else ((), "?")
        label = " ".join(filter(None, ("/".join(modules), op)))
        key = short(launch.kernel), label, part
        found.setdefault(key, []).append(launch.us)
    return [Row(*key, len(us) / steps, sum(us) / steps) for key, us in found.items()]


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


def launches_of(profile: Any, names: Mapping[str, str]) -> list[Launch]:
    """Events of the streams of all GPUs.

    Raises:
        ValueError: there are none.
    """
    found: list[Launch] = []
    planes = list(profile.planes)
    for plane in planes:
        if "/device:GPU" not in plane.name:
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                # The instruction; some versions have its op_name too, as one of these.
                path = names.get(str(stats.get("hlo_op", "")), "")
                path = path or str(stats.get("tf_op", "") or stats.get("name", ""))
                found.append(Launch(event.name, path, event.start_ns, event.duration_ns / 1e3))
    if not found:
        seen = [(plane.name, [line.name for line in plane.lines]) for plane in planes]
        raise ValueError(f"the profile must hold launches of a GPU, got {seen}")
    return found


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


def made(tree: Any) -> Any:
    """Random arrays; ids of experts are in range and distinct."""
    leaves, structure = jax.tree.flatten(tree)

    def leaf(i: int, x: Any) -> jax.Array:
        if x.dtype == jnp.int32:  # tid2eid
            return (jnp.arange(x.shape[0])[:, None] + jnp.arange(x.shape[1])) % EXPERTS
        return any_leaf(i, x.shape, x.dtype)

    return jax.tree.unflatten(structure, [leaf(i, x) for i, x in enumerate(leaves, 1)])


def at_position(model: DeepseekV4, position: int) -> Cache:
    """A cache of one random sequence of ``position`` tokens."""
    cache = jax.eval_shape(lambda: model.init_cache(1, position + 4 * STEPS))
    return dataclasses.replace(
        cache,
        layers=made(cache.layers),
        lengths=jnp.full(1, position, jnp.int32),
        overflow=jnp.zeros(1, bool),
    )


def decode(model: DeepseekV4, params: Any, tokens: jax.Array, cache: Cache) -> Any:
    """A step; the model is static."""
    return model.apply({"params": params}, tokens, cache, logits="last")


def profile_of(model: DeepseekV4, position: int) -> tuple[Any, str]:
    """Some steps, and the compiled program."""
    params = made(expected_tree(model.config, model.precision, False))
    cache = at_position(model, position)
    tokens = jnp.zeros((1, 1), jnp.int32)
    jitted = jax.jit(decode, static_argnames="model", donate_argnames="cache")
    compiled = jitted.lower(model, params, tokens, cache).compile()

    def steps(cache: Cache) -> Cache:
        for _ in range(STEPS):
            _, cache = compiled(params, tokens, cache)
        return jax.block_until_ready(cache)

    cache = steps(cache)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            steps(cache)
        paths = [str(path) for path in Path(folder).rglob("*.xplane.pb")]
        if len(paths) != 1:
            raise ValueError(f"the profiler must write one profile, got {paths}")
        return ProfileData.from_file(paths[0]), compiled.as_text()


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
    # XLA reads it with the first compilation.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {NO_GRAPHS}".strip()
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
                texts.append(table(title, layer_rows(launches, layer, STEPS)))
                print(texts[-1], flush=True)
    if given.out:
        given.out.write_text("\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
