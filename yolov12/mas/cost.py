"""The online model of a micro-batch's peak: bytes above what was live before it.

    peak = c0 + images · pixels · (c1 + c2 · max(boxes − kink, 0)) + what this very shape was seen to add to that

A micro-batch has its peak where all activations are kept and the backward pass begins, unless the matching of boxes to
anchors, whose tables grow with images × anchors × boxes of the fullest image, needs more than that: a flat part and a
rising one. The constants are least squares of relative errors over the last observations of every shape. Libraries
choose workspaces by shape, in steps that no line follows, so each shape also keeps what it was off by.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, median

import torch
from torch import Tensor

__all__ = ["CostModel", "Features"]

_KINKS = 16
_KEPT = 16  # observations of one shape
_SHAPES = 64
_SIGMAS = 3.0
_SPREAD_SEEN = 0.01  # least relative spread of a prediction for a shape that was seen
_SPREAD_UNSEEN = 0.05  # and for one that was not
_SPREAD_MOST = 0.5


@dataclass(frozen=True)
class Features:
    """What the peak of a micro-batch depends on."""

    images: int
    height: int
    width: int
    boxes: int
    """Of the image that has most."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """What libraries choose their workspaces by."""
        return self.images, self.height, self.width


class CostModel:
    """Learns from every micro-batch; close for shapes it has seen, careful about others."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int, int], deque[tuple[int, int]]] = {}  # (boxes, bytes) by shape, latest last
        self._off: dict[tuple[int, int, int], float] = {}  # bytes a shape is off the line by
        self._least: dict[tuple[int, int, int], int] = {}  # bytes a shape is known to need more than
        self._line = (0.0, 0.0, 0.0)
        self._kink = 0.0
        self._spread = 0.0  # relative, of what is left

    @property
    def largest(self) -> int:
        """Most images a micro-batch was observed with; 0 before any."""
        return max((shape[0] for shape in self._seen), default=0)

    def predict(self, features: Features) -> int:
        """Bytes that a micro-batch will need above what is live before it."""
        terms = _terms(features.shape, features.boxes, self._kink)
        expected = sum(a * b for a, b in zip(terms, self._line, strict=True)) + self._off.get(features.shape, 0.0)
        return max(int(expected), self._least.get(features.shape, 0))

    def margin(self, features: Features) -> int:
        """Bytes by which a prediction may be too low: three standard deviations of what the fit leaves."""
        least = _SPREAD_SEEN if features.shape in self._seen else _SPREAD_UNSEEN
        return math.ceil(min(max(_SIGMAS * self._spread, least), _SPREAD_MOST) * self.predict(features))

    def observe(self, features: Features, needed_bytes: int) -> None:
        """Learn what a micro-batch needed above what was live before it."""
        if needed_bytes <= 0:
            return  # a resident size that did not move
        known = features.shape in self._seen
        error = abs(self.predict(features) / max(needed_bytes, 1) - 1.0)
        if known:
            self._spread = (0.95 * self._spread**2 + 0.05 * error**2) ** 0.5
        rows = self._seen.pop(features.shape, deque(maxlen=_KEPT))
        rows.append((features.boxes, needed_bytes))
        self._seen[features.shape] = rows
        if len(self._seen) > _SHAPES:
            oldest = next(iter(self._seen))
            del self._seen[oldest], self._off[oldest]
        self._least.pop(features.shape, None)
        if not known or error > max(_SPREAD_SEEN, self._spread):
            self._fit()

    def observe_failure(self, features: Features, more_than_bytes: int) -> None:
        """Learn that a micro-batch did not get through with this much above what was live before it."""
        self._least[features.shape] = max(self._least.get(features.shape, 0), more_than_bytes)

    def _fit(self) -> None:
        seen = [(shape, boxes, needed) for shape, rows in self._seen.items() for boxes, needed in rows]
        needed = torch.tensor([row[2] for row in seen], dtype=torch.float64).clamp(min=1)
        boxes = torch.tensor([row[1] for row in seen], dtype=torch.float64)
        terms = torch.tensor([_terms(shape, 0, 0) for shape, *_ in seen], dtype=torch.float64)
        low, high = float(boxes.min()), float(boxes.max())
        best = float("inf")
        for _ in range(2):  # all of the range, then around the best
            step = (high - low) / _KINKS
            for index in range(_KINKS if step else 1):
                kink = low + index * step
                terms[:, 2] = terms[:, 1] * (boxes - kink).clamp(min=0) / 1e2
                line = _least_squares(terms, needed)
                error = float(((terms @ line / needed - 1) ** 2).sum())
                if error < best - 1e-9:
                    best, self._line, self._kink = error, tuple(line.tolist()), kink
            low, high = max(low, self._kink - step), min(high, self._kink + step)
        off: dict[tuple[int, int, int], list[float]] = {}
        for shape, most, bytes_ in seen:
            terms_ = _terms(shape, most, self._kink)
            off.setdefault(shape, []).append(bytes_ - sum(a * b for a, b in zip(terms_, self._line, strict=True)))
        self._off = {shape: median(rests) for shape, rests in off.items()}
        errors = [self.predict(Features(*shape, most)) / bytes_ - 1.0 for shape, most, bytes_ in seen if bytes_]
        self._spread = fmean(error**2 for error in errors) ** 0.5 if errors else 0.0


def _terms(shape: tuple[int, int, int], boxes: int, kink: float) -> tuple[float, float, float]:
    # In units that make the smallest solution of an underdetermined fit put the cost on the pixels.
    kilopixels = shape[0] * shape[1] * shape[2] / 1e3
    return 1.0, kilopixels, kilopixels * max(boxes - kink, 0) / 1e2


def _least_squares(terms: Tensor, needed: Tensor) -> Tensor:
    """Of relative errors; more pixels or boxes never cost less."""
    relative, ones = terms / needed[:, None], torch.ones(len(needed), 1, dtype=torch.float64)
    line = torch.zeros(3, dtype=torch.float64)
    one_size = len(terms[:, 1].unique()) == 1  # then nothing tells what is fixed: too much for more images is safe
    for columns in ([1, 2], [1]) if one_size else ([0, 1, 2], [0, 1], [1]):
        line.zero_()
        line[columns] = torch.linalg.lstsq(relative[:, columns], ones, driver="gelsd").solution[:, 0]
        if (line[1:] >= 0).all():
            break
    return line
