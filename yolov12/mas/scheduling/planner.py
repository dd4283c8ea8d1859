"""One batch's way through the engine: asks the scheduler, and knows what to do when an allocation failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from yolov12.errors import DoesNotFitError
from yolov12.mas.config import Config
from yolov12.mas.memory.reading import Meter
from yolov12.mas.oom import Failure, does_not_fit, tried_to_allocate
from yolov12.mas.scheduling.groups import split_groups
from yolov12.mas.scheduling.peak_model import SPREAD_UNSEEN, CostModel, Features
from yolov12.mas.scheduling.scheduler import Decision, Group, History, State, decide
from yolov12.mas.scheduling.time_model import SpeedModel
from yolov12.mas.task import Workload

__all__ = ["BatchPlanner", "WaysOut"]

WaysOut = Callable[[float], Sequence[str]]
"""Given the share of one image's activations that would fit: what the user could do, cheapest first."""

WAIT_S = 120
"""How long to wait for other processes to give memory back before a run ends."""


class BatchPlanner:
    """Implements `step.Planner` for one batch.

    Args:
        work: What the batch is.
        config: See there.
        group: Images that BatchNorm normalises together; 0: those of a micro-batch.
        cost: Is asked, and taught.
        meter: Of the model's device.
        speed: Is asked, and told which sizes ran. What a batch took, which is known later, is for the caller to tell.
        history: Of the batch before; as an attribute it is for the next.
        gradient_bytes: Of all gradients of the model.
        optimizer_bytes: Tells what the optimizer will hold from its first update on, and does not hold yet.
        ways_out: See `WaysOut`.
        patience_s: How long to wait for other processes to give memory back.
        sleep: Waits for so many seconds.
    """

    def __init__(
        self,
        work: Workload,
        config: Config,
        group: int,
        cost: CostModel,
        meter: Meter,
        *,
        speed: SpeedModel,
        history: History,
        gradient_bytes: int,
        optimizer_bytes: Callable[[], int] = lambda: 0,
        ways_out: WaysOut = lambda share: (),
        patience_s: float = WAIT_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._work, self._config, self._group = work, config, group
        self._cost, self._speed, self._meter = cost, speed, meter
        self._gradient_bytes, self._optimizer_bytes = gradient_bytes, optimizer_bytes
        self._ways_out, self._sleep, self._patience_s = ways_out, sleep, patience_s
        self._start = 0
        self._ceiling: float | None = None
        self._failed_at = self._waited_s = self._told_s = 0
        self.history = history
        self.level = history.level
        """Checkpoint plan of the cut that `plan` returned last."""
        self.undisturbed = True
        """Whether the batch ran as planned first, and as the one before, so that its time says what this takes."""
        self.reading = meter.read()
        """When the batch began, or after the last failure."""
        self.budget_bytes = self.reading.budget_bytes(config.safety_ratio)
        self.predicted_bytes = self.peak_bytes = 0
        self.events: list[str] = []
        cost.new_batch()

    def plan(self, start: int, failure: Failure | None) -> list[tuple[int, ...]]:
        """See `step.Planner.plan`."""
        self._start = start
        if failure is not None:
            self.undisturbed = False
            self._read()
            self._learn(start, failure)
        while (plan := self._cut_to_fit(start)) is None:
            if not self.wait(failure):
                raise self._error(failure)
        return plan

    def wait(self, failure: Failure | None) -> bool:
        """Wait a second for other processes to give memory back; False where that would not help, or has taken long."""
        if self._waited_s >= self._patience_s or not self._may_come_back(failure):
            return False
        self._sleep(1.0)
        self._read()
        self._waited_s += 1
        self._ceiling = None
        return True

    def _cut_to_fit(self, start: int) -> list[tuple[int, ...]] | None:
        """Groups as they should be, or smaller ones, the last rung: BatchNorm then sees fewer images for a batch."""
        group = self._group or 1
        while self._ceiling != 0:
            sizes = split_groups(self._work.images - start, group)
            decision = decide(self._state(start, sizes), self._cost, self._speed)
            if decision.fits:
                return self._accept(decision, sizes, group)
            if group == 1:
                break
            group = max(sizes) // 2 or 1
        return None

    def done(self, start: int, stop: int, live_bytes: int, peak_bytes: int) -> None:
        """See `step.Planner.done`."""
        self._cost.observe(self._features(start, stop, self.level), peak_bytes - live_bytes)
        self._speed.ran(stop - start, self._work.height, self._work.width)
        self.peak_bytes = max(self.peak_bytes, peak_bytes)
        self._waited_s = self._told_s = 0  # only a micro-batch that got through ends a wait
        if self._failed_at == stop - start:
            self.events.append(f"retried {self._failed_at}")
        self._failed_at = 0

    def _learn(self, start: int, failure: Failure) -> None:
        self.events.append(f"out-of-memory at {failure.images}")
        least = self._weight(1, -1)
        needs = self._weight(failure.images, self.level)
        if self._failed_at != failure.images:  # false alarms exist: once more as it was, if it still seems to fit
            self._failed_at, self._ceiling = failure.images, needs
            return
        features = self._features(start, start + failure.images, self.level)
        self._cost.observe_failure(features, self.budget_bytes - self.reading.live_bytes)
        self._failed_at = 0
        # Half of what failed, be it half the images or another plan; the last thing to try is one image under the last.
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
            self._meter.release()  # what is no longer needed is for those who press
        if before.images and (after.images, after.level) != (before.images, before.level):
            # To give memory back and ask for it again takes time; of a size that is new it is not much.
            self.undisturbed = self.undisturbed and not self._speed.warm(
                after.images, self._work.height, self._work.width
            )
        self.history, self.level = after, decision.level
        # What ran before a failure had its peak too.
        self.predicted_bytes = max(decision.predicted_bytes, self.predicted_bytes if self.peak_bytes else 0)
        ends = accumulate(decision.micro_batches)
        plan = [sizes[end - count : end] for count, end in zip(decision.micro_batches, ends, strict=True)]
        return plan if self._group else [(sum(groups),) for groups in plan]

    def _weight(self, images: int, level: int) -> float:
        """Activations, in images at level 0."""
        return images * self._cost.levels[min(level, len(self._cost.levels) - 1)].share

    def _may_come_back(self, failure: Failure | None) -> bool:
        """Whether one image would fit if no other process held any of the device."""
        without_others = self.reading.without_others().budget_bytes(self._config.safety_ratio)
        return self.budget_bytes < self._needed_bytes(failure) <= without_others

    def _needed_bytes(self, failure: Failure | None) -> int:
        return self._beside_bytes() + max(self._image_bytes(failure), self._failed_bytes(failure))

    def _beside_bytes(self) -> int:
        """Live beside an image that runs alone, as `decide` counts it."""
        return self.reading.live_bytes + (self._gradient_bytes if self._start == 0 and self._work.images > 1 else 0)

    def _image_bytes(self, failure: Failure | None) -> int:
        """Of the fullest one left, under the last plan, with the margin; after a failure, as if it had not failed."""
        features = replace(self._features(self._start, self._work.images, len(self._cost.levels) - 1), images=1)
        return self._cost.usual_bytes(features) if failure else self._cost.upper(features)[1]

    def _failed_bytes(self, failure: Failure | None) -> int:
        """What one image had taken when it failed, and asked for: it needs that at least."""
        if failure is None or failure.images > 1:
            return 0
        return failure.peak_bytes + tried_to_allocate(failure.message) - self.reading.live_bytes

    def _error(self, failure: Failure | None) -> DoesNotFitError:
        reading, ratio = self.reading, self._config.safety_ratio
        fits = failure is not None and self._needed_bytes(failure) <= self.budget_bytes  # it may be something else
        # A limit that did for this batch alone would end the run in the next.
        beside = self._beside_bytes() + self._optimizer_bytes()
        needed = max(self._needed_bytes(failure) - self._beside_bytes(), 1) + beside
        ways = []
        if self._config.limit is not None:
            roomy = (needed + SPREAD_UNSEEN * (needed - beside)) / (1 - ratio)  # batches to come may have fuller images
            if self._failed_bytes(failure) > self._image_bytes(failure) or fits:
                ways.append(f"give a mem_limit above {max(roomy, reading.total_bytes) // 2**20 + 1:,.0f} MiB")
            else:
                ways.append(f"give a mem_limit of {roomy // 2**20 + 1:,.0f} MiB")
        if needed <= min(reading.held_bytes + reading.free_bytes, reading.total_bytes):
            ways.append(f"give a mem_safety_ratio below {ratio:g}")
        if self._may_come_back(failure):
            ways.append(f"stop the other processes, which hold {(reading.others_bytes or 0) / 2**20:,.0f} MiB of it")
        share = (self.budget_bytes - beside) / (needed - beside)
        ways += [*self._ways_out(min(max(share, 0.0), 1.0)), "smaller images", "a smaller model", "a larger device"]
        error = does_not_fit(needed, self.budget_bytes, reading.free_bytes, ways)
        if failure is not None and fits:
            error.args = (f"{error}. What failed: {failure.message.strip().splitlines()[0]}",)
        return error

    def _read(self) -> None:
        self.reading = self._meter.read()
        self.budget_bytes = self.reading.budget_bytes(self._config.safety_ratio)

    def _state(self, start: int, sizes: tuple[int, ...]) -> State:
        ends = [start + end for end in accumulate(sizes)]
        boxes = self._work.boxes
        return State(
            groups=tuple(Group(size, max(boxes[end - size : end])) for size, end in zip(sizes, ends, strict=True)),
            height=self._work.height,
            width=self._work.width,
            budget_bytes=self.budget_bytes,
            live_bytes=self.reading.live_bytes,
            gradient_bytes=0 if start else self._gradient_bytes,
            history=self.history,
            ceiling=self._ceiling,
            fixed=self._config.micro_batch,
        )

    def _features(self, start: int, stop: int, level: int) -> Features:
        boxes = max(self._work.boxes[start:stop])
        return Features(stop - start, self._work.height, self._work.width, boxes, level)
