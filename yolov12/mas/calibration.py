"""Decisions for a whole run: the size of BatchNorm groups, and the checkpoint plans once memory is short."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from yolov12.mas.checkpointing.checkpointing import KEEP_ALL
from yolov12.mas.config import GROUPS, Config
from yolov12.mas.distributed.ranks import Ranks
from yolov12.mas.memory.reading import Meter, Reading
from yolov12.mas.oom import Failure
from yolov12.mas.profiling.ladder import Ladder, make_ladder
from yolov12.mas.profiling.ladder_cache import LadderCache
from yolov12.mas.profiling.warmup import PROFILE_IMAGES, warm_up
from yolov12.mas.scheduling.candidates import beside_bytes
from yolov12.mas.scheduling.groups import largest_group, least_bytes, split_groups
from yolov12.mas.scheduling.peak_model import Features
from yolov12.mas.scheduling.planner import BatchPlanner
from yolov12.mas.step.step import Step
from yolov12.mas.task import Share, Workload

__all__ = ["Calibration"]


class Calibration:
    """Decides what holds for a whole run, with the first batch or when memory gets short.

    Args:
        step: Runs the model.
        planner: Plans its batches; its models learn from the warm-up.
        meter: Meter of the model's device.
        config: Settings of the engine.
        layers: Layers that checkpoint plans may name: name → layer.
        cache: Folder in which ladders of plans are kept from run to run; None to profile in every run.
        device: Name of the device.
        ranks: Processes that share each batch.
        log: Called with lines for the user.
    """

    def __init__(
        self,
        step: Step,
        planner: BatchPlanner,
        meter: Meter,
        config: Config,
        layers: Mapping[str, nn.Module],
        cache: Path | None,
        device: str,
        ranks: Ranks,
        log: Callable[[str], None],
    ) -> None:
        self.bn_group = config.bn_group
        """Number of images that BatchNorm normalises together; None until it is decided."""
        self.ladder: Ladder | None = None
        """Checkpoint plans; None until a batch does not fit without them."""
        self.layers = layers
        self._step, self._planner, self._meter, self._config = step, planner, meter, config
        self._cache, self._device, self._ranks, self._log = LadderCache(cache), device, ranks, log
        self._settled, self._logged = False, ""
        self._guess_budget_bytes = 0  # budget when a ladder was guessed
        importlib.import_module("scipy.optimize")  # for the ladder; then there may be no memory to import it

    @property
    def levels(self) -> int:
        """Number of checkpoint plans."""
        return len(self._step.plans)

    def begin(self, batch: Any, work: Workload, share: Share, patience_s: float) -> None:
        """Begin a batch: decide what is still open, and make checkpoint plans if the batch does not fit without them.

        Args:
            batch: Batch on the host.
            work: Properties of the batch.
            share: Description of the whole batch over all ranks.
            patience_s: Seconds to wait for other processes to release memory.
        """
        planner = self._planner
        planner.begin(work, self.bn_group or 0, patience_s)
        if not self._settled:
            self._settle(batch, work, share)
            planner.regroup(self.bn_group or 0)
        if self._wants_ladder() and planner.cost.largest and not self.fits(work.images, work):
            self._make_ladder(batch, work)
            planner.regroup(self.bn_group or 0)

    def start_over(self) -> None:
        """Decide everything again with the next batch, because the first one did not fit."""
        self._settled, self.bn_group = False, self._config.bn_group

    def resume(self, ladder: Ladder | None) -> None:
        """Use the checkpoint plans of a ladder, of which the models know the levels already; None for no plans."""
        self.ladder, self._step.plans = ladder, (KEEP_ALL,) if ladder is None else ladder.plans

    def fits(
        self,
        images: int,
        work: Workload,
        *,
        level: int = 0,
        reading: Reading | None = None,
        budget_bytes: int = 0,
        later_bytes: int = 0,
    ) -> bool:
        """Return whether a micro-batch is predicted to fit beside the gradients; False before any was observed.

        Args:
            images: Number of images. A larger number than `micro_batch` counts as `micro_batch`.
            work: Properties of the batch: the size and the boxes of its images.
            level: Index of the checkpoint plan.
            reading: Memory reading; by default that of the current batch.
            budget_bytes: Budget in bytes at that reading.
            later_bytes: Bytes that are allocated later, and beside which it has to fit, too.
        """
        images = min(images, self._config.micro_batch or images)
        features = Features(images, work.height, work.width, work.most_boxes, level)
        _, needed_bytes = self._planner.cost.upper(features)
        return self._has_room(needed_bytes + later_bytes, reading, budget_bytes)

    def _has_room(self, needed_bytes: int, reading: Reading | None = None, budget_bytes: int = 0) -> bool:
        planner = self._planner
        if reading is None:
            reading, budget_bytes = planner.reading, planner.budget_bytes
        beside = beside_bytes(reading.allocated_bytes, planner.gradient_bytes)
        return planner.cost.largest > 0 and beside + needed_bytes <= budget_bytes

    def _settle(self, batch: Any, work: Workload, share: Share) -> None:
        planner = self._planner
        if self._config.micro_batch is None or self.bn_group is None:
            self._step.notes_tries = True
            while (failure := self._warm_up(batch, work)) and planner.wait(failure):
                self._step.notes_tries = False  # it fails again every second, until others release memory
            self._step.notes_tries = True
            self._meter.release(thorough=False)
            planner.read()  # libraries and autocast keep what they allocated in the warm-up
        if self.bn_group is None:
            images, later_bytes = min(GROUPS[0], work.images), planner.optimizer_bytes
            if self.ladder is None and not self.fits(images, work, later_bytes=later_bytes):
                self._make_ladder(batch, work)
            self.bn_group = self._choose_group(work, share)
            self._log_group(self.bn_group, share.batch_images)
        elif (seen := min(self.bn_group, work.images)) and planner.cost.largest and not self._group_fits(seen, work):
            self._log_once(
                f"memory: {seen} images at once (bn_group) seem not to fit",
                f" into the budget of {planner.budget_bytes / 2**20:,.0f} MiB: BatchNorm will see fewer in the steps "
                "where that is so",
            )
        self._settled = True

    def _log_group(self, group: int, batch_images: int) -> None:
        """Log how many images BatchNorm really sees: a batch may be smaller than a group."""
        sizes = sorted(set(split_groups(batch_images, group)), reverse=True)
        seen = " or ".join(map(str, sizes))
        run = "(bn_group) in this run"
        if sizes[0] != group:
            run = f"in this run (bn_group={group}, {batch_images} in a batch)"
        others_mib = (self._planner.reading.others_bytes or 0) / 2**20
        others = f"; other processes hold {others_mib:,.0f} MiB" if group < GROUPS[0] else ""
        self._log_once(f"memory: BatchNorm sees {seen} images at once {run}", others)

    def _log_once(self, line: str, details: str) -> None:
        """Log a line and its details, unless the last line was the same: the first batch may be tried several times."""
        if line != self._logged:
            self._logged = line
            self._log(line + details)

    def _choose_group(self, work: Workload, share: Share) -> int:
        """Return the size of BatchNorm groups for the run: the same on all ranks, with at least one group for each."""
        most = max(share.batch_images // self._ranks.size, 1) if self._ranks.size > 1 else None
        # The first update comes later, and the group is that of all batches.
        later_bytes = self._planner.optimizer_bytes
        group = largest_group(
            lambda group: self._group_fits(group, work, later_bytes), most=most, micro_batch=self._config.micro_batch
        )
        return self._ranks.least(group)

    def _group_fits(self, group: int, work: Workload, later_bytes: int = 0) -> bool:
        """Return whether a BatchNorm group fits under some checkpoint plan, also beside bytes allocated later."""
        if group > (self._config.micro_batch or group):
            return False
        features = Features(group, work.height, work.width, work.most_boxes)
        return self._has_room(least_bytes(self._planner.cost, features) + later_bytes)

    def _warm_up(self, batch: Any, work: Workload) -> Failure | None:
        """Run a few images and keep everything or, if not even one fits like this, keep as little as possible."""
        planner = self._planner

        def run(level: int) -> Failure | None:
            # Not even one image fits without a plan if a level is given, so that a group would not fit under one.
            group, budget_bytes = 0 if level else self._group_to_try(work), planner.budget_bytes
            return warm_up(
                self._step, self._meter.kind, batch, work, planner.cost, planner.speed, level,
                budget_bytes=budget_bytes, group=group, held=partial(self._meter.held_to, budget_bytes),
            )  # fmt: skip

        failure = run(0)
        if failure is None or not self.layers:
            return failure
        self._make_ladder(batch, work)
        return run(len(self._step.plans) - 1)

    def _group_to_try(self, work: Workload) -> int:
        """Return how many images the warm-up tries first; 0 to begin with few.

        A group is tried only where the allocator keeps to the budget, as nobody knows what its images need. In a run
        that resumes, it is known.
        """
        group, is_known = self._first_group(work), self._planner.cost.largest > 0
        may_try = self._meter.held_to(self._planner.budget_bytes) is not None
        return group if may_try and (not is_known or self.fits(group, work)) else 0

    def _first_group(self, work: Workload) -> int:
        """Return the images of the largest BatchNorm group that a batch may run in, at most `GROUPS[0]`."""
        most = min(self.bn_group or GROUPS[0], self._config.micro_batch or GROUPS[0], GROUPS[0])
        return max(split_groups(work.images, most))

    def _wants_ladder(self) -> bool:
        """Return whether there is no ladder, or one that was guessed when there was much less memory than now."""
        guessed = self.ladder is not None and self.ladder.guessed
        return self.ladder is None or (guessed and self._planner.budget_bytes > 2 * self._guess_budget_bytes)

    def _make_ladder(self, batch: Any, work: Workload) -> None:
        norms = self._step.norms
        key = self._cache.key(
            self._step.model, list(self.layers), work, self._device, fused=norms.fused, joins=norms.may_join
        )
        ladder = self._cache.get(key)
        if ladder is None:
            images, group = min(self._planner.cost.largest, work.images, PROFILE_IMAGES), self._first_group(work)
            if self._planner.speed.warm(group, work.height, work.width) and self.fits(group, work):
                images = group  # ten passes with more images take less time than a new size
            ladder = make_ladder(self._step, self._meter, self.layers, batch, images)
            if not ladder.guessed:
                self._cache.put(key, ladder)
        self._guess_budget_bytes = self._meter.read().budget_bytes(self._config.safety_ratio)
        self.resume(ladder)
        self._planner.cost.set_levels(ladder.levels)
        self._planner.speed.set_levels(ladder.levels)
        self._planner.replay_room.forget()
