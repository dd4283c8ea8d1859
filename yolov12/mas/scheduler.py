"""Memory-feedback batching: how many images run at once, decided before every batch from the memory that is there.

`decide` is a pure function of a `State` and a cost model, so a decision can be tested and replayed without a GPU. Its
rule: the fewest micro-batches, as level as whole groups allow, whose predicted peak plus margin stays inside the
budget. It shrinks at once. It grows back when the larger size has fitted, with room to spare, for several batches in a
row, and never to more than four times what was ever observed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from yolov12.mas.cost import CostModel, Features

__all__ = ["Decision", "Group", "State", "decide"]

CALM_BATCHES = 8
"""How long a larger size must have fitted after a shrink before it is used again."""
ROOM_TO_GROW = 0.05
"""Share of the budget that must stay free at the larger size; without it the size would swing to and fro."""
_LARGEST_STEP = 4  # a prediction further out than this times what was observed is a guess


@dataclass(frozen=True)
class Group:
    """Images that BatchNorm sees together."""

    images: int
    boxes: int
    """Of the image that has most."""


@dataclass(frozen=True)
class State:
    """What a decision depends on, besides the cost model."""

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
    allowance: int
    """Most images at once so far. To go beyond is slow; a batch that is smaller stays below and leaves it as it is."""
    calm: int = CALM_BATCHES
    """Batches in a row for which more than the allowance has fitted."""
    ceiling: int | None = None
    """Most images at once, whatever is predicted: more has just failed, or is not wanted."""
    fixed: bool = False
    """Run at the ceiling without asking the cost model: the user has fixed the size."""


@dataclass(frozen=True)
class Decision:
    """How to run the groups of a state."""

    micro_batches: tuple[int, ...]
    """Number of groups in each."""
    predicted_bytes: int
    """Peak of live bytes, without the margin."""
    fits: bool
    """Whether peak and margin are inside the budget and the size is under the ceiling; else this is group by group."""
    allowance: int
    calm: int
    """For the next state."""


def decide(state: State, cost: CostModel) -> Decision:
    """Choose the micro-batches of a batch."""
    images = sum(group.images for group in state.groups)
    ceiling = state.ceiling or images
    if state.fixed:
        tried = state.calm == CALM_BATCHES or ceiling <= state.allowance
        chosen = _fewest(state, cost, ceiling if tried else state.allowance, float("inf"))
        if tried:
            return replace(chosen, allowance=max(state.allowance, ceiling))
        return replace(chosen, calm=state.calm + 1)
    one_group = max(group.images for group in state.groups)
    ceiling = min(ceiling, max(_LARGEST_STEP * cost.largest, one_group))
    allowed = min(ceiling, max(state.allowance, one_group))
    wanted = _fewest(state, cost, allowed, float("inf"))
    chosen = _fewest(state, cost, allowed, state.budget_bytes)
    # A batch with crowded images is split for their sake, and says nothing about the next.
    boxes = sorted(group.boxes for group in state.groups)[len(state.groups) // 2]
    typical = replace(state, groups=tuple(replace(group, boxes=min(group.boxes, boxes)) for group in state.groups))
    if len(chosen.micro_batches) > len(wanted.micro_batches):
        if len(_fewest(typical, cost, allowed, state.budget_bytes).micro_batches) == len(wanted.micro_batches):
            return chosen
        return replace(chosen, allowance=_largest(state, chosen), calm=0)  # memory has become tight
    if not chosen.fits or len(chosen.micro_batches) == 1:
        return chosen
    roomy_bytes = state.budget_bytes * (1 - ROOM_TO_GROW)
    more = _fewest(state, cost, ceiling, roomy_bytes)
    if not more.fits or len(more.micro_batches) >= len(chosen.micro_batches):
        usual = _fewest(typical, cost, ceiling, roomy_bytes)
        crowded = usual.fits and len(usual.micro_batches) < len(chosen.micro_batches)
        return chosen if crowded or ceiling < images else replace(chosen, calm=0)
    if state.calm < CALM_BATCHES:
        return replace(chosen, calm=state.calm + 1)
    return replace(more, allowance=max(state.allowance, _largest(state, more)))


def _fewest(state: State, cost: CostModel, ceiling: int, budget_bytes: float) -> Decision:
    """The fewest level micro-batches of at most `ceiling` images that stay inside the budget; else single groups."""
    count = len(state.groups)
    images = sum(group.images for group in state.groups)
    for parts in range(min(-(-images // ceiling), count), count + 1):
        if not state.fixed and count % parts and any(count % more == 0 for more in range(parts + 1, 2 * parts)):
            continue  # some more micro-batches would all be of one size
        sizes = tuple(count * (i + 1) // parts - count * i // parts for i in range(parts))
        live = state.live_bytes + (state.gradient_bytes if parts > 1 else 0)
        features = [_features(state, groups) for groups in _chunks(state.groups, sizes)]
        peaks = [(cost.predict(each), cost.margin(each)) for each in set(features)]
        under = max(each.images for each in features) <= ceiling
        fits = under and live + max(peak + margin for peak, margin in peaks) <= budget_bytes
        if fits or parts == count:
            break
    peak_bytes = live + max(peak for peak, _ in peaks)
    return Decision(sizes, peak_bytes, fits, allowance=state.allowance, calm=state.calm)


def _features(state: State, groups: Sequence[Group]) -> Features:
    images = sum(group.images for group in groups)
    return Features(images, state.height, state.width, max(group.boxes for group in groups))


def _chunks(groups: Sequence[Group], sizes: Sequence[int]) -> list[Sequence[Group]]:
    ends = list(accumulate(sizes))
    return [groups[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _largest(state: State, decision: Decision) -> int:
    return max(sum(group.images for group in chunk) for chunk in _chunks(state.groups, decision.micro_batches))
