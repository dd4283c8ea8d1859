"""Comparison of a candidate with the serving model: the decision whether it is promoted.

Classes that the serving model knows are measured on the validation images of the old data, which both models are judged
by. New classes, and classes that the old data does not show because they were new in an earlier attempt, are measured
on the validation images of the new data. Measuring and deciding are separate: the decision is a function of the table
of classes alone.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolov12.printable import printable

__all__ = ["ClassChange", "Verdict", "compare", "decide"]

_ROUNDING = 1e-9  # a fall of exactly the margin is allowed, whatever the difference of two floats is


@dataclass(frozen=True)
class ClassChange:
    """One class, measured with both models."""

    name: str
    is_new: bool
    """True if the serving model does not know the class."""
    objects: int
    """Number of objects of the class in the validation images that it was measured on."""
    serving: float | None
    """AP50-95 of the serving model; None for a new class or one without objects."""
    candidate: float | None
    """AP50-95 of the candidate; None for a class without objects."""

    @property
    def fall(self) -> float:
        """Fall of AP50-95 of a measured class. It is negative if the candidate is better."""
        assert self.candidate is not None
        return (self.serving or 0.0) - self.candidate


@dataclass(frozen=True)
class Verdict:
    """Decision about a candidate."""

    promote: bool
    reasons: tuple[str, ...]
    """Sentences with classes and numbers. If the candidate is not promoted, each of them is a reason for that."""
    classes: tuple[ClassChange, ...]
    """All classes: those of the serving model first, then the new ones."""
    margin: float
    """Largest fall of AP50-95 of a known class that is allowed."""


@dataclass(frozen=True)
class _Measured:
    """One model on the validation images of one data set."""

    objects: Mapping[int, int]  # by class id of the model, as the next one
    aps: Mapping[int, float]


def compare(
    serving: Path, candidate: Path, old_data: Path, new_data: Path, margin: float, *, val_args: Mapping[str, Any]
) -> Verdict:
    """Measure both models and decide whether the candidate is promoted.

    Class ids of models and data sets may differ: classes are matched by name. A class that a data set lacks is not
    measured.

    Args:
        serving: Weights of the serving model.
        candidate: Weights of the candidate.
        old_data: Data set yaml whose validation images measure the classes that the serving model knows.
        new_data: Data set yaml whose validation images measure the classes that those of `old_data` do not show. It may
            be the same.
        margin: Largest fall of AP50-95 of a known class that is allowed, such as 0.02.
        val_args: Arguments of Ultralytics' `val`, such as `imgsz`, `batch`, `device` and `mem_limit`.

    Returns:
        The decision, with its reasons and the table of classes.

    Raises:
        DataError: A data set cannot be used.
        DoesNotFitError: Not even one image fits into memory.
        WeightsError: A weight file cannot be used.
    """
    from ultralytics import YOLO

    from yolov12.training.classes.names import match

    models = {path: YOLO(str(path)) for path in (serving, candidate)}
    names = models[candidate].names
    counterparts = match(models[serving].names, names)
    before, after = (_measure(models[path], old_data, val_args) for path in (serving, candidate))
    new = [index for index, counterpart in enumerate(counterparts) if counterpart is None]
    unseen = [index for index in models[serving].names if not before.objects.get(index)]
    new_before, new_after = before, after
    if new_data != old_data and (new or unseen):
        new_after = _measure(models[candidate], new_data, val_args)
        if unseen:
            new_before = _measure(models[serving], new_data, val_args)
    rows = []
    for index, name in models[serving].names.items():
        then, now = (new_before, new_after) if index in unseen else (before, after)
        ap = then.aps.get(index)
        found = now.aps.get(counterparts.index(index)) if index in counterparts else None
        # A class that the candidate does not know is one that it never finds.
        rows.append(ClassChange(name, False, then.objects.get(index, 0), ap, found if ap is None else found or 0.0))
    for index in new:  # the old data has it if somebody has added it there
        now = new_after if new_after.objects.get(index) else after
        rows.append(ClassChange(names[index], True, now.objects.get(index, 0), None, now.aps.get(index)))
    return decide(rows, margin)


def decide(classes: Sequence[ClassChange], margin: float) -> Verdict:
    """Decide whether a candidate is promoted.

    It is promoted if no known class fell by more than the margin, and if the mean over all measured classes did not
    fall. For the serving model, a class that it does not know counts as 0 in the mean.

    Args:
        classes: The table of classes.
        margin: Largest fall of AP50-95 of a known class that is allowed.

    Returns:
        The decision. Without any measured class, or without a known one although the serving model knows some, the
        candidate is not promoted, because nothing shows that it is as good.
    """
    measured = [row for row in classes if row.candidate is not None]
    known = [row for row in measured if not row.is_new]
    against = [
        f"{printable(row.name)} fell from {row.serving or 0:.3f} to {row.candidate:.3f}, more than the margin of "
        f"{margin:g}."
        for row in sorted(known, key=lambda row: -row.fall if math.isfinite(row.fall) else -math.inf)
        if not row.fall <= margin + _ROUNDING  # this is also true if a value is not a number
    ]
    if not measured or (not known and any(not row.is_new for row in classes)):
        against.append(
            "None of the classes that the serving model knows has objects in the validation images, so nothing shows "
            "that the candidate is as good."
        )
    before, after = _mean(row.serving or 0.0 for row in measured), _mean(row.candidate or 0.0 for row in measured)
    if not after >= before - _ROUNDING:
        digits = 3 if f"{before:.3f}" != f"{after:.3f}" else 6
        against.append(f"The mean over {_counted(measured)} fell from {before:.{digits}f} to {after:.{digits}f}.")
    reasons = against or [*_in_favour(known, margin), *_new(measured), _mean_change(measured, before, after)]
    return Verdict(not against, tuple(reasons), tuple(classes), margin)


def _in_favour(known: Sequence[ClassChange], margin: float) -> list[str]:
    if not known:
        return []
    worst = max(known, key=lambda row: row.fall)
    if worst.fall <= 0:
        return ["No known class fell."]
    return [
        f"No known class fell by more than the margin of {margin:g}. The largest fall is that of "
        f"{printable(worst.name)}, from {worst.serving:.3f} to {worst.candidate:.3f}."
    ]


def _new(measured: Sequence[ClassChange]) -> list[str]:
    return [f"{printable(row.name)} is new and has {row.candidate:.3f}." for row in measured if row.is_new]


def _mean_change(measured: Sequence[ClassChange], before: float, after: float) -> str:
    if f"{before:.3f}" == f"{after:.3f}":
        return f"The mean over {_counted(measured)} stayed at {after:.3f}."
    word = "rose" if after > before else "fell"  # by rounding at most
    return f"The mean over {_counted(measured)} {word} from {before:.3f} to {after:.3f}."


def _counted(measured: Sequence[ClassChange]) -> str:
    from yolov12.training.classes.names import counted

    return counted(len(measured))


def _mean(values: Any) -> float:
    every = list(values)
    return sum(every) / len(every) if every else 0.0


def _measure(yolo: Any, data: Path, val_args: Mapping[str, Any]) -> _Measured:
    """Validate a model on the validation images of a data set, whose classes may have other ids."""
    from yolov12.training.classes import table

    with tempfile.TemporaryDirectory() as folder:
        quiet = {"plots": False, "save_json": False, "save_txt": False, "verbose": False}
        where = {"project": folder, "name": "val", "exist_ok": True}
        metrics = yolo.val(validator=_by_name(yolo), **{**val_args, **quiet, **where, "data": str(data)})
    objects = metrics.nt_per_class
    return _Measured(
        {} if objects is None else {index: int(count) for index, count in enumerate(objects)},
        {index: ap for index, (_, ap) in table.aps(metrics).items()},
    )


def _by_name(yolo: Any) -> Any:
    """Return a validator class that gives the labels of a data set the class ids of the model, by name."""
    from yolov12.training.classes.names import match
    from yolov12.training.data.replay import with_class_ids

    stock: Any = yolo._smart_load("validator")

    class ByName(stock):  # type: ignore[misc]  # the class depends on the model's task
        def build_dataset(self, *args: Any, **kwargs: Any) -> Any:
            dataset = super().build_dataset(*args, **kwargs)
            with_class_ids(dataset.labels, dict(enumerate(match(self.names, self.data["names"]))))
            return dataset

    return ByName
