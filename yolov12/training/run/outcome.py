"""Text at the end of a training: where its files are, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yolov12.training.classes import table

__all__ = ["describe"]

_FIRST_PICTURES = ("val_batch0_pred.jpg", "confusion_matrix.png")


def describe(folder: Path, best: Path, csv: Path, next_steps: Sequence[tuple[str, str]] = ()) -> str:
    """Return the text. It names only files that exist, as `plots` and `save` may be off.

    Args:
        folder: Folder of the run.
        best: Weights that were trained.
        csv: The run's results.csv.
        next_steps: Commands, each with its purpose; empty for the validation of the weights.
    """
    lines = [f"Trained. Everything is in {folder}"]
    if best.exists():
        lines.append(f"  weights   {best}")
    curves, classes = folder / "results.png", folder / Path(table.FILE).with_suffix(".png")
    memory = folder / "memory.png"
    if curves.exists():
        lines.append(f"  curves    {curves} (numbers: {csv})")
    elif csv.exists():
        lines.append(f"  numbers   {csv}")
    if classes.exists():
        lines.append(f"  classes   {classes} (numbers: {table.FILE})")
    if memory.exists():
        lines.append(f"  memory    {memory} (numbers: memory.csv)")
    pictures = sorted({*folder.glob("*.png"), *folder.glob("*.jpg")} - {curves, classes, memory}, key=_rank)
    if pictures:
        names = ", ".join([str(pictures[0]), *(picture.name for picture in pictures[1:2])])
        lines.append(f"  pictures  {names}{' and others' if len(pictures) > 2 else ''}")
    if best.exists():
        steps = next_steps or [(f"yolov12 val model={best}", "")]
        width = max(len(command) for command, _ in steps)
        for index, (command, purpose) in enumerate(steps):
            line = f"{command:{width}}  # {purpose}" if purpose else command
            lines.append(f"{'Next: ' if index == 0 else '      '}{line}")
    return "\n".join(lines)


def _rank(picture: Path) -> tuple[int, str]:
    name = picture.name
    return (_FIRST_PICTURES.index(name) if name in _FIRST_PICTURES else len(_FIRST_PICTURES)), name
