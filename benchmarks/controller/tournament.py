"""Comparison of controllers in the simulation, each with an oracle for the memory that it met.

The oracle knows the card, the trace and the bounds of the scatter. It uses those sizes of micro-batches that are worth
the seconds of their first use, and changes between them at no cost.
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
    """Result of one policy on one trace."""

    policy: str
    """Name of the policy."""
    kind: str
    """Kind of the trace."""
    card: str
    """Name of the card."""
    first: bool
    """True if the run began with this trace."""
    steps: int
    """Number of steps of the trace."""
    images: int
    """Number of images trained on."""
    ms: float
    """Time in ms. After a run died, it includes the rest of the trace, in which the machine is idle."""
    oracle_ms: float
    """Time of the oracle for all images of the trace."""
    over_budget: int
    """Number of steps over the budget."""
    avoidable: int
    """Number of steps over the budget in which a smaller action would have been inside it."""
    failures: int
    """Number of failed allocations."""
    died: int
    """1 if the run died, otherwise 0."""


def compare(seed: int, traces: int, steps: int, policies: Iterable[str] = POLICIES) -> list[Score]:
    """Train one card under each policy, through traces of all kinds.

    Args:
        seed: Seed of the run, which also chooses the card.
        traces: Number of traces.
        steps: Number of steps of a trace.
        policies: Names of policies.
    """
    scores = []
    for name in policies:
        chance = random.Random(seed)
        told = CARDS[seed % len(CARDS)]
        run = Run(told.drawn(chance), seed, traces * steps)
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
    """Sum up the scores of one policy: all, by kind of trace, by card, and the first traces of runs."""
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
    """Return the least time of every batch in ms, with the sizes that make the whole run shortest."""
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
    """Return the time in ms of a batch in `parts` equal micro-batches, under the first plan inside the budget."""
    images = card.images // parts
    room = card.total_bytes * (1 - max(moment.others, moment.others_later) - 0.1) - card.allocated_bytes
    room -= card.gradient_bytes if parts > 1 else 0
    fullest = max(moment.boxes)
    for level in range(len(card.levels)):
        if card.usual_bytes(images, fullest, level) * (1 + PEAK_SCATTER) <= room:
            return parts * card.usual_ms(images, level)
    return float("inf")
