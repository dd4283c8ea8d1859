"""Planner of batches: it asks the scheduler for a decision, and reacts to failed allocations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

from yolov12.errors import DoesNotFitError
from yolov12.mas.config import Config
from yolov12.mas.memory.reading import Meter, Reading
from yolov12.mas.oom import Failure, does_not_fit, tell_wait, tried_to_allocate
from yolov12.mas.scheduling.advice import NO_ADVICE, Advice
from yolov12.mas.scheduling.candidates import beside_bytes
from yolov12.mas.scheduling.groups import decide_groups
from yolov12.mas.scheduling.peak_model import GRAPH_RESERVE, SPREAD_UNSEEN, CostModel, Features
from yolov12.mas.scheduling.replay_room import ReplayRoom
from yolov12.mas.scheduling.scheduler import Decision, Group, History, State
from yolov12.mas.scheduling.time_model import SpeedModel
from yolov12.mas.task import Workload

__all__ = ["WAIT_S", "BatchPlanner", "BatchReport"]

WAIT_S = 120
"""Most seconds to wait for other processes to release memory before a run ends."""


@dataclass(frozen=True)
class BatchReport:
    """Plan of a batch that was run, and the memory it took."""

    level: int
    """Index of the checkpoint plan of the last micro-batch."""
    predicted_bytes: int
    """Predicted peak of allocated memory."""
    peak_bytes: int
    """Measured peak of allocated memory."""
    budget_bytes: int
    """Memory that this process could use, according to the reading."""
    reading: Reading
    """Memory when the batch began, or after the last failure."""
    events: tuple[str, ...]
    """Events of the batch, as the journal names them."""
    undisturbed: bool
    """True if the batch ran as first planned and like the previous batch, so that its time is representative."""
    replays: bool = False
    """True if the batch ran as decided with room for a CUDA graph."""


class BatchPlanner:
    """Plans the batches of a run one after the other; implements `step.Planner`.

    Args:
        config: Settings of the engine.
        cost: Model of peak bytes; it learns from micro-batches that ran.
        speed: Model of times. It is told the sizes that ran; the caller tells it their times, which are known later.
        meter: Meter of the model's device.
        gradient_bytes: Bytes of all gradients of the model.
        advice: Knowledge of the training, see `Advice`.
        sleep: Waits for a number of seconds.
        log: Takes lines for the log of the training.
    """

    reading: Reading
    """Memory when the batch began, or after the last failure."""
    budget_bytes: int
    """Memory that this process may use, according to that reading."""

    def __init__(
        self,
        config: Config,
        cost: CostModel,
        speed: SpeedModel,
        meter: Meter,
        *,
        gradient_bytes: int,
        advice: Advice = NO_ADVICE,
        sleep: Callable[[float], None] = time.sleep,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.cost, self.speed, self.gradient_bytes, self.sleep = cost, speed, gradient_bytes, sleep
        self.replay_room = ReplayRoom()
        self.history = self._completed = History()
        """State that the latest decision passes on to the next one."""
        self.level = 0
        """Index of the checkpoint plan that `plan` returned last."""
        self._config, self._meter, self._advice, self._log = config, meter, advice, log
        self._work, self._group, self._patience_s = Workload(0, 0, ()), 0, float(WAIT_S)
        self._arm = 0, 0  # images in the largest micro-batch, and level, of the latest decision
        self._waited_s = self._told_s = 0
        self._start_over()

    def _start_over(self) -> None:
        self.history = self._completed
        self._start = 0
        self._ceiling: float | None = None
        self._failed_at = 0
        self.level = self.history.level
        self.undisturbed = True
        self.predicted_bytes = self.peak_bytes = 0
        self.events: list[str] = []

    def begin(self, work: Workload, group: int, patience_s: float = WAIT_S) -> None:
        """Begin a batch: read the memory, and let the effect of earlier failures fade.

        Args:
            work: Properties of the batch.
            group: Number of images that BatchNorm normalises together; 0 for all of a micro-batch.
            patience_s: Seconds to wait for other processes to release memory.
        """
        self._work, self._group, self._patience_s = work, group, patience_s
        self._waited_s = self._told_s = 0  # `regroup` comes after a wait of the warm-up
        self._start_over()
        self.read()
        self.cost.new_batch()

    def regroup(self, group: int) -> None:
        """Plan the current batch again, after the size of groups or the checkpoint plans have changed."""
        self._group = group
        self._start_over()
        self.read()

    def read(self) -> None:
        """Read the memory and the budget again."""
        self.reading = self._meter.read()
        self.budget_bytes = self.reading.budget_bytes(self._config.safety_ratio)

    def complete(self) -> BatchReport:
        """End the current batch, which was run, and return its report."""
        self._completed = self.history
        limit_bytes = self.reading.total_bytes - self.reading.outside_bytes
        if self._config.limit is not None and self.peak_bytes > limit_bytes:  # on a CPU, nothing enforces it
            self.events.append(f"over the limit of {self.reading.total_bytes / 2**20:,.0f} MiB")
        return BatchReport(
            level=self.level,
            predicted_bytes=self.predicted_bytes,
            peak_bytes=self.peak_bytes,
            budget_bytes=self.budget_bytes,
            reading=self.reading,
            events=tuple(self.events),
            undisturbed=self.undisturbed,
            replays=self.replay_room.completed(undisturbed=self.undisturbed),
        )

    @property
    def optimizer_bytes(self) -> int:
        """Bytes that the optimizer will allocate at its first update; 0 after it."""
        return self._advice.optimizer_bytes()

    @property
    def completed_history(self) -> History:
        """History after the latest batch that was completed."""
        return self._completed

    def resume(self, cost: CostModel, speed: SpeedModel, history: History) -> None:
        """Continue with the models and the history of an earlier run."""
        self.cost, self.speed, self.history, self._completed = cost, speed, history, history

    def plan(self, start: int, failure: Failure | None) -> list[tuple[int, ...]]:
        """Split the remaining images into micro-batches, see `step.Planner.plan`."""
        self._start = start
        if failure is not None:
            self.undisturbed = False
            self.read()
            self._learn(start, failure)
        while (plan := self._split(start)) is None:
            if not self.wait(failure):
                raise self._error(failure)
        return plan

    def wait(self, failure: Failure | None) -> bool:
        """Wait a second for other processes to release memory.

        Args:
            failure: Last failed allocation; None if there was none.

        Returns:
            False, without a wait, if that cannot help or has taken too long already.
        """
        if self._waited_s >= self._patience_s or not self._may_come_back(failure):
            return False
        tell_wait(self._log, self.reading.others_bytes, self._waited_s, self._patience_s)
        self.sleep(1.0)
        self.read()
        self._waited_s += 1
        self._ceiling, self.undisturbed = None, False  # the time of the batch would include the wait
        return True

    def _split(self, start: int) -> list[tuple[int, ...]] | None:
        if self._ceiling == 0:
            return None
        images = self._work.images - start
        decision, sizes, group = decide_groups(
            images, self._group, lambda sizes: self._state(start, sizes), self.cost, self.speed
        )
        return self._accept(decision, sizes, group) if decision.fits else None

    def room(self, start: int, stop: int) -> tuple[int, int, int]:
        """Return the bytes of a micro-batch and of its capture, and the budget, see `step.graphs.recorder.Graphs`."""
        needed_bytes = self.cost.upper(self._features(start, stop, self.level))[1]
        factor = self.cost.levels[self.level].graph_bytes + GRAPH_RESERVE
        later_bytes = self.gradient_bytes if start == 0 and stop < self._work.images else 0  # graphs stay beside them
        return needed_bytes, math.ceil(factor * needed_bytes), self.budget_bytes - later_bytes

    def done(
        self, start: int, stop: int, allocated_bytes: int, peak_bytes: int | None, is_replay: bool = False
    ) -> None:
        """Learn from a micro-batch that ran, see `step.Planner.done`."""
        if peak_bytes is not None:
            if is_replay:
                self.replay_room.peak_bytes = max(self.replay_room.peak_bytes, peak_bytes)
            else:
                self.cost.observe(self._features(start, stop, self.level), peak_bytes - allocated_bytes)
            self.peak_bytes = max(self.peak_bytes, peak_bytes)
        self.speed.ran(stop - start, self._work.height, self._work.width)
        self._waited_s = self._told_s = 0  # only a successful micro-batch ends a wait
        if self._failed_at == stop - start:
            self.events.append(f"retried {self._failed_at}")
        self._failed_at = 0

    def _learn(self, start: int, failure: Failure) -> None:
        self.events.append(f"out-of-memory at {failure.images}")
        least = self._weight(1, -1)
        needs = self._weight(failure.images, self.level)
        if self._failed_at != failure.images:  # a false alarm is possible: retry unchanged once, if it seems to fit
            self._failed_at, self._ceiling = failure.images, needs
            return
        features = self._features(start, start + failure.images, self.level)
        self.cost.observe_failure(features, self.budget_bytes - self.reading.allocated_bytes)
        self._failed_at = 0
        # Try half of what failed: half the images or another plan. The last attempt is one image under the last plan.
        self._ceiling = max(needs / 2, least) if needs > least else 0.0

    def _accept(self, decision: Decision, sizes: tuple[int, ...], group: int) -> list[tuple[int, ...]]:
        if self._waited_s > self._told_s:
            self.events.append(f"waited {self._waited_s - self._told_s} s")
            self._told_s = self._waited_s
        if group < self._group:
            self.events.append(f"groups of {group}")
        before, after = self.history, decision.history
        if after.images < before.images:
            self.events.append(f"shrunk {before.images} to {after.images}")
        elif 0 < before.images < after.images:
            self.events.append(f"grew {before.images} to {after.images}")
        if decision.level != self.level and before.images:
            self.events.append(f"plan {self.level} to {decision.level}")
        if self._weight(after.images, after.level) < self._weight(before.images, before.level):
            self._meter.release()  # other processes may need the memory that this one no longer uses
        ends = accumulate(decision.micro_batches)
        plan = [sizes[end - count : end] for count, end in zip(decision.micro_batches, ends, strict=True)]
        last, self._arm = self._arm, (max(map(sum, plan)), decision.level)
        allocated_bytes = self.reading.allocated_bytes - self.replay_room.static_bytes()
        stays = (after.images, after.level) == (before.images, before.level)
        if not (stays if before.images else self._arm == last):  # after a first size that was held back
            self.replay_room.moved()
        if before.images and not stays:
            # A change releases and allocates memory, so the time of this batch is not representative. For a new size,
            # this time is small compared with the search for kernels.
            self.undisturbed &= not self.speed.warm(after.images, self._work.height, self._work.width)
        self.history, self.level = after, decision.level
        beside = beside_bytes(allocated_bytes, self.gradient_bytes, alone=self._start > 0 or len(plan) == 1)
        pixels = self._arm[0] * self._work.height * self._work.width
        predicted_bytes = self.replay_room.expect(decision, pixels, beside)
        # Micro-batches that ran before a failure had a predicted peak, too.
        self.predicted_bytes = max(predicted_bytes, self.predicted_bytes if self.peak_bytes else 0)
        return plan if self._group else [(sum(groups),) for groups in plan]

    def _weight(self, images: int, level: int) -> float:
        """Return the activations of a micro-batch, expressed as a number of images at level 0."""
        return images * self.cost.levels[min(level, len(self.cost.levels) - 1)].fraction

    def _may_come_back(self, failure: Failure | None) -> bool:
        """Return whether one image would fit if no other process used the device."""
        without_others = self.reading.without_others().budget_bytes(self._config.safety_ratio)
        return self.budget_bytes < self._needed_bytes(failure) <= without_others

    def _needed_bytes(self, failure: Failure | None) -> int:
        return self._beside_bytes() + max(self._image_bytes(failure), self._failed_bytes(failure))

    def _beside_bytes(self) -> int:
        alone = self._start > 0 or self._work.images == 1  # later, the gradients are allocated already
        return beside_bytes(self.reading.allocated_bytes, self.gradient_bytes, alone=alone)

    def _image_bytes(self, failure: Failure | None) -> int:
        """Return the bytes of the remaining image with most boxes, under the last plan.

        The result includes the margin. After a failure it leaves out the bounds that failures set.
        """
        features = replace(self._features(self._start, self._work.images, len(self.cost.levels) - 1), images=1)
        return self.cost.usual_bytes(features) if failure else self.cost.upper(features)[1]

    def _failed_bytes(self, failure: Failure | None) -> int:
        """Return the bytes that one image had allocated and requested when it failed: a lower bound of its need."""
        if failure is None or failure.images > 1:
            return 0
        return failure.peak_bytes + tried_to_allocate(failure.message) - self.reading.allocated_bytes

    def _error(self, failure: Failure | None) -> DoesNotFitError:
        reading, ratio = self.reading, self._config.safety_ratio
        # If one image should fit, memory may not be the cause.
        fits = failure is not None and self._needed_bytes(failure) <= self.budget_bytes
        # With a limit that suffices only for this batch, the run would end in the next one.
        beside = self._beside_bytes() + self.optimizer_bytes
        needed = max(self._needed_bytes(failure) - self._beside_bytes(), 1) + beside
        ways = []
        if self._config.limit is not None:
            # Later batches may have images with more boxes.
            roomy = (needed + SPREAD_UNSEEN * (needed - beside) + reading.outside_bytes) / (1 - ratio)
            if self._failed_bytes(failure) > self._image_bytes(failure) or fits:
                ways.append(f"give a mem_limit above {max(roomy, reading.total_bytes) // 2**20 + 1:,.0f} MiB")
            else:
                ways.append(f"give a mem_limit of {roomy // 2**20 + 1:,.0f} MiB")
        if needed <= reading.reachable_bytes:
            ways.append(f"give a mem_safety_ratio below {ratio:g}")
        if self._may_come_back(failure):
            ways.append(f"stop the other processes, which hold {(reading.others_bytes or 0) / 2**20:,.0f} MiB of it")
        fraction = (self.budget_bytes - beside) / (needed - beside)
        ways += self._advice.ways_out(min(max(fraction, 0.0), 1.0))
        ways += ["smaller images", "a smaller model", "a larger device"]
        cause = failure.message if failure is not None and fits else ""
        return does_not_fit(needed, self.budget_bytes, reading.free_bytes, ways, cause)

    def _state(self, start: int, sizes: tuple[int, ...]) -> State:
        ends = [start + end for end in accumulate(sizes)]
        boxes, reserve = self._work.boxes, self.replay_room.reserve() if self._ceiling is None else None
        return State(
            groups=tuple(Group(size, max(boxes[end - size : end])) for size, end in zip(sizes, ends, strict=True)),
            height=self._work.height,
            width=self._work.width,
            budget_bytes=self.budget_bytes,
            allocated_bytes=self.reading.allocated_bytes - self.replay_room.static_bytes(),
            gradient_bytes=0 if start else self.gradient_bytes,
            history=self.history,
            ceiling=self._ceiling,
            fixed=self._config.micro_batch,
            graph_reserve=reserve,
            graph_bytes=self.replay_room.needed_bytes(
                self.history.images * self._work.height * self._work.width, self.history.level
            ),
            later_bytes=self.optimizer_bytes if reserve is not None else 0,
            batches_left=self._advice.batches_left(),
        )

    def _features(self, start: int, stop: int, level: int) -> Features:
        boxes = max(self._work.boxes[start:stop])
        return Features(stop - start, self._work.height, self._work.width, boxes, level)
