"""A measurement as a picture: stacked bars, the floor beside what was measured."""

from pathlib import Path
from typing import Any, cast

from dsv4_jax.bench.floor import GROUPS, OUTSIDE

__all__ = ["bars", "draw"]

_IDLE = "between launches"
_OTHER = "not explained"


def _floors(report: dict[str, Any]) -> dict[str, float]:
    """us of a step, by group: bytes over the read ceiling."""
    decode, rate = report["decode"], report["ceilings"]["read"] / 1e6
    found = {
        group: sum(k["layers"] * k["groups_bytes"][group] for k in decode["kinds"]) / rate
        for group in GROUPS
    }
    return found | {OUTSIDE: decode["outside_bytes"] / rate}


def bars(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """us by label, of every bar in order.

    With a profile: groups of ops of a layer of each kind and of the whole step; what the step takes
    beyond its launches is ``between launches``. Without: kinds of layers.
    """
    decode, profile = report["decode"], report["profile"]
    rate = report["ceilings"]["read"] / 1e6
    if profile is None:
        kinds = {f"{k['layers']} {k['kind']}": k for k in decode["kinds"]}
        measured = {name: k["layers"] * k["us"] for name, k in kinds.items()}
        floor = {name: k["layers"] * k["floor_us"] for name, k in kinds.items()}
        return {
            "step, floor": floor | {OUTSIDE: decode["outside_bytes"] / rate},
            "step": measured
            | {OUTSIDE: decode["outside_us"], _OTHER: max(decode["unexplained_us"], 0.0)},
        }
    found: dict[str, dict[str, float]] = {}
    step: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
    for kind in decode["kinds"]:
        name, groups = kind["kind"], profile[kind["kind"]]["groups_us"]
        found[f"{name}, floor"] = {g: kind["groups_bytes"][g] / rate for g in GROUPS}
        found[name] = groups
        for group in GROUPS:
            step[group] += kind["layers"] * groups[group]
    step[OUTSIDE] = decode["outside_us"]
    step[_IDLE] = max(decode["us_per_token"] - sum(step.values()), 0.0)
    return found | {"step, floor": _floors(report), "step": step}


def draw(report: dict[str, Any], path: Path | str) -> None:
    """Writes the picture; its format is that of the name.

    Raises:
        ValueError: matplotlib is not installed, or the name's format is unknown.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(
            "bench: plot: matplotlib is not installed; it comes with the extra `train`: "
            "pip install 'dsv4_jax[train]'"
        ) from error
    found = bars(report)
    layers = {name: x for name, x in found.items() if not name.startswith("step")}
    panels = [x for x in (layers, {n: x for n, x in found.items() if n not in layers}) if x]
    figure = Figure(figsize=(4 + 4 * len(panels), 5), layout="constrained")
    labels = list(dict.fromkeys(label for parts in found.values() for label in parts))
    axes: Any = figure.subplots(1, len(panels), squeeze=False)
    drawn: dict[str, Any] = {}
    for ax, panel in zip(axes[0], panels, strict=True):
        bottom = dict.fromkeys(panel, 0.0)
        for i, label in enumerate(labels):
            heights = [panel[name].get(label, 0.0) for name in panel]
            if any(heights):
                drawn[label] = ax.bar(
                    list(panel), heights, bottom=list(bottom.values()), color=f"C{i}"
                )
            bottom = {name: bottom[name] + h for name, h in zip(panel, heights, strict=True)}
        ax.set_ylabel("us")
        ax.tick_params(axis="x", rotation=30)
    figure.legend(drawn.values(), drawn.keys(), loc=cast(Any, "outside center right"))
    figure.suptitle(
        f"{report['model']}, {report['layers']} layers, {report['precision']}, batch "
        f"{report['batch']}, context {report['context']}; {report['device']}, "
        f"JAX {report['jax']}",
        x=0.01,
        horizontalalignment="left",
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
