"""The memory-aware engine: a training step that fits into whatever memory is free."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from yolov12.errors import DoesNotFitError
from yolov12.mas.calibration import Calibration
from yolov12.mas.checkpointing.layers import candidates
from yolov12.mas.config import Config
from yolov12.mas.data_times import DataTimes
from yolov12.mas.distributed.ranks import ALONE, Ranks
from yolov12.mas.distributed.replicas import keep_alike
from yolov12.mas.journal.journal import Journal, Summary
from yolov12.mas.memory.meter import meter_for
from yolov12.mas.memory.reading import Meter
from yolov12.mas.profiling.ladder import FORMAT, Ladder
from yolov12.mas.records import DoneBatch, Records
from yolov12.mas.room import Room
from yolov12.mas.scheduling.advice import NO_ADVICE, Advice
from yolov12.mas.scheduling.peak_model import CostModel, Features
from yolov12.mas.scheduling.planner import WAIT_S, BatchPlanner
from yolov12.mas.scheduling.scheduler import History
from yolov12.mas.scheduling.time_model import NEW_SIZE_MS, SpeedModel
from yolov12.mas.step import gradients
from yolov12.mas.step.first_update import Undo, survive_first_update
from yolov12.mas.step.graphs.recorder import graphs_for
from yolov12.mas.step.result import Result
from yolov12.mas.step.retry import Retry
from yolov12.mas.step.step import Step
from yolov12.mas.task import Share, Task, Workload

__all__ = ["Engine"]

_CHECK_EVERY = 100
"""Number of updates after which ranks compare their weights."""
_PATIENCE_S = 2.0
"""Seconds to wait for other processes if smaller images are another way out."""
_SKIPPED_UPDATES = 16
"""Most updates that a `GradScaler` skips at first, as it halves its scale of 65,536. Then the optimizer has state."""

_log = logging.getLogger("yolov12.mas").info


class Engine:
    """Runs every batch in micro-batches that fit into memory, and keeps a journal.

    Use it as a context manager, or call `close` at the end.

    Args:
        model: Model with its parameters on the device to train on.
        task: Adapter to the kind of training; `TensorTask` for batches that are tuples of tensors.
        config: Settings; by default all of the memory less a tenth.
        meter: Meter of the model's device; by default the result of `memory.meter.meter_for`.
        journal: Receives a row for each update; None for no journal.
        backward: Differentiates a scalar; with a `GradScaler`, `lambda loss: scaler.scale(loss).backward()`.
        layers: Outermost layers that checkpoint plans may name: name → layer; by default see
            `checkpointing.layers.candidates`.
        activations: BatchNorm → the SiLU that alone uses its output. On a GPU both run as one operation, which is
            faster and keeps half as much for the backward pass.
        advice: Knowledge of the training, see `Advice`.
        cache: Folder that keeps checkpoint plans from run to run; None to make them in every run.
        ranks: Processes that share each batch; all of them call the same methods in the same order.
        log: Called with lines for the user.

    Raises:
        ConfigError: `disable_mas_layers` names a layer that does not exist, or the device's memory cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: Config | None = None,
        *,
        meter: Meter | None = None,
        journal: Journal | None = None,
        backward: Callable[[Tensor], None] = Tensor.backward,
        layers: Mapping[str, nn.Module] | None = None,
        activations: Mapping[nn.Module, nn.Module] | None = None,
        advice: Advice = NO_ADVICE,
        cache: Path | None = None,
        ranks: Ranks = ALONE,
        log: Callable[[str], None] = _log,
    ) -> None:
        device = next(model.parameters()).device
        self.config = config or Config()
        self.meter = meter or meter_for(device, self.config.limit, self.config.safety_ratio)
        self.latest: Result | None = None
        """The latest batch that was run."""
        self._task, self._ranks, self._log = task, ranks, log
        self._device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        # On the host, libraries do not search kernels for a new size.
        speed = SpeedModel(new_size_ms=0.0 if self.meter.kind == "host" else NEW_SIZE_MS)
        gradient_bytes = gradients.bytes_of(model.parameters())
        self._planner = BatchPlanner(
            self.config, CostModel(), speed, self.meter, gradient_bytes=gradient_bytes, advice=advice, log=log
        )
        found = candidates(model, layers, self.config.disabled_layers)
        is_untried = self.config.cuda_graphs is None and ranks.size > 1
        graphs = graphs_for(device, self._planner.room, False if is_untried else self.config.cuda_graphs)
        self._step = Step(
            model, task, self.meter, backward, found, activations, ranks, log,
            exact=self.config.exact, note=self.note, graphs=graphs,
        )  # fmt: skip
        self._planner.replay_room.graphs = self._step.replays if graphs else None
        self._calibration = Calibration(
            self._step, self._planner, self.meter, self.config, found, cache, self._device_name, ranks, log
        )
        self._room = Room(self._planner, self.meter, self.config, ranks, log)
        self._records = Records(speed, self._calibration, self.meter, journal, log, shares=ranks.size > 1)
        self._limit = ExitStack()  # limit of PyTorch's allocator, from the first step to `close`
        self._is_limited = False
        self._updates = 0
        self._checksum = 0  # for the next report to other ranks
        self._work: Workload | None = None  # properties of the current batch

    @property
    def bn_group(self) -> int | None:
        """Number of images that BatchNorm normalises together; None until the first batch has shown what fits."""
        return self._calibration.bn_group

    @property
    def journal(self) -> Journal | None:
        """Journal of the run; None if there is none, or if it could not be written."""
        return self._records.journal

    def __enter__(self) -> Engine:
        self.hold_limit()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def step(
        self,
        batch: Any,
        share: Share | None = None,
        *,
        smaller: Callable[[Any], Any | None] | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> Result:
        """Run the forward and backward pass of a batch, and add its gradient to that of the parameters.

        Args:
            batch: Batch on the host, of the kind that the task knows; with several ranks, this rank's share. Copies
                from pinned memory overlap with computation.
            share: Description of the whole batch over all ranks; None for a training in one process.
            smaller: Called with a batch if not even one of its images fits; returns the batch with smaller images, or
                None if images cannot get smaller.
            stop_requested: Returns whether this process was asked to stop. A wait for memory then ends with SystemExit
                on all ranks.

        Returns:
            Loss and items of the batch, and how it was run.

        Raises:
            DoesNotFitError: Not even one image fits, here or on another rank. Gradients, buffers and attributes of
                layers are as before.
            RankError: Another rank failed or is gone.
        """
        self.hold_limit()
        if self._records.pending and all(parameter.grad is None for parameter in self._step.parameters):
            self._records.drop()  # Ultralytics drops the gradients when it finds a NaN
        self._planner.gradient_bytes = gradients.bytes_of(self._step.parameters)  # a callback may have unfrozen layers
        try:
            hopeful, self._work = True, None  # the previous batch is not lost
            while smaller is not None:
                with suppress(DoesNotFitError):
                    return self._run(batch, share, _PATIENCE_S, stop_requested)
                if self.latest is None:
                    self._calibration.start_over()
                if hopeful:
                    has_room, waited_s = self._room.wait(stop_requested)
                    if waited_s:
                        self.note(f"waited {waited_s} s for room")
                        if not has_room:
                            return self._run(batch, share, 0.0, stop_requested)  # smaller images would not fit either
                        hopeful = False
                        continue
                smaller_batch = smaller(batch)
                if smaller_batch is None:
                    break
                batch = smaller_batch
            return self._run(batch, share, WAIT_S, stop_requested)
        except BaseException:
            self._records.lost(share.batch_images if share else self._work.images if self._work else 0)
            raise

    def _run(self, batch: Any, share: Share | None, patience_s: float, stop_requested: Callable[[], bool]) -> Result:
        # A task may have to preprocess an image on the device to know its size.
        work = Retry(self._step.replays.release, self.note)(lambda: self._task.workload(batch))
        share = share or Share(work.images)
        self._work = work
        self._calibration.begin(batch, work, share, patience_s)
        status = replace(self._records.take_status(), stop=stop_requested(), checksum=self._checksum)
        self._checksum = 0
        fits = not self._planner.cost.largest or self._calibration.fits(work.images, work)
        ran = self._step.run(batch, work.images, self._planner, share, status)
        report = self._planner.complete()
        plan, level = str(self._step.plans[report.level]), self._planner.speed.levels[report.level]
        self._records.add(DoneBatch(work, report, ran, share, fits, plan, level))
        self.latest = replace(
            ran,
            level=report.level,
            predicted_bytes=report.predicted_bytes,
            peak_bytes=report.peak_bytes,
            budget_bytes=report.budget_bytes,
            events=report.events,
        )
        return self.latest

    def update(
        self,
        optimizer: Optimizer,
        update: Callable[[], None] | None = None,
        remember: Callable[[], Undo] = lambda: lambda: None,
        *,
        epoch: int = 1,
    ) -> None:
        """Step the optimizer, and write the journal's row of this update.

        Args:
            optimizer: Optimizer of the model's parameters.
            update: Called in place of `optimizer.step(); optimizer.zero_grad()`.
            remember: Copies what `update` changes besides, see `step.first_update.survive_first_update`.
            epoch: Number of the epoch for the journal, from 1.
        """

        def plain() -> None:
            optimizer.step()
            optimizer.zero_grad()

        failures = 0
        if optimizer.state or self._updates >= _SKIPPED_UPDATES:
            (update or plain)()
        else:
            failures = survive_first_update(update or plain, optimizer, self._step.replays.release, remember, self.note)
        self._updates += 1
        if self._ranks.size > 1 and self._updates % _CHECK_EVERY == 0:
            self._checksum = keep_alike(self._step.model, self._step.norms.layers, self._ranks)
        if self._records.pending:
            self._records.updated(epoch, ("out-of-memory in the optimizer",) * failures)

    def make_room(self) -> None:
        """Return memory that a validation may need: that of CUDA graphs, unless it is small."""
        self._step.replays.make_room()

    def would_fit(self, height: int, width: int, *, whole_group: bool) -> bool:
        """Return whether images of a size are predicted to fit into the memory that is free now, on every rank.

        True before anything is known. All ranks call this together.

        Args:
            height: Height of the images in pixels.
            width: Width of the images in pixels.
            whole_group: True for a BatchNorm group with everything kept; False for one image under the checkpoint plan
                that keeps least.
        """
        if self._work is None or self.latest is None:
            return self._room.fits(None)
        images, level = (self.bn_group or 1, 0) if whole_group else (1, len(self._step.plans) - 1)
        return self._room.fits(Features(images, height, width, self._work.most_boxes, level))

    def note(self, event: str) -> None:
        """Add an event to the row of the next update."""
        self._records.note(event)

    def loaded(self, times: DataTimes) -> None:
        """Add the times in which the next batch was loaded to the row of the next update."""
        self._records.loaded(times)

    def flush(self) -> None:
        """Write all rows to the journal; this waits for the device until their times are known, at most a minute."""
        self._records.flush()

    def close(self, updates_expected: int | None = None, *, is_exact: bool = False) -> Summary | None:
        """Restore the limit of PyTorch's allocator, and finish the journal, if there is one.

        Args:
            updates_expected: Number of updates that the run should have made, for the summary; see `Summary`.
            is_exact: True if the summary may say that a split batch had the gradient of the whole batch.

        Returns:
            The summary of the run; None without a journal.
        """
        self._step.replays.drop()
        self.lift_limit()
        return self._records.close(updates_expected, is_exact=is_exact, bn_group=self.bn_group)

    def lift_limit(self) -> None:
        """Restore the limit of PyTorch's allocator that was there before the first step."""
        self._limit.close()
        self._is_limited = False

    def hold_limit(self) -> None:
        """Hold PyTorch's allocator to the limit, until `close` or `lift_limit`. The first step does so too."""
        if not self._is_limited:
            self._limit.enter_context(self.meter.limited())
            self._is_limited = True

    def state_dict(self) -> dict[str, Any]:
        """Return what was learned, for JSON or a checkpoint, so that a resumed run need not learn it again."""
        ladder = self._calibration.ladder
        return {
            "device": self._device_name,
            "format": FORMAT,
            "ladder": ladder.state_dict() if ladder and not ladder.guessed else None,
            "cost": self._planner.cost.state_dict(),
            "speed": self._planner.speed.state_dict(),
            "history": asdict(self._planner.completed_history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, unless it was learned on another device or by another version."""
        planner, calibration = self._planner, self._calibration
        try:
            if (state["device"], state.get("format")) != (self._device_name, FORMAT):
                return
            ladder = Ladder.from_state_dict(state["ladder"]) if state["ladder"] else None
            history = History(**state["history"])
            cost, speed = CostModel(), SpeedModel(new_size_ms=planner.speed.new_size_ms)
            if ladder is not None:
                cost.set_levels(ladder.levels)
                speed.set_levels(ladder.levels)
            cost.load_state_dict(state["cost"])
            speed.load_state_dict(state["speed"])
        except (KeyError, TypeError, ValueError) as error:
            self._log(f"memory: begins to learn anew, as the saved state of the engine cannot be read ({error!r})")
            return
        if ladder is not None and not ladder.names() <= calibration.layers.keys():
            return  # the plans name layers that may not be planned any more
        planner.resume(cost, speed, history)
        self._records.speed = speed
        calibration.resume(ladder)
