"""Complete state of a training after an optimizer step: saved to a file, and restored from it.

Ultralytics saves the end of an epoch in half precision. The state file beside `last.pt` holds the exact state in the
middle of an epoch: order of images, augmentation, weights, optimizer, moving average, scaler, and the engine's models.
A run that resumes from it ends like a run that was not interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Number
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from yolov12 import files
from yolov12.mas import Engine
from yolov12.mas.distributed.ranks import ALONE, Ranks
from yolov12.training.data.loader import ResumableLoader
from yolov12.training.data.random_state import random_state, set_random_state
from yolov12.training.data.resolution import ResolutionControl
from yolov12.training.run.first_checkpoint import FirstCheckpoint
from yolov12.training.run.interruption import Interruption
from yolov12.training.run.options import Interval
from yolov12.training.run.result_rows import drop_rows
from yolov12.training.run.saved_state import FILE, VERSION

__all__ = ["RunSaver"]

_COST = 0.01  # largest fraction of the time that saves at the ends of epochs may take
_NEVER = 2**62


class RunSaver:
    """Saves the state of one training, and restores it.

    Args:
        trainer: Ultralytics trainer that has been set up.
        model: Its model without wrappers.
        engine: Runs its batches.
        loader: Loader of its batches.
        every: Interval at which to save.
        resolution: Chooses the size of images.
        of_epoch: Column → value for results.csv that is collected during an epoch.
        interruption: Signals of this process.
        ranks: Processes that share each batch. Rank 0 saves.
    """

    def __init__(
        self,
        trainer: Any,
        model: nn.Module,
        engine: Engine,
        loader: ResumableLoader,
        every: Interval,
        resolution: ResolutionControl,
        of_epoch: dict[str, float],
        interruption: Interruption,
        ranks: Ranks = ALONE,
    ) -> None:
        self._trainer, self._model, self._engine, self._loader = trainer, model, engine, loader
        self._resolution, self._of_epoch = resolution, of_epoch
        self._ranks = ranks
        self._saves = ranks.rank == 0 and bool(trainer.args.save)
        self._every = every if self._saves else Interval()
        self._at_epoch_ends = self._every != Interval()
        self._moment: dict[str, Any] | None = None
        self._buffers: dict[str, Tensor] = {}
        self._saved_s, self._cost_s, self._steps = time.monotonic(), 0.0, 0
        self._resumed: Mapping[str, Any] | None = None  # set until all of its placeholder batches have run
        self._whole = True
        self._is_saved = False  # by this process, or by the one before, from whose state it goes on
        self._first_checkpoint = FirstCheckpoint(trainer)
        self.epoch_ends = self._first_checkpoint.epoch_ends
        self.interruption = interruption

    def begin(self) -> None:
        """Handle signals until `end`."""
        self.interruption.watch()

    @property
    def path(self) -> Path:
        """Path of the state file."""
        return Path(self._trainer.wdir, FILE)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Return the context of an optimizer step, which delays signals. At its end the state is saved if it is due."""
        with self.interruption.deferred():
            self._whole = False  # parameters may change from here on
            yield
            self._take_note()
            self._whole = True
            seconds = time.monotonic() - self._saved_s
            epoch_end = self._at_epoch_ends and self._loader.is_last and seconds * _COST >= self._cost_s
            if self._moment is not None and (epoch_end or self._every.due(self._steps, seconds)):
                self._save_or_warn()

    def complete(self) -> None:
        """Delete the state, as the training is complete."""
        self.path.unlink(missing_ok=True)
        self._steps, self._is_saved = 0, False

    def flush(self) -> None:
        """Write all rows to the journal."""
        self._engine.flush()

    def end(self) -> None:
        """Release the signal handlers."""
        self.interruption.stop()

    def save_at_last(self) -> None:
        """Save a run that ends early, unless it ended in the middle of an optimizer step, and say how it goes on.

        The exception of a signal is not raised here, so that what ends the run reaches the other ranks.
        """
        with self.interruption.kept():
            if self._saves and self._whole and self._steps:
                self._save_or_warn()
            last = self._trainer.last
            if self._is_saved and last.exists():
                from ultralytics.utils import LOGGER

                LOGGER.info(
                    "resume: this run is saved: it goes on with the same command and resume=auto, or with "
                    f"model={last} resume=True"
                )

    def _take_note(self) -> None:
        if not self._saves:
            return
        trainer = self._trainer
        # The loader does not know the place of another's batch, nor a loop of the user's own what Ultralytics' does.
        if self._loader.seed is None or trainer.tloss is None or not hasattr(trainer, "epoch_time_start"):
            self._moment, self._steps = None, 0
            return
        self._moment = {
            "epoch": trainer.epoch,
            "loader": self._loader.state_dict(),
            "random": random_state(),
            "cuda": [torch.cuda.get_rng_state(trainer.device)] if trainer.device.type == "cuda" else [],
            "accumulate": trainer.accumulate,
            "loss": trainer.loss.detach(),
            "tloss": dict(trainer.tloss),
            "resolution": self._resolution.state_dict(),
            "of_epoch": dict(self._of_epoch),
            # Every batch changes BatchNorm's statistics, and the run may be interrupted before the next update.
            "buffers": self._kept_buffers(),
            "fitness": _plain(trainer.fitness),
            "best_fitness": _plain(trainer.best_fitness),
            "stopper": _numbers(trainer.stopper, ("best_fitness", "best_epoch", "possible_stop")),
            "criterion": _numbers(self._criterion, vars(self._criterion)),
            "epochs": trainer.epochs,
            "epoch_s": time.time() - trainer.epoch_time_start,
        }
        self._steps += 1

    def _kept_buffers(self) -> dict[str, Tensor]:
        buffers = dict(self._model.named_buffers())
        if _kinds(self._buffers) != _kinds(buffers):  # at first, and after a user has replaced a layer or a buffer
            self._buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        else:
            # A few launches instead of hundreds.
            torch._foreach_copy_(list(self._buffers.values()), list(buffers.values()))
        return self._buffers

    def _is_finite(self) -> bool:
        """Return whether loss and weights are finite. If not, Ultralytics recovers at the end of the epoch."""
        assert self._moment is not None
        sums = [parameter.detach().sum().float() for parameter in self._model.parameters()]
        return bool(torch.stack([self._moment["loss"].sum().float(), *sums]).isfinite().all())

    def _save_or_warn(self) -> None:
        try:
            if self._is_finite():  # the device has answered, so no collective of it waits for a rank that is gone
                with self._ranks.saving():
                    self._save()
        except (OSError, RuntimeError) as error:  # a full disk or a lost device: the previous save is kept
            from ultralytics.utils import LOGGER

            LOGGER.warning(f"resume: {self.path} could not be written, {error}")

    def _save(self) -> None:
        """Save the state after the last optimizer step. The parameters have not changed since then."""
        assert self._moment is not None
        begin = time.monotonic()
        trainer, buffers = self._trainer, self._moment["buffers"]
        self._engine.flush()
        journal = self._engine.journal
        state = {
            "version": VERSION,
            **{key: value for key, value in self._moment.items() if key != "buffers"},
            "rows": journal.next_step - 1 if journal is not None else None,
            "model": {name: buffers.get(name, value) for name, value in self._model.state_dict().items()},
            "ema": trainer.ema.ema.state_dict(),
            "updates": trainer.ema.updates,
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.write(self.path, lambda file: torch.save(state, file))
        try:
            self._first_checkpoint.write()
        except RuntimeError:
            self.path.unlink()  # without a checkpoint, it is of no use
            raise
        self._is_saved = True
        self._saved_s, self._steps = time.monotonic(), 0
        self._cost_s = self._saved_s - begin

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore a run. Its first epoch begins with placeholders for the finished batches.

        Args:
            state: Result of `saved_state.find`.
        """
        from ultralytics.utils import LOGGER

        trainer = self._trainer
        _load(self._model, state["model"])
        _load(trainer.ema.ema, state["ema"])
        trainer.ema.updates = state["updates"]
        for saved, group in zip(state["optimizer"]["param_groups"], trainer.optimizer.param_groups, strict=True):
            saved["fused"] = group.get("fused")  # the current device decides, as when Ultralytics resumes
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scaler.load_state_dict(state["scaler"])
        trainer.fitness, trainer.best_fitness = state["fitness"], state["best_fitness"]
        vars(trainer.stopper).update(state["stopper"])
        vars(self._criterion).update(state["criterion"])
        trainer.start_epoch = state["epoch"]
        trainer.scheduler.last_epoch = state["epoch"] - 1
        drop_rows(trainer.csv, state["epoch"] + (state["validated"] is not None))
        self._resumed, self._is_saved = state, self._saves
        self._resolution.load_state_dict(state["resolution" if "resolution" in state else "data_layer"])
        same = self._loader.load_state_dict(state["loader"], self._go_on)
        position = state["loader"]["position"]
        LOGGER.info(f"resume: epoch {state['epoch'] + 1}, after batch {position} of {len(self._loader)}")
        if not same:
            LOGGER.warning("resume: the state is of an older version: images are augmented differently from here on")

    @property
    def _criterion(self) -> Any:
        """Criterion of a model with two heads, whose weights depend on the epoch; otherwise an empty object."""
        criterion = getattr(self._model, "criterion", None)
        return criterion if hasattr(criterion, "update") else SimpleNamespace()

    @property
    def skipping(self) -> bool:
        """True while batches are placeholders for batches that were trained on before the interruption."""
        return self._resumed is not None

    def skip(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and items for a placeholder batch."""
        assert self._resumed is not None
        # Only the last placeholder may count as an update of the loop.
        last = self._loader.position == self._resumed["loader"]["position"]
        if last:
            self._loader.repeated()
        self._trainer.accumulate = 1 if last else _NEVER
        device = self._trainer.device
        loss = self._resumed["loss"].to(device, copy=True).requires_grad_()
        return loss, {name: item.to(device) for name, item in self._resumed["tloss"].items()}

    def _go_on(self) -> None:
        state, self._resumed, trainer = self._resumed, None, self._trainer
        assert state is not None
        if trainer.args.time:  # the schedule depends on the time of epochs
            trainer.epochs = trainer.args.epochs = state["epochs"]
            trainer.train_time_start = trainer.epoch_time_start = time.time() - state["epoch_s"]
        trainer.accumulate = state["accumulate"]
        trainer.tloss = {name: item.to(trainer.device) for name, item in state["tloss"].items()}
        self._of_epoch.update(state["of_epoch"])
        set_random_state(state["random"])
        if state["cuda"] and trainer.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"][0], trainer.device)


def _kinds(tensors: Mapping[str, Tensor]) -> list[tuple[str, torch.Size, torch.dtype]]:
    return [(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load weights and buffers. A buffer may have changed its shape in the training, as in a layer that collects."""
    for name, buffer in module.named_buffers():
        if name in state and state[name].shape != buffer.shape:
            buffer.data = buffer.new_empty(state[name].shape)
    module.load_state_dict(state)


def _numbers(thing: Any, names: Iterable[str]) -> dict[str, Any]:
    values = {name: getattr(thing, name) for name in names}
    return {name: _plain(value) for name, value in values.items() if value is None or isinstance(value, Number)}


def _plain(value: Any) -> Any:
    """Return a number as a plain Python type, as the file is read without any other types."""
    return value if value is None or isinstance(value, (bool, int)) else float(value)
