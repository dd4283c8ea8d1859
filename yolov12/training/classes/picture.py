"""classes.png: average precision of each class before and after a training.

The colours are those of Okabe and Ito, as in memory.png.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from yolov12.training.classes.table import ClassRow

__all__ = ["draw", "save"]

_BLUE, _ORANGE, _GREEN = "#0072B2", "#E69F00", "#009E73"
_HEIGHT = 0.38  # of a bar; a class has two


def save(rows: Sequence[ClassRow], path: Path) -> None:
    """Write the picture as a PNG, 1200 pixels wide.

    Args:
        rows: At least one row of the table.
        path: File to write.
    """
    draw(rows).savefig(path)


def draw(rows: Sequence[ClassRow]) -> Figure:
    """Draw two bars for each class: AP50-95 before and after the training. Marks show AP50.

    Args:
        rows: At least one row of the table.
    """
    # Not pyplot, which keeps every figure alive and selects a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2 + 0.35 * len(rows)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for shift, when, kinds in (
        (-_HEIGHT / 2, "before", (("before", _ORANGE, None),)),
        (_HEIGHT / 2, "after", (("after", _BLUE, True), ("after, new class", _GREEN, False))),
    ):
        for label, colour, known in kinds:
            chosen = [
                (place, pair)
                for place, row in enumerate(rows)
                if (pair := getattr(row, when)) is not None and known in (None, row.known)
            ]
            if not chosen:
                continue
            places, pairs = [place + shift for place, _ in chosen], [pair for _, pair in chosen]
            axes.barh(places, [ap for _, ap in pairs], _HEIGHT, color=colour, label=f"AP50-95 {label}")
            axes.plot([ap50 for ap50, _ in pairs], places, "|", color="black", markersize=9)
    axes.plot([], [], "|", color="black", markersize=9, label="AP50")
    names = [row.name if row.known else f"{row.name} (new)" for row in rows]
    axes.set_yticks(range(len(rows)), names, parse_math=False)  # a name may have dollar signs
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xlabel("average precision on the validation data")
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure
