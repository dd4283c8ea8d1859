"""Controllers in the simulation, ours and its rivals. Each plans batches as a `step.Planner`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from benchmarks.controller.simulate import PEAK_SCATTER, SAFETY_RATIO, Batch, Card, Run
from yolov12.errors import DoesNotFitError
from yolov12.mas.config import Config
from yolov12.mas.oom import Failure
from yolov12.mas.scheduling.advice import Advice
from yolov12.mas.scheduling.groups import split_groups
from yolov12.mas.scheduling.peak_model import CostModel, Features
from yolov12.mas.scheduling.planner import BatchPlanner
from yolov12.mas.scheduling.time_model import SpeedModel
from yolov12.mas.step.planner import Planner
from yolov12.mas.task import Workload

__all__ = ["POLICIES", "Policy"]


class Policy(Protocol):
    """Controller of a training: it returns a planner for each batch, and learns from the outcome."""

    def restart(self) -> None:
        """Begin a trace. A policy that measures the card only at the start does so now."""

    def planner(self, work: Workload) -> Planner:
        """Return the planner of one batch."""

    def learn(self, batch: Batch) -> None:
        """Learn from a finished batch."""


class Ours:
    """Scheduler of this package.

    Args:
        run: Training that it controls.
        told: Card as a profile would describe it, with inexact checkpoint plans.
    """

    def __init__(self, run: Run, told: Card) -> None:
        self._group = run.card.group
        self._planner = _Noted(
            Config(safety_ratio=SAFETY_RATIO),
            CostModel(told.levels),
            SpeedModel(told.levels),
            run.device,
            gradient_bytes=run.card.gradient_bytes,
            advice=Advice(batches_left=lambda: run.batches_left),
            sleep=lambda seconds: None,
        )
        # The warm-up runs a BatchNorm group, or fewer images if it does not fit.
        room_bytes = run.device.read().budget_bytes(SAFETY_RATIO) - run.card.allocated_bytes
        fits = run.card.usual_bytes(told.group, 40, 0) <= room_bytes
        warmed_up = told.group if fits else min(told.group, 8)
        needed = run.card.usual_bytes(warmed_up, 40, 0)
        self._planner.cost.observe(Features(warmed_up, 640, 640, 40), int(needed))
        self._planner.speed.ran(warmed_up, 640, 640, timed=False)
        self._warm_up_ms = run.warm_up(warmed_up)

    def restart(self) -> None:
        """Keep everything that was learned."""

    def planner(self, work: Workload) -> Planner:
        """Begin the next batch, see `Policy`."""
        self._planner.sizes = ()
        self._planner.begin(work, self._group)
        return self._planner

    def learn(self, batch: Batch) -> None:
        """Teach the time model, see `Policy`."""
        report = self._planner.complete()
        if report.undisturbed and not batch.died:
            self._planner.speed.observe(self._planner.sizes, 640, 640, report.level, batch.ms)
        batch.ms += self._warm_up_ms  # the first batch pays for the warm-up
        self._warm_up_ms = 0.0


class _Noted(BatchPlanner):
    sizes: tuple[int, ...] = ()

    def done(
        self, start: int, stop: int, allocated_bytes: int, peak_bytes: int | None, is_replay: bool = False
    ) -> None:
        super().done(start, stop, allocated_bytes, peak_bytes)
        self.sizes = (*self.sizes, stop - start)


class Sized:
    """Controller that chooses a micro-batch for the memory at the start, and keeps it.

    Args:
        run: Training that it controls.
        told: Unused, as this controller knows the true card.
        level: Index of the checkpoint plan that it always uses.
        share: Fraction of the memory free at the start to fill; by default what the budget allows.
        halves: True to continue with half the images after a failure; otherwise the run ends.
    """

    def __init__(
        self, run: Run, told: Card, *, level: int = 0, share: float | None = None, halves: bool = False
    ) -> None:
        self._run, self.level, self._share, self._halves = run, level, share, halves
        self._images = 0

    def restart(self) -> None:
        """Forget the size, see `Policy`."""
        self._images = 0

    def planner(self, work: Workload) -> Planner:
        """Return this object as the planner, see `Policy`."""
        self._work = work
        return self

    def plan(self, start: int, failure: Failure | None) -> list[tuple[int, ...]]:
        """Split into micro-batches of the chosen size, see `step.Planner`."""
        card = self._run.card
        if not self._images:
            self._images = self._fitting()
        if failure is not None:
            if not self._halves or failure.images <= card.group:
                raise DoesNotFitError("as every other training")
            self._images = max(failure.images // 2, card.group)
        groups = split_groups(card.images - start, card.group)
        each = max(self._images // card.group, 1)
        return [groups[index : index + each] for index in range(0, len(groups), each)]

    def done(
        self, start: int, stop: int, allocated_bytes: int, peak_bytes: int | None, is_replay: bool = False
    ) -> None:
        """Learn nothing, see `step.Planner`."""

    def learn(self, batch: Batch) -> None:
        """Learn nothing."""

    def _fitting(self) -> int:
        """Return the largest number of images that fits now, from the batch halved again and again, or one group."""
        card, reading = self._run.card, self._run.device.read()
        room = reading.budget_bytes(SAFETY_RATIO) if self._share is None else self._share * reading.free_bytes
        images = card.images
        while images > card.group:
            live = card.allocated_bytes + (card.gradient_bytes if images < card.images else 0)
            needed = card.usual_bytes(images, max(self._work.boxes), self.level) * (1 + PEAK_SCATTER)
            if live + needed <= room:
                break
            images //= 2
        return images


POLICIES: dict[str, Callable[[Run, Card], Policy]] = {
    "ours": Ours,
    "fixed": Sized,
    "halving": lambda run, told: Sized(run, told, halves=True),
    "AutoBatch": lambda run, told: Sized(run, told, share=0.6),
    "checkpoint all": lambda run, told: Sized(run, told, level=len(run.card.levels) - 1),
}
