"""Memory-feedback batching: before every batch, it decides how many images run at once and which layers recompute.

`decide` is a pure function of a `State` and two models, so a decision can be tested and replayed without a GPU. It is a
safe contextual bandit. Context: the budget, the groups of the batch, and earlier decisions. Arms: a split of the batch
into equal micro-batches of whole groups, together with a checkpoint plan. Reward: images per second.

- Safe exploration (SafeOpt: Sui, Gotovos, Burdick, Krause, Safe exploration for optimization with Gaussian processes,
  2015): only arms whose predicted peak plus margin stays inside the budget are considered. The set of these arms grows
  with the observations, at most fourfold at once, or further if there is at least twice the memory that is predicted.
- Upper confidence bound (Auer, Cesa-Bianchi, Fischer, 2002): among the safe arms, the one with the least optimistic
  time is best.
- Ski rental (Karlin, Manasse, Rudolph, Sleator, Competitive snoopy caching, 1988): a move has a price. For a new size,
  libraries search kernels, and the memory of a larger size may have to be released again at once. The scheduler moves
  when staying has lost as much as the price. The total is then at most twice what a scheduler that knows the future
  would pay.

Small micro-batches may be replayed as CUDA graphs, where the host is what is waited for. A graph holds memory, so an
arm may leave room for one: fewer images, or a plan that keeps less. It is an arm like the others, with its own times.

A choice that no longer fits is left at once, without a price. A batch that is split only because of one crowded image
does not change the size used for the next batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from yolov12.mas.scheduling.candidates import (
    Arm,
    Group,
    History,
    State,
    arm_of,
    even_splits,
    features_of,
    has_room,
    latest_ms,
    safe_arms,
    split_micro_batches,
    under_ceiling,
    upper_bytes,
)
from yolov12.mas.scheduling.peak_model import CostModel
from yolov12.mas.scheduling.time_model import SpeedModel

__all__ = ["Decision", "Group", "History", "State", "decide"]

ROOM_TO_GROW = 0.01
"""Fraction of the budget that must stay free under an arm that needs more memory, as memory readings scatter."""
MOVE_BATCHES = 0.1
"""Price of a move in batches: memory is released and allocated again. In simulation, prices from 0.05 to 0.25, and a
`ROOM_TO_GROW` from 0 to 0.03, make a difference of 0.5 % (benchmarks/controller)."""
_LARGEST_STEP = 4  # largest size as a multiple of the largest one observed: predictions beyond are less certain
_BEYOND = 2.0
"""A size beyond the largest step is safe if this multiple of its prediction fits. With plenty of memory, a run then
needs no size between the warm-up and the whole batch. Each size costs a search for kernels, which takes seconds."""
_EQUAL = 1.02  # times within this factor count as equal, as they scatter by more; the fewest micro-batches win


@dataclass(frozen=True)
class Decision:
    """Micro-batches and checkpoint plan for the groups of a state."""

    micro_batches: tuple[int, ...]
    """Number of groups in each micro-batch."""
    level: int
    """Index of the checkpoint plan."""
    predicted_bytes: int
    """Predicted peak of allocated memory, without the margin."""
    fits: bool
    """True if peak plus margin is inside the budget and under the ceiling; otherwise each micro-batch is one group."""
    history: History
    """History for the next state."""
    replays: bool = False
    """True if the micro-batches are expected to be replayed as CUDA graphs, sooner or later."""


def decide(state: State, cost: CostModel, speed: SpeedModel) -> Decision:
    """Choose the micro-batches and the checkpoint plan of a batch.

    Args:
        state: Budget, groups of the batch, and earlier decisions.
        cost: Model of peak bytes.
        speed: Model of times.
    """
    if state.fixed is not None:
        return _decide_fixed(state, cost, speed, state.fixed)
    history, last = state.history, len(cost.levels) - 1
    images = sum(group.images for group in state.groups)
    one_group = max(group.images for group in state.groups)
    most = max(_LARGEST_STEP * cost.largest, one_group)
    arms: list[Arm] = []
    usual = None
    for split in even_splits(state.groups):
        if usual is None and split.largest <= min(max(history.images, one_group), most):
            usual = split
        is_far = split.largest > most
        arms += safe_arms(state, cost, speed, [split], state.budget_bytes / (_BEYOND if is_far else 1.0))
        plain = [arm for arm in arms if arm.level == 0]
        is_replayed = state.graph_reserve is None or any(arm.replays for arm in plain)
        if usual is not None and plain and is_replayed and (len(plain) > 1 or not plain[0].new_sizes):
            break  # smaller micro-batches take longer and recompute no less
    assert usual is not None
    if not arms:
        single = split_micro_batches(state.groups, len(state.groups))
        return _decision(arm_of(state, cost, speed, single, last), history, fits=False)
    if not history.images:  # over a long run, the price of a first size does not count
        first = _fastest(arms, [arm.ms for arm in arms])
        held_back = first.split.largest < images and _LARGEST_STEP * first.split.largest > most
        return _decision(first, History(0 if held_back else first.split.largest, first.level, replays=first.replays))
    level = min(history.level, last)
    replays = has_room(state, cost, usual, level, state.budget_bytes)
    stay = arm_of(state, cost, speed, usual, level, replays=replays)
    if stay.upper_bytes > state.budget_bytes or not under_ceiling(state, cost, usual, stay.level):
        known = [arm for arm in arms if not arm.new_sizes] or arms
        chosen = _fastest(known, [arm.best_ms for arm in known])
        if state.ceiling is None and (images < history.images or _fits_but_for_crowds(state, cost, stay)):
            return _decision(chosen, history)
        return _decision(chosen, _moved(history, chosen))
    if state.ceiling is not None or images < history.images:
        return _decision(stay, history)
    if history.replays and not replays and has_room(state, cost, usual, level, state.budget_bytes, _usual_boxes(state)):
        return _decision(stay, history)  # a crowded image changes nothing for the next batch
    roomy_bytes = max(state.budget_bytes * (1 - ROOM_TO_GROW), stay.upper_bytes)
    tight = [arm.split for arm in arms if arm.room_bytes > roomy_bytes]
    roomy = [arm for arm in arms if arm.room_bytes <= roomy_bytes]
    roomy += safe_arms(state, cost, speed, tight, roomy_bytes)
    return _stay_or_move(state, speed, stay, roomy)


def _fastest(arms: Sequence[Arm], times_ms: Sequence[float]) -> Arm:
    """Return the first arm that takes about the least time. Micro-batches of arms get smaller from first to last."""
    least_ms = min(times_ms)
    return next(arm for arm, ms in zip(arms, times_ms, strict=True) if ms <= _EQUAL * least_ms)


def _stay_or_move(state: State, speed: SpeedModel, stay: Arm, arms: Sequence[Arm]) -> Decision:
    """Add up what staying loses against the best arm, and move when the sum reaches the price of the move.

    Staying loses nothing if one of the latest two batches was fast: slow ones, which may have waited for anything, have
    raised the mean. After a wrong move, it takes hundreds of batches until the arm is tried again, if it ever is: an
    arm that was more than a few per cent slower is tried again only once the arm in use is slower than it was then.

    A new size must also be able to save its price until the end of the run.
    """
    history, new_size_ms, batches_left = state.history, speed.new_size_ms, state.batches_left
    price_ms, stays_ms = MOVE_BATCHES * stay.ms, min(stay.best_ms, latest_ms(state, speed, stay))
    known = _at_best([arm for arm in arms if arm.new_sizes <= stay.new_sizes], stay)
    new = _at_best([arm for arm in arms if arm.new_sizes > stay.new_sizes], stay)
    better = _EQUAL * known.best_ms < stays_ms
    history = replace(
        history,
        replays=stay.replays,
        regret_ms=history.regret_ms + (stays_ms - known.best_ms) * better,
        new_regret_ms=history.new_regret_ms + (max(stay.ms - new.best_ms, 0.0) if new is not stay else 0.0),
    )
    if better and history.regret_ms >= price_ms:
        return _decision(known, _moved(history, known))
    new_price_ms = price_ms + (new.new_sizes - stay.new_sizes) * new_size_ms
    saved_ms = (stay.ms - new.best_ms) * batches_left
    if new is not stay and history.new_regret_ms >= new_price_ms and saved_ms > new_price_ms:
        return _decision(new, History(new.split.largest, new.level, replays=new.replays))
    return _decision(stay, history)


def _moved(history: History, arm: Arm) -> History:
    return replace(history, images=arm.split.largest, level=arm.level, replays=arm.replays, regret_ms=0.0)


def _at_best(arms: Sequence[Arm], default: Arm) -> Arm:
    return min(arms, key=lambda arm: arm.best_ms, default=default)


def _decide_fixed(state: State, cost: CostModel, speed: SpeedModel, images: int) -> Decision:
    """Use the user's size under the first plan that fits; if none fits, under the last, unless it failed recently."""
    levels = range(len(cost.levels))
    for split in even_splits(state.groups, every=True, most=images):
        arms = [
            arm_of(state, cost, speed, split, each, replays=has_room(state, cost, split, each, state.budget_bytes))
            for each in levels
            if under_ceiling(state, cost, split, each)
        ]
        fitting = [arm for arm in arms if arm.upper_bytes <= state.budget_bytes]
        failed = bool(arms) and any(cost.failed(each) for each in features_of(state, split, arms[-1].level))
        for arm in fitting[:1] or ([] if failed else arms[-1:]):
            history = History(max(arm.split.largest, state.history.images), arm.level, replays=arm.replays)
            return _decision(arm, history)
    single = split_micro_batches(state.groups, len(state.groups))
    return _decision(arm_of(state, cost, speed, single, levels[-1]), state.history, fits=False)


def _fits_but_for_crowds(state: State, cost: CostModel, arm: Arm) -> bool:
    """Return whether an arm would be safe if the images with most boxes had only as many as those of most groups."""
    return upper_bytes(state, cost, arm.split, arm.level, _usual_boxes(state)) <= state.budget_bytes


def _usual_boxes(state: State) -> int:
    return sorted(group.boxes for group in state.groups)[len(state.groups) // 2]


def _decision(arm: Arm, history: History, *, fits: bool = True) -> Decision:
    return Decision(arm.split.counts, arm.level, arm.peak_bytes, fits, history, arm.replays)
