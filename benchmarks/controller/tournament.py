"""Comparing controllers in the simulation, each with the oracle of the very memory it met.

The oracle knows the card, the trace and the scatter's bounds; in hindsight it uses the sizes of micro-batch that are
worth the seconds their first time costs, and moves between them for nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.controller.rivals import POLICIES
from benchmarks.controller.simulate import CARDS, KINDS, PEAK_SCATTER, Batch, Card, Moment, Run, trace

__all__ = ["Score", "compare", "summed"]


@dataclass(frozen=True)
class Score:
    """One policy on one trace."""

    policy: str
    kind: str
    card: str
    first: bool
    """Whether the run began with it."""
    steps: int
    images: int
    ms: float
    """With what was left of the trace when a run had died, in which the machine waits for somebody to come."""
    oracle_ms: float
    """For all images of the trace."""
    over_budget: int
    """Steps."""
    avoidable: int
    """Of these, where a smaller action would have been inside the budget."""
    failures: int
    """Allocations."""
    died: int


def compare(seed: int, traces: int, steps: int, policies: Iterable[str] = POLICIES) -> list[Score]:
    """Train one card under each policy, through traces of all kinds."""
    scores = []
    for name in policies:
        chance = random.Random(seed)
        told = CARDS[seed % len(CARDS)]
        run = Run(told.drawn(chance), seed)
        policy = POLICIES[name](run, told)
        batches: list[list[Batch]] = []
        met: list[list[Moment]] = []
        kinds = [KINDS[(seed // len(CARDS) + index) % len(KINDS)] for index in range(traces)]
        for kind in kinds:
            policy.restart()
            held = trace(kind, steps, chance)
            crowds = [run.boxes() for _ in range(steps)]
            done: list[Batch] = []
            path: list[Moment] = []
            others = 0.0
            for index in range(steps):
                if callable(held):
                    peaks = [batch.peak_bytes / run.card.total_bytes for batch in [*done[-2:]]]
                    others = later = held(*([0.0] * (2 - len(peaks)) + peaks)[:2]) if peaks else held(0.0, 0.0)
                else:
                    others, later = held[index], held[min(index + chance.randint(0, 1), steps - 1)]
                path.append(Moment(others, later, crowds[index]))
                if not (done and done[-1].died):
                    done.append(run.batch(path[-1], policy.planner))
                    policy.learn(done[-1])
            batches.append(done)
            met.append(path)
        oracle = _oracle_ms(run.card, met)
        for index, (kind, done) in enumerate(zip(kinds, batches, strict=True)):
            finished = [batch for batch in done if not batch.died]
            died = len(finished) < len(done)
            scores.append(
                Score(
                    name,
                    kind,
                    told.name,
                    index == 0,
                    steps,
                    images=len(finished) * run.card.images,
                    ms=sum(batch.ms for batch in done) + sum(oracle[index][len(done) - 1 :]) * died,
                    oracle_ms=sum(oracle[index]),
                    over_budget=sum(batch.over_budget for batch in done),
                    avoidable=sum(batch.avoidable for batch in done),
                    failures=sum(batch.failures for batch in done),
                    died=int(died),
                )
            )
    return scores


def summed(scores: Sequence[Score]) -> dict[str, Any]:
    """Of one policy: all, by kind of trace, by card, and the first traces of runs."""
    parts = {
        "all": scores,
        **{kind: [score for score in scores if score.kind == kind] for kind in KINDS},
        **{card.name: [score for score in scores if score.card == card.name] for card in CARDS},
        "first of a run": [score for score in scores if score.first],
    }
    return {name: _sum(part) for name, part in parts.items() if part}


def _sum(scores: Sequence[Score]) -> dict[str, float]:
    steps = sum(score.steps for score in scores)
    cards = {card.name: card.images for card in CARDS}
    # Images a second against the oracle's, each trace weighted by the time the oracle needs.
    speed = sum(score.images / (score.steps * cards[score.card]) * score.oracle_ms for score in scores)
    spent = sum(score.ms for score in scores)
    return {
        "traces": len(scores),
        "of_oracle": round(speed / spent, 4),
        "avoidable_percent": round(100 * sum(score.avoidable for score in scores) / steps, 4),
        "over_budget_percent": round(100 * sum(score.over_budget for score in scores) / steps, 4),
        "failures": sum(score.failures for score in scores),
        "died": sum(score.died for score in scores),
    }


def _oracle_ms(card: Card, met: Sequence[Sequence[Moment]]) -> list[list[float]]:
    """Least time of every batch, with the sizes that make the whole run shortest."""
    count = card.images // card.group
    parts = [each for each in range(1, count + 1) if count % each == 0]
    steps = [step for path in met for step in path]
    ms = np.array([[_least_ms(card, step, each) for each in parts] for step in steps])
    impossible = np.isinf(ms).all(axis=1)
    ms[impossible] = [each * card.usual_ms(card.images // each, len(card.levels) - 1) for each in parts]
    best = np.inf, ms[:, -1]
    for size in range(1, len(parts) + 1):
        for chosen in combinations(range(len(parts)), size):
            each = ms[:, list(chosen)].min(axis=1)
            total = each.sum() + len(chosen) * card.new_size_ms
            if total < best[0]:
                best = total, each
    flat = best[1].tolist()
    flat[0] += best[0] - best[1].sum()
    ends = np.cumsum([len(path) for path in met]).tolist()
    return [flat[end - len(path) : end] for path, end in zip(met, ends, strict=True)]


def _least_ms(card: Card, moment: Moment, parts: int) -> float:
    """Of a batch in so many micro-batches of one size, under the first plan that stays inside the budget."""
    images = card.images // parts
    room = card.total_bytes * (1 - max(moment.others, moment.others_later) - 0.1) - card.live_bytes
    room -= card.gradient_bytes if parts > 1 else 0
    fullest = max(moment.boxes)
    for level in range(len(card.levels)):
        if card.usual_bytes(images, fullest, level) * (1 + PEAK_SCATTER) <= room:
            return parts * card.usual_ms(images, level)
    return float("inf")
