"""Simulated cards, and memory that other processes take and release, to compare controllers of memory.

A `Card` defines the true cost of a micro-batch; the controller under test gets values for checkpoint plans that are a
few percent off. A `Run` trains on the card, batch after batch, under a trace of memory that other processes hold.
Peaks scatter by 1 % and times by 3 %. Some batches have crowded images, a new size takes seconds, and memory may change
within a batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from yolov12.errors import DoesNotFitError
from yolov12.mas.memory.reading import Reading
from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.oom import Failure
from yolov12.mas.scheduling.peak_model import Level
from yolov12.mas.step.planner import Planner
from yolov12.mas.task import Workload

__all__ = ["CARDS", "KINDS", "SAFETY_RATIO", "Batch", "Card", "Moment", "Run", "level_peak_bytes", "trace"]

GIB = 2**30
SAFETY_RATIO = 0.10
PEAK_SCATTER = 0.01
_TIME_SCATTER = 0.03
_MOVE_MS = 150.0  # time to release memory and to allocate it again
_FAILURE_MS = 200.0  # time of a failure besides that of the micro-batch
_CROWDED = 0.05  # fraction of batches with crowded images
KINDS = ("steady", "steps", "ramps", "bursts", "saw-tooth", "adversary")

Taker = Callable[[float, float], float]
"""Function of this process's peaks in the last two batches, as fractions of the card; returns the fraction that other
processes hold next."""


@dataclass(frozen=True)
class Card:
    """Device with a model on it."""

    name: str
    """Name in the results."""
    total_bytes: int
    """Memory of the device."""
    allocated_bytes: int
    """Allocated memory between batches."""
    gradient_bytes: int
    """Bytes of all gradients."""
    fixed_bytes: int
    """Bytes of a micro-batch of any size."""
    image_bytes: int
    """Activations of an image at level 0."""
    host_ms: float
    """Least time of a micro-batch."""
    image_ms: float
    """Device time of an image."""
    new_size_ms: float
    """Time in which libraries search kernels for a new size."""
    images: int
    """Number of images in a batch."""
    group: int
    """Number of images in a BatchNorm group."""
    levels: tuple[Level, ...] = (Level(1, 1), Level(0.8, 1.03), Level(0.6, 1.08), Level(0.5, 1.2), Level(0.4, 1.35))

    def usual_ms(self, images: int, level: int) -> float:
        """Return the time of a micro-batch in ms, without scatter."""
        return max(self.host_ms, self.image_ms * images) * self.levels[level].slow

    def usual_bytes(self, images: int, boxes: int, level: int) -> float:
        """Return the peak of a micro-batch above the bytes allocated before it, without scatter."""
        return self.fixed_bytes + images * self.image_bytes * level_peak_bytes(self.levels[level].fraction, boxes)

    def drawn(self, chance: random.Random) -> Card:
        """Return a similar card, with random changes of some percent."""

        def about(value: float, percent: float) -> float:
            return value * (1 + chance.uniform(-percent, percent) / 100)

        levels = [Level(about(each.fraction, 3), about(each.slow, 3)) for each in self.levels[1:]]
        return replace(
            self,
            image_bytes=int(about(self.image_bytes, 20)),
            host_ms=about(self.host_ms, 20),
            image_ms=about(self.image_ms, 20),
            levels=(self.levels[0], *levels),
        )


CARDS = (
    Card("fast, waits for its host", 80 * GIB, GIB, GIB // 16, GIB // 4, 254 * 2**20, 79.0, 1.2, 4000.0, 256, 32),
    Card("T4-like", 15 * GIB, GIB // 2, GIB // 16, GIB // 8, 254 * 2**20, 60.0, 9.0, 3000.0, 64, 4),
    Card("Jetson-like", 8 * GIB, GIB // 4, GIB // 64, GIB // 16, 110 * 2**20, 150.0, 30.0, 6000.0, 32, 4),
)
"""Cards to draw from. The first is as measured: YOLOv12-S at 640 on an H100 and its host, 254 MiB per image."""


def level_peak_bytes(share: float, boxes: int) -> float:
    """Return the peak of one image as a fraction of its activations at level 0.

    The peak is that of the backward pass, or that of the loss if its tables need more. Under a plan that keeps less,
    the loss starts from fewer bytes.

    Args:
        share: Fraction of level 0 that the plan needs.
        boxes: Number of boxes in the image with most boxes.
    """
    return max(share, max(share - 0.8, 0.05) + 0.0067 * boxes)


@dataclass(frozen=True)
class Moment:
    """Conditions of one batch."""

    others: float
    """Fraction of the card that other processes hold in its first half."""
    others_later: float
    """Fraction of the card that other processes hold in its second half."""
    boxes: tuple[int, ...]
    """Number of boxes in each image."""


@dataclass
class Batch:
    """Outcome of one batch."""

    moment: Moment
    ms: float = 0.0
    peak_bytes: float = 0.0
    largest: int = 0
    level: int = 0
    failures: int = 0
    over_budget: bool = False
    avoidable: bool = False
    """True if the batch was over the budget and a smaller action would not have been."""
    new_sizes: list[int] = field(default_factory=list)
    died: bool = False


class Device(ReplayMeter):
    """Meter that reads the simulated memory."""

    def __init__(self, card: Card) -> None:
        super().__init__(card.total_bytes, [0], card.allocated_bytes)
        self._card = card
        self.others = 0.0
        self.released = False

    def read(self) -> Reading:
        """Return the simulated memory, see `Meter`."""
        card = self._card
        others = int(self.others * card.total_bytes)
        free = max(0, card.total_bytes - others - card.allocated_bytes)
        return Reading(card.allocated_bytes, card.allocated_bytes, free, card.total_bytes, others)

    def release(self, *, thorough: bool = True) -> None:
        """Note that memory was released, see `Meter`."""
        self.released = True


class Run:
    """Training on one card under one controller.

    Args:
        card: True card.
        seed: Seed of boxes and scatter.
        batches: Number of batches.
    """

    def __init__(self, card: Card, seed: int, batches: int) -> None:
        self.card, self.device = card, Device(card)
        self.batches_left = batches
        """Batches until the end, with the next one."""
        self._chance = random.Random(seed)
        self._warm: set[int] = set()
        self._levels = 0, 0  # micro-batch and checkpoint plan of the previous batch

    def warm_up(self, images: int) -> float:
        """Run some images before the first batch, so that libraries know this size; return the time in ms."""
        self._warm.add(images)
        return self.card.new_size_ms

    def boxes(self) -> tuple[int, ...]:
        """Draw the boxes of a batch: all images of a group have those of its fullest image."""
        chance, groups = self._chance, self.card.images // self.card.group
        fullest = [chance.randint(20, 60) for _ in range(groups)]
        if chance.random() < _CROWDED:
            fullest[chance.randrange(groups)] = chance.randint(160, 330)
        return tuple(boxes for boxes in fullest for _ in range(self.card.group))

    def budget_bytes(self, others: float) -> float:
        """Return the budget of this process in bytes.

        Args:
            others: Fraction of the card that other processes hold.
        """
        return max(0.0, self.card.total_bytes * (1 - others - SAFETY_RATIO))

    def batch(self, moment: Moment, planner: Callable[[Workload], Planner]) -> Batch:
        """Run a batch as `step.Step` does.

        Args:
            moment: Conditions of the batch.
            planner: Returns the planner of the batch.
        """
        card, chance, done = self.card, self._chance, Batch(moment)
        self.device.others, self.device.released = moment.others, False
        work = Workload(640, 640, moment.boxes)
        start, failure, ways = 0, None, planner(work)
        while start < card.images:
            try:
                plan = ways.plan(start, failure)
            except DoesNotFitError:
                done.died = True
                return done
            failure = None
            budget_bytes = self.budget_bytes(self.device.others)
            for groups in plan:
                stop = start + sum(groups)
                if 2 * start >= card.images:
                    self.device.others = moment.others_later
                live = card.allocated_bytes + (card.gradient_bytes if start else 0)
                boxes = max(moment.boxes[start:stop])
                usual = card.usual_bytes(stop - start, boxes, ways.level)
                peak = live + usual * (1 + chance.uniform(-PEAK_SCATTER, PEAK_SCATTER))
                ms = card.usual_ms(stop - start, ways.level) * math.exp(chance.gauss(0, _TIME_SCATTER))
                done.ms += ms
                if peak > card.total_bytes * (1 - self.device.others):
                    done.failures += 1
                    done.ms += _FAILURE_MS
                    failure = Failure(stop - start, "CUDA out of memory. Tried to allocate 20.00 MiB", int(peak))
                    break
                if stop - start not in self._warm:
                    self._warm.add(stop - start)
                    done.ms += card.new_size_ms
                    done.new_sizes.append(stop - start)
                if peak > budget_bytes:
                    done.over_budget = True
                    least = card.usual_bytes(card.group, max(moment.boxes), len(card.levels) - 1) + card.gradient_bytes
                    done.avoidable |= card.allocated_bytes + least * (1 + PEAK_SCATTER) <= budget_bytes
                done.peak_bytes = max(done.peak_bytes, peak)
                done.largest, done.level = max(done.largest, stop - start), ways.level
                ways.done(start, stop, int(live), int(peak))
                start = stop
        if self.device.released or done.largest > self._levels[0] > 0:
            done.ms += _MOVE_MS
        self.batches_left -= 1
        self._levels = done.largest, done.level
        return done


def trace(kind: str, steps: int, chance: random.Random) -> Sequence[float] | Taker:
    """Draw the fraction of the card that other processes hold in each step; an adversary reacts to the peaks.

    Args:
        kind: One of `KINDS`.
        steps: Number of steps.
        chance: Source of random numbers.
    """
    most, least = chance.uniform(0.3, 0.8), chance.uniform(0.0, 0.2)
    if kind == "steady":
        level = chance.uniform(0.0, 0.8)
        return [max(level + chance.gauss(0, 0.002), 0.0) for _ in range(steps)]
    if kind == "steps":
        held: list[float] = []
        while len(held) < steps:
            held += [chance.uniform(0.0, 0.8)] * chance.randint(5, 30)
        return held[:steps]
    if kind == "ramps":
        first, last = (least, most) if chance.random() < 0.5 else (most, least)
        return [first + (last - first) * index / (steps - 1) for index in range(steps)]
    if kind == "bursts":
        held = [least] * steps
        for _ in range(steps // 12):
            start = chance.randrange(steps)
            for index in range(start, min(start + chance.randint(1, 4), steps)):
                held[index] = most
        return held
    if kind == "saw-tooth":
        period = chance.randint(8, 40)
        return [least + (most - least) * (index % period) / period for index in range(steps)]
    taken = least

    def adversary(before: float, now: float) -> float:
        """Take memory right after this process has grown, and release it when it has shrunk."""
        nonlocal taken
        if now > 1.02 * before:
            taken = min(1 - SAFETY_RATIO - 0.8 * now, 0.85)
        elif now < 0.98 * before:
            taken = least
        return max(taken, least)

    return adversary
