"""The curve of a training: `metrics.jsonl` of one or more runs as one picture."""

import json
from pathlib import Path
from typing import Any

# A figure that needs no display and no font of the system.
import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

# Nats per token to bits per byte of the training text; `prepare` prints both counts.
BYTES_PER_TOKEN = 27_684_029 / (9_433_778 - 2 * 1_515)


def read(files: list[Path]) -> list[dict[str, Any]]:
    """All lines of the runs; a later run replaces the steps of an earlier one from its start on."""
    lines: list[dict[str, Any]] = []
    for file in files:
        new = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        first = min(line["step"] for line in new)
        lines = [line for line in lines if line["step"] < first] + new
    return lines


def plot(kept: list[Path], abandoned: list[Path], out: Path) -> None:
    """Training loss and dev bits per byte over the steps.

    Args:
        kept: Metrics of the runs that led to the shipped weights, in order.
        abandoned: Metrics of runs that were given up, drawn thinner.
        out: PNG file.
    """
    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=90)
    for files, color, width in ((abandoned, "0.7", 0.8), (kept, "C0", 1.2)):
        lines = read(files) if files else []
        train = [line for line in lines if line["kind"] == "train"]
        name = "training" if files is kept else "training, given up"
        scale = 1 / (0.6931 * BYTES_PER_TOKEN)
        axes.plot(
            [line["step"] for line in train],
            [line["ce"] * scale for line in train],
            color=color,
            linewidth=width,
            label=name,
        )
        dev = [line for line in lines if line["kind"] == "dev"]
        if dev:
            axes.plot(
                [line["step"] for line in dev],
                [line["bits_per_byte"] for line in dev],
                color="C1" if files is kept else "C3",
                marker="o",
                markersize=3,
                label="dev files" if files is kept else "dev files, given up",
            )
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0.3, 2))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, metadata={"Software": None})
