"""The online model of a micro-batch's time, by images, height, width and checkpoint plan.

A size that was measured takes what it took, the mean of late, and a plan multiplies it by a factor, which begins as
that of its profile. For other sizes there is a law (time_law.py), which says what is expected and what it would be at
best: optimism in the face of uncertainty (Auer, Cesa-Bianchi, Fischer: Finite-time analysis of the multiarmed bandit
problem, 2002). Measured times are forgotten exponentially (Garivier, Moulines: On upper-confidence bound policies for
switching bandit problems, 2011), as other processes come and go.

The first micro-batch of a size takes seconds, in which libraries look for kernels. It teaches `new_size_ms` alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from yolov12.mas.scheduling.peak_law import Size
from yolov12.mas.scheduling.peak_model import Level
from yolov12.mas.scheduling.time_law import SpeedLaw, megapixels

__all__ = ["NEW_SIZE_MS", "SpeedModel"]

NEW_SIZE_MS = 4000.0
"""What a size that is new costs, until it was seen: 3.6 to 7.7 s on an H200, deterministic (docs/measurements.md)."""
_UNSEEN = 0.15  # relative uncertainty of the time of a size that was not measured
_BOUNDED = 0.05  # the same where two other sizes bound it, or where it was measured under another plan
_SEEN = 0.03  # and of one that was measured once: what a step's time scatters by
_MEMORY = 16.0  # observations: a mean is over about the last so many
_FADING = 0.995  # of the weight of a mean, for each batch under another plan or size
_OUTLIER = 2.0  # times the mean: what is more was something else, the first time it happens
_ARMS = 128
_FIRST = 8  # first times that wait for a second
_LEAST = 0.05  # weight of what was measured long ago
_TRUST = 2.0  # observations that the profile of a plan counts for

_Arm = tuple[int, int, int, int]  # images, height, width, level


@dataclass(frozen=True)
class _Mean:
    ms: float
    weight: float

    def with_(self, ms: float) -> _Mean:
        weight = min(self.weight + 1.0, _MEMORY)
        ms = min(ms, _OUTLIER * self.ms) if self.weight >= 1.0 else ms
        return _Mean(self.ms + (ms - self.ms) / weight, weight)


@dataclass(frozen=True)
class _First:
    """A batch with sizes that were new."""

    counts: Mapping[Size, int]
    new: int
    level: int
    ms: float


class SpeedModel:
    """Learns from the time of every batch.

    Args:
        levels: The checkpoint plans, level 0 first.
        prior_ms: From a profile: of a micro-batch at least, and of a million pixels, at level 0.
        new_size_ms: What a size that is new costs, until it was seen.
    """

    def __init__(
        self,
        levels: Sequence[Level] = (Level(1.0, 1.0),),
        prior_ms: tuple[float, float] | None = None,
        new_size_ms: float = NEW_SIZE_MS,
    ) -> None:
        self.levels = tuple(levels)
        self.new_size_ms = new_size_ms
        """What the first micro-batch of a size costs beyond its time."""
        self._prior_ms = prior_ms if prior_ms and min(prior_ms) > 0 else None
        self._arms: dict[_Arm, _Mean] = {}
        self._warm: dict[Size, bool] = {}  # sizes that ran in this process; whether the first time was accounted for
        self._first: list[_First] = []
        self._factors = [level.slow for level in self.levels]
        self._times: dict[Size, float] = {}  # ms at level 0
        self._law = SpeedLaw.fit((), self._prior_ms)

    def set_levels(self, levels: Sequence[Level]) -> None:
        """Take another ladder of plans; what was learned stays where a level is what it was."""
        kept = {index for index, level in enumerate(levels) if self.levels[index : index + 1] == (level,)}
        self._arms = {arm: mean for arm, mean in self._arms.items() if arm[3] in kept}
        self._first = [first for first in self._first if first.level in kept]
        self.levels = tuple(levels)
        self._fit()

    def warm(self, images: int, height: int, width: int) -> bool:
        """Whether the size has run in this process, so that libraries have their kernels."""
        return (images, height, width) in self._warm

    def seen(self, images: int, height: int, width: int, level: int) -> bool:
        """Whether its time was measured."""
        return (images, height, width, level) in self._arms

    def expected_ms(self, images: int, height: int, width: int, level: int) -> float:
        """Milliseconds of a micro-batch. Where it is open which of host and device is waited for: the longer."""
        mean = self._arms.get((images, height, width, level))
        return mean.ms if mean else self._base_ms((images, height, width))[0] * self._factors[level]

    def optimistic_ms(self, images: int, height: int, width: int, level: int) -> float:
        """What it may take at best."""
        mean = self._arms.get((images, height, width, level))
        if mean is not None:
            return mean.ms * (1.0 - _SEEN / math.sqrt(max(mean.weight, _LEAST)))
        size = images, height, width
        doubt = _BOUNDED if size in self._times or len(self._times) > 1 else _UNSEEN
        return self._base_ms(size)[1] * self._factors[level] * (1.0 - doubt)

    def flat_images(self, height: int, width: int) -> float:
        """Images up to which a micro-batch takes as long as a smaller one, as it is the host that is waited for."""
        device_ms = self._law.device_ms * megapixels((1, height, width))
        return self._law.host_ms / device_ms if device_ms > 0 else 0.0

    def ran(self, images: int, height: int, width: int, *, timed: bool = True) -> None:
        """Note that a micro-batch has run.

        Args:
            images: Of the micro-batch.
            height: Of its images.
            width: Of its images.
            timed: Whether `observe` will hear of it; not so for a rehearsal.
        """
        size = images, height, width
        self._warm[size] = self._warm.get(size, False) or not timed

    def observe(self, sizes: Sequence[int], height: int, width: int, level: int, ms: float) -> None:
        """Learn from a batch that ran as it was planned.

        Args:
            sizes: Images of its micro-batches.
            height: Of its images.
            width: Of its images.
            level: Its checkpoint plan.
            ms: Of the batch, forward and backward.
        """
        if ms <= 0:
            return  # a clock too coarse
        counts = Counter((images, height, width) for images in sizes)
        new = [size for size in counts if not self._warm.get(size, False)]
        if new:
            self._warm.update(dict.fromkeys(new, True))
            self._first = [*self._first, _First(counts, len(new), level, ms)][-_FIRST:]
            return
        total = sum(count * self.expected_ms(*size, level) for size, count in counts.items())
        means = {size: self.expected_ms(*size, level) * ms / total for size in counts}
        self._arms = {arm: _Mean(mean.ms, mean.weight * _FADING) for arm, mean in self._arms.items()}
        for size, each in means.items():
            arm = (*size, level)
            self._arms[arm] = self._arms.pop(arm, _Mean(each, 0.0)).with_(each)
        for arm in list(self._arms)[:-_ARMS]:
            del self._arms[arm]
        self._fit()
        self._account()

    def state_dict(self) -> dict[str, Any]:
        """Everything learned, for JSON. Which sizes are new is not: another process has to look for kernels again."""
        return {
            "levels": [[level.share, level.slow] for level in self.levels],
            "arms": [[*arm, mean.ms, mean.weight] for arm, mean in self._arms.items()],
            "new_size_ms": self.new_size_ms,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave, where the levels are what they were then."""
        levels, self.levels = self.levels, tuple(Level(share, slow) for share, slow in state["levels"])
        self._arms = {
            (images, height, width, level): _Mean(ms, weight)
            for images, height, width, level, ms, weight in state["arms"]
        }
        self.new_size_ms = state["new_size_ms"]
        self.set_levels(levels)

    def _account(self) -> None:
        """What first times cost, where by now it is known what the batch takes without them."""
        for first in list(self._first):
            if all(any(arm[:3] == size for arm in self._arms) for size in first.counts):
                usual_ms = sum(count * self.expected_ms(*size, first.level) for size, count in first.counts.items())
                cost_ms = max(first.ms - usual_ms, 0.0) / first.new
                self.new_size_ms += (cost_ms - self.new_size_ms) / 2
                self._first.remove(first)

    def _fit(self) -> None:
        self._factors = [level.slow for level in self.levels]
        arms = [(arm[:3], arm[3], mean.ms, max(mean.weight, _LEAST)) for arm, mean in self._arms.items()]
        for _ in range(2):  # what a size takes, given the plans, and what a plan costs, given the sizes
            sums: dict[Size, tuple[float, float]] = {}
            for size, level, ms, weight in arms:
                total, weights = sums.get(size, (0.0, 0.0))
                sums[size] = total + weight * ms / self._factors[level], weights + weight
            self._times = {size: total / weights for size, (total, weights) in sums.items()}
            off = [(0.0, _TRUST)] * len(self.levels)
            for size, level, ms, weight in arms:
                total, weights = off[level]
                rest = math.log(ms / (self._times[size] * self.levels[level].slow))
                off[level] = total + weight * rest, weights + weight
            self._factors[1:] = [
                level_.slow * math.exp(total / weights)
                for level_, (total, weights) in zip(self.levels[1:], off[1:], strict=True)
            ]
        self._law = SpeedLaw.fit(((megapixels(size), ms) for size, ms in self._times.items()), self._prior_ms)

    def _base_ms(self, size: Size) -> tuple[float, float]:
        """At level 0: expected and least."""
        ms = self._times.get(size)
        return (ms, ms) if ms is not None else self._law.bounds_ms(megapixels(size))
