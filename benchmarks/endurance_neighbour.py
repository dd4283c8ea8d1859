"""Part `neighbour` of benchmarks/endurance.py: two hours beside a process that takes and releases memory at random.

On the CPU, the device is simulated: an image takes memory in it, and its clock advances by the time of an image. The
engine, its model and its updates are real. On a GPU, the process is benchmarks/neighbour.py, which changes what it
holds more often, so that it makes the changes of two hours in less time.
"""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.processes import GIB, Call, environment

HOURS = 2.0
CHANGE_S = (1.0, 5.0)  # between two changes, as benchmarks/neighbour.py makes them
MOST, MOST_SIMULATED = 0.4, 0.7  # fractions of the card that the neighbour holds at most
BATCH, GROUP = 256, 4
CARD_BYTES, IMAGE_BYTES, IMAGE_MS = 16 * GIB, 254 * 2**20, 9.0  # YOLOv12-S at 640 on a card like a T4


def schedule(hours: float, seed: int, most: float) -> list[tuple[float, float]]:
    """Draw what the neighbour holds: (seconds since the beginning, fraction of the card) of each change.

    Args:
        hours: Duration.
        seed: Seed of the draws.
        most: Fraction of the card that it holds at most.
    """
    chance, now_s, changes = random.Random(seed), 0.0, []
    while now_s < 3600 * hours:
        changes.append((now_s, most * chance.random()))
        now_s += chance.uniform(*CHANGE_S)
    return changes


