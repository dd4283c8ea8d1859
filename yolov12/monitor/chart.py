"""Charts made of characters. All functions are pure."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["bar", "columns", "rows_of_bars"]

_BLOCKS = " ▁▂▃▄▅▆▇█"
_LINE, _ASCII_LINE, _ASCII_BLOCKS = "─", "-", " #"


def bar(fraction: float, width: int, *, unicode: bool) -> str:
    """Return a horizontal bar that is filled to a fraction of its width."""
    full = min(width, max(round(fraction * width), 1 if fraction > 0 else 0))
    return ("█" if unicode else "#") * full + ("░" if unicode else ".") * (width - full)


def columns(steps: Sequence[int], width: int) -> list[list[int]]:
    """Distribute the steps of a run over the columns of a chart.

    Args:
        steps: Step numbers, in ascending order.
        width: Most columns. In a run with fewer steps, each gets the same number of columns.

    Returns:
        Indices into `steps` for each column. A column without a step has those of the column before it.
    """
    first, span = steps[0], max(steps[-1] - steps[0] + 1, 1)
    found: list[list[int]] = [[] for _ in range(min(width, span))]
    for index, step in enumerate(steps):
        found[min(max((step - first) * len(found) // span, 0), len(found) - 1)].append(index)
    for column in range(1, len(found)):
        found[column] = found[column] or found[column - 1]
    return [each for each in found for _ in range(max(width // span, 1))]


def rows_of_bars(
    heights: Sequence[float], top: float, height: int, line: Sequence[float] = (), *, unicode: bool
) -> list[str]:
    """Draw vertical bars, and a line above them.

    Args:
        heights: Height of the bar in each column, from 0 to `top`.
        top: Value at the upper edge.
        height: Number of rows.
        line: Height of the line in each column; empty for no line. It is hidden where a bar reaches it.
        unicode: Draw with block characters, which show eighths of a row. Otherwise with ASCII.

    Returns:
        The rows, from the upper one to the lower one, each as wide as there are columns.
    """
    blocks, dash = (_BLOCKS, _LINE) if unicode else (_ASCII_BLOCKS, _ASCII_LINE)
    eighths = len(blocks) - 1
    made = []
    for row in range(height - 1, -1, -1):
        cells = []
        for column, value in enumerate(heights):
            filled = value / top * height - row
            cell = blocks[min(max(round(filled * eighths), 0), eighths)]
            at = min(int(line[column] / top * height), height - 1) if line else -1
            cells.append(dash if cell == " " and at == row else cell)
        made.append("".join(cells))
    return made
