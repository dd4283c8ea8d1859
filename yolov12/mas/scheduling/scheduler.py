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

from collections.abc import Sequence
from dataclasses import dataclass, replace

from yolov12.mas.scheduling.candidates import (
    Arm,
    Group,
    History,
    State,
    arm_of,
    cut_evenly,
    cuts,
    features_of,
    safe_arms,
    under_ceiling,
    upper_bytes,
)
from yolov12.mas.scheduling.peak_model import CostModel
from yolov12.mas.scheduling.time_model import SpeedModel

__all__ = ["Decision", "Group", "History", "State", "decide"]

ROOM_TO_GROW = 0.01
"""Share of the budget that must stay free under an arm that needs more memory, as readings of memory scatter."""
MOVE_BATCHES = 0.1
"""Price of a move, in batches: memory is given back and asked for again. In simulation 0.05 to 0.25, and a room of 0 to
0.03, make a difference of 0.5 % (benchmarks/controller)."""
_LARGEST_STEP = 4  # a prediction further out than this times what was observed is a guess
_EQUAL = 1.02  # times as long is as long, as times scatter by more; then the fewest micro-batches


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


def decide(state: State, cost: CostModel, speed: SpeedModel) -> Decision:
    """Choose the micro-batches and the checkpoint plan of a batch."""
    if state.fixed is not None:
        return _decide_fixed(state, cost, speed, state.fixed)
    history, last = state.history, len(cost.levels) - 1
    images = sum(group.images for group in state.groups)
    one_group = max(group.images for group in state.groups)
    most = max(_LARGEST_STEP * cost.largest, one_group)
    arms: list[Arm] = []
    usual = None
    for cut in cuts(state.groups, most=most):
        if usual is None and cut.largest <= max(history.images, one_group):
            usual = cut
        arms += safe_arms(state, cost, speed, [cut], state.budget_bytes)
        plain = [arm for arm in arms if arm.level == 0]
        if usual is not None and plain and (len(plain) > 1 or not plain[0].new_sizes):
            break  # less at once takes longer, and has nothing to recompute less
    assert usual is not None
    if not arms:
        single = cut_evenly(state.groups, len(state.groups))
        return _decision(arm_of(state, cost, speed, single, last), history, fits=False)
    if not history.images:  # a run is long, so that a size costs nothing; of equals, the fewest
        first = _fastest(arms, [arm.ms for arm in arms])
        held_back = first.cut.largest < images and _LARGEST_STEP * first.cut.largest > most
        return _decision(first, History(0 if held_back else first.cut.largest, first.level))
    stay = arm_of(state, cost, speed, usual, min(history.level, last))
    if stay.upper_bytes > state.budget_bytes or not under_ceiling(state, cost, usual, stay.level):
        known = [arm for arm in arms if not arm.new_sizes] or arms
        chosen = _fastest(known, [arm.best_ms for arm in known])
        if state.ceiling is None and (images < history.images or _fits_but_for_crowds(state, cost, stay)):
            return _decision(chosen, history)
        return _decision(chosen, replace(history, images=chosen.cut.largest, level=chosen.level, regret_ms=0.0))
    if state.ceiling is not None or images < history.images:
        return _decision(stay, history)
    roomy_bytes = max(state.budget_bytes * (1 - ROOM_TO_GROW), stay.upper_bytes)
    tight = [arm.cut for arm in arms if arm.upper_bytes > roomy_bytes]
    roomy = [arm for arm in arms if arm.upper_bytes <= roomy_bytes]
    roomy += safe_arms(state, cost, speed, tight, roomy_bytes)
    return _stay_or_move(history, stay, roomy, speed.new_size_ms)


def _fastest(arms: Sequence[Arm], times_ms: Sequence[float]) -> Arm:
    """Of arms whose micro-batches are ever smaller: the first of those that take about the least time."""
    least_ms = min(times_ms)
    return next(arm for arm, ms in zip(arms, times_ms, strict=True) if ms <= _EQUAL * least_ms)


def _stay_or_move(history: History, stay: Arm, arms: Sequence[Arm], new_size_ms: float) -> Decision:
    """Ski rental: add up what staying loses against the best arm, and move when that is the price of the move."""
    price_ms = MOVE_BATCHES * stay.ms
    known = _at_best([arm for arm in arms if arm.new_sizes <= stay.new_sizes], stay)
    new = _at_best([arm for arm in arms if arm.new_sizes > stay.new_sizes], stay)
    better = _EQUAL * known.best_ms < stay.best_ms
    history = replace(
        history,
        regret_ms=history.regret_ms + (stay.best_ms - known.best_ms) * better,
        new_regret_ms=history.new_regret_ms + (max(stay.ms - new.best_ms, 0.0) if new is not stay else 0.0),
    )
    if better and history.regret_ms >= price_ms:
        return _decision(known, replace(history, images=known.cut.largest, level=known.level, regret_ms=0.0))
    new_price_ms = price_ms + (new.new_sizes - stay.new_sizes) * new_size_ms
    if new is not stay and new.best_ms < stay.ms and history.new_regret_ms >= new_price_ms:
        return _decision(new, History(new.cut.largest, new.level))
    return _decision(stay, history)


def _at_best(arms: Sequence[Arm], default: Arm) -> Arm:
    return min(arms, key=lambda arm: arm.best_ms, default=default)


def _decide_fixed(state: State, cost: CostModel, speed: SpeedModel, images: int) -> Decision:
    """The user's size, under the first plan that fits, or else the last, unless that has failed of late."""
    levels = range(len(cost.levels))
    for cut in cuts(state.groups, every=True, most=images):
        arms = [arm_of(state, cost, speed, cut, each) for each in levels if under_ceiling(state, cost, cut, each)]
        fitting = [arm for arm in arms if arm.upper_bytes <= state.budget_bytes]
        failed = bool(arms) and any(cost.failed(each) for each in features_of(state, cut, arms[-1].level))
        for arm in fitting[:1] or ([] if failed else arms[-1:]):
            return _decision(arm, History(max(arm.cut.largest, state.history.images), arm.level))
    single = cut_evenly(state.groups, len(state.groups))
    return _decision(arm_of(state, cost, speed, single, levels[-1]), state.history, fits=False)


def _fits_but_for_crowds(state: State, cost: CostModel, arm: Arm) -> bool:
    """Whether an arm would be safe if its fullest images were as those of most groups."""
    usual = sorted(group.boxes for group in state.groups)[len(state.groups) // 2]
    return upper_bytes(state, cost, arm.cut, arm.level, usual) <= state.budget_bytes


def _decision(arm: Arm, history: History, *, fits: bool = True) -> Decision:
    return Decision(arm.cut.counts, arm.level, arm.peak_bytes, fits, history)