def simulated(hours: float, seed: int = 0) -> dict[str, Any]:
    """Train on the simulated card, whose memory changes also in the middle of micro-batches.

    Args:
        hours: Duration on the clock of the card.
        seed: Seed of the schedule and of the times at which allocations meet it.
    """
    import torch
    from torch import nn

    from yolov12 import mas
    from yolov12.errors import DoesNotFitError
    from yolov12.mas.memory.replay import ReplayMeter

    begun, changes = time.monotonic(), schedule(hours, seed, MOST_SIMULATED)
    meter = ReplayMeter(CARD_BYTES, [int(held * CARD_BYTES) for _, held in changes], GIB // 2)
    clock, place, found = [0.0], [0], Counter[str]()

    def advance(ms: float) -> None:
        meter.tick(ms)
        clock[0] += ms / 1000
        while place[0] + 1 < len(changes) and changes[place[0] + 1][0] <= clock[0]:
            place[0] += 1
            meter.advance()

    def loss(model: nn.Module, images: torch.Tensor, wanted: torch.Tensor) -> mas.Loss:
        for part in (0.5, 1.0):  # memory grows in the forward pass, and the neighbour does not wait for its end
            meter.use(int(part * len(images) * IMAGE_BYTES))
            advance(0.5 * len(images) * IMAGE_MS)
        error = (model(images) - wanted).square().mean()
        return mas.Loss(error, torch.full((), float(len(images))), {"error": error.detach()})

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.SiLU(), nn.Flatten(), nn.Linear(36, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch = torch.randn(BATCH, 3, 8, 8), torch.randn(BATCH, 2)
    config, folder = mas.Config(bn_group=GROUP), Path(tempfile.mkdtemp())
    engine = mas.Engine(
        model, mas.TensorTask(loss), config, meter=meter, journal=mas.Journal(folder), layers={}, log=lambda line: None
    )
    while clock[0] < 3600 * hours:
        found["steps"] += 1
        try:
            engine.step(batch)
        except DoesNotFitError:
            found["interruptions"] += 1
            continue
        engine.update(optimizer)
        advance(20.0)
    summary = engine.close(updates_expected=found["steps"])
    assert summary is not None
    return {
        "simulated": True,
        "hours": hours,
        "changes": len(changes),
        "most_of_card": MOST_SIMULATED,
        "steps": found["steps"],
        "interruptions": found["interruptions"],
        **_of_summary(vars(summary)),
        "images_wanted": found["steps"] * BATCH,
        "seconds": round(time.monotonic() - begun, 1),
    }


def _of_summary(summary: dict[str, Any]) -> dict[str, Any]:
    names = ("updates", "updates_expected", "images", "images_lost", "out_of_memories", "retries", "shrinks", "grows")
    more = ("micro_batch_min", "micro_batch_median", "micro_batch_max", "images_per_s")
    return {name: summary[name] for name in (*names, *more)}


def real(seconds: float, period_s: float, hours: float, is_stock: bool) -> dict[str, Any]:
    """Train YOLO12-S on a GPU beside a process that makes the changes of some hours in less time.

    Args:
        seconds: Time of the training.
        period_s: Seconds between two changes.
        hours: Hours whose changes are made.
        is_stock: True for stock Ultralytics.
    """
    import torch

    from benchmarks.memory_trainings import _draw, _rows, _train

    folder = Path(tempfile.mkdtemp())
    total = torch.cuda.mem_get_info()[1]
    batch = int(0.7 * total / 192e6) // 128 * 128
    run_folder = folder / ("stock" if is_stock else "ours")
    run = _train(
        run_folder, is_stock, data=_draw(folder, 5 * batch), epochs=1000, batch=batch, time=seconds / 3600, val=False,
        workers=12, model="yolo12s.yaml",
    )  # fmt: skip
    log = run_folder.with_suffix(".log")
    while run.poll() is None and "Starting training" not in log.read_text():
        time.sleep(0.2)
    changes = [held for _, held in schedule(hours, 0, MOST)]
    command = [sys.executable, "-m", "benchmarks.endurance_neighbour", str(period_s)]
    neighbour = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert neighbour.stdin is not None
    begun = time.monotonic()
    neighbour.stdin.write(json.dumps(changes) + "\n")
    neighbour.stdin.flush()
    while run.poll() is None and time.monotonic() - begun < seconds + 60:
        time.sleep(0.2)
    run.poll() is None and run.kill()
    neighbour.stdin.close()
    assert neighbour.stdout is not None
    made = neighbour.stdout.read().split()
    neighbour.wait()
    text = log.read_text()
    lines = [line[-200:] for line in text.splitlines() if "out of memory" in line.lower()]
    summary = json.loads(file.read_text()) if (file := run_folder / "memory.json").exists() else None
    status = run.wait()
    return {
        "simulated": False,
        "hours": hours,
        "changes": len(changes),
        "changes_made": int(made[-1]) if made else 0,
        "seconds_between_changes": round(period_s, 3),
        "most_of_card": MOST,
        "batch": batch,
        "exit_status": status,
        "interruptions": int(status != 0),
        "out_of_memory_lines": lines[:5],
        "steps": len(_rows(run_folder)) or None,
        **(_of_summary(summary) if summary else {}),
        "seconds": round(time.monotonic() - begun, 1),
    }


def press(period_s: float) -> None:
    """Take and release memory of the GPU, as the first line of the standard input says, until that is closed.

    Args:
        period_s: Mean seconds between two changes.
    """
    import select

    from benchmarks.neighbour import BLOCK_MIB, _Gpu

    memory, held = _Gpu("0"), list[Any]()
    total_mib = memory.total_mib()
    fractions, made = json.loads(sys.stdin.readline()), 0
    for fraction in itertools.cycle(fractions):
        wanted = int(fraction * total_mib) // BLOCK_MIB
        del held[wanted:]
        memory.release()
        held += memory.take(wanted - len(held))
        made += 1
        if select.select([sys.stdin], [], [], period_s)[0]:
            break
    print(made, flush=True)


def neighbour(device: str, seconds: float, hours: float = HOURS) -> Iterator[dict[str, Any]]:
    """Yield the content of the part: on a GPU first ours, then with stock's beside it.

    Args:
        device: `cpu` or `cuda`.
        seconds: Time that the part may take on a GPU.
        hours: Hours to imitate.
    """
    if device == "cpu":
        yield {"ours": Call("endurance_neighbour:simulated", hours=hours).result()}
        return
    period_s = 0.6 * seconds / len(schedule(hours, 0, MOST))
    call = partial(Call, "endurance_neighbour:real", period_s=period_s, hours=hours)
    ours = call(seconds=0.6 * seconds, is_stock=False).result()
    yield {"ours": ours}
    stock = call(seconds=0.2 * seconds, is_stock=True).result()
    yield {"ours": ours, "stock": stock}


if __name__ == "__main__":
    press(float(sys.argv[1]))
