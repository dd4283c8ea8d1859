"""Adapter between one Ultralytics trainer and the engine.

Ultralytics' training loop is unchanged. It calls `preprocess_batch`, the model, `optimizer_step` and a few other
methods of the trainer. The adapter replaces these methods on this trainer, so that they use the engine. They still call
the trainer's original methods. `trainer.model` stays the user's own model.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from yolov12.errors import ConfigError
from yolov12.mas import Engine, Share
from yolov12.mas.config import GROUPS
from yolov12.mas.distributed.ranks import Ranks, RankStatus
from yolov12.mas.step.snapshots import RandomState
from yolov12.training.adapter.detection import (
    DetectionTask,
    criterion_of,
    drawing_from,
    is_exact,
    knows_call,
    knows_loss,
    note_on_split,
)
from yolov12.training.adapter.display import Display
from yolov12.training.adapter.logical_batch import LogicalBatch
from yolov12.training.adapter.memory_needs import remember
from yolov12.training.adapter.plotting import drawn
from yolov12.training.adapter.sharing import share_batches
from yolov12.training.adapter.users_code import Notices, Replaced, check_split, is_ultralytics, show_whole
from yolov12.training.adapter.validation import over_limit
from yolov12.training.data.augmentation import chosen, note_host
from yolov12.training.data.loader import SKIPPED, ResumableLoader, resumable
from yolov12.training.data.resolution import ResolutionControl
from yolov12.training.data.sharing import SHARE, Sharing
from yolov12.training.data.waiting import waited_for_data
from yolov12.training.data.workers import WorkersControl
from yolov12.training.run import run_folder
from yolov12.training.run.interruption import Interruption
from yolov12.training.run.options import Interval
from yolov12.training.run.run_state import RunSaver

__all__ = ["RUNS", "SAVER", "TrainerAdapter"]

RUNS, SAVER = "yolov12_runs", "yolov12_saver"
"""Name of the trainer's attribute that holds its `RunSaver`."""


