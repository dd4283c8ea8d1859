"""The ladder of checkpointing plans of a run, from keeping all to keeping least: a level is a rung of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, RECOMPUTE, Plan
from yolov12.mas.checkpointing.layers import outermost
from yolov12.mas.memory.reading import Meter
from yolov12.mas.profiling.profile import Profile
from yolov12.mas.profiling.solver import ladder
from yolov12.mas.profiling.warmup import profile
from yolov12.mas.scheduling.peak_model import Level
from yolov12.mas.step.step import Step

__all__ = ["Ladder", "ladder_of", "make_ladder"]

# Where not even one image could be profiled: what recomputing all layers did to YOLO12-S (docs/measurements.md).
_UNKNOWN = Level(share=0.4, slow=1.35)


@dataclass(frozen=True)
class Ladder:
    """Plans, each with less memory and more time than the one before."""

    plans: tuple[Plan, ...]
    levels: tuple[Level, ...]
    """What each does, relative to the first, which keeps all."""
    guessed: bool = False
    """Not from a profile, for which there was no memory."""

    def names(self) -> set[str]:
        """Layers that are in a plan."""
        return {name for plan in self.plans for name, _ in plan.modes}

    def state_dict(self) -> list[dict[str, Any]]:
        """For JSON."""
        pairs = zip(self.plans, self.levels, strict=True)
        return [{"modes": [list(m) for m in p.modes], "share": lv.share, "slow": lv.slow} for p, lv in pairs]

    @classmethod
    def from_state_dict(cls, state: list[dict[str, Any]]) -> Ladder:
        """Take what `state_dict` gave."""
        plans = tuple(Plan(tuple((name, mode) for name, mode in rung["modes"])) for rung in state)
        return cls(plans, tuple(Level(rung["share"], rung["slow"]) for rung in state))


def make_ladder(step: Step, meter: Meter, layers: Mapping[str, nn.Module], batch: Any, images: int) -> Ladder:
    """Profile a model and plan for it; where not even one image runs, all of it or nothing is recomputed.

    Args:
        step: Runs the model.
        meter: Of its device.
        layers: See `checkpointing.layers.candidates`.
        batch: On the host.
        images: How many to profile with; libraries should have seen this number.
    """
    found = profile(step, meter, layers, batch, max(images, 1)) if layers else None
    if found is not None:
        return ladder_of(found)
    everything = Plan(tuple((name, RECOMPUTE) for name in outermost(layers)))
    if not layers:
        return Ladder((KEEP_ALL,), (Level(1.0, 1.0),))
    return Ladder((KEEP_ALL, everything), (Level(1.0, 1.0), _UNKNOWN), guessed=True)


def ladder_of(profile: Profile) -> Ladder:
    """Plans for a profile."""
    rungs = ladder(profile) if profile.layers else ()
    if not rungs:
        return Ladder((KEEP_ALL,), (Level(1.0, 1.0),))
    return Ladder(
        tuple(rung.plan for rung in rungs),
        tuple(Level(rung.peak_bytes / rungs[0].peak_bytes, rung.slow) for rung in rungs),
    )
