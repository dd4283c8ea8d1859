"""Memory-feedback batching: how many images run at once and what is recomputed, decided before every batch.

`decide` is a pure function of a `State` and two models, so a decision can be tested and replayed without a GPU. It is a
safe contextual bandit. Context: the budget, the groups of the batch, and what was decided before. Arms: a cut into
level micro-batches of whole groups, under a checkpoint plan. Reward: images a second.

- Safe (SafeOpt: Sui, Gotovos, Burdick, Krause, Safe exploration for optimization with Gaussian processes, 2015): only
  arms whose predicted peak and margin stay inside the budget are considered. The set grows from what was observed, at
  most fourfold at once.
- Upper confidence bound (Auer, Cesa-Bianchi, Fischer, 2002): of those, the one that takes least time at best.
- Ski rental (Karlin, Manasse, Rudolph, Sleator, Competitive snoopy caching, 1988): a move has a price. A size that is
  new makes libraries look for kernels; a larger one may have to be given back at once. The price is paid when staying
  has lost as much, so that it all costs at most twice what knowing the future would.

What no longer fits is left at once, at no price. A batch with a crowded image is split for its own sake and changes
nothing for the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from yolov12.mas.cost import CostModel, Features
from yolov12.mas.speed import SpeedModel

__all__ = ["Decision", "Group", "History", "State", "decide"]

ROOM_TO_GROW = 0.03
"""Share of the budget that must stay free under an arm that needs more memory; without it the size would swing."""
MOVE_BATCHES = 0.25
"""Price of a move, in batches: memory is given back and asked for again, and others may want it the next moment."""
CALM_BATCHES = 8  # for engine.py, until it passes a history on
_LARGEST_STEP = 4  # a prediction further out than this times what was observed is a guess
_EQUAL = 1.02  # times as long is as long; then the fewest micro-batches
_NEXT_CUT = 1.15  # cuts whose number of micro-batches differs by less are as good as the same


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
class Decision:
    """How to run the groups of a state."""

    micro_batches: tuple[int, ...]
    """Number of groups in each."""
    level: int
    """Checkpoint plan."""
    predicted_bytes: int
    """Peak of live bytes, without the margin."""
    fits: bool
    """Whether peak and margin are inside the budget and under the ceiling; else this is group by group."""
    history: History
    """For the next state."""


@dataclass(frozen=True)
class _Cut:
    """Of the groups into micro-batches."""

    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    """Images."""
    fullest: tuple[tuple[int, int], ...]
    """Of each size of micro-batch that occurs: images, most boxes."""

    @property
    def largest(self) -> int:
        return self.fullest[-1][0]


@dataclass(frozen=True)
class _Arm:
    cut: _Cut
    level: int
    peak_bytes: int
    upper_bytes: int
    """With the margin."""
    ms: float
    best_ms: float
    new_sizes: int
    """That libraries have no kernels for."""


def decide(state: State, cost: CostModel, speed: SpeedModel) -> Decision:
    """Choose the micro-batches and the checkpoint plan of a batch."""
    if state.fixed is not None:
        return _decide_fixed(state, cost, speed, state.fixed)
    history, last = state.history, len(cost.levels) - 1
    images = sum(group.images for group in state.groups)
    one_group = max(group.images for group in state.groups)
    most = max(_LARGEST_STEP * cost.largest, one_group)
    cuts = [cut for cut in _cuts(state.groups) if cut.largest <= most] or [_single(state.groups)]
    arms = _safe_arms(state, cost, speed, cuts, state.budget_bytes)
    if not arms:
        return _decision(_arm(state, cost, speed, cuts[-1], last), history, fits=False)
    if not history.images:  # a run is long, so that a size costs nothing; of equals, the fewest
        least_ms = min(arm.ms for arm in arms)
        first = next(arm for arm in arms if arm.ms <= _EQUAL * least_ms)
        return _decision(first, History(first.cut.largest, first.level))
    usual = next((cut for cut in cuts if cut.largest <= max(history.images, one_group)), cuts[-1])
    stay = _arm(state, cost, speed, usual, min(history.level, last))
    if stay.upper_bytes > state.budget_bytes or not _under_ceiling(state, cost, usual, stay.level):
        known = [arm for arm in arms if not arm.new_sizes] or arms
        least_ms = min(arm.best_ms for arm in known)
        chosen = next(arm for arm in known if arm.best_ms <= _EQUAL * least_ms)
        if state.ceiling is None and (images < history.images or _fits_but_for_crowds(state, cost, stay)):
            return _decision(chosen, history)
        return _decision(chosen, replace(history, images=chosen.cut.largest, level=chosen.level, regret_ms=0.0))
    if state.ceiling is not None or images < history.images:
        return _decision(stay, history)
    roomy_bytes = max(state.budget_bytes * (1 - ROOM_TO_GROW), stay.upper_bytes)
    return _stay_or_move(history, stay, _safe_arms(state, cost, speed, cuts, roomy_bytes), speed.new_size_ms)


def _stay_or_move(history: History, stay: _Arm, arms: Sequence[_Arm], new_size_ms: float) -> Decision:
    """Ski rental: add up what staying loses against the best arm, and move when that is the price of the move."""
    price_ms = MOVE_BATCHES * stay.ms
    known = min((arm for arm in arms if not arm.new_sizes), key=lambda arm: arm.best_ms, default=stay)
    new = min((arm for arm in arms if arm.new_sizes), key=lambda arm: arm.best_ms, default=stay)
    history = replace(
        history,
        regret_ms=max(history.regret_ms + stay.best_ms - known.best_ms, 0.0),
        new_regret_ms=max(history.new_regret_ms + (stay.ms - new.best_ms if new is not stay else 0.0), 0.0),
    )
    if known.best_ms < stay.best_ms and history.regret_ms >= price_ms:
        return _decision(known, replace(history, images=known.cut.largest, level=known.level, regret_ms=0.0))
    if new.best_ms < stay.ms and history.new_regret_ms >= price_ms + new.new_sizes * new_size_ms:
        return _decision(new, History(new.cut.largest, new.level))
    return _decision(stay, history)


def _decide_fixed(state: State, cost: CostModel, speed: SpeedModel, images: int) -> Decision:
    """The user's size, under the first plan that fits, or else the last, unless that has failed of late."""
    levels = range(len(cost.levels))
    for cut in _cuts(state.groups, every=True, most=images):
        arms = [_arm(state, cost, speed, cut, each) for each in levels if _under_ceiling(state, cost, cut, each)]
        fitting = [arm for arm in arms if arm.upper_bytes <= state.budget_bytes]
        failed = bool(arms) and any(cost.failed(each) for each in _features(state, cut, arms[-1].level))
        for arm in fitting[:1] or ([] if failed and len(cut.counts) < len(state.groups) else arms[-1:]):
            return _decision(arm, History(max(arm.cut.largest, state.history.images), arm.level))
    return _decision(_arm(state, cost, speed, _single(state.groups), levels[-1]), state.history, fits=False)


