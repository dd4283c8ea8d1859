"""Checkpoint of a run that has completed no epoch yet.

A run resumes from `last.pt`. If there is none when the state in mid-epoch is saved, Ultralytics' own method writes one
that says so. A `save_model` of the user's own is called at the ends of epochs only, as without this package. If it
writes no `last.pt`, that of this package does not stay, so that nobody takes it for the result of the training.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

from yolov12.training.adapter.users_code import is_ultralytics

__all__ = ["RESUMED", "FirstCheckpoint"]

RESUMED = "yolov12_resumed_first"
"""Attribute of a trainer: True if it resumes from a checkpoint that `FirstCheckpoint` has written."""


class FirstCheckpoint:
    """Writes the checkpoint, and removes it.

    Args:
        trainer: Ultralytics trainer that has been set up.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._written: tuple[int, int] | None = None
        if vars(trainer).pop(RESUMED, False) and Path(str(trainer.args.resume)).resolve() == trainer.last.resolve():
            self._note()

    def write(self) -> None:
        """Write `last.pt`, unless there is one.

        Raises:
            RuntimeError: The model cannot be pickled, or the method of Ultralytics' class is the user's own.
        """
        from ultralytics.engine.trainer import BaseTrainer

        trainer = self._trainer
        if trainer.last.exists():
            return
        if not is_ultralytics(BaseTrainer.save_model):
            raise RuntimeError(f"nor {trainer.last} before the end of the epoch: save_model is your own")
        now = {name: getattr(trainer, name) for name in ("epoch", "fitness", "save_period")}
        vars(trainer).update(epoch=-1, fitness=math.nan, save_period=-1)
        try:
            BaseTrainer.save_model(trainer)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise RuntimeError(f"nor {trainer.last}: {error}") from error
        finally:
            vars(trainer).update(now)
        self._note()

    def _note(self) -> None:
        if not is_ultralytics(self._trainer.save_model):
            self._written = _identity(self._trainer.last)

    def epoch_ends(self) -> None:
        """Remove what `write` has written, unless the end of the epoch has replaced it."""
        written, self._written = self._written, None
        if written is not None and self._trainer.last.exists() and _identity(self._trainer.last) == written:
            self._trainer.last.unlink()


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns
