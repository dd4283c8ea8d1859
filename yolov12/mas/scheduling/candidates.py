"""The ways in which a batch can run: splits into micro-batches under checkpoint plans, with their memory and time.

A `BatchSplit` is a split of a batch into micro-batches. An `Arm` is a split together with a checkpoint plan. In bandit
problems, an alternative is called an arm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from yolov12.mas.scheduling.peak_model import CostModel, Features
from yolov12.mas.scheduling.time_model import SpeedModel

__all__ = [
    "Arm",
    "BatchSplit",
    "Group",
    "History",
    "State",
    "arm_of",
    "beside_bytes",
    "even_splits",
    "features_of",
    "split_micro_batches",
]
__all__ += ["has_room", "latest_ms", "safe_arms", "under_ceiling", "upper_bytes"]

# Bytes beside a capture, relative to the gradients: copies of weights in half precision that autocast keeps for a
# batch, and gradients that the graph lends, as far as `Level.graph_bytes` does not include them.
_COPIES_BYTES = 1.0
# Least ratio between the numbers of micro-batches of two splits. Splits that are closer are nearly the same.
_NEXT_SPLIT = 1.25


@dataclass(frozen=True)
class Group:
    """Images that BatchNorm normalises together."""

    images: int
    """Number of images."""
    boxes: int
    """Boxes of the image that has most."""


@dataclass(frozen=True)
class History:
    """State that one decision passes on to the next."""

    images: int = 0
    """Micro-batch size in use, in images; 0 before the first decision.

    A change to a larger size has a price. A batch with fewer images than this does not change the size.
    """
    level: int = 0
    """Checkpoint plan in use, as a level of the ladder."""
    regret_ms: float = 0.0
    """Milliseconds lost so far against the best arm of the sizes that have run."""
    new_regret_ms: float = 0.0
    """Milliseconds lost so far against the best arm with a new size, if that arm takes only its optimistic time."""
    replays: bool = False
    """True if the arm in use leaves room for a CUDA graph."""


@dataclass(frozen=True)
class State:
    """Input of a decision, besides the models of memory and time."""

    groups: tuple[Group, ...]
    """Groups of the batch, or those that have not run yet."""
    height: int
    """Height of the images in pixels."""
    width: int
    """Width of the images in pixels."""
    budget_bytes: int
    """Bytes that this process may use."""
    allocated_bytes: int
    """Bytes allocated now, between batches."""
    gradient_bytes: int
    """Bytes of the gradients, which are allocated from the end of the first micro-batch on."""
    history: History = History()
    """What the previous decision passed on."""
    ceiling: float | None = None
    """Upper limit of a micro-batch's images times its plan's `Level.fraction`, whatever is predicted.

    It is set after an allocation failure; None otherwise.
    """
    fixed: int | None = None
    """Micro-batch size that the user has set, whatever is predicted; None if it is chosen here."""
    graph_reserve: float | None = None
    """Bytes to leave for the capture of a CUDA graph beyond `Level.graph_bytes`, relative to those of the micro-batch
    with their margin, see `GRAPH_RESERVE`; None if there are no graphs now."""
    graph_bytes: int = 0
    """Bytes that the graph of the arm in use and its replays need above what was allocated before, gradients of earlier
    micro-batches included; 0 if unknown."""
    later_bytes: int = 0
    """Bytes that are going to be allocated beside graphs, such as the optimizer's state."""
    batches_left: float = math.inf
    """Batches until the end of the run, with this one; infinity if that is unknown."""


@dataclass(frozen=True)
class BatchSplit:
    """A split of groups into micro-batches."""

    counts: tuple[int, ...]
    """Number of groups in each micro-batch."""
    sizes: tuple[int, ...]
    """Number of images in each micro-batch."""
    fullest: tuple[tuple[int, int], ...]
    """(images, most boxes) for each size of micro-batch in the split, by images."""

    @property
    def largest(self) -> int:
        """Images in the largest micro-batch."""
        return self.fullest[-1][0]


@dataclass(frozen=True)
class Arm:
    """One way to run a batch: a split under a checkpoint plan."""

    split: BatchSplit
    """The split into micro-batches."""
    level: int
    """The checkpoint plan, as a level of the ladder."""
    peak_bytes: int
    """Predicted peak of allocated memory."""
    upper_bytes: int
    """Predicted peak with its margin."""
    ms: float
    """Expected milliseconds of the batch."""
    best_ms: float
    """Optimistic milliseconds of the batch."""
    new_sizes: int
    """Number of micro-batch sizes for which libraries have no kernels yet."""
    replays: bool = False
    """True if its micro-batches are replayed as CUDA graphs, for which it leaves room."""
    room_bytes: int = 0
    """Predicted peak with its margin, including the capture of a graph if `replays`; see `_room_bytes`."""


