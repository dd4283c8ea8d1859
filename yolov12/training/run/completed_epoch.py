"""End of an epoch that was complete before a run was interrupted: on the resume, nothing of its end happens twice.

The run resumes from the state after the last optimizer step that was saved, so Ultralytics' loop passes the end of that
epoch again. Its batches up to this step are placeholders. Those after it, if there are any, are trained on again, as
their gradients or their updates are not in the state. The learning rate and the early stopping advance as they did, and
the checkpoint, which a kill may have cut off from `best.pt`, is written again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from yolov12.training.data.random_state import set_random_state

__all__ = ["CompletedEpoch"]

_OF_BATCHES = ("on_train_batch_start", "on_train_batch_end")
_EVENTS = (*_OF_BATCHES, "on_train_epoch_start", "on_train_epoch_end", "on_model_save", "on_fit_epoch_end")


class CompletedEpoch:
    """Keeps a trainer from running callbacks, validating, and writing to results.csv in its first epoch.

    If some of its batches are trained on again, their callbacks run, and that of its start.

    Args:
        trainer: Ultralytics trainer.
        metrics: Metrics of the epoch as its checkpoint has them, with its fitness.
        random: State of the random generators at the checkpoint, as validation draws from them; None if unknown.
        placeholders: Number of batches of the epoch that are not trained on again.
        is_first: True on rank 0, the only one with metrics.
    """

    def __init__(
        self,
        trainer: Any,
        metrics: Mapping[str, Any],
        random: Mapping[str, Any] | None,
        placeholders: int,
        *,
        is_first: bool,
    ) -> None:
        self._trainer, self._metrics, self._random, self._is_first = trainer, metrics, random, is_first
        self._placeholders = placeholders
        self._is_over = False
        self._stock_callbacks, self._stock_validate = trainer.run_callbacks, trainer.validate
        self._stock_save_metrics = trainer.save_metrics

    def begin(self) -> None:
        """Take over the trainer's methods, before the adapter does."""
        trainer = self._trainer
        trainer.run_callbacks, trainer.validate = self._run_callbacks, self._validate
        trainer.save_metrics = self._save_metrics

    def _run_callbacks(self, event: str) -> None:
        if self._is_over or event not in _EVENTS or self._is_trained_on(event):
            self._stock_callbacks(event)
        elif event == "on_fit_epoch_end":
            self._is_over = True
            if self._random is not None:
                set_random_state(self._random)

    def _is_trained_on(self, event: str) -> bool:
        loader = self._trainer.train_loader
        if event == "on_train_epoch_start":
            return len(loader) > self._placeholders
        return event in _OF_BATCHES and getattr(loader, "position", math.inf) > self._placeholders

    def _validate(self) -> Any:
        if self._is_over:
            return self._stock_validate()
        if not self._is_first:
            return None, None
        metrics, trainer = dict(self._metrics), self._trainer
        fitness = metrics.pop("fitness")
        if trainer.best_fitness is None or trainer.best_fitness < fitness:
            trainer.best_fitness = fitness
        return metrics, fitness

    def _save_metrics(self, metrics: dict[str, Any]) -> None:
        if self._is_over:
            self._stock_save_metrics(metrics)
