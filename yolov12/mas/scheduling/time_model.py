"""The online model of a micro-batch's time, as a function of images, height, width and checkpoint plan.

For a size that has been measured, the model uses the mean of recent times. A plan multiplies it by a factor, which
starts with the value from the profile. For other sizes there is a law (time_law.py), which gives an expected and an
optimistic time: optimism in the face of uncertainty (Auer, Cesa-Bianchi, Fischer: Finite-time analysis of the
multiarmed bandit problem, 2002). Old measurements are discounted exponentially (Garivier, Moulines: On upper-confidence
bound policies for switching bandit problems, 2011), because other processes come and go.

Micro-batches that are replayed as CUDA graphs have times and a law of their own, as they wait for no launches. Until
one of them has been measured, a replay may take as little as the device needs according to the usual times.

A pass without gradients before a batch (`task.Loss`) adds a fraction of its time, which is learned separately for whole
and for split batches: the scheduler compares both.

The first micro-batch of a size takes seconds, while libraries search for kernels. Its time is used only to learn
`new_size_ms`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from yolov12.mas.scheduling.peak_law import Size
from yolov12.mas.scheduling.peak_model import Level
from yolov12.mas.scheduling.time_law import SpeedLaw, megapixels

__all__ = ["NEW_SIZE_MS", "SpeedModel"]

NEW_SIZE_MS = 4000.0
"""Initial cost of a new size: 3.6 to 7.7 s were measured on an H200 in deterministic mode
(docs/reference/measurements.md)."""
# Relative uncertainty of the time of a size that was not measured.
_UNSEEN = 0.15
# The same, if two other sizes bound the time or the size was measured under another plan.
_BOUNDED = 0.05
# The same, after one measurement: the noise of a step's time.
_SEEN = 0.03
# Observations that a mean covers, approximately.
_MEMORY = 16.0
# Factor on the weight of a mean with each batch that runs under another plan or size.
_FADING = 0.995
# Longer times than this, relative to the mean, are clipped: something else took the time.
_OUTLIER = 2.0
# Most means that are stored.
_ARMS = 128
# Most batches with new sizes that wait for the usual time of these sizes.
_FIRST = 8
# Least weight of an old mean. An arm that was clearly slower is not tried again only because that was long ago.
_LEAST = 0.25
# Batches over which the time of passes without gradients is averaged.
_AHEAD_BATCHES = 8
# Usual time of a micro-batch, relative to the time of its replay: as it is expected, and as it is at best. On an H200
# it was 2.5 for 32 images of YOLO12-S and 6.0 for 8 (docs/reference/measurements.md).
_GAIN = 2.0
_MOST_GAIN = 6.0
# Weight of a plan's profile, in observations.
_TRUST = 2.0

_Arm = tuple[int, int, int, int]  # images, height, width, level


@dataclass(frozen=True)
class _Mean:
    ms: float
    weight: float
    latest_ms: tuple[float, ...] = ()
    """The two latest times."""

    def with_(self, ms: float) -> _Mean:
        weight, latest_ms = min(self.weight + 1.0, _MEMORY), (*self.latest_ms, ms)[-2:]
        ms = min(ms, _OUTLIER * self.ms) if self.weight >= 1.0 else ms
        return _Mean(self.ms + (ms - self.ms) / weight, weight, latest_ms)

    def faded(self) -> _Mean:
        return replace(self, weight=self.weight * _FADING)


@dataclass(frozen=True)
class _FirstRun:
    """The time of a batch with new sizes."""

    counts: Mapping[Size, int]
    """Micro-batches of each size."""
    new: int
    """Number of sizes that were new."""
    level: int
    """Level of the checkpoint plan."""
    ms: float
    """Milliseconds of the batch."""


class SpeedModel:
    """Learns from the time of every batch.

    Args:
        levels: The checkpoint plans, starting with level 0.
        prior_ms: Times from a profile at level 0: milliseconds of a launch-bound micro-batch, and milliseconds per
            megapixel of a larger one.
        new_size_ms: Initial cost of a new size.
    """

    def __init__(
        self,
        levels: Sequence[Level] = (Level(1.0, 1.0),),
        prior_ms: tuple[float, float] | None = None,
        new_size_ms: float = NEW_SIZE_MS,
    ) -> None:
        self.levels = tuple(levels)
        self.new_size_ms = new_size_ms
        """Milliseconds that the first micro-batch of a size takes beyond its usual time."""
        self._ahead = [0.0, 0.0]  # time of a pass ahead, as a fraction of the rest: for whole and for split batches
        self._prior_ms = prior_ms if prior_ms and min(prior_ms) > 0 else None
        self._arms: dict[_Arm, _Mean] = {}
        self._replays: dict[_Arm, _Mean] = {}  # the same for CUDA graphs
        # Sizes that have run in this process → whether their first time has been used.
        self._warm: dict[Size, bool] = {}
        self._first: list[_FirstRun] = []
        self._factors = [level.slow for level in self.levels]
        self._times: dict[Size, float] = {}  # milliseconds at level 0
        self._replay_times: dict[Size, float] = {}
        self._law, self._replay_law = SpeedLaw.fit((), self._prior_ms), SpeedLaw()

    def set_levels(self, levels: Sequence[Level]) -> None:
        """Replace the ladder of plans. What was learned about a level is kept if the new ladder has it, too."""
        kept = {index for index, level in enumerate(levels) if self.levels[index : index + 1] == (level,)}
        self._arms = {arm: mean for arm, mean in self._arms.items() if arm[3] in kept}
        self._replays = {arm: mean for arm, mean in self._replays.items() if arm[3] in kept}
        self._first = [first for first in self._first if first.level in kept]
        self.levels = tuple(levels)
        self._fit()

    def warm(self, images: int, height: int, width: int) -> bool:
        """Return whether a size has run in this process, so that libraries have kernels for it."""
        return (images, height, width) in self._warm

    def seen(self, images: int, height: int, width: int, level: int, replays: bool = False) -> bool:
        """Return whether the time of a size has been measured under a plan, as CUDA graphs if `replays`."""
        return (images, height, width, level) in (self._replays if replays else self._arms)

    def expected_ms(self, images: int, height: int, width: int, level: int, replays: bool = False) -> float:
        """Return the expected milliseconds of a micro-batch, as a CUDA graph if `replays`.

        If it is unknown whether launches or the GPU are the bottleneck, the larger estimate counts.
        """
        mean = (self._replays if replays else self._arms).get((images, height, width, level))
        return mean.ms if mean else self._bounds_ms((images, height, width), level, replays)[0]

    def optimistic_ms(self, images: int, height: int, width: int, level: int, replays: bool = False) -> float:
        """Return the least milliseconds that a micro-batch may take, as a CUDA graph if `replays`."""
        mean = (self._replays if replays else self._arms).get((images, height, width, level))
        if mean is not None:
            return mean.ms * (1.0 - _SEEN / math.sqrt(max(mean.weight, _LEAST)))
        size, times = (images, height, width), self._replay_times if replays else self._times
        doubt = _BOUNDED if size in times or len(times) > 1 else _UNSEEN
        return self._bounds_ms(size, level, replays)[1] * (1.0 - doubt)

    def latest_ms(self, images: int, height: int, width: int, level: int, replays: bool = False) -> float:
        """Return the less of the two latest milliseconds of a micro-batch, as a CUDA graph if `replays`.

        It is infinite if they are unknown.
        """
        mean = (self._replays if replays else self._arms).get((images, height, width, level))
        return min(mean.latest_ms, default=math.inf) if mean else math.inf

    def flat_images(self, height: int, width: int) -> float:
        """Return the images up to which a micro-batch is launch-bound and takes no longer than a smaller one."""
        device_ms = self._law.device_ms * megapixels((1, height, width))
        return self._law.host_ms / device_ms if device_ms > 0 else 0.0

    def with_ahead(self, parts: int) -> float:
        """Return the factor of a batch's time for the pass without gradients that may run before it.

        Args:
            parts: Number of micro-batches in the batch.
        """
        return 1.0 + self._ahead[parts > 1]

    def ran(self, images: int, height: int, width: int, *, timed: bool = True) -> None:
        """Note that a micro-batch has run.

        Args:
            images: Images in the micro-batch.
            height: Height of its images in pixels.
            width: Width of its images in pixels.
            timed: Whether `observe` will receive its time; False for a warm-up.
        """
        size = images, height, width
        self._warm[size] = self._warm.get(size, False) or not timed

    def observe(
        self,
        sizes: Sequence[int],
        height: int,
        width: int,
        level: int,
        ms: float,
        ahead_ms: float = 0.0,
        *,
        replays: bool = False,
    ) -> None:
        """Learn from a batch that ran as planned.

        Args:
            sizes: Images in each micro-batch.
            height: Height of the images in pixels.
            width: Width of the images in pixels.
            level: Level of the checkpoint plan.
            ms: Milliseconds of the batch, forward and backward.
            ahead_ms: Milliseconds of a pass without gradients before it.
            replays: True for the time of a batch in CUDA graphs.
        """
        if ms <= 0:
            return  # the clock is too coarse
        counts = Counter((images, height, width) for images in sizes)
        new = [size for size in counts if not self._warm.get(size, False)]
        self._warm.update(dict.fromkeys(new, True))
        if new and not replays:  # a graph has run as usual before
            self._first = [*self._first, _FirstRun(counts, len(new), level, ms + ahead_ms)][-_FIRST:]
            return
        is_split = len(sizes) > 1
        known = self._ahead[is_split]
        self._ahead[is_split] += (ahead_ms / ms - known) / (_AHEAD_BATCHES if known else 1)
        total = sum(count * self.expected_ms(*size, level, replays) for size, count in counts.items())
        means = {size: self.expected_ms(*size, level, replays) * ms / total for size in counts}
        self._arms, self._replays = (
            {arm: mean.faded() for arm, mean in arms.items()} for arms in (self._arms, self._replays)
        )
        for size, each in means.items():
            _add(self._replays if replays else self._arms, (*size, level), each)
        self._fit()
        self._learn_new_size_ms()

    def observe_micro_batch(self, images: int, height: int, width: int, level: int, ms: float) -> None:
        """Learn the usual time of a micro-batch that is replayed from now on, unless it is known."""
        arm = images, height, width, level
        if arm not in self._arms and ms > 0:
            self._warm[arm[:3]] = True
            _add(self._arms, arm, ms)
            self._fit()

    def state_dict(self) -> dict[str, Any]:
        """Return everything learned, in a form that JSON can store.

        Which sizes have run is not included, because another process has to search for kernels again.
        """
        return {
            "levels": [[level.fraction, level.slow] for level in self.levels],
            "arms": [[*arm, mean.ms, mean.weight] for arm, mean in self._arms.items()],
            "replays": [[*arm, mean.ms, mean.weight] for arm, mean in self._replays.items()],
            "new_size_ms": self.new_size_ms,
            "ahead": self._ahead,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, for levels that are the same now as they were then."""
        levels, self.levels = self.levels, tuple(Level(fraction, slow) for fraction, slow in state["levels"])
        self._arms, self._replays = (
            {(images, height, width, level): _Mean(ms, weight) for images, height, width, level, ms, weight in arms}
            for arms in (state["arms"], state.get("replays", ()))
        )
        self.new_size_ms = state["new_size_ms"]
        self._ahead = list(state.get("ahead", self._ahead))
        self.set_levels(levels)

    def _learn_new_size_ms(self) -> None:
        """Learn the cost of new sizes from batches whose usual time is known by now."""
        for first in list(self._first):
            if all(any(arm[:3] == size for arm in self._arms) for size in first.counts):
                usual_ms = sum(count * self.expected_ms(*size, first.level) for size, count in first.counts.items())
                usual_ms *= self.with_ahead(sum(first.counts.values()))
                cost_ms = max(first.ms - usual_ms, 0.0) / first.new
                self.new_size_ms += (cost_ms - self.new_size_ms) / 2
                self._first.remove(first)

    def _fit(self) -> None:
        self._factors = [level.slow for level in self.levels]
        arms = [(arm[:3], arm[3], mean.ms, max(mean.weight, _LEAST)) for arm, mean in self._arms.items()]
        for _ in range(2):  # alternate: sizes given the plans, then plans given the sizes
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
        replays: dict[Size, list[float]] = {}
        for arm, mean in self._replays.items():
            replays.setdefault(arm[:3], []).append(mean.ms / self._factors[arm[3]])
        self._replay_times = {size: sum(times) / len(times) for size, times in replays.items()}
        self._replay_law = SpeedLaw.fit(((megapixels(size), ms) for size, ms in self._replay_times.items()), None)

    def _bounds_ms(self, size: Size, level: int, replays: bool) -> tuple[float, float]:
        """Return the expected and the least milliseconds under a plan."""
        factor = self._factors[level]
        expected, least = (factor * ms for ms in self._base_ms(size))
        if not replays:
            return expected, least
        if self._replay_times:
            bounds_ms = self._replay_law.bounds_ms(megapixels(size))
            known_ms = self._replay_times.get(size)
            found = [factor * ms for ms in (bounds_ms if known_ms is None else (known_ms, known_ms))]
        else:
            found = [expected / _GAIN, expected / _MOST_GAIN]
        device_ms = factor * self._law.device_least_ms(megapixels(size))
        return min(max(found[0], device_ms), expected), min(max(found[1], device_ms), expected)

    def _base_ms(self, size: Size) -> tuple[float, float]:
        """Return the expected and the least milliseconds at level 0 without graphs."""
        ms = self._times.get(size)
        if ms is None and not self._times and self._replay_times and self._prior_ms is None:
            return self._replay_law.bounds_ms(megapixels(size))  # a graph that is kept is no slower
        return (ms, ms) if ms is not None else self._law.bounds_ms(megapixels(size))


def _add(arms: dict[_Arm, _Mean], arm: _Arm, ms: float) -> None:
    """Add a time to the mean of an arm, as the latest of the means."""
    arms[arm] = arms.pop(arm, _Mean(ms, 0.0)).with_(ms)
    for old in list(arms)[:-_ARMS]:
        del arms[old]
