"""The online model of a micro-batch's peak: bytes above the memory allocated before it, under any checkpoint plan.

Each plan (`Level`) learns its own law (peak_law.py), because recomputation moves the peak to another part of the pass.
A plan that has not run yet uses the law of the nearest plan that has run, with activations scaled by the ratio of the
two plans' fractions. A plan that has run with a single size does the same for other sizes, with the law of a plan that
has run with several sizes. If one of these is near its own, it scales the result to its own measurement. If not, the
plan that has run nearer to the size in question tells its bytes alone.

A failed allocation gives a lower bound for the peak of its shape. It may also be a false alarm or fragmentation, so the
bound fades: it is constant for a few batches, and then its excess over the law is halved again and again. After
repeated failures, this takes longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from yolov12.mas.scheduling.peak_law import SURPRISE, PeakLaw, Size

__all__ = ["GRAPH_RESERVE", "SPREAD_UNSEEN", "CostModel", "Features", "Level"]

GRAPH_RESERVE = 0.05
"""Bytes to leave for the capture of a CUDA graph beyond `Level.graph_bytes`, relative to those of the micro-batch."""
# Bytes that a graph holds beyond the peak of its micro-batch as usual, relative to the peak with everything kept. They
# hardly depend on the plan: of the graphs in benchmarks/results/limits_h200.json (YOLO12-S and X, micro-batches of 8 to
# 256 images), the most took 0.066, gradients aside.
_GRAPH_BYTES = 0.07

_SIGMAS = 3.0
# Least margin for a shape that has been observed, relative to the prediction.
_SPREAD_SEEN = 0.01
SPREAD_UNSEEN = 0.05
"""Least margin for a shape that has not been observed, relative to the prediction."""
# Margin for boxes beyond the most that were observed, relative to the bytes predicted for these boxes.
_SPREAD_FURTHER = 0.5
# With more than this times the most boxes observed, a shape counts as not observed.
_FURTHEST = 2.0
_SPREAD_MOST = 0.5
# Distance (`PeakLaw.distance`) up to which a law counts as known. A law of 64 and 128 images says nothing about 8.
_NEAR = 1.0
# Half-life after a first failure. Together with the hold, a false alarm is gone after about ten batches.
_HALF_LIFE_BATCHES = 4
_HALF_LIFE_MOST = 4096
_GONE = 1 / 16  # fraction of its excess at which a bound is dropped
_REMEMBERED = 32  # half-lives after which another failure counts as the first


@dataclass(frozen=True)
class Level:
    """A checkpoint plan, as decisions see it. Level 0 keeps every activation; higher levels free more of them."""

    fraction: float
    """Activation bytes of an image relative to level 0. It falls with the level."""
    slow: float
    """Time relative to level 0. It rises with the level."""

    @property
    def graph_bytes(self) -> float:
        """Bytes that the CUDA graph of a micro-batch holds, relative to those that the micro-batch needs as usual."""
        return 1.0 + _GRAPH_BYTES / self.fraction


@dataclass(frozen=True)
class Features:
    """The quantities on which the peak of a micro-batch depends."""

    images: int
    """Number of images."""
    height: int
    """Height of the images in pixels."""
    width: int
    """Width of the images in pixels."""
    boxes: int
    """Boxes of the image that has most."""
    level: int = 0
    """Level of the checkpoint plan."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Images, height, width and level: libraries choose workspaces by them."""
        return self.images, self.height, self.width, self.level

    @property
    def size(self) -> Size:
        """Images, height and width."""
        return self.images, self.height, self.width


@dataclass(frozen=True)
class _Bound:
    """Bound from a failure: the shape needed more than the law predicts."""

    excess_bytes: float
    """Bytes above the prediction of the law."""
    failures: int
    """Number of failures of this shape."""
    batches: int = 0
    """Batches since the last failure."""

    @property
    def half_lives(self) -> float:
        """Half-lives since the last failure. The half-life doubles with every further failure."""
        return self.batches / min(_HALF_LIFE_BATCHES * 2.0 ** min(self.failures - 1, 16), _HALF_LIFE_MOST)

    @property
    def weight(self) -> float:
        """Fraction of the excess that still counts: 1 for one half-life, then halved with every further one."""
        weight = float(min(1.0, 2.0 ** (1.0 - self.half_lives)))
        return weight if weight >= _GONE else 0.0


