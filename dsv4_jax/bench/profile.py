"""A profile's launches: which layer and op made each of them, and how long the device was idle.

A launch belongs to the instruction that made it and so to the module and the op that the compiled
program names for it. Programs that are profiled are compiled `WITHOUT_GRAPHS`: each launch is an
event of its own. So the time inside of launches is that of every program, the idle time between
them is not: replayed from a captured graph there is less.
"""

import dataclasses
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import jax
from jax.profiler import ProfileData

__all__ = [
    "WITHOUT_GRAPHS",
    "Launch",
    "Row",
    "launches_of",
    "layer_rows",
    "op_names",
    "part_of",
    "traced",
]

WITHOUT_GRAPHS: Final[dict[str, str | bool]] = {
    "xla_gpu_enable_command_buffer": "",
    "xla_gpu_graph_min_graph_size": str(2**31 - 1),
}
"""Compiler options of a program whose launches are not captured."""

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
    gap_us: float = 0.0
    """The device was idle before them."""

    @property
    def group(self) -> str:
        """Which of `floor.GROUPS`; of a row outside of layers it means nothing."""
        *modules, op = self.op.split(" ")
        return _group(modules[0].split("/") if modules else [], op)


def where(path: str) -> tuple[tuple[str, ...], str]:
    """Modules inside of the layer, and the op: the first jitted function, or the primitive."""
    inside = re.sub(r"^.*?(?:^|/)layer_\d+/|^jit\(\w+\)/", "", path)
    modules: list[str] = []
    *outer, last = inside.split("/")
    for name in outer:
        if called := re.fullmatch(r"jit\((\w+)\)", name):
            return tuple(modules), called[1]
        # Methods and the scopes of the two branches say nothing that modules do not.
        if re.fullmatch(r"(?!layers_\d+$|attention$|moe$|DeepseekV4$|while$|body$|cond$)\w+", name):
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
    known: list[Part | None] = [
        part_of(*where(launch.path)) if launch.path else None for launch in launches
    ]
    both = zip(_last_known(known), _last_known(known[::-1])[::-1], strict=True)
    return [before if before == behind else "counted" for before, behind in both]


def _last_known(parts: Iterable[Part | None]) -> list[Part]:
    """Each part, or where there is none the nearest one before it."""
    found: list[Part] = []
    last: Part = "counted"
    for part in parts:
        last = part or last
        found.append(last)
    return found


def _shares(launches: Sequence[Launch]) -> list[tuple[float, float]]:
    """Of each launch, in order of time, what it adds: us of work, and idle us before it.

    A launch may begin while the one ahead runs, and wait for it: that is the other one's time.
    """
    shares: list[tuple[float, float]] = []
    end = launches[0].start_ns if launches else 0.0
    for launch in launches:
        over = max(end, launch.start_ns + launch.us * 1e3)
        idle = max(launch.start_ns - end, 0.0)
        shares.append(((over - end - idle) / 1e3, idle / 1e3))
        end = over
    return shares


def layer_rows(launches: Iterable[Launch], layers: Collection[int | None], steps: int) -> list[Row]:
    """Launches per step and layer in order of time; layer ``None``: what is outside of layers."""
    ordered = sorted(launches, key=lambda launch: launch.start_ns)
    found: dict[tuple[str, str, Part], list[tuple[float, float]]] = {}
    owners = zip(ordered, _shares(ordered), layers_of(ordered), parts_of(ordered), strict=True)
    for launch, share, owner, part in owners:
        if owner not in layers:
            continue
        modules, op = where(launch.path) if launch.path else ((), "?")
        label = " ".join(filter(None, ("/".join(modules), op)))
        key = short(launch.kernel), label, part
        found.setdefault(key, []).append(share)
    each = steps * len(layers)
    rows: list[Row] = []
    for key, times in found.items():
        us, gaps = (sum(column) / each for column in zip(*times, strict=True))
        rows.append(Row(*key, len(times) / each, us, gaps))
    return rows


def _group(modules: Sequence[str], op: str) -> str:
    """Of `floor.GROUPS`."""
    if modules and modules[0].startswith("hc_"):
        return "hyper-connections"
    if modules and modules[0] == "ffn":
        parts = {"gate": "router", "shared_experts": "shared expert", "experts": "experts"}
        return next((parts[name] for name in modules if name in parts), "rest")
    if not modules or modules[0] != "attn":
        return "rest"
    if "compressor" in modules or op in ("compressor", "dense_linears"):
        return "compressors"
    if "indexer" in modules and not op.endswith("_linear"):  # its wq_b goes with the layer's
        return "indexer"
    return "attention" if op == "attention" else "attention linears"


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


def traced(run: Callable[[], object]) -> Any:
    """The profile of a call, which must wait for what it starts.

    Raises:
        ValueError: the profiler wrote no file.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        paths = [str(path) for path in Path(folder).rglob("*.xplane.pb")]
        if len(paths) != 1:
            raise ValueError(f"the profiler must write one profile, got {paths}")
        return ProfileData.from_file(paths[0])
