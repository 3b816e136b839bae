"""Draw the stored curves of Megapixel MNIST: test error against epochs and against processor time."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("Agg")

LABELS = {"biased_original": "biased gradient of the original"}
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00"]


def draw_figure(folder: Path, target: Path) -> None:
    """Draw every run of ``folder``, one panel for each setting and each of the two clocks."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    settings = sorted({result["run"]["setting"] for result in results}, reverse=True)
    if not settings:
        raise SystemExit(f"no stored runs in {folder}")
    figure, axes = plt.subplots(
        len(settings), 2, figsize=(9, 3.2 * len(settings)), sharey=True, squeeze=False, layout="constrained"
    )
    for row, setting in zip(axes, settings, strict=True):
        chosen = [result for result in results if result["run"]["setting"] == setting]
        for result, colour in zip(chosen, COLOURS, strict=False):
            _draw_run(row, result, colour)
        row[0].set(ylabel="test error", title=f"{setting} setting", xlabel="epochs")
        row[1].set(xlabel="minutes of processor time", ylim=(0, 1))
        row[1].legend(frameon=False, loc="upper right")
        for axis in row:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)


def _draw_run(row: list[plt.Axes], result: dict[str, object], colour: str) -> None:
    curve, method = result["curve"], result["run"]["method"]
    error = [1 - point["test_accuracy"] for point in curve]
    label = LABELS.get(method["scheme"], method["scheme"])
    if method["prior"] != "none":
        label += f", prior: {method['prior']}"
    epochs = [point["epoch"] for point in curve]
    minutes, total = [], 0.0
    for point in curve:
        total += point["cpu_seconds"] / 60
        minutes.append(total)
    for axis, clock in zip(row, (epochs, minutes), strict=True):
        axis.plot(clock, error, color=colour, label=label, linewidth=1.8)


if __name__ == "__main__":
    import sys

    draw_figure(Path(sys.argv[1]), Path(sys.argv[2]))
