"""Chooses checkpoint plans: the least time for the memory that must be freed, solved exactly as an integer programme.

A training step has several phases, and the peak of a plan is the memory of its highest phase. At the end of the
forward pass, everything that the plan keeps is in memory, and all tensors that the code of the model still refers to.
In the loss, only the result of the model is left of the latter. The other phases are the backward passes of the
outermost layers. In the phase of a layer, the tensors that this layer and the layers before it keep are in memory,
together with the tensors that the layer recomputes, or the one that it rebuilds.

The bytes of each phase are a linear function of the choices, which are the layers to rebuild or recompute. The solver
looks for the fastest plan whose phases all stay below a number of bytes. This is a knapsack problem with a few more
constraints. HiGHS, which is part of SciPy, solves it in milliseconds. Checkmate (Jain et al., 2020,
https://arxiv.org/abs/1910.02653) decides about every single operation instead, which takes minutes.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Plan
from yolov12.mas.memory.cgroups import usable_cores
from yolov12.mas.profiling.profile import LayerCost, Profile, Time

__all__ = ["LadderLevel", "ladder", "peak_bytes", "solve"]

_Array = NDArray[np.float64]

# Choices inside an outermost layer are left out if they free less than this fraction of all bytes that are kept. With
# many small choices, the solver would take long.
_WORTHWHILE = 0.01
_INFEASIBLE = 2  # status of SciPy's milp
LEVELS = 10
"""Number of levels above level 0, which keeps everything."""


@dataclass(frozen=True)
class LadderLevel:
    """One level of a ladder: a checkpoint plan with its memory and time."""

    plan: Plan
    """The checkpoint plan."""
    peak_bytes: float
    """Bytes of one image in the highest phase."""
    slow: float
    """Time of a forward and backward pass, relative to the plan that keeps everything."""


@dataclass(frozen=True)
class _Choice:
    layer: LayerCost
    mode: str

    @property
    def frees_bytes(self) -> float:
        return self.layer.recompute_frees_bytes if self.mode == RECOMPUTE else self.layer.rebuild_frees_bytes

    @property
    def in_forward_bytes(self) -> float:
        """Change of the bytes at the end of the forward pass."""
        return (self.layer.held_bytes if self.mode == REBUILD else 0.0) - self.frees_bytes

    @property
    def in_loss_bytes(self) -> float:
        """Change of the bytes in the loss."""
        return (self.layer.result_bytes if self.mode == REBUILD else 0.0) - self.frees_bytes

    @property
    def again_bytes(self) -> float:
        """Bytes of `frees_bytes` that are in memory again while the layer is rebuilt or recomputed."""
        return self.frees_bytes if self.mode == RECOMPUTE else self.layer.largest_rebuilt_bytes

    @property
    def time(self) -> Time:
        return self.layer.recompute if self.mode == RECOMPUTE else self.layer.rebuild


def peak_bytes(profile: Profile, plan: Plan) -> float:
    """Return the bytes of one image in the highest phase of a plan."""
    programme = _Programme(profile)
    return programme.level(programme.chosen(plan)).peak_bytes


def solve(profile: Profile, most_bytes: float) -> LadderLevel | None:
    """Return the fastest plan whose peak bytes for one image are at most `most_bytes`; None if there is none."""
    return _Programme(profile).least_time(most_bytes)


def ladder(profile: Profile, levels: int = LEVELS) -> tuple[LadderLevel, ...]:
    """Return the ladder of a profile: level 0 keeps everything, and the last level has the lowest possible peak.

    The levels are solved at the same time, on the cores that this process may use.

    Args:
        profile: Costs of the layers.
        levels: Most levels above level 0. From level to level, the peak falls by a constant factor. A level is left
            out if its peak is less than 1 % below that of the level before.
    """
    programme = _Programme(profile)
    first = programme.level(programme.chosen(KEEP_ALL))
    found = [first]
    if first.peak_bytes <= 0:
        return (first,)
    lowest = programme.lowest_peak()
    targets = [first.peak_bytes * (lowest / first.peak_bytes) ** (step / levels) for step in range(1, levels + 1)]
    with ThreadPoolExecutor(_threads(levels)) as pool:  # SciPy from 1.15 on solves without Python's lock
        solved = list(pool.map(lambda target: programme.least_time(target * (1 + 1e-9)), targets))
    for level in solved:
        if level is not None and level.peak_bytes < 0.99 * found[-1].peak_bytes:
            found.append(level)
    return tuple(found)


def _threads(levels: int) -> int:
    """Return the number of levels to solve at once. Ranks on this machine share its cores, and each makes a ladder.

    With more threads than cores, a level could reach the time limit of the solver.
    """
    return max(1, min(levels, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class _Programme:
    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        least_bytes = _WORTHWHILE * sum(stage.kept_bytes for stage in profile.stages())
        self._choices = [
            choice
            for layer in profile.layers
            for mode in (REBUILD, RECOMPUTE)
            if (choice := _Choice(layer, mode)).frees_bytes > (least_bytes if layer.inside else 0)
        ]
        self._times = np.array([profile.fraction_of_time(choice.time) for choice in self._choices])
        # Bytes of the phases: fixed + grows @ chosen, with one row per phase. The first rows are the end of the forward
        # pass and the loss. Each stage (an outermost layer) has one row, and another row for each choice in it.
        stages = profile.stages()
        kept = np.cumsum([stage.kept_bytes for stage in stages])
        fixed = [kept[-1] + profile.forward_extra_bytes, kept[-1] + profile.loss_extra_bytes]
        rows = [[each.in_forward_bytes for each in self._choices], [each.in_loss_bytes for each in self._choices]]
        for index, stage in enumerate(stages):
            extra = kept[index] + profile.stage_extra_bytes[stage.stage]
            inside = [index for index, choice in enumerate(self._choices) if choice.layer.stage == stage.stage]
            for again in (None, *inside):
                fixed.append(extra)
                rows.append(self._changes(stage.stage, again))
        self._fixed, self._grows = np.array(fixed), np.array(rows)

    def _changes(self, stage: int, again: int | None) -> list[float]:
        """Return the bytes by which each choice changes the phase of a stage.

        Args:
            stage: Index of the stage.
            again: Index of a choice whose layer is being rebuilt or recomputed in this phase.
        """
        return [
            -choice.frees_bytes * (choice.layer.stage <= stage) + choice.again_bytes * (index == again)
            for index, choice in enumerate(self._choices)
        ]

    def phases(self, chosen: _Array) -> _Array:
        found: _Array = self._fixed + self._grows @ chosen
        return found

    def chosen(self, plan: Plan) -> _Array:
        return np.array([float((choice.layer.name, choice.mode) in plan.modes) for choice in self._choices])

    def level(self, chosen: _Array) -> LadderLevel:
        modes = tuple((c.layer.name, c.mode) for c, x in zip(self._choices, chosen, strict=True) if x)
        peak = float(self.phases(chosen).max()) - (0.0 if modes else self._profile.joined_bytes)
        return LadderLevel(Plan(modes), peak, 1.0 + float(self._times @ chosen))

    def least_time(self, most_bytes: float) -> LadderLevel | None:
        if self._profile.joined_bytes and (keep := self.level(self.chosen(KEEP_ALL))).peak_bytes <= most_bytes:
            return keep
        chosen = self._optimise(self._times, self._grows, most_bytes - self._fixed)
        if chosen is not None:
            return self.level(chosen)
        fitting = (level for level in self._uniform_levels() if level.peak_bytes <= most_bytes)
        return min(fitting, key=lambda level: level.slow, default=None)

    def _uniform_levels(self) -> list[LadderLevel]:
        """Return the plans that treat all outermost layers alike. They are known without the solver."""
        outermost = [choice.mode if choice.layer.inside is None else "" for choice in self._choices]
        chosen = ([float(each == mode) for each in outermost] for mode in (None, REBUILD, RECOMPUTE))
        return [self.level(np.array(each)) for each in chosen]

    def lowest_peak(self) -> float:
        """Return the lowest possible peak: the minimum of an additional variable that no phase may exceed."""
        count = len(self._choices)
        if not count:
            return float(self._fixed.max())
        grows = np.hstack([self._grows, -np.ones((len(self._grows), 1)) * self._fixed.max()])
        chosen = self._optimise(np.eye(count + 1)[count], grows, -self._fixed)
        if chosen is None:  # to keep everything is always a solution, so the solver failed
            return min(level.peak_bytes for level in self._uniform_levels())
        return float(self.phases(chosen).max())

    def _optimise(self, costs: _Array, grows: _Array, most: _Array) -> _Array | None:
        """Return the choices of least cost; None if there is no solution or the solver fails."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        if not self._choices:
            return np.zeros(0) if (most >= 0).all() else None
        more = len(costs) - len(self._choices)
        once = np.array([self._exclusive(layer) + [0.0] * more for layer in self._profile.layers])
        scale = self._fixed.max()
        for presolve in (True, False):  # now and then, only the presolve of HiGHS ends with "Solve error"
            found = milp(
                costs / (abs(costs).max() or 1.0),
                constraints=(LinearConstraint(grows / scale, ub=most / scale), LinearConstraint(once, ub=1.0)),
                integrality=np.array([1] * len(self._choices) + [0] * more),
                bounds=Bounds(0.0, 1.0),
                options={"mip_rel_gap": 0.0, "time_limit": 5.0, "presolve": presolve},
            )
            if found.x is not None:
                chosen: _Array = np.round(found.x[: len(self._choices)])
                return chosen
            if found.status == _INFEASIBLE:
                break
        return None

    def _exclusive(self, layer: LayerCost) -> list[float]:
        """Return 1.0 for choices about this layer or a layer around it, else 0.0. A plan may make only one of them."""
        by_name = {each.name: each for each in self._profile.layers}
        names: list[str] = []
        current: LayerCost | None = layer
        while current is not None:
            names.append(current.name)
            current = by_name.get(current.inside) if current.inside else None
        return [float(choice.layer.name in names) for choice in self._choices]
