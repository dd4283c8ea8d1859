"""Curves of all trainings of benchmarks/accuracy.py in one picture.

    python -m benchmarks.accuracy_picture benchmarks/results/accuracy.json docs/accuracy.png [PART]

Each panel has one model on one data set: mAP50-95 on held-out images against the images that a training has seen. A
thin line is one training, a thick one the mean of a variant. Trainings that were cut off end earlier. Colours are those
of Okabe and Ito, and variants differ in their dashes, too. They have the names of benchmarks/accuracy.py, with the real
size of the large batch for 256.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy_settings import STOCK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES: dict[str, tuple[str, Any]] = {
    "stock": ("#000000", "-"),
    "same": ("#E69F00", (0, (6, 2))),
    "256": ("#0072B2", "-"),
    "stock256": ("#56B4E9", (0, (8, 2, 1, 2))),
    "neighbour": ("#D55E00", (0, (2, 1))),
    "nbs256": ("#009E73", (0, (4, 1, 1, 1))),
    "256lr": ("#CC79A7", (0, (1, 1))),
    "device": ("#F0E442", (0, (5, 1, 1, 1, 1, 1))),
}
"""Colour and dashes of each variant."""


def draw(part: Mapping[str, Any]) -> Figure:
    """Draw a part of the JSON file.

    Args:
        part: Its `runs` and `settings`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    runs = [{**run, "map": curve} for run in part["runs"] if (curve := run.get("map") or run.get("map_so_far"))]
    panels = list(dict.fromkeys((run["data"], run["model"]) for run in runs))
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 1 + 3.2 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    settings = part["settings"]
    seen = settings["images"] * settings["passes"] // settings["epochs"]
    named: dict[str, Any] = {}
    for (data, model), axes in zip(panels, figure.subplots(rows, columns, squeeze=False).flat, strict=False):
        for variant, (colour, dashes) in STYLES.items():
            name = (data, model, variant)
            curves = [run["map"] for run in runs if (run["data"], run["model"], run["variant"]) == name]
            if curves:
                images = [seen * (epoch + 1) for epoch in range(settings["epochs"])]
                for curve in curves:
                    axes.plot(images[: len(curve)], curve, color=colour, linewidth=0.6, alpha=0.5)
                means = [mean(each) for each in zip(*curves, strict=False)]
                told = ("" if variant in STOCK else "ours ") + variant.replace("256", str(settings["large"]))
                named[told] = axes.plot(images[: len(means)], means, color=colour, linestyle=dashes)[0]
        axes.set_title(f"{model}, {data}")
        axes.set_xlabel("images seen")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel("mAP50-95")
        axes.set_ylim(bottom=0)
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=len(named), frameon=False)
    return figure


def main(file: str, picture: str, part: str = "gpu") -> None:
    """Draw one part of a JSON file, and write the picture.

    Args:
        file: The JSON file.
        picture: PNG to write.
        part: Name of the part.
    """
    draw(json.loads(Path(file).read_text())[part]).savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
