"""The ladder of checkpoint plans of a run: level 0 keeps everything, and each level above it keeps less.

`make_ladder` profiles the model with a few images, and `ladder_of` computes the plans from that profile. If there is
not enough memory for a profile, the ladder has two levels: keep everything, and recompute everything.
"""

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

__all__ = ["FORMAT", "Ladder", "ladder_of", "make_ladder"]

FORMAT = 6
"""Version of stored ladders and of the profiles behind them. With a higher number, none of an earlier version is used:
neither one in a cache nor one in the state of an engine."""

# Used if not even one image could be profiled: the effect of recomputing all layers of YOLO12-S
# (docs/reference/measurements.md).
_UNKNOWN = Level(fraction=0.4, slow=1.35)


@dataclass(frozen=True)
class Ladder:
    """Checkpoint plans, each with less memory and more time than the one before."""

    plans: tuple[Plan, ...]
    """One plan per level, starting with the plan that keeps everything."""
    levels: tuple[Level, ...]
    """Memory and time of each plan, relative to the first."""
    guessed: bool = False
    """True if there was not enough memory for a profile, so that the levels are a rough estimate."""

    def names(self) -> set[str]:
        """Return the layers that at least one plan names."""
        return {name for plan in self.plans for name, _ in plan.modes}

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the plans and levels in a form that JSON can store."""
        pairs = zip(self.plans, self.levels, strict=True)
        return [{"modes": [list(m) for m in p.modes], "share": lv.fraction, "slow": lv.slow} for p, lv in pairs]

    @classmethod
    def from_state_dict(cls, state: list[dict[str, Any]]) -> Ladder:
        """Create a ladder from what `state_dict` returned.

        Raises:
            KeyError, TypeError, ValueError: The state has another form.
        """
        plans = tuple(Plan(tuple((name, mode) for name, mode in level["modes"])) for level in state)
        return cls(plans, tuple(Level(level["share"], level["slow"]) for level in state))


def make_ladder(step: Step, meter: Meter, layers: Mapping[str, nn.Module], batch: Any, images: int) -> Ladder:
    """Profile a model and compute its checkpoint plans.

    If not even one image can be profiled, the result has two levels, keep everything and recompute everything, and is
    marked as guessed.

    Args:
        step: Runs the model.
        meter: Meter of the model's device.
        layers: Name → layer, from `checkpointing.layers.candidates`.
        batch: A batch on the host.
        images: Number of images to profile with. A micro-batch of this size should have run before, so that libraries
            have chosen their kernels.
    """
    found = profile(step, meter, layers, batch, max(images, 1)) if layers else None
    if found is not None:
        return ladder_of(found)
    everything = Plan(tuple((name, RECOMPUTE) for name in outermost(layers)))
    if not layers:
        return Ladder((KEEP_ALL,), (Level(1.0, 1.0),))
    return Ladder((KEEP_ALL, everything), (Level(1.0, 1.0), _UNKNOWN), guessed=True)


def ladder_of(profile: Profile) -> Ladder:
    """Compute the checkpoint plans for a profile."""
    levels = ladder(profile) if profile.layers else ()
    if not levels:
        return Ladder((KEEP_ALL,), (Level(1.0, 1.0),))
    return Ladder(
        tuple(level.plan for level in levels),
        tuple(Level(level.peak_bytes / levels[0].peak_bytes, level.slow) for level in levels),
    )
