"""What a batch may be run as: cuts into micro-batches under checkpoint plans, what each needs and how long it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from yolov12.mas.scheduling.peak_model import CostModel, Features
from yolov12.mas.scheduling.time_model import SpeedModel

__all__ = ["Arm", "Cut", "Group", "History", "State", "arm_of", "beside_bytes", "cut_evenly", "cuts", "features_of"]
__all__ += ["safe_arms", "under_ceiling", "upper_bytes"]

_NEXT_CUT = 1.25  # cuts whose number of micro-batches differs by less are as good as the same


@dataclass(frozen=True)
class Group:
    """Images that BatchNorm sees together."""

    images: int
    boxes: int
    """Of the image that has most."""


@dataclass(frozen=True)
class History:
    """What one decision leaves to the next."""

    images: int = 0
    """Most images at once. To use more has a price; a batch that is smaller leaves it as it is. 0: nothing ran yet."""
    level: int = 0
    """Checkpoint plan."""
    regret_ms: float = 0.0
    """What staying has cost so far, against the best arm of a size that has run."""
    new_regret_ms: float = 0.0
    """And against the best of a size that has not, if that is as fast as it may be."""


@dataclass(frozen=True)
class State:
    """What a decision depends on, besides the models."""

    groups: tuple[Group, ...]
    """Of the batch, or of what is left of it."""
    height: int
    width: int
    budget_bytes: int
    """What this process may hold."""
    live_bytes: int
    """What it holds in tensors now, between batches."""
    gradient_bytes: int
    """What it will hold in gradients after the first micro-batch."""
    history: History = History()
    ceiling: float | None = None
    """Most images at once, times the share of the plan, whatever is predicted: more has just failed."""
    fixed: int | None = None
    """Images at once that the user wants, whatever is predicted."""


@dataclass(frozen=True)
class Cut:
    """Of groups into micro-batches."""

    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    """Images."""
    fullest: tuple[tuple[int, int], ...]
    """Of each size of micro-batch that occurs: images, most boxes."""

    @property
    def largest(self) -> int:
        """Most images at once."""
        return self.fullest[-1][0]


@dataclass(frozen=True)
class Arm:
    """One way to run a batch."""

    cut: Cut
    level: int
    peak_bytes: int
    upper_bytes: int
    """With the margin."""
    ms: float
    best_ms: float
    new_sizes: int
    """That libraries have no kernels for."""


def cuts(groups: Sequence[Group], *, every: bool = False, most: int | None = None) -> Iterator[Cut]:
    """Level cuts, from one micro-batch to one for each group.

    Args:
        groups: Of the batch.
        every: Also those of several sizes where a few more micro-batches would be of one, and those much like others.
        most: Images of a micro-batch, as far as groups allow.
    """
    count, last = len(groups), 0
    total = sum(group.images for group in groups)
    for parts in range(min(-(-total // most), count) if most else 1, count + 1):
        if not every and parts < count and parts < last * _NEXT_CUT:
            continue
        if not every and count % parts and any(count % more == 0 for more in range(parts + 1, 2 * parts)):
            continue
        cut = cut_evenly(groups, parts)
        if parts < count and most and cut.largest > most:
            continue
        last = parts
        yield cut


def cut_evenly(groups: Sequence[Group], parts: int) -> Cut:
    """Into micro-batches whose numbers of groups differ by one at most."""
    count = len(groups)
    counts = tuple(count * (i + 1) // parts - count * i // parts for i in range(parts))
    fullest: dict[int, int] = {}
    sizes = []
    for end, size in zip(accumulate(counts), counts, strict=True):
        chunk = groups[end - size : end]
        images = sum([group.images for group in chunk])
        fullest[images] = max(fullest.get(images, 0), max([group.boxes for group in chunk]))
        sizes.append(images)
    return Cut(counts, tuple(sizes), tuple(sorted(fullest.items())))


def safe_arms(state: State, cost: CostModel, speed: SpeedModel, cuts: Sequence[Cut], budget_bytes: float) -> list[Arm]:
    """Of each cut the first plan that fits: to recompute more is never faster."""
    arms = []
    for cut in cuts:
        low, high = 0, len(cost.levels)
        while low < high:  # the first that is under the ceiling and fits, as both follow the share
            level = (low + high) // 2
            fits = under_ceiling(state, cost, cut, level) and upper_bytes(state, cost, cut, level) <= budget_bytes
            low, high = (low, level) if fits else (level + 1, high)
        if low < len(cost.levels):
            arms.append(arm_of(state, cost, speed, cut, low))
    return arms


def arm_of(state: State, cost: CostModel, speed: SpeedModel, cut: Cut, level: int) -> Arm:
    """A cut under a plan."""
    where = state.height, state.width
    times = [(cut.sizes.count(images), images) for images, _ in cut.fullest]
    return Arm(
        cut,
        level,
        peak_bytes=_live_bytes(state, cut) + max(cost.predict(each) for each in features_of(state, cut, level)),
        upper_bytes=upper_bytes(state, cost, cut, level),
        ms=sum(count * speed.expected_ms(images, *where, level) for count, images in times),
        best_ms=sum(count * speed.optimistic_ms(images, *where, level) for count, images in times),
        new_sizes=sum(not speed.warm(images, *where) for _, images in times),
    )


def upper_bytes(state: State, cost: CostModel, cut: Cut, level: int, most_boxes: int | None = None) -> int:
    """Predicted peak of live bytes, with its margin; also as if no image had more boxes than so many."""
    uppers = [cost.upper(each) for each in features_of(state, cut, level, most_boxes)]
    return _live_bytes(state, cut) + max(upper for _, upper in uppers)


def features_of(state: State, cut: Cut, level: int, most_boxes: int | None = None) -> list[Features]:
    """Of each size of micro-batch in a cut."""
    boxes = [most if most_boxes is None else min(most, most_boxes) for _, most in cut.fullest]
    sizes = [images for images, _ in cut.fullest]
    return [Features(size, state.height, state.width, most, level) for size, most in zip(sizes, boxes, strict=True)]


def under_ceiling(state: State, cost: CostModel, cut: Cut, level: int) -> bool:
    """Whether it has not just failed, nor anything that is smaller."""
    # A ceiling is a share of a product, too: equal ones may differ by a rounding.
    return state.ceiling is None or cut.largest * cost.levels[level].share <= state.ceiling * (1 + 1e-9)


def beside_bytes(live_bytes: int, gradient_bytes: int, *, alone: bool = False) -> int:
    """Bytes allocated beside a micro-batch.

    Args:
        live_bytes: Bytes allocated before the batch, or before what is left of it.
        gradient_bytes: Bytes of one set of gradients. Earlier micro-batches of the batch leave one.
        alone: True for a micro-batch that is all of its batch, so that no earlier one leaves gradients.
    """
    return live_bytes if alone else live_bytes + gradient_bytes


def _live_bytes(state: State, cut: Cut) -> int:
    return beside_bytes(state.live_bytes, state.gradient_bytes, alone=len(cut.counts) == 1)
