"""memory.png: a picture of what the engine did, step by step.

Its title says the conclusion, and labels say in words what happened. A run that memory did not limit gets a bar of its
highest peak over its budget instead of a flat line under an empty field. With several ranks, the picture shows each
rank in its own colour: its peak and budget, its share of each batch, and its speed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from yolov12.mas.journal import panels, rank_panels
from yolov12.mas.journal.conclusion import facts_of, fraction, in_percent
from yolov12.mas.journal.highlights import Highlight, choose, highlights_of_ranks
from yolov12.mas.journal.labels import place
from yolov12.mas.journal.thinning import thin, thin_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "save", "thin"]

_Row = Mapping[str, str]

# Most epochs that are marked with a vertical line. More lines would hide everything else.
_EPOCHS = 60
_LABELS = 8
# Characters of a title that fills the width. A longer one gets smaller letters.
_TITLE = 95
# Most ranks that get a bar each. Of more ranks, only the one with the least room does.
_BARS = 4
_NONE: Mapping[int, Sequence[_Row]] = {}


def save(rows: Sequence[_Row], path: Path, others: Mapping[int, Sequence[_Row]] = _NONE) -> None:
    """Write the picture as a PNG of 1200 x 800 pixels.

    Args:
        rows: At least one row, as `read_rows` returns them.
        path: File to write.
        others: Rank → rows, for the ranks above 0.
    """
    draw(rows, others).savefig(path)


def draw(rows: Sequence[_Row], others: Mapping[int, Sequence[_Row]] = _NONE) -> Figure:
    """Draw three panels under the conclusion: memory in GiB, micro-batches and images/s over the steps.

    With several ranks, the second panel shows each rank's share of the batch. If memory was never tight, the first
    panel shows the highest peak over budget, and the second one the peaks.

    Args:
        rows: At least one row, as `read_rows` returns them.
        others: Rank → rows, for the ranks above 0.
    """
    # Imported here, because the engine does not need matplotlib. Not pyplot, which keeps every figure alive and selects
    # a window system.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    journals = {0: rows, **others}
    longest = max(journals.values(), key=len)
    edges = int(longest[0]["step"]) - 0.5, int(longest[-1]["step"]) + 0.5
    facts = facts_of(journals)
    found = highlights_of_ranks(journals)
    if not facts.roomy:
        text = f"tightest: {in_percent(facts.percent)} of the budget"
        found = [*found, Highlight(int(facts.tightest["step"]), "tightest", text, 4)]
    labels = place(choose(found, _LABELS), *edges)
    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    _title(figure, facts.headline(), facts.details())
    bars = len(journals) if len(journals) <= _BARS else 1
    axes = list(figure.subplots(3, 1, height_ratios=(0.6 + 0.5 * bars, 3, 4) if facts.roomy else (5, 3, 3)))
    if facts.roomy:
        tightest = {rank: max(each, key=fraction) for rank, each in journals.items() if each}
        panels.draw_room(axes[0], tightest if len(tightest) <= _BARS else {0: facts.tightest})
    shown, drawn = thin_all(journals), axes[1:] if facts.roomy else axes
    if others:
        colors = rank_panels.rank_colors(journals)
        rank_panels.draw_memory(drawn[0], shown, colors, labels, budget=not facts.roomy)
        if not facts.roomy:
            rank_panels.draw_shares(drawn[1], shown, colors, every_step=shown == journals)
        rank_panels.draw_speed(drawn[-1], shown, colors)
    else:
        panels.draw_memory(drawn[0], shown[0], labels, budget=not facts.roomy)
        if not facts.roomy:
            panels.draw_micro_batches(drawn[1], shown[0])
        panels.draw_speed(drawn[-1], shown[0])
    _steps(drawn, longest, edges)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure


def _title(figure: Figure, headline: str, details: str) -> None:
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.915))  # type: ignore[union-attr,call-arg]
    points = min(15.0, 15 * _TITLE / len(headline))
    figure.text(0.012, 0.968, headline, fontsize=points, fontweight="bold", va="center")
    figure.text(0.012, 0.934, details, fontsize=10.5, color="0.25", va="center")


def _steps(panels: Sequence[Axes], rows: Sequence[_Row], edges: tuple[float, float]) -> None:
    """Give the panels one axis of steps, with a vertical line before each epoch."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    epochs = [int(row["step"]) for last, row in pairwise(rows) if row["epoch"] != last["epoch"]]
    for axes in panels:
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
        axes.set_xlim(*edges)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.tick_params(labelbottom=axes is panels[-1])
        for step in epochs if len(epochs) < _EPOCHS else ():
            axes.axvline(step - 0.5, color="0.85", linewidth=0.8, zorder=0)
    lines = " (vertical lines: a new epoch)" if 0 < len(epochs) < _EPOCHS else ""
    panels[-1].set_xlabel(f"optimizer step{lines}")
