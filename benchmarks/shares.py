"""Shares of a batch that follow speed, in simulated fleets of cards with measured speeds.

    python -m benchmarks shares --out benchmarks/results/shares.json      (no GPU; minutes on one core)

A simulated card takes as long for an image as YOLOv12-S did on an H100 under one of seven memory limits
(results/checkpointing.json, in BatchNorm groups of 32). Groups of 8 are assumed to take the same time. A mixed fleet is
a random choice of these cards; in a fleet of equals, all cards have 80 GiB. Times of each rank and step scatter by 3 %.
Three splits are compared on the same times: our shares, equal shares, and the ideal split, which knows all speeds and
may split images. Halfway, one card becomes slower by a third. A change of our shares costs the time in which libraries
search kernels. The exchange of gradients is left out. `plan_ms` is the time that each rank spends on shares in a step.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import report
from yolov12.mas.distributed.shares import Balance, share_out, slowest_ms
from yolov12.mas.scheduling.groups import split_groups
from yolov12.mas.scheduling.time_model import NEW_SIZE_MS

MEASURED = Path(__file__).parent / "results" / "checkpointing.json"
IMAGES_PER_RANK, NOISE, SLOWER = 256, 0.03, 2 / 3
STEPS, LEARNED = 2000, 200
FLEETS = {2: 40, 4: 40, 8: 20, 64: 5, 256: 2, 1024: 1}  # number of ranks → number of fleets


def main() -> None:
    out = report.parser(__doc__).parse_args().out
    measured = json.loads(MEASURED.read_text())
    cards = {each["limit_gib"]: each["images_per_s"] for each in measured["ours-s"]}
    fleets: list[dict[str, Any]] = []
    kinds = {"mixed": list(cards.values()), "equal": [cards[80]]}
    for (kind, speeds), group, (ranks, count) in itertools.product(kinds.items(), (32, 8), FLEETS.items()):
        runs = [_train(ranks, group, speeds, seed) for seed in range(count)]
        fleets.append({"fleet": kind, "ranks": ranks, "bn_group": group, "fleets": count, **_summed(runs)})
        print(json.dumps(fleets[-1]), file=sys.stderr)
    by = {(each["ranks"], each["bn_group"]): each["plan_ms"] for each in fleets if each["fleet"] == "mixed"}
    report.Report(
        out,
        "cpu",
        simulated=f"speeds of {measured['device']}",
        cards={f"{limit_gib} GiB": round(speed, 1) for limit_gib, speed in cards.items()},
        images_per_rank=IMAGES_PER_RANK,
        noise_percent=100 * NOISE,
        steps=STEPS,
        move_ms=NEW_SIZE_MS,
        fleets=fleets,
        plan_growth_256_to_1024={str(group): round(by[1024, group] / by[256, group], 2) for group in (32, 8)},
    ).write()


def _train(ranks: int, group: int, cards: Sequence[float], seed: int) -> dict[str, float]:
    draw = random.Random(f"{ranks} {seed}")
    speeds = [draw.choice(cards) for _ in range(ranks)]
    victim, half = draw.randrange(ranks), STEPS // 2
    groups = split_groups(IMAGES_PER_RANK * ranks, group)
    equal = share_out(groups, [1.0] * ranks)
    balance = Balance(ranks, NEW_SIZE_MS)
    ours_ms, equal_ms, whole_ms, ideal_ms, plan_ms = [], [], [], [], []
    moved: list[int] = []
    before: tuple[int, ...] | None = None
    for step in range(STEPS):
        if step == half:
            speeds[victim] *= SLOWER
        ms = [1000 / speed for speed in speeds]
        if step in (0, half):
            whole, total = share_out(groups, ms), sum(speeds)
        noise = [max(draw.gauss(1.0, NOISE), 0.5) for _ in range(ranks)]
        noisy_ms = [each * factor for each, factor in zip(ms, noise, strict=True)]
        began = time.perf_counter()
        shares = balance.shares(groups)
        planned = time.perf_counter()
        times_ms = [share * each for share, each in zip(shares, noisy_ms, strict=True)]
        told = time.perf_counter()
        balance.observe(shares, times_ms)
        plan_ms.append(1000 * (planned - began + time.perf_counter() - told))
        ours_ms.append(max(times_ms))
        equal_ms.append(slowest_ms(equal, noisy_ms))
        whole_ms.append(slowest_ms(whole, noisy_ms))
        ideal_ms.append(1000 * sum(groups) / total * max(noise))
        if before is not None and shares != before:
            moved.append(step)
            ours_ms[-1] += NEW_SIZE_MS
        before = shares
    assert before is not None
    followed = [step - half for step in moved if step >= half]
    return {
        "images_per_s": 1000 * sum(groups) * STEPS / sum(ours_ms),
        "to_equal": sum(equal_ms) / sum(ours_ms),
        "to_ideal": sum(ideal_ms) / sum(ours_ms),
        "to_ideal_once_learned": sum(ideal_ms[LEARNED:half]) / sum(ours_ms[LEARNED:half]),
        "whole_groups_to_ideal": sum(ideal_ms) / sum(whole_ms),
        "end_over_best": slowest_ms(before, ms) / slowest_ms(whole, ms),
        "moves": len(moved),
        "needless_moves": sum(LEARNED <= step < half or step >= half + LEARNED for step in moved),
        "followed_after": followed[0] if followed else -1,
        "plan_ms": statistics.median(plan_ms),
        "plan_p99_ms": statistics.quantiles(plan_ms, n=100)[98],
    }


def _summed(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """Return means over fleets, and the worst value where the name tells so (`least`, `most`)."""

    def mean(name: str) -> float:
        return statistics.mean(run[name] for run in runs)

    followed = [run["followed_after"] for run in runs if run["followed_after"] >= 0]
    return {
        "images_per_s": round(mean("images_per_s")),
        "to_equal": round(mean("to_equal"), 3),
        "to_ideal": round(mean("to_ideal"), 3),
        "to_ideal_least": round(min(run["to_ideal"] for run in runs), 3),
        "to_ideal_once_learned": round(mean("to_ideal_once_learned"), 3),
        "whole_groups_to_ideal": round(mean("whole_groups_to_ideal"), 3),
        "end_over_best_most": round(max(run["end_over_best"] for run in runs), 3),
        "moves": round(mean("moves"), 2),
        "moves_most": max(run["moves"] for run in runs),
        "needless_moves": round(mean("needless_moves"), 2),
        "steps_to_follow_median": statistics.median_low(followed) if followed else None,
        "fleets_that_followed": len(followed),
        "plan_ms": round(mean("plan_ms"), 3),
        "plan_p99_ms": round(mean("plan_p99_ms"), 3),
    }


if __name__ == "__main__":
    main()
