"""A simulated device whose small micro-batches wait for launches, with and without CUDA graphs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from yolov12.mas.config import Config
from yolov12.mas.memory.replay import ReplayMeter
from yolov12.mas.scheduling.peak_model import GRAPH_RESERVE, CostModel, Features, Level
from yolov12.mas.scheduling.planner import BatchPlanner, BatchReport
from yolov12.mas.scheduling.time_model import SpeedModel
from yolov12.mas.task import Workload

MIB = 2**20
LADDER = tuple(Level(0.87**index, 1.0 + 0.006 * index**2) for index in range(11))
LOSS = 0.05
"""Bytes of the loss beside a graph, relative to those of the micro-batch."""


@dataclass
class Device:
    """Host-bound device, and graphs as `step.graphs.replays` makes them: after three usual runs of a size."""

    limit_mib: int
    launch_ms: float = 150.0
    image_ms: float = 3.5
    image_mib: int = 700
    fixed_mib: int = 100
    allocated_mib: int = 950
    gradient_mib: int = 236
    new_size_ms: float = 4000.0
    group: int = 8
    works: bool = True
    """Whether captures succeed."""
    holds: float = 0.069
    """Bytes of a graph beyond those of the micro-batch, relative to those of one that keeps everything."""
    has_graphs: bool = True
    possible: bool = True
    static_bytes: int = 0
    lacks_room: bool = False
    runs: dict = field(default_factory=dict)
    held: set = field(default_factory=set)
    refused: set = field(default_factory=set)
    over: list = field(default_factory=list)
    sizes: tuple = ()
    replayed: int = 0
    captures: int = 0
    report: BatchReport | None = None

    def __post_init__(self):
        self.meter = ReplayMeter(2**40, [0], self.allocated_mib * MIB, limit=self.limit_mib * MIB)
        cost, self.speed = CostModel(LADDER), SpeedModel(LADDER)
        self.planner = BatchPlanner(Config(), cost, self.speed, self.meter, gradient_bytes=self.gradient_mib * MIB)
        cost.observe(Features(self.group, 640, 640, 10), self.needed_bytes(self.group, 0))
        self.speed.ran(self.group, 640, 640, timed=False)
        self.planner.replay_room.graphs = self if self.has_graphs else None
        self.known = {self.group}
        self.arms = []

    def drop(self):
        self.held.clear()

    def needed_bytes(self, images, level):
        return int((self.fixed_mib + images * self.image_mib * LADDER[level].fraction) * MIB)

    def graph_bytes(self, key):
        return self.needed_bytes(*key) + self.holds * self.needed_bytes(key[0], 0)

    def usual_ms(self, images, level):
        slow = LADDER[level].slow
        return max(self.launch_ms * slow, images * self.image_ms * slow)

    def replay_ms(self, images, level):
        return 5.0 + images * self.image_ms * LADDER[level].slow

    def batch(self, images=256, boxes=10):
        """Run a batch, teach its time, and return its milliseconds."""
        planner = self.planner
        planner.begin(Workload(640, 640, (boxes,) * images), self.group)
        plan = planner.plan(0, None)
        waits = captured = False
        self.lacks_room, self.replayed, ms, start, told = False, 0, 0.0, 0, {}
        for groups in plan:
            size, level = sum(groups), planner.level
            live = (self.allocated_mib + (self.gradient_mib if start else 0)) * MIB
            needed, key = self.needed_bytes(size, level), (size, level)
            pool = max(map(self.graph_bytes, self.held), default=0)
            upper, capture, room = planner.room(start, start + size)
            capture = max(capture, upper * self.graph_bytes(key) / needed)
            budget = planner.budget_bytes
            is_due = self.can_capture and key not in self.held | self.refused and self.runs.get(key, 0) >= 3
            if is_due and capture <= room - live - pool:
                captured, ms = True, ms + 3 * self.usual_ms(*key)
                self.captures += 1
                self.over.append(live + pool + self.graph_bytes(key) - budget)
                told[size] = self.usual_ms(*key)
                (self.held if self.works else self.refused).add(key)
                pool = max(map(self.graph_bytes, self.held), default=0)
            if key in self.held:
                self.replayed, ms = self.replayed + 1, ms + min(self.replay_ms(*key), self.usual_ms(*key))
                peak = live + pool + LOSS * needed
            else:
                if live + pool + upper > budget:
                    self.drop()
                    pool = 0
                ms, self.runs[key] = ms + self.usual_ms(*key), self.runs.get(key, 0) + 1
                peak = live + pool + needed
                if self.can_capture and key not in self.refused:
                    has_room = capture <= room - live - pool
                    waits, self.lacks_room = waits or has_room, self.lacks_room or not has_room
            if size not in self.known:
                self.known.add(size)
                ms += self.new_size_ms
            self.over.append(peak - budget)
            planner.done(start, start + size, int(live), int(peak), key in self.held)
            start += size
        self.lacks_room = self.lacks_room and not self.replayed
        report = self.report = planner.complete()
        if report.undisturbed:
            for size, usual_ms in told.items():
                self.speed.observe_micro_batch(size, 640, 640, report.level, usual_ms)
            if not captured and not (waits and self.replayed):
                sizes = [sum(groups) for groups in plan]
                self.speed.observe(sizes, 640, 640, report.level, ms, replays=report.replays and not waits)
        self.arms.append((max(map(sum, plan)), report.level, self.replayed == len(plan)))
        return ms

    @property
    def can_capture(self):
        return self.has_graphs and self.possible

    def best_ms(self, *, replays):
        """Return the least milliseconds of a batch in equal micro-batches, over all plans that fit."""
        budget, found = 0.9 * self.limit_mib * MIB, []
        for size in (8, 16, 32, 64, 128, 256):
            for level in range(len(LADDER)):
                live = (self.allocated_mib + 1.5 * self.gradient_mib) * MIB
                factor = LADDER[level].graph_bytes + GRAPH_RESERVE if replays else 1.0
                if live + factor * 1.02 * self.needed_bytes(size, level) <= budget:
                    ms = self.replay_ms(size, level) if replays else self.usual_ms(size, level)
                    found.append(256 // size * ms)
        return min(found)


def trained(batches=60, **options):
    device = Device(**options)
    return device, [device.batch() for _ in range(batches)]


def drawn(seed):
    draw = random.Random(seed)
    return {
        "limit_mib": draw.randint(3800, 40_000),
        "launch_ms": draw.uniform(1.0, 400.0),
        "image_ms": draw.uniform(0.5, 20.0),
        "image_mib": draw.randint(150, 800),
        "new_size_ms": draw.choice([0.0, 2000.0]),
    }


def graphed(limit_mib=8192):
    """Return a device that replays all of each batch."""
    device, _ = trained(limit_mib=limit_mib)
    assert set(device.arms[-6:]) == {(*device.arms[-1][:2], True)}
    return device
