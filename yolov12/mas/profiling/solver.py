"""Choosing a plan: the least time for the bytes that must be freed, solved exactly as an integer programme.

The peak of a plan is the highest of: the loss, when all that is kept is there; and the backward pass of each outermost
layer, when what was kept before and in it is there, and what it recomputes besides. All are linear in the choices, so
"no phase above so many bytes, in the least time" is a knapsack with a few constraints more, and HiGHS, in SciPy, solves
it in milliseconds (compare Checkmate: Jain et al., 2020, https://arxiv.org/abs/1910.02653, which places every single
operation and takes minutes).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, REBUILD, RECOMPUTE, Plan
from yolov12.mas.profiling.profile import LayerCost, Profile, Time

__all__ = ["Rung", "ladder", "peak_bytes", "solve"]

_Array = NDArray[np.float64]

_WORTHWHILE = 0.01  # share of all that is kept, for a choice about part of a layer: many small ones take long to weigh
RUNGS = 10
"""Plans between keeping all and freeing all that can be freed."""


@dataclass(frozen=True)
class Rung:
    """A plan, and what it does."""

    plan: Plan
    peak_bytes: float
    """Of one image: the highest phase."""
    slow: float
    """Time relative to keeping all."""


@dataclass(frozen=True)
class _Choice:
    layer: LayerCost
    mode: str

    @property
    def frees_bytes(self) -> float:
        return self.layer.recompute_frees_bytes if self.mode == RECOMPUTE else self.layer.rebuild_frees_bytes

    @property
    def time(self) -> Time:
        return self.layer.recompute if self.mode == RECOMPUTE else self.layer.rebuild


def peak_bytes(profile: Profile, plan: Plan) -> float:
    """Highest phase of a plan, for one image."""
    programme = _Programme(profile)
    return float(programme.phases(programme.chosen(plan)).max())


def solve(profile: Profile, most_bytes: float) -> Rung | None:
    """The plan of least time whose peak, for one image, is at most `most_bytes`; None if there is none."""
    return _Programme(profile).least_time(most_bytes)


def ladder(profile: Profile, rungs: int = RUNGS) -> tuple[Rung, ...]:
    """Plans from keeping all to the lowest peak there is, each lower and slower than the one before."""
    programme = _Programme(profile)
    first = programme.rung(programme.chosen(KEEP_ALL))
    found = [first]
    if first.peak_bytes <= 0:
        return (first,)
    lowest = programme.lowest_peak()
    for step in range(1, rungs + 1):
        target = first.peak_bytes * (lowest / first.peak_bytes) ** (step / rungs)
        rung = programme.least_time(target * (1 + 1e-9))
        if rung is not None and rung.peak_bytes < 0.99 * found[-1].peak_bytes:
            found.append(rung)
    return tuple(found)


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
        self._times = np.array([profile.share_of_time(choice.time) for choice in self._choices])
        # phases(x) = fixed + grows @ x: the loss; every stage; every recomputed layer inside its stage.
        stages = profile.stages()
        kept = np.cumsum([stage.kept_bytes for stage in stages])
        fixed, rows = [kept[-1] + profile.loss_extra_bytes], [self._freed(len(stages), None)]
        for index, stage in enumerate(stages):
            extra = kept[index] + profile.stage_extra_bytes[stage.stage]
            inside = [i for i, c in enumerate(self._choices) if c.layer.stage == stage.stage and c.mode == RECOMPUTE]
            for again in (None, *inside):
                fixed.append(extra)
                rows.append(self._freed(stage.stage, again))
        self._fixed, self._grows = np.array(fixed), np.array(rows)

    def _freed(self, stage: int, again: int | None) -> list[float]:
        """What choices change in the phase of a stage; what is recomputed there is back."""
        return [
            -choice.frees_bytes * (choice.layer.stage <= stage) + choice.frees_bytes * (index == again)
            for index, choice in enumerate(self._choices)
        ]

    def phases(self, chosen: _Array) -> _Array:
        found: _Array = self._fixed + self._grows @ chosen
        return found

    def chosen(self, plan: Plan) -> _Array:
        return np.array([float((choice.layer.name, choice.mode) in plan.modes) for choice in self._choices])

    def rung(self, chosen: _Array) -> Rung:
        modes = tuple((c.layer.name, c.mode) for c, x in zip(self._choices, chosen, strict=True) if x)
        return Rung(Plan(modes), float(self.phases(chosen).max()), 1.0 + float(self._times @ chosen))

    def least_time(self, most_bytes: float) -> Rung | None:
        chosen = self._optimise(self._times, self._grows, most_bytes - self._fixed)
        return None if chosen is None else self.rung(chosen)

    def lowest_peak(self) -> float:
        """With the peak as one variable more, which all phases stay under."""
        count = len(self._choices)
        if not count:
            return float(self._fixed.max())
        grows = np.hstack([self._grows, -np.ones((len(self._grows), 1)) * self._fixed.max()])
        chosen = self._optimise(np.eye(count + 1)[count], grows, -self._fixed)
        assert chosen is not None  # all kept is a solution
        return float(self.phases(chosen).max())

    def _optimise(self, costs: _Array, grows: _Array, most: _Array) -> _Array | None:
        from scipy.optimize import Bounds, LinearConstraint, milp

        if not self._choices:
            return np.zeros(0) if (most >= 0).all() else None
        more = len(costs) - len(self._choices)
        once = np.array([self._chain(layer) + [0.0] * more for layer in self._profile.layers])
        scale = self._fixed.max()
        found = milp(
            costs / (abs(costs).max() or 1.0),
            constraints=(LinearConstraint(grows / scale, ub=most / scale), LinearConstraint(once, ub=1.0)),
            integrality=np.array([1] * len(self._choices) + [0] * more),
            bounds=Bounds(0.0, 1.0),
            options={"mip_rel_gap": 0.0, "time_limit": 5.0},
        )
        return None if found.x is None else np.round(found.x[: len(self._choices)])

    def _chain(self, layer: LayerCost) -> list[float]:
        """Choices for a layer and those that it is inside of, of which there can be one."""
        by_name = {each.name: each for each in self._profile.layers}
        names: list[str] = []
        current: LayerCost | None = layer
        while current is not None:
            names.append(current.name)
            current = by_name.get(current.inside) if current.inside else None
        return [float(choice.layer.name in names) for choice in self._choices]
