"""classes.csv and classes.png: average precision of each class before and after a training that changes the classes.

"Before" is the model that the training begins with, on the training's own validation data. It predicts no class that it
does not know. "After" is best.pt.
"""

from __future__ import annotations

import csv
import functools
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yolov12 import files
from yolov12.training.classes import head, picture
from yolov12.training.data.random_state import random_state, set_random_state

__all__ = ["FILE", "ClassRow", "aps", "as_text", "begin", "read", "shown", "write"]

FILE = "classes.csv"
_COLUMNS = ("class", "known", "objects", "before_AP50", "before_AP50-95", "after_AP50", "after_AP50-95")
_SHOWN = 40  # most classes that are printed and drawn

_AP = tuple[float, float]


@dataclass(frozen=True)
class ClassRow:
    """One class."""

    name: str
    known: bool
    """True if the model knew the class before the training."""
    objects: int
    """Number of objects of the class in the validation data."""
    before: _AP | None
    """AP50 and AP50-95 before the training; None for a class that was not known or has no objects."""
    after: _AP | None
    """The same after the training; None before its end too."""


def begin(trainer: Any, change: head.ClassChange | None, *, wanted: bool) -> None:
    """Validate the model that a training begins with, and let the training complete the table at its end.

    A resumed training completes the table that it finds in its folder.

    Args:
        trainer: Ultralytics trainer that has been set up.
        change: Classes of the training and of its model; None if they are not known.
        wanted: True to make a table also if the classes are the same.
    """
    from ultralytics.utils import RANK
    from ultralytics.utils.metrics import DetMetrics

    file = Path(trainer.save_dir, FILE)
    if trainer.resume:
        if not file.exists():
            return
        rows = read(file)
    else:
        if RANK in (-1, 0):
            file.unlink(missing_ok=True)  # it belongs to an earlier run in this folder
        if change is None or change.knows_none or (change.is_none and not wanted):
            return
        validator = trainer.get_validator()
        if not isinstance(getattr(validator, "metrics", None), DetMetrics):
            return  # a validator of the user's own
        rows = _before(trainer, change, validator)
        if RANK in (-1, 0):
            write(file, rows)
    trainer.final_eval = functools.partial(_finish, trainer.final_eval, trainer, rows)


def read(file: Path) -> list[ClassRow]:
    """Read a table.

    Args:
        file: classes.csv.
    """

    def pair(row: Mapping[str, str], when: str) -> _AP | None:
        return (float(row[f"{when}_AP50"]), float(row[f"{when}_AP50-95"])) if row[f"{when}_AP50"] else None

    return [
        ClassRow(row["class"], row["known"] == "yes", int(row["objects"]), pair(row, "before"), pair(row, "after"))
        for row in csv.DictReader(io.StringIO(file.read_text("utf-8")))
    ]


def write(file: Path, rows: Sequence[ClassRow]) -> None:
    """Write a table.

    Args:
        file: classes.csv.
        rows: A row for each class.
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(_COLUMNS)
    for row in rows:
        values = [f"{ap:.5f}" for pair in (row.before, row.after) for ap in pair or ()]
        padded = ([] if row.before else ["", ""]) + values + ([] if row.after else ["", ""])
        table.writerow([row.name, "yes" if row.known else "no", row.objects, *padded])
    files.write(file, lambda stream: stream.write(text.getvalue().encode()))


def shown(rows: Sequence[ClassRow]) -> list[ClassRow]:
    """Choose the rows to print and draw: all, or of many classes the new ones and those that changed most.

    Args:
        rows: A row for each class.
    """
    if len(rows) <= _SHOWN:
        return list(rows)

    def change(index: int) -> float:
        before, after = rows[index].before, rows[index].after
        return abs(after[1] - before[1]) if before and after else 0.0

    order = sorted(range(len(rows)), key=lambda index: (rows[index].known, -change(index)))
    return [rows[index] for index in sorted(order[:_SHOWN])]


def as_text(rows: Sequence[ClassRow]) -> str:
    """Format a table for the log.

    Args:
        rows: A row for each class.
    """
    chosen = shown(rows)
    width = max(len("class"), *(len(row.name) for row in chosen))

    def ap(pair: _AP | None) -> str:
        return f"{pair[0]:>8.3f}{pair[1]:>10.3f}" if pair else f"{'-':>8}{'-':>10}"

    lines = [f"  {'':{width}} {'':>13}  {'before':>8}{'':>10}  {'after':>8}"]
    lines.append(f"  {'class':{width}} {'objects':>13}" + f"  {'AP50':>8}{'AP50-95':>10}" * 2)
    for row in chosen:
        is_new = "" if row.known else "new"
        lines.append(f"  {row.name:{width}} {is_new:>4} {row.objects:>8}  {ap(row.before)}  {ap(row.after)}")
    if len(chosen) < len(rows):
        lines.append(f"  and {len(rows) - len(chosen)} more")
    return "\n".join(lines)


def aps(metrics: Any) -> dict[int, _AP]:
    """Return AP50 and AP50-95 of the boxes of each class that has objects, by class id.

    Args:
        metrics: Metrics of an Ultralytics validation.
    """
    box = metrics.box
    return {
        int(index): (float(ap50), float(ap))
        for index, ap50, ap in zip(box.ap_class_index, box.ap50, box.ap, strict=True)
    }


def _before(trainer: Any, change: head.ClassChange, validator: Any) -> list[ClassRow]:
    from ultralytics.utils import LOGGER
    from ultralytics.utils.torch_utils import unwrap_model

    LOGGER.info("classes: validating the model that the training begins with")
    model = unwrap_model(trainer.ema.ema)
    model = deepcopy(getattr(model, "student_model", model))  # a distillation has a teacher as well
    head.silence(model, change.new)
    validator.args = copy(validator.args)
    for name in ("plots", "save_json", "save_txt", "verbose", "compile"):
        setattr(validator.args, name, False)
    validator.callbacks = defaultdict(list)  # a user's callbacks are for validations of the training
    state = random_state()
    try:
        validator(model=model)
    finally:
        set_random_state(state)
    found = aps(validator.metrics)
    objects = validator.metrics.nt_per_class
    return [
        ClassRow(
            name,
            index not in change.new,
            int(objects[index]) if objects is not None else 0,
            None if index in change.new else found.get(index),
            None,
        )
        for index, name in change.names.items()
    ]


def _finish(stock: Any, trainer: Any, rows: Sequence[ClassRow]) -> None:
    """Run Ultralytics' `final_eval`, which validates best.pt, and complete the table with its result."""
    from ultralytics.utils import LOGGER, RANK

    stock()
    if RANK not in (-1, 0):
        return
    file, found = Path(trainer.save_dir, FILE), aps(trainer.validator.metrics)
    rows = [replace(row, after=found.get(index)) for index, row in enumerate(rows)]
    write(file, rows)
    picture.save(shown(rows), file.with_suffix(".png"))
    LOGGER.info(f"classes: {file}, drawn in {file.with_suffix('.png').name}\n{as_text(rows)}")