def even_splits(groups: Sequence[Group], *, every: bool = False, most: int | None = None) -> Iterator[BatchSplit]:
    """Yield even splits, from one micro-batch to one per group.

    Args:
        groups: Groups of the batch.
        every: Yield also the splits that are skipped by default. These are splits into unequal micro-batches where
            slightly more micro-batches would all be equal, and splits into nearly as many micro-batches as the previous
            split.
        most: Most images in a micro-batch, as far as whole groups allow.
    """
    count, last = len(groups), 0
    total = sum(group.images for group in groups)
    for parts in range(min(-(-total // most), count) if most else 1, count + 1):
        if not every and parts < count and parts < last * _NEXT_SPLIT:
            continue
        if not every and count % parts and any(count % more == 0 for more in range(parts + 1, 2 * parts)):
            continue
        split = split_micro_batches(groups, parts)
        if parts < count and most and split.largest > most:
            continue
        last = parts
        yield split


def split_micro_batches(groups: Sequence[Group], parts: int) -> BatchSplit:
    """Split groups into `parts` micro-batches whose numbers of groups differ by one at most."""
    count = len(groups)
    counts = tuple(count * (i + 1) // parts - count * i // parts for i in range(parts))
    fullest: dict[int, int] = {}
    sizes = []
    for end, size in zip(accumulate(counts), counts, strict=True):
        chunk = groups[end - size : end]
        images = sum([group.images for group in chunk])
        fullest[images] = max(fullest.get(images, 0), max([group.boxes for group in chunk]))
        sizes.append(images)
    return BatchSplit(counts, tuple(sizes), tuple(sorted(fullest.items())))


def safe_arms(
    state: State, cost: CostModel, speed: SpeedModel, splits: Sequence[BatchSplit], budget_bytes: float
) -> list[Arm]:
    """Return each split with the first plan under which it fits. Later plans recompute more, so they are not faster.

    If CUDA graphs are possible, each split is also returned with the first plan that leaves room for one.

    Args:
        state: Groups, memory and ceiling.
        cost: Model of memory.
        speed: Model of time.
        splits: Splits to consider.
        budget_bytes: Upper limit of the predicted peak with its margin.
    """
    arms = []
    for split in splits:
        level = _first_level(state, cost, split, budget_bytes)
        if level == len(cost.levels):
            continue
        replays = has_room(state, cost, split, level, budget_bytes)
        arms.append(arm_of(state, cost, speed, split, level, replays=replays))
        if state.graph_reserve is not None and not replays:
            level = _first_level(state, cost, split, budget_bytes, level + 1, replays=True)
            if level < len(cost.levels):
                arms.append(arm_of(state, cost, speed, split, level, replays=True))
    return arms


def _first_level(
    state: State, cost: CostModel, split: BatchSplit, budget_bytes: float, low: int = 0, *, replays: bool = False
) -> int:
    """Return the first level from `low` on that is under the ceiling and fits; the number of levels for none."""
    high = len(cost.levels)
    while low < high:  # binary search, as both improve with the level
        level = (low + high) // 2
        fits = under_ceiling(state, cost, split, level) and upper_bytes(state, cost, split, level) <= budget_bytes
        fits = fits and (not replays or has_room(state, cost, split, level, budget_bytes))
        low, high = (low, level) if fits else (level + 1, high)
    return low


def has_room(
    state: State, cost: CostModel, split: BatchSplit, level: int, budget_bytes: float, most_boxes: int | None = None
) -> bool:
    """Return whether a split under a plan leaves room for a CUDA graph of its micro-batches.

    Args:
        state: Memory that is allocated already, and whether graphs are possible.
        cost: Model of memory.
        split: Split into micro-batches.
        level: Checkpoint plan.
        budget_bytes: Upper limit.
        most_boxes: If given, predict as if no image had more boxes than this.
    """
    return state.graph_reserve is not None and _room_bytes(state, cost, split, level, most_boxes) <= budget_bytes


def _room_bytes(state: State, cost: CostModel, split: BatchSplit, level: int, most_boxes: int | None = None) -> int:
    """Return the peak of the capture with margin, beside gradients and copies of weights of earlier micro-batches.

    The usual runs before need less, and so do replays, which hold the graph and need memory for the loss. For the arm
    in use, it is the peak of its replays as measured. If there are several sizes, the last one runs as usual beside the
    graphs of the others.
    """
    history = state.history
    upper = max(upper for _, upper in (cost.upper(each) for each in features_of(state, split, level, most_boxes)))
    if state.graph_bytes and (split.largest, level) == (history.images, history.level):
        held_bytes: float = state.graph_bytes
    else:
        factor = cost.levels[level].graph_bytes + (state.graph_reserve or 0.0)
        held_bytes = factor * upper + _COPIES_BYTES * state.gradient_bytes
    last_bytes = upper if len(split.fullest) > 1 else 0
    return math.ceil(_allocated_bytes(state, split) + state.later_bytes + held_bytes + last_bytes)


def arm_of(
    state: State, cost: CostModel, speed: SpeedModel, split: BatchSplit, level: int, *, replays: bool = False
) -> Arm:
    """Return the memory and time of a split under a plan, as CUDA graphs if `replays`."""
    uppers_bytes = upper_bytes(state, cost, split, level)
    where = state.height, state.width
    times = [(split.sizes.count(images), images) for images, _ in split.fullest]
    ahead = speed.with_ahead(len(split.counts))
    return Arm(
        split,
        level,
        peak_bytes=_allocated_bytes(state, split)
        + max(cost.predict(each) for each in features_of(state, split, level)),
        upper_bytes=uppers_bytes,
        ms=ahead * sum(count * speed.expected_ms(images, *where, level, replays) for count, images in times),
        best_ms=ahead * sum(count * speed.optimistic_ms(images, *where, level, replays) for count, images in times),
        new_sizes=sum(not speed.warm(images, *where) for _, images in times),
        replays=replays,
        room_bytes=_room_bytes(state, cost, split, level) if replays else uppers_bytes,
    )


def latest_ms(state: State, speed: SpeedModel, arm: Arm) -> float:
    """Return the milliseconds of the latest batch that ran as an arm; infinity if they are unknown."""
    times = [(arm.split.sizes.count(images), images) for images, _ in arm.split.fullest]
    where = state.height, state.width
    known = [count * speed.latest_ms(images, *where, arm.level, arm.replays) for count, images in times]
    return speed.with_ahead(len(arm.split.counts)) * sum(known)


def upper_bytes(state: State, cost: CostModel, split: BatchSplit, level: int, most_boxes: int | None = None) -> int:
    """Return the predicted peak of allocated memory with its margin.

    Args:
        state: Memory that is allocated already.
        cost: Model of memory.
        split: Split into micro-batches.
        level: Checkpoint plan.
        most_boxes: If given, predict as if no image had more boxes than this.
    """
    uppers = [cost.upper(each) for each in features_of(state, split, level, most_boxes)]
    return _allocated_bytes(state, split) + max(upper for _, upper in uppers)


def features_of(state: State, split: BatchSplit, level: int, most_boxes: int | None = None) -> list[Features]:
    """Return the features of each size of micro-batch in a split; for `most_boxes`, see `upper_bytes`."""
    boxes = [most if most_boxes is None else min(most, most_boxes) for _, most in split.fullest]
    sizes = [images for images, _ in split.fullest]
    return [Features(size, state.height, state.width, most, level) for size, most in zip(sizes, boxes, strict=True)]


def under_ceiling(state: State, cost: CostModel, split: BatchSplit, level: int) -> bool:
    """Return whether a split under a plan needs less than what has just failed."""
    # The ceiling is also a number of images times a `Level.fraction`. Equal products may differ by rounding.
    return state.ceiling is None or split.largest * cost.levels[level].fraction <= state.ceiling * (1 + 1e-9)


def beside_bytes(allocated_bytes: int, gradient_bytes: int, *, alone: bool = False) -> int:
    """Return the bytes that are allocated while a micro-batch runs and do not belong to it.

    Args:
        allocated_bytes: Bytes allocated before the batch or, after a failure, before its remaining images.
        gradient_bytes: Bytes of one set of gradients, which earlier micro-batches of the batch leave.
        alone: True if there are no gradients of earlier micro-batches, or `allocated_bytes` includes them.
    """
    return allocated_bytes if alone else allocated_bytes + gradient_bytes


def _allocated_bytes(state: State, split: BatchSplit) -> int:
    return beside_bytes(state.allocated_bytes, state.gradient_bytes, alone=len(split.counts) == 1)