def _cuts(groups: Sequence[Group], *, every: bool = False, most: int | None = None) -> Iterator[_Cut]:
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
        cut = _cut(groups, parts)
        if parts < count and most and cut.largest > most:
            continue
        last = parts
        yield cut


def _single(groups: Sequence[Group]) -> _Cut:
    return _cut(groups, len(groups))


def _cut(groups: Sequence[Group], parts: int) -> _Cut:
    count = len(groups)
    counts = tuple(count * (i + 1) // parts - count * i // parts for i in range(parts))
    fullest: dict[int, int] = {}
    sizes = []
    for end, size in zip(accumulate(counts), counts, strict=True):
        chunk = groups[end - size : end]
        images = sum([group.images for group in chunk])
        fullest[images] = max(fullest.get(images, 0), max([group.boxes for group in chunk]))
        sizes.append(images)
    return _Cut(counts, tuple(sizes), tuple(sorted(fullest.items())))


def _safe_arms(
    state: State, cost: CostModel, speed: SpeedModel, cuts: Sequence[_Cut], budget_bytes: float
) -> list[_Arm]:
    """Of each cut the first plan that fits: to recompute more is never faster."""
    arms = []
    for cut in cuts:
        for level in range(len(cost.levels)):
            if _under_ceiling(state, cost, cut, level):
                arm = _arm(state, cost, speed, cut, level)
                if arm.upper_bytes <= budget_bytes:
                    arms.append(arm)
                    break
    return arms


def _arm(state: State, cost: CostModel, speed: SpeedModel, cut: _Cut, level: int) -> _Arm:
    uppers = [cost.upper(features) for features in _features(state, cut, level)]
    live = state.live_bytes + (state.gradient_bytes if len(cut.counts) > 1 else 0)
    where = state.height, state.width
    times = [(cut.sizes.count(images), images) for images, _ in cut.fullest]
    return _Arm(
        cut,
        level,
        peak_bytes=live + max(peak for peak, _ in uppers),
        upper_bytes=live + max(upper for _, upper in uppers),
        ms=sum(count * speed.expected_ms(images, *where, level) for count, images in times),
        best_ms=sum(count * speed.optimistic_ms(images, *where, level) for count, images in times),
        new_sizes=sum(not speed.warm(images, *where) for _, images in times),
    )


def _features(state: State, cut: _Cut, level: int) -> list[Features]:
    return [Features(images, state.height, state.width, boxes, level) for images, boxes in cut.fullest]


def _under_ceiling(state: State, cost: CostModel, cut: _Cut, level: int) -> bool:
    # A ceiling is a share of a product, too: equal ones may differ by a rounding.
    return state.ceiling is None or cut.largest * cost.levels[level].share <= state.ceiling * (1 + 1e-9)


def _fits_but_for_crowds(state: State, cost: CostModel, arm: _Arm) -> bool:
    """Whether an arm would be safe if its fullest images were as those of most groups."""
    boxes = sorted(group.boxes for group in state.groups)[len(state.groups) // 2]
    live = state.live_bytes + (state.gradient_bytes if len(arm.cut.counts) > 1 else 0)
    features = [Features(images, state.height, state.width, boxes, arm.level) for images, _ in arm.cut.fullest]
    return live + max(cost.upper(each)[1] for each in features) <= state.budget_bytes


def _decision(arm: _Arm, history: History, *, fits: bool = True) -> Decision:
    return Decision(arm.cut.counts, arm.level, arm.peak_bytes, fits, history)