class TrainerAdapter:
    """Replaces methods of one trainer, so that the engine runs its batches.

    Args:
        trainer: Ultralytics trainer that has been set up.
        model: Its model without wrappers.
        task: Splits the trainer's batches.
        engine: Runs the trainer's batches.
        resolution: Chooses the size of images.
        ranks: Processes that share each batch.
    """

    def __init__(
        self,
        trainer: Any,
        model: nn.Module,
        task: DetectionTask,
        engine: Engine,
        resolution: ResolutionControl,
        ranks: Ranks,
    ) -> None:
        self._trainer, self._model, self._task, self._engine = trainer, model, task, engine
        self._resolution, self._ranks = resolution, ranks
        self.saver: RunSaver | None = None  # None for a loader of the user's own, which cannot be resumed
        self._loader: ResumableLoader | None = None
        self._choose_workers: Callable[[], None] = lambda: None
        self._interruption = Interruption()
        self._sharing: Sharing | None = None
        self._display = Display(trainer.csv)
        self._updates_asked = 0
        self._has_run = False  # True if the engine ran a batch after the last update
        self._is_due = False  # True if the next call of `preprocess_batch` comes from the training loop
        self._notices, self._knows_preprocess = Notices(silent=ranks.rank > 0), is_ultralytics(trainer.preprocess_batch)
        self._stock_update, self._stock_validate = trainer.optimizer_step, trainer.validate
        self._stock_memory, self._stock_header = trainer._get_memory, trainer.progress_string
        self._stock_plot, self._stock_warmup = trainer.plot_training_samples, trainer._get_warmup_iterations
        self._stock_callbacks, self._stock_save = trainer.run_callbacks, trainer.save_metrics
        self._hooks = {"on_train_epoch_start": self._epoch_starts, "on_train_epoch_end": self._epoch_ends}
        self._hooks["teardown"] = self._finish

    def take_over_loader(self) -> None:
        """Replace the trainer's loader with one that can be resumed and that ranks can share.

        Raises:
            ConfigError: Several processes cannot share the loader.
        """
        trainer, engine, ranks = self._trainer, self._engine, self._ranks
        if not resumable(trainer.train_loader):
            if ranks.size == 1:
                note_host(trainer.args.augment_on, "the loader is your own")
                return
            raise ConfigError("a loader of your own cannot be shared among processes: train in one, or with mas=False")
        if ranks.size > 1:
            self._sharing = share_batches(trainer, ranks, engine, self._resolution)
        arrange = engine.config.bn_group != 0 and trainer.batch_size > (engine.config.bn_group or GROUPS[0])
        loader = ResumableLoader(
            trainer.train_loader,
            trainer.args.imgsz,
            arrange=arrange and self._sharing is None,  # with several ranks, no rank knows the whole batch
            sharing=self._sharing,
            stopwatch=engine.meter.stopwatch,
            epoch=trainer.start_epoch,
        )
        augmentation = chosen(trainer, self._knows_preprocess)
        trainer.train_loader = self._loader = loader.take_over(augmentation)
        self._choose_workers = WorkersControl(trainer, loader, ranks, engine.note).epoch_ends
        if (before := getattr(trainer, SAVER, None)) is not None:
            before.end()
        self._interruption = Interruption()
        interval = Interval.parse(trainer.args.save_every)
        states = self._resolution, self._display.of_epoch, self._interruption
        self.saver = RunSaver(trainer, self._model, engine, loader, interval, *states, ranks)
        setattr(trainer, SAVER, self.saver)
        if getattr(trainer, RUNS, False):  # not if a user only looks at its loaders
            self.saver.begin()
        self._hooks |= {"on_train_batch_end": loader.batch_ends, "on_fit_epoch_end": self.saver.epoch_ends}

    def take_over(self) -> None:
        """Replace the trainer's methods with those of this adapter, until its training ends."""
        trainer = self._trainer
        if self._ranks.size > 1 and trainer.args.time:
            trainer._get_warmup_iterations = self._warmup
        self._replaced = Replaced(
            trainer, run_callbacks=self._run_callbacks, preprocess_batch=self._logical, optimizer_step=self._update,
            validate=self._validate, _get_memory=self._memory, plot_training_samples=self._plot,
            progress_string=lambda: self._display.header(str(self._stock_header())),
            save_metrics=lambda metrics: self._stock_save(self._display.in_order(metrics)),
        )  # fmt: skip

    def _run_callbacks(self, event: str) -> None:
        """Run the callbacks, which users may replace. After some, the loop asks for its batches, or takes one."""
        if event == "on_train_end" and self.saver is not None:
            self.saver.complete()  # before the callbacks, which may fail
        if event == "teardown":
            self._replaced.restore()  # likewise
        loader = self._loader
        if loader is not None:
            is_loops, loader.is_loops = loader.is_loops, False
        with self._interruption.users_code():
            self._stock_callbacks(event)
        if event == "on_train_epoch_start":
            loader = self._followed_loader()
        self._is_due = event == "on_train_batch_start"
        if (hook := self._hooks.get(event)) is not None:
            hook()
        if loader is not None:  # a user may run callbacks of further events
            loader.is_loops = event == "on_train_epoch_start" or (is_loops and event != "on_train_batch_start")

    def _followed_loader(self) -> ResumableLoader | None:
        """Take over a new loader of Ultralytics, as that of the smaller batch with which its loop begins again.

        A loader of the user's own may stand around the one that was taken over, which goes on then.
        """
        trainer = self._trainer
        if self.saver is not None and resumable(trainer.train_loader) and self._ranks.size == 1:
            self.saver.complete()  # its state is of the old loader
            self._resolution.join(trainer.train_loader.dataset, trainer.args)
            self.take_over_loader()
        return self._loader

    def _logical(self, batch: dict[str, Any]) -> Any:
        """Wrap a batch of the training loop as a `LogicalBatch`, still on the host. Preprocess any other batch."""
        share = batch.pop(SHARE, None)
        if not self._is_due and share is None:
            return self._task.preprocess(batch)
        self._is_due = False
        logical = LogicalBatch.of(batch, share, self._model, self._preprocess, self._run)
        if SKIPPED in batch:
            logical.show_host()
        return logical

    def _preprocess(self, batch: dict[str, Any]) -> Any:
        self._seed()
        return self._task.preprocess(batch)

    def _preprocess_again(self, draw: Any, batch: dict[str, Any]) -> Any:
        state = RandomState(self._trainer.device)
        try:
            with drawing_from(draw):
                return self._task.preprocess(batch)
        finally:
            state.restore()

    def _seed(self) -> None:
        if self._loader is not None and self._loader.seed is not None and self._trainer.args.multi_scale > 0:
            random.seed(self._loader.seed)  # the image size depends on the place of the batch, on all ranks alike

    def _run(self, batch: LogicalBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Run a logical batch with the engine. Its gradient is then on the parameters."""
        trainer, share, model = self._trainer, batch.share, self._model
        if self.saver is not None and batch.is_placeholder:
            # The loop uses the criterion at the end of an epoch, even if all batches of the epoch were skipped.
            criterion_of(model)
            return self.saver.skip()
        if share is None:
            self._interruption.check()
        if not self._knows_preprocess:
            show_whole(batch, trainer.device, self._engine.meter.release, self._notices)
        host = batch.shown() if batch.is_seen else batch.host  # code that read the batch may have changed it
        if not self._can_split(model, host):
            return model(batch.shown())  # type: ignore[no-any-return]
        self._task.is_preprocessed = batch.is_seen
        if not batch.is_seen:
            self._seed()
        host = self._resolution.before(host, self._fits)
        self._note_sizes()

        def smaller(batch: dict[str, Any]) -> dict[str, Any] | None:
            nonlocal host
            found = self._resolution.smaller(batch)
            self._note_sizes()
            host = found or host
            return found

        if self._loader is not None and self._loader.times is not None:
            self._engine.loaded(self._loader.times)
        result = self._engine.step(
            host,
            share,
            smaller=None if trainer.args.mas_data == "off" else smaller,
            stop_requested=lambda: self._interruption.due,
        )
        self._has_run = True
        if len(result.micro_batches) > 1 and (key := self._task.unknown(host)):
            check_split(key, self._notices, is_training=self._updates_asked > 0)
        self._share_ends(share, result.statuses)
        self._resolution.after(self._fits)
        self._note_sizes()
        run_folder.keep_group(trainer, self._engine.bn_group, is_first=not self._ranks.rank)
        self._display.add(result)
        batch.describe(self._task.facts, partial(self._preprocess_again, self._task.draw), host)
        loss = result.loss.sum(0) if result.loss.ndim > 1 else result.loss  # of two heads, see loss_terms.py
        # The loss is a leaf tensor, so the `backward` of Ultralytics' loop changes no gradient of a parameter.
        return loss.requires_grad_(), dict(result.items)

    def _note_sizes(self) -> None:
        for event in self._resolution.take_events():
            self._engine.note(event)

    def _fits(self, size: int) -> bool:
        return self._engine.would_fit(size, size, whole_group=self._resolution.is_eager)

    def _share_ends(self, share: Share | None, statuses: Sequence[RankStatus]) -> None:
        """Handle the reports of all ranks. If one rank got a signal, all ranks end after this step."""
        if share is None or self._sharing is None:
            return
        if any(status.stop for status in statuses):
            self._interruption.check()
            raise SystemExit(128 + signal.SIGTERM)
        self._sharing.observe(statuses)

    def _can_split(self, model: nn.Module, batch: dict[str, Any]) -> bool:
        """Return whether the batch can be split and its parts' losses can be combined. Also log how batches run."""
        reason = ""
        if not (knows_call(model) and knows_loss(model)):
            reason = "the loss is not one of Ultralytics' own"
        elif not self._task.splits(batch):
            reason = "the batch does not tell which image its objects belong to"
        if reason and self._ranks.size > 1:
            raise ConfigError(f"{reason}, so several processes cannot share it: train in one, or with mas=False")
        line = f"memory: {reason}: batches run as Ultralytics runs them" if reason else ""
        self._notices.hold(line or note_on_split(model, exact=self._engine.config.exact))
        return not reason

    def _warmup(self, batches: int) -> int:
        """Use the same number of epochs on all ranks: Ultralytics estimates it from the clock of each process."""
        trainer = self._trainer
        trainer.epochs = trainer.args.epochs = self._ranks.least(trainer.epochs)
        return int(self._stock_warmup(batches))

    def _update(self) -> None:
        if self.saver is not None and self.saver.skipping:
            return
        trainer = self._trainer
        if not self._has_run and not self._notices.latest:
            self._notices.hold(
                "memory: the model was not given what preprocess_batch returned: batches run as Ultralytics runs them"
            )
        self._updates_asked += self._has_run
        self._has_run = False
        with self.saver.step() if self.saver is not None else nullcontext():
            self._engine.update(
                trainer.optimizer, self._stock_update, lambda: remember(trainer), epoch=trainer.epoch + 1
            )

    def _validate(self) -> Any:
        self._engine.make_room()
        # With a world size of 1, Ultralytics does not average the losses over ranks. validation.py combines them.
        size, self._trainer.world_size = self._trainer.world_size, 1
        try:
            metrics, fitness = self._stock_validate()
        finally:
            self._trainer.world_size = size
        return (metrics if metrics is None else {**metrics, **self._display.metrics()}), fitness

    def _epoch_starts(self) -> None:
        self._display.of_epoch.clear()
        self._heed_signals(at_once=self._sharing is None)

    def _epoch_ends(self) -> None:
        trainer = self._trainer
        if trainer.metrics is not None:  # with several ranks, only rank 0 has metrics
            trainer.metrics = {**trainer.metrics, **self._display.metrics()}
        self._choose_workers()
        self._heed_signals(at_once=True)

    def _heed_signals(self, *, at_once: bool) -> None:
        self._interruption.at_once = at_once
        if at_once:
            self._interruption.check()

    def _memory(self, fraction: bool = False) -> float:
        shows_ours = not fraction and is_ultralytics(self._stock_memory)
        return self._display.column() if shows_ours else float(self._stock_memory(fraction))

    def _plot(self, batch: Any, ni: int) -> None:
        if not isinstance(batch, LogicalBatch):
            self._stock_plot(batch, ni)
        elif not batch.is_placeholder:
            if batch.is_seen or not is_ultralytics(self._stock_plot):
                self._stock_plot(batch.shown(), ni)
                return
            only_scales = self._knows_preprocess and not self._trainer.args.multi_scale
            again = None if only_scales else partial(self._preprocess_again, self._task.draw)
            self._stock_plot(drawn(batch.host, self._task, again), ni)

    def _finish(self) -> None:
        from ultralytics.utils import LOGGER

        exact = self._knows_preprocess and is_exact(self._model, self._engine.config.exact)
        summary = self._engine.close(self._updates_asked, is_exact=exact)
        if summary is not None and not self._ranks.rank:
            waited = waited_for_data(self._trainer, self._loader, summary)
            LOGGER.info(summary.as_text() + over_limit(self._trainer.validator) + waited)
