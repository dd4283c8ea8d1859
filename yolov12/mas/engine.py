"""The memory-aware engine: a training step that fits into whatever memory is free."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from yolov12.errors import DoesNotFitError
from yolov12.mas.checkpointing.checkpointing import KEEP_ALL
from yolov12.mas.checkpointing.layers import candidates
from yolov12.mas.config import GROUPS, Config
from yolov12.mas.distributed.ranks import ALONE, Ranks
from yolov12.mas.distributed.replicas import checksum
from yolov12.mas.journal.journal import Journal, Row, Summary
from yolov12.mas.memory.meter import meter_for
from yolov12.mas.memory.reading import Meter, Stopwatch
from yolov12.mas.oom import Failure, is_out_of_memory
from yolov12.mas.profiling.ladder import Ladder, make_ladder
from yolov12.mas.profiling.ladder_cache import LadderCache
from yolov12.mas.profiling.warmup import PROFILE_IMAGES, rehearse
from yolov12.mas.scheduling.peak_model import CostModel, Features
from yolov12.mas.scheduling.planner import WAIT_S, BatchPlanner, WaysOut
from yolov12.mas.scheduling.scheduler import History
from yolov12.mas.scheduling.time_model import NEW_SIZE_MS, SpeedModel
from yolov12.mas.step.first_update import Undo, survive_first_update
from yolov12.mas.step.step import Result, Step
from yolov12.mas.task import Task, Workload

__all__ = ["Engine"]

_CHECK_EVERY = 100
"""Updates after which ranks compare their replicas."""
_PATIENCE_S = 2.0
"""How long to wait for other processes where smaller images are another way."""
_STOP, _NONE, _HOPE, _ROOM = range(4)
"""What a rank says of its room for images, the gravest first: it was asked to stop; none; some if others left; some."""

_SKIPPED_UPDATES = 16
"""At most: a `GradScaler` halves its scale from 65,536 until it fits. The optimizer makes its state after that."""

_log = logging.getLogger("yolov12.mas").info


class Engine:
    """Runs every batch in micro-batches that fit, and keeps a journal.

    Args:
        model: Its parameters are on the device to train on.
        task: Joins the engine to the kind of training; `TensorTask` for batches that are tuples of tensors.
        config: See there.
        meter: Reads memory; by default that of the model's device.
        journal: Where rows go; by default nowhere.
        backward: Differentiates a scalar; with a `GradScaler`, `lambda loss: scaler.scale(loss).backward()`.
        layers: Name → layer: the outermost ones that may keep less for the backward pass; by default see
            `checkpointing.layers.candidates`.
        activations: BatchNorm → SiLU that is applied to its output, which nothing else uses. On a GPU they are then one
            operation, faster and with half as much to keep.
        cache: Folder in which plans are kept from run to run; by default they are made anew.
        ways_out: See `scheduling.planner.WaysOut`.
        optimizer_bytes: Tells what the optimizer will hold from its first update on, and does not hold yet: the error
            of a run that does not fit counts it.
        smaller: Called with a batch of which not even one image fits: the same with smaller images, or None.
        ranks: Processes that share each batch; all of them call the same methods in the same order.
        log: Takes lines for the user.
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
        cache: Path | None = None,
        ways_out: WaysOut = lambda share: (),
        optimizer_bytes: Callable[[], int] = lambda: 0,
        smaller: Callable[[Any], Any | None] | None = None,
        ranks: Ranks = ALONE,
        log: Callable[[str], None] = _log,
    ) -> None:
        self.config = config or Config()
        self.meter = meter or meter_for(next(model.parameters()).device, self.config.limit)
        self.journal = journal
        self.bn_group = self.config.bn_group
        """Images that BatchNorm normalises together; None until the first batch has told what fits."""
        # On the host no library looks for kernels when a size is new.
        self.cost, self.speed = CostModel(), SpeedModel(new_size_ms=0.0 if self.meter.kind == "host" else NEW_SIZE_MS)
        self.epoch = 1
        """For the journal."""
        self.stopping: Callable[[], bool] = lambda: False
        """Tells whether this process was asked to stop: a wait for room then ends on all ranks, with SystemExit."""
        self.latest: BatchPlanner | None = None
        """Of the last batch: its peak, budget and events."""
        self.micro_batches: tuple[int, ...] = ()
        """Of the last batch: images in each."""
        self._task, self._ways_out, self._smaller, self._log = task, ways_out, smaller, log
        self._optimizer_bytes = optimizer_bytes
        self._notes: list[str] = []
        self._layers = candidates(model, layers, self.config.disabled_layers)
        self._ranks = ranks
        self._step = Step(model, task, self.meter, backward, self._layers, activations, ranks)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._gradient_bytes = sum(parameter.numel() * parameter.element_size() for parameter in self._parameters)
        self._ladder: Ladder | None = None  # made when a batch does not fit as it is
        self._guess_budget_bytes = 0
        self._history = History()
        self._cache = LadderCache(cache)
        self._device_name = _name(next(model.parameters()).device)
        self._known = False
        self._images, self._most_boxes, self._patience_s = 0, 0, float(WAIT_S)  # of the batch at hand
        self._of_all, self._counts = 0, True  # its images on all ranks; whether those of this one do
        self._done: list[_Done] = []  # since the last update
        self._rows: list[tuple[Row, list[_Done]]] = []  # whose time is not known yet
        self._updates = 0

    def step(self, batch: Any, of_all: int | None = None, *, counts: bool = True) -> Result:
        """Run forward and backward of a batch; its gradient is then on the parameters, added to what was there.

        Args:
            batch: On the host, of the kind the task knows; pinned memory lets copying overlap with computing. Where
                there are several ranks, this one's share.
            of_all: Images that all ranks have of the batch; by default those of this one.
            counts: See `Step.run`.

        Raises:
            DoesNotFitError: Not even one image fits, here or on another rank. Gradients and running statistics are as
                before.
            RankError: Another rank failed or is gone.
        """
        self._of_all, self._counts = of_all or 0, counts
        if self._done and all(parameter.grad is None for parameter in self._parameters):
            self._done.clear()  # what they added up was dropped, as Ultralytics does when it finds a NaN
        try:
            hopeful = True
            while self._smaller is not None:
                with suppress(DoesNotFitError):
                    return self._run(batch, _PATIENCE_S)
                if self.latest is None:  # what holds is to be found out anew
                    self._known, self.bn_group = False, self.config.bn_group
                if hopeful and (came := self._wait_for_room()) is not None:
                    if not came:
                        return self._run(batch, 0.0)  # smaller images would not fit either
                    hopeful = False
                    continue
                smaller = self._smaller(batch)
                if smaller is None:
                    break
                batch = smaller
            return self._run(batch, WAIT_S)
        except BaseException:
            if self.journal is not None:
                self.journal.lost(self._of_all or self._images)
            raise

    def _run(self, batch: Any, patience_s: float) -> Result:
        work, self._patience_s = self._look_at(batch), patience_s
        self._images, self._most_boxes = work.images, max(work.boxes)
        if not self._known:
            self._get_to_know(batch, work)
        planner = self._planner(work)
        if self._wants_ladder(planner) and self.cost.largest and not self._fits(work.images, work, planner):
            self._make_ladder(batch, work)
            planner = self._planner(work)
        result = self._step.run(batch, work.images, planner, self._of_all or work.images, counts=self._counts)
        self._history = planner.history
        self.latest, self.micro_batches = planner, result.micro_batches
        self._done.append(_Done(work, planner, result.micro_batches, result.watch, self._counts))
        return result

    def update(
        self,
        optimizer: Optimizer,
        update: Callable[[], None] | None = None,
        remember: Callable[[], Undo] = lambda: lambda: None,
    ) -> None:
        """Step the optimizer, and write the row of this step.

        Args:
            optimizer: Of the model's parameters.
            update: What to do in place of `optimizer.step(); optimizer.zero_grad()`.
            remember: See `step.first_update.survive_first_update`.
        """

        def plain() -> None:
            optimizer.step()
            optimizer.zero_grad()

        failures = 0
        if optimizer.state or self._updates >= _SKIPPED_UPDATES:
            (update or plain)()
        else:
            failures = survive_first_update(update or plain, optimizer, self.meter.release, remember)
        self._updates += 1
        if self._ranks.size > 1 and self._updates % _CHECK_EVERY == 0:
            self._keep_replicas_alike()
        if self._done:
            self._record(("out-of-memory in the optimizer",) * failures)

    def _keep_replicas_alike(self) -> None:
        model = self._step.model
        if self._ranks.alike:
            self._ranks.say.checksum = checksum(model)
        else:
            self._ranks.copy_from_first([tensor.detach() for tensor in (*model.parameters(), *model.buffers())])

    def would_fit(self, height: int, width: int, *, whole_group: bool) -> bool:
        """Whether images of a size are predicted to fit into what is free now, on every rank; True before all is known.

        Args:
            height, width: In pixels.
            whole_group: A BatchNorm group with everything kept; otherwise one image with as little as can be.
        """
        if self.latest is None or not self.cost.largest:
            return self._ranks.all(True)
        images, level = (self.bn_group or 1, 0) if whole_group else (1, len(self._step.plans) - 1)
        reading = self.meter.read()
        _, needed_bytes = self.cost.upper(Features(images, height, width, self._most_boxes, level))
        budget_bytes = reading.budget_bytes(self.config.safety_ratio)
        return self._ranks.all(reading.live_bytes + self._gradient_bytes + needed_bytes <= budget_bytes)

    def note(self, event: str) -> None:
        """Add an event to the row of the step at hand."""
        self._notes.append(event)

    def flush(self) -> None:
        """Write all rows to the journal, waiting for the device to tell their times."""
        self._write(final=True)
        if self.journal is not None:
            self.journal.flush()

    def close(self, updates_expected: int | None = None) -> Summary | None:
        """Give the limit of PyTorch's allocator back, and finish the journal, if there is one.

        Args:
            updates_expected: For the summary.
        """
        self.meter.close()
        if self.journal is None:
            return None
        self._write(final=True)
        try:
            return self.journal.close(updates_expected=updates_expected) if self.journal is not None else None
        except OSError as error:
            self._log(f"memory: the journal is not complete, {error}")
            return None

    def _wait_for_room(self) -> bool | None:
        """Wait while images of no size have room on some rank, if others may make some; whether they did.

        None where there was nothing to wait for: there is room, or would not be if others held nothing.
        """
        seconds = 0
        while (least := self._ranks.least(self._room())) == _HOPE and seconds < WAIT_S:
            if not seconds:
                self.meter.release()  # another rank may be waiting for it
            time.sleep(1.0)
            seconds += 1
        if least == _STOP:
            raise SystemExit(128 + signal.SIGTERM)
        if not seconds:
            return None
        self.note(f"waited {seconds} s for room")
        return least == _ROOM

    def _room(self) -> int:
        """Of this rank, beside what stays in memory: _STOP, _NONE, _HOPE or _ROOM."""
        if self.stopping():
            return _STOP
        reading = self.meter.read()
        kept_bytes = reading.live_bytes + self._gradient_bytes
        now, alone = (
            kept_bytes < each.budget_bytes(self.config.safety_ratio) for each in (reading, reading.without_others())
        )
        return _ROOM if now else _HOPE if alone else _NONE

    def _look_at(self, batch: Any) -> Workload:
        try:
            return self._task.workload(batch)
        except Exception as error:  # a task may have to try on the device what size its images will have
            if not is_out_of_memory(error):
                raise
        self.meter.release()
        return self._task.workload(batch)

    def state_dict(self) -> dict[str, Any]:
        """What was learned, for JSON or a checkpoint: a run that resumes need not learn it again."""
        return {
            "device": self._device_name,
            "ladder": self._ladder.state_dict() if self._ladder and not self._ladder.guessed else None,
            "cost": self.cost.state_dict(),
            "speed": self.speed.state_dict(),
            "history": asdict(self._history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave, unless it was learned on another device, or by another version of this."""
        try:
            if state["device"] != self._device_name:
                return
            ladder = Ladder.from_state_dict(state["ladder"]) if state["ladder"] else None
            history = History(**state["history"])
            cost, speed = CostModel(), SpeedModel(new_size_ms=self.speed.new_size_ms)
            if ladder is not None:
                cost.set_levels(ladder.levels)
                speed.set_levels(ladder.levels)
            cost.load_state_dict(state["cost"])
            speed.load_state_dict(state["speed"])
        except (KeyError, TypeError, ValueError) as error:
            self._log(f"memory: begins to learn anew, as what was learned before cannot be read ({error!r})")
            return
        if ladder is not None and not ladder.names() <= self._layers.keys():
            return  # others may be planned for now
        self._ladder, self.cost, self.speed, self._history = ladder, cost, speed, history
        self._step.plans = ladder.plans if ladder is not None else (KEEP_ALL,)

    def _get_to_know(self, batch: Any, work: Workload) -> None:
        """Settle the group size and the first micro-batch."""
        planner = self._planner(work)
        if self.config.micro_batch is None or self.bn_group is None:
            while (failure := self._rehearse(batch, work)) and planner.wait(failure):
                pass
            self.meter.release()
        if self.bn_group is None:
            if self._ladder is None and not self._fits(min(GROUPS[0], work.images), work, planner):
                self._make_ladder(batch, work)
            most = max((self._of_all or work.images) // self._ranks.size, 1)  # so that each rank has a group
            groups = [group for group in GROUPS if group <= most or self._ranks.size == 1]
            group = next((group for group in groups if self._holds(group, work, planner)), 1)
            self.bn_group = self._ranks.least(group)
            held = f"; other processes hold {(planner.reading.others_bytes or 0) / 2**20:,.0f} MiB"
            others = held if self.bn_group < GROUPS[0] else ""
            self._log(f"memory: BatchNorm sees {self.bn_group} images at once (bn_group) in this run{others}")
        elif self.bn_group and self.cost.largest and not self._holds(self.bn_group, work, planner):
            self._log(
                f"memory: {self.bn_group} images at once (bn_group) seem not to fit into the budget of "
                f"{planner.budget_bytes / 2**20:,.0f} MiB: BatchNorm will see fewer in the steps where that is so"
            )
        self._known = True

    def _rehearse(self, batch: Any, work: Workload) -> Failure | None:
        """Run a few images with everything kept or, where not even one fits so, with as little as can be."""
        failure = rehearse(self._step, self.meter.kind, batch, work, self.cost, self.speed)
        if failure is None or not self._layers:
            return failure
        self._make_ladder(batch, work)
        return rehearse(self._step, self.meter.kind, batch, work, self.cost, self.speed, len(self._step.plans) - 1)

    def _wants_ladder(self, planner: BatchPlanner) -> bool:
        """There is none, or one that was guessed when there was much less memory than now."""
        guessed = self._ladder is not None and self._ladder.guessed
        return self._ladder is None or (guessed and planner.budget_bytes > 2 * self._guess_budget_bytes)

    def _make_ladder(self, batch: Any, work: Workload) -> None:
        key = self._cache.key(self._step.model, list(self._layers), work, self._device_name, self._step.fused)
        ladder = self._cache.get(key)
        if ladder is None:
            images = min(self.cost.largest, work.images, PROFILE_IMAGES)
            ladder = make_ladder(self._step, self.meter, self._layers, batch, images)
            if not ladder.guessed:
                self._cache.put(key, ladder)
        self._guess_budget_bytes = self.meter.read().budget_bytes(self.config.safety_ratio)
        self._climb(ladder)

    def _climb(self, ladder: Ladder) -> None:
        self._ladder = ladder
        self._step.plans = ladder.plans
        self.cost.set_levels(ladder.levels)
        self.speed.set_levels(ladder.levels)

    def _fits(self, images: int, work: Workload, planner: BatchPlanner, level: int = 0) -> bool:
        """Whether so many images are predicted to fit."""
        if not self.cost.largest:
            return False
        images = min(images, self.config.micro_batch or images)
        features = Features(images, work.height, work.width, max(work.boxes), level)
        _, needed_bytes = self.cost.upper(features)
        return planner.reading.live_bytes + self._gradient_bytes + needed_bytes <= planner.budget_bytes

    def _holds(self, group: int, work: Workload, planner: BatchPlanner) -> bool:
        """Whether a group fits under any plan."""
        if group > (self.config.micro_batch or group):
            return False
        return any(self._fits(group, work, planner, level) for level in range(len(self._step.plans)))

    def _planner(self, work: Workload) -> BatchPlanner:
        return BatchPlanner(
            work,
            self.config,
            self.bn_group or 0,
            self.cost,
            self.meter,
            speed=self.speed,
            history=self._history,
            gradient_bytes=self._gradient_bytes,
            optimizer_bytes=self._optimizer_bytes,
            ways_out=self._ways_out,
            patience_s=self._patience_s,
        )

    def _record(self, events: tuple[str, ...]) -> None:
        works = [done.work for done in self._done]
        planners = [done.planner for done in self._done]
        row = Row(
            step=self.journal.next_step + len(self._rows) if self.journal is not None else self._updates,
            epoch=self.epoch,
            images=sum(done.work.images for done in self._done if done.counts),
            micro_batches=tuple(size for done in self._done for size in done.micro_batches),
            plan=str(self._step.plans[planners[-1].level]),
            image_size=f"{works[-1].height}x{works[-1].width}",
            max_boxes=max(max(work.boxes) for work in works),
            predicted_bytes=max(planner.predicted_bytes for planner in planners),
            peak_bytes=max(planner.peak_bytes for planner in planners),
            held_bytes=planners[-1].reading.held_bytes,
            free_bytes=planners[-1].reading.free_bytes,
            budget_bytes=planners[-1].budget_bytes,
            step_ms=None,
            events=(*self._notes, *(event for planner in planners for event in planner.events), *events),
        )
        self._notes.clear()
        self._rows.append((row, list(self._done)))
        self._done.clear()
        self._write(final=False)

    def _write(self, *, final: bool) -> None:
        """Write the rows whose time is known, as the device is a step behind; at the end, all of them."""
        while self._rows:
            row, batches = self._rows[0]
            times = [done.watch.elapsed_ms() for done in batches]
            known = [time for time in times if time is not None]
            if len(known) < len(times) and not final:
                return
            del self._rows[0]
            for done, time_ms in zip(batches, times, strict=True):
                if time_ms is not None and done.planner.undisturbed:
                    self._take_time(done, time_ms)
            if self.journal is not None:
                self.journal.busy(self.meter.busy_percent())
                try:
                    self.journal.add(replace(row, step_ms=sum(known) if len(known) == len(times) else None))
                except OSError as error:  # a full disk is no reason to end a training
                    self._log(f"memory: the journal ends here, {error}")
                    self.journal = None

    def _take_time(self, done: _Done, ms: float) -> None:
        work, level = done.work, done.planner.level
        usual = all(self.speed.seen(size, work.height, work.width, level) for size in done.micro_batches)
        if usual and done.counts and self._ranks.size > 1:
            self._ranks.say.images, self._ranks.say.ms = max(work.images, self._as_quick(done)), ms
        self.speed.observe(done.micro_batches, work.height, work.width, level, ms)

    def _as_quick(self, done: _Done) -> int:
        """Images that would have taken no longer: micro-batches as large as the host has time for, where memory has."""
        work, planner, group = done.work, done.planner, self.bn_group or 1
        flat = self.speed.flat_images(work.height, work.width)
        images, last = 0, len(self._step.plans) - 1
        while images + group <= flat and self._fits(max(2 * images, group), work, planner, last):
            images = max(2 * images, group)
        return min(images, int(flat)) * len(done.micro_batches)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass(frozen=True)
class _Done:
    work: Workload
    planner: BatchPlanner
    micro_batches: tuple[int, ...]
    watch: Stopwatch
    counts: bool
