"""The online model of a micro-batch's peak: bytes above what was live before it, under any checkpoint plan.

Each plan (`Level`) learns a law of its own (peak_law.py), as recomputing moves the place of the peak. A plan that was
not seen takes the law of the nearest one that was, its activations scaled by the shares of the two; one that was seen
at a single size takes the shape of its neighbour's law, and its height from what was seen.

A failed allocation bounds a shape from below. It may have been a false alarm, or fragmentation, so the bound fades:
it holds for a few batches, then what it adds to the law halves again and again, each time more slowly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from yolov12.mas.scheduling.peak_law import SURPRISE, PeakLaw, Size

__all__ = ["SPREAD_UNSEEN", "CostModel", "Features", "Level"]

_SIGMAS = 3.0
_SPREAD_SEEN = 0.01  # least relative margin of a prediction for a shape that was seen
SPREAD_UNSEEN = 0.05
"""And for one that was not."""
_SPREAD_FURTHER = 0.5  # of what boxes beyond all that were seen add, once it is known what boxes cost
_FURTHEST = 2.0  # times the boxes that were seen; beyond, all is open
_SPREAD_MOST = 0.5
_HALF_LIFE_BATCHES = 4  # after a first failure: together with the hold, about ten batches until a false alarm is gone
_HALF_LIFE_MOST = 4096
_GONE = 1 / 16  # of what a bound added
_REMEMBERED = 32  # half-lives after which a further failure counts as the first


@dataclass(frozen=True)
class Level:
    """A checkpoint plan, as far as decisions go. Level 0 keeps every activation; higher ones free more of them."""

    share: float
    """Activation bytes of an image, relative to level 0; falls with the level."""
    slow: float
    """Milliseconds, relative to level 0; rises with the level."""


@dataclass(frozen=True)
class Features:
    """What the peak of a micro-batch depends on."""

    images: int
    height: int
    width: int
    boxes: int
    """Of the image that has most."""
    level: int = 0
    """Of the checkpoint plan."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """What libraries choose their workspaces by."""
        return self.images, self.height, self.width, self.level

    @property
    def size(self) -> Size:
        """The shape without the plan."""
        return self.images, self.height, self.width


@dataclass(frozen=True)
class _Bound:
    """A shape needed more than this when it failed."""

    excess_bytes: float
    """Over what was predicted."""
    failures: int
    batches: int = 0
    """Since the last of them."""

    @property
    def half_lives(self) -> float:
        """Since the last failure. They are twice as long after every further one."""
        return self.batches / min(_HALF_LIFE_BATCHES * 2.0 ** min(self.failures - 1, 16), _HALF_LIFE_MOST)

    @property
    def weight(self) -> float:
        """How much of the excess still counts: all of it for a half-life, then half for every further one."""
        weight = float(min(1.0, 2.0 ** (1.0 - self.half_lives)))
        return weight if weight >= _GONE else 0.0


class CostModel:
    """Learns from every micro-batch; close for shapes it has seen, careful about others.

    Args:
        levels: The checkpoint plans, level 0 first.
    """

    def __init__(self, levels: Sequence[Level] = (Level(1.0, 1.0),)) -> None:
        self.levels = tuple(levels)
        self._laws = [PeakLaw() for _ in self.levels]
        self._bounds: dict[tuple[int, int, int, int], _Bound] = {}
        self._spread = self._bytes_per_box = 0.0  # the most that any law says

    @property
    def largest(self) -> int:
        """Most images a micro-batch was observed with; 0 before any."""
        return max(law.largest for law in self._laws)

    def set_levels(self, levels: Sequence[Level]) -> None:
        """Take another ladder of plans; what was learned stays where a level is what it was."""
        kept = {index for index, level in enumerate(levels) if self.levels[index : index + 1] == (level,)}
        self._laws = [self._laws[index] if index in kept else PeakLaw() for index in range(len(levels))]
        self._bounds = {shape: bound for shape, bound in self._bounds.items() if shape[3] in kept}
        self.levels = tuple(levels)
        self._sum_up()

    def predict(self, features: Features) -> int:
        """Bytes that a micro-batch will need above what is live before it; after a failure, more than seemed to do."""
        expected = self._expected_bytes(features)
        bound = self._bounds.get(features.shape)
        if bound is not None:
            expected += bound.excess_bytes * bound.weight
        return max(int(expected), 0)

    def margin(self, features: Features) -> int:
        """Bytes by which a prediction may be too low: three standard deviations of what the fit leaves."""
        return math.ceil(self._margin(features) * self.predict(features))

    def upper(self, features: Features) -> tuple[int, int]:
        """Prediction, and prediction with margin."""
        predicted = self.predict(features)
        return predicted, predicted + math.ceil(self._margin(features) * predicted)

    def usual_bytes(self, features: Features) -> int:
        """Prediction with margin, whatever has failed."""
        return max(math.ceil((1.0 + self._margin(features)) * self._expected_bytes(features)), 0)

    def failed(self, features: Features) -> bool:
        """Whether this shape has failed, and that is not forgotten."""
        bound = self._bounds.get(features.shape)
        return bound is not None and bound.weight > 0

    def observe(self, features: Features, needed_bytes: int) -> None:
        """Learn what a micro-batch needed above what was live before it."""
        if needed_bytes <= 0:
            return  # a resident size that did not move
        self._laws[features.level].observe(features.size, features.boxes, needed_bytes)
        self._sum_up()
        bound = self._bounds.get(features.shape)
        if bound is not None:  # it got through: the number of its failures is all that stays, for a while
            self._bounds[features.shape] = replace(bound, excess_bytes=0.0)

    def observe_failure(self, features: Features, room_bytes: int) -> None:
        """Learn that a micro-batch did not get through.

        Args:
            features: Of the micro-batch.
            room_bytes: What the budget gave room for above what was live. A failure says that this did not do, and no
                more: what was asked for last may be a small part of what was missing, or more than any device has.
        """
        bound = self._bounds.get(features.shape, _Bound(0.0, 0))
        excess = max(room_bytes - self._expected_bytes(features), bound.excess_bytes * bound.weight, 0.0)
        self._bounds[features.shape] = _Bound(excess, bound.failures + 1)

    def new_batch(self) -> None:
        """Count a batch: failures fade with them."""
        aged = {shape: replace(bound, batches=bound.batches + 1) for shape, bound in self._bounds.items()}
        self._bounds = {shape: bound for shape, bound in aged.items() if bound.half_lives < _REMEMBERED}

    def state_dict(self) -> dict[str, Any]:
        """Everything learned, for JSON."""
        return {
            "levels": [[level.share, level.slow] for level in self.levels],
            "laws": [law.state_dict() for law in self._laws],
            "bounds": [
                [*shape, bound.excess_bytes, bound.failures, bound.batches] for shape, bound in self._bounds.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave, where the levels are what they were then."""
        levels = self.levels
        self.levels = tuple(Level(share, slow) for share, slow in state["levels"])
        self._laws = [PeakLaw() for _ in self.levels]
        for law, learned in zip(self._laws, state["laws"], strict=True):
            law.load_state_dict(learned)
        self._bounds = {
            (images, height, width, level): _Bound(excess, failures, batches)
            for images, height, width, level, excess, failures, batches in state["bounds"]
        }
        self.set_levels(levels)

    def _margin(self, features: Features) -> float:
        law = self._laws[features.level]
        spread = _SIGMAS * self._spread
        count = law.seen(features.size)
        further = max(features.boxes - law.most_boxes, 0)
        if not count or (further and not self._knows_boxes(features, law.most_boxes)):
            return min(max(spread, SPREAD_UNSEEN), _SPREAD_MOST)
        seen = max(spread * math.sqrt(1 + 1 / count), _SPREAD_SEEN)
        if further:
            known = self._expected_bytes(replace(features, boxes=law.most_boxes))
            more = self._expected_bytes(features) - known
            seen = (seen * known + _SPREAD_FURTHER * more) / (known + more)
        return min(seen, _SPREAD_MOST)

    def _knows_boxes(self, features: Features, most: int) -> bool:
        """Whether boxes are not far from those that were seen, and what they cost is known, and more than a trace."""
        known, more = (self._expected_bytes(replace(features, boxes=boxes)) for boxes in (most, most + 100))
        return features.boxes <= _FURTHEST * most and more - known >= SURPRISE * known > 0

    def _expected_bytes(self, features: Features) -> float:
        law, boxes, per_box = self._laws[features.level], features.boxes, self._bytes_per_box
        if law.sizes > 1 or len(self._laws) == 1 or law.seen(features.size):
            return law.expected_bytes(features.size, boxes, 1.0, per_box)
        level = self._nearest(features.level, sizes=2 if law.sizes else 1)
        if level is None:
            return law.expected_bytes(features.size, boxes, 1.0, per_box)
        share = self.levels[features.level].share / self.levels[level].share
        expected = self._laws[level].expected_bytes(features.size, boxes, share, per_box)
        if (latest := law.latest()) is not None:
            there = self._laws[level].expected_bytes(*latest, share, per_box)
            expected *= law.expected_bytes(*latest) / there if there > 0 else 1.0
        return expected

    def _sum_up(self) -> None:
        self._spread = max(law.spread for law in self._laws)
        self._bytes_per_box = max(law.bytes_per_box for law in self._laws)

    def _nearest(self, level: int, sizes: int) -> int | None:
        """The seen level whose law says most about this one."""
        known = [index for index, law in enumerate(self._laws) if law.sizes >= sizes and index != level]
        return min(known, key=lambda index: (abs(index - level), index), default=None)