class CostModel:
    """Learns from every micro-batch. It is precise for shapes that it has observed and cautious about other shapes.

    Args:
        levels: The checkpoint plans, starting with level 0.
    """

    def __init__(self, levels: Sequence[Level] = (Level(1.0, 1.0),)) -> None:
        self.levels = tuple(levels)
        self._laws = [PeakLaw() for _ in self.levels]
        self._bounds: dict[tuple[int, int, int, int], _Bound] = {}
        self._spread = self._bytes_per_box = 0.0  # the maximum over all laws

    @property
    def largest(self) -> int:
        """Most images observed in a micro-batch; 0 before any observation."""
        return max(law.largest for law in self._laws)

    def set_levels(self, levels: Sequence[Level]) -> None:
        """Replace the ladder of plans. What was learned about a level is kept if the new ladder has it, too."""
        kept = {index for index, level in enumerate(levels) if self.levels[index : index + 1] == (level,)}
        self._laws = [self._laws[index] if index in kept else PeakLaw() for index in range(len(levels))]
        self._bounds = {shape: bound for shape, bound in self._bounds.items() if shape[3] in kept}
        self.levels = tuple(levels)
        self._sum_up()

    def predict(self, features: Features) -> int:
        """Return the bytes that a micro-batch will need above the memory allocated before it.

        After a failure the result includes the bound of that shape.
        """
        expected = self._expected_bytes(features)
        bound = self._bounds.get(features.shape)
        if bound is not None:
            expected += bound.excess_bytes * bound.weight
        return max(int(expected), 0)

    def margin(self, features: Features) -> int:
        """Return the bytes by which a prediction may be too low: three standard deviations of the residuals."""
        return math.ceil(self._margin(features) * self.predict(features))

    def upper(self, features: Features) -> tuple[int, int]:
        """Return the prediction without and with its margin, in bytes."""
        predicted = self.predict(features)
        return predicted, predicted + math.ceil(self._margin(features) * predicted)

    def usual_bytes(self, features: Features) -> int:
        """Return the prediction with its margin in bytes, regardless of failures."""
        return max(math.ceil((1.0 + self._margin(features)) * self._expected_bytes(features)), 0)

    def failed(self, features: Features) -> bool:
        """Return whether this shape has failed and its bound still counts."""
        bound = self._bounds.get(features.shape)
        return bound is not None and bound.weight > 0

    def observe(self, features: Features, needed_bytes: int) -> None:
        """Learn the bytes that a micro-batch needed above the memory allocated before it."""
        if needed_bytes <= 0:
            return  # on the host, the resident size may stay the same
        self._laws[features.level].observe(features.size, features.boxes, needed_bytes)
        self._sum_up()
        bound = self._bounds.get(features.shape)
        if bound is not None:  # the shape has fitted, so only its number of failures is kept for a while
            self._bounds[features.shape] = replace(bound, excess_bytes=0.0)

    def observe_failure(self, features: Features, room_bytes: int) -> None:
        """Learn that an allocation failed in a micro-batch.

        Args:
            features: Features of the micro-batch.
            room_bytes: Bytes that the budget allowed above the memory allocated before it. The failure only says that
                this was not enough. The size of the failed request says little: it may be a small part of what was
                missing, or more than any device has.
        """
        bound = self._bounds.get(features.shape, _Bound(0.0, 0))
        excess = max(room_bytes - self._expected_bytes(features), bound.excess_bytes * bound.weight, 0.0)
        self._bounds[features.shape] = _Bound(excess, bound.failures + 1)

    def new_batch(self) -> None:
        """Count a batch. Bounds from failures fade with the number of batches."""
        aged = {shape: replace(bound, batches=bound.batches + 1) for shape, bound in self._bounds.items()}
        self._bounds = {shape: bound for shape, bound in aged.items() if bound.half_lives < _REMEMBERED}

    def state_dict(self) -> dict[str, Any]:
        """Return everything learned, in a form that JSON can store."""
        return {
            "levels": [[level.fraction, level.slow] for level in self.levels],
            "laws": [law.state_dict() for law in self._laws],
            "bounds": [
                [*shape, bound.excess_bytes, bound.failures, bound.batches] for shape, bound in self._bounds.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, for levels that are the same now as they were then."""
        levels = self.levels
        self.levels = tuple(Level(fraction, slow) for fraction, slow in state["levels"])
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
        """Return whether the boxes are close to those observed, and their cost is known and significant."""
        known, more = (self._expected_bytes(replace(features, boxes=boxes)) for boxes in (most, most + 100))
        return features.boxes <= _FURTHEST * most and more - known >= SURPRISE * known > 0

    def _expected_bytes(self, features: Features) -> float:
        law, boxes, per_box = self._laws[features.level], features.boxes, self._bytes_per_box
        if law.sizes > 1 or len(self._laws) == 1 or law.seen(features.size):
            return law.expected_bytes(features.size, boxes, 1.0, per_box)
        level, latest = self._nearest(features.level, sizes=2 if law.sizes else 1), law.latest()
        if level is None:
            return law.expected_bytes(features.size, boxes, 1.0, per_box)
        other, ratio = self._laws[level], self.levels[features.level].fraction / self.levels[level].fraction
        is_anchored = latest is not None and other.distance(latest[0]) <= _NEAR
        if not is_anchored and law.distance(features.size) < other.distance(features.size):
            return law.expected_bytes(features.size, boxes, 1.0, per_box)
        expected = other.expected_bytes(features.size, boxes, ratio, per_box)
        if latest is not None and is_anchored:
            there = other.expected_bytes(*latest, ratio, per_box)
            expected *= law.expected_bytes(*latest) / there if there > 0 else 1.0
        return expected

    def _sum_up(self) -> None:
        self._spread = max(law.spread for law in self._laws)
        self._bytes_per_box = max(law.bytes_per_box for law in self._laws)

    def _nearest(self, level: int, sizes: int) -> int | None:
        """Return the nearest other level with at least `sizes` observed sizes; None if there is none."""
        known = [index for index, law in enumerate(self._laws) if law.sizes >= sizes and index != level]
        return min(known, key=lambda index: (abs(index - level), index), default=None)
