"""Part `kills` of benchmarks/endurance.py: trainings that are killed at drawn moments and resumed until they end."""

from __future__ import annotations

import csv
import gc
import importlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.processes import shared_out
from benchmarks.endurance_model import TINY, drawn, training

IMAGES, EPOCHS = 64, 10
UPDATES = IMAGES // TINY["batch"] * EPOCHS
MOST_UPDATES = 12  # of a life, one and a half epochs
EARLY = 0.15  # probability that a life ends while it starts
LEAST_LIVES = 40  # after which a training that makes no progress is given up


class Lives:
    """Trainings in processes that are forked from this one, which has loaded all libraries.

    Args:
        data: Yaml of the data set.
        is_stock: True for stock Ultralytics.
    """

    def __init__(self, data: str, is_stock: bool) -> None:
        self._data, self._is_stock = data, is_stock
        self.update_s = 0.05
        """Seconds of an update of the training that was not killed."""
        # No training here: it would leave threads, without which the forked processes would wait for ever.
        if not is_stock:
            from yolov12 import autopatch

            autopatch.apply()
        importlib.import_module("ultralytics.models.yolo.detect")
        importlib.import_module("scipy.optimize")
        gc.collect()
        gc.freeze()

    def live(self, project: Path, seed: int, kill_after: tuple[int | None, float] | None = None) -> int:
        """Train until the end or until the process is killed, and return its exit status.

        Args:
            project: Folder of the training. A run in it is resumed.
            seed: Seed of the training.
            kill_after: Number of updates of this life, None for a process that may not have begun, and the seconds
                after them; None for no kill.
        """
        project.mkdir(exist_ok=True)
        updates = project / "updates"
        updates.unlink(missing_ok=True)
        pid = os.fork()
        if not pid:
            self._train(project, seed)
        if kill_after is not None:
            count, delay_s = kill_after
            while count is not None and not (updates.exists() and updates.stat().st_size >= count):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                    break  # it has ended before
                time.sleep(0.002)
            time.sleep(delay_s)
            os.kill(pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _train(self, project: Path, seed: int) -> None:
        """Train in this process, which is a child, and end it."""
        log = os.open(project / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 1
        try:
            self._resume(project, seed)
            status = 0
        finally:
            os._exit(status)

    def _resume(self, project: Path, seed: int) -> None:
        import torch

        def begin(trainer: Any) -> None:
            (project / "updates").write_text("")
            trainer.optimizer.register_step_post_hook(count)

        def count(*_: Any) -> None:  # each batch has an update
            for name in ("updates", "all_updates"):
                _append(project / name)

        def end(trainer: Any) -> None:
            weights = [trainer.model.state_dict(), trainer.ema.ema.state_dict()]
            torch.save(weights, project / "final.pt")

        settings = _settings(seed)
        last = project / "run" / "weights" / "last.pt"
        if not self._is_stock:
            settings |= {"save_every": 1, "resume": "auto", "exist_ok": False}
        elif last.exists():
            settings |= {"model": str(last), "resume": True}
        callbacks = {"on_train_start": begin, "on_train_end": end}
        training(
            device="cpu", data=self._data, folder=project, callbacks=callbacks, is_stock=self._is_stock, **settings
        )


def _settings(seed: int) -> dict[str, Any]:
    augmentation = {"mixup": 0.3, "multi_scale": 0.5}
    return {**TINY, **augmentation, "epochs": EPOCHS, "seed": seed, "bn_group": 8}


def _append(file: Path) -> None:
    with file.open("a") as lines:
        lines.write(".")


def kill(kills: int, seconds: float, data: str, seed: int = 0, *, is_stock: bool = False) -> dict[str, Any]:
    """Kill trainings, and compare each with one without kills.

    Args:
        kills: Number of kills.
        seconds: Time after which no further process is killed, from the end of the training without kills.
        data: Yaml of the data set.
        seed: Seed of the moments and of the trainings.
        is_stock: True for stock Ultralytics.
    """
    begun, lives, chance = time.monotonic(), Lives(data, is_stock), random.Random(seed)
    found = Counter(dict.fromkeys(("kills", "trainings", "bit_equal_weights"), 0))
    folder = Path(tempfile.mkdtemp())
    whole, broken = folder / "whole", folder / "broken"
    if status := lives.live(whole, seed):
        raise RuntimeError(f"a training without kills ended with {status}: {(whole / 'log').read_text()[-2000:]}")
    lives.update_s = (time.monotonic() - begun) / UPDATES
    begun = time.monotonic()
    while found["kills"] < kills and time.monotonic() - begun < seconds:
        ended, killed = 0, 0
        while found["kills"] < kills and time.monotonic() - begun < seconds and killed < LEAST_LIVES:
            count = None if chance.random() < EARLY else chance.randint(1, MOST_UPDATES)
            ended = lives.live(broken, seed, (count, chance.uniform(0, 1.0 if count is None else lives.update_s)))
            if ended != -signal.SIGKILL:
                if not ended:
                    break
                found["resumes_that_failed"] += 1
                shutil.rmtree(broken / "run", ignore_errors=True)  # somebody starts it anew
                continue
            killed += 1
            found["kills"] += 1
        while not (broken / "final.pt").exists():
            if lives.live(broken, seed) and found.update(["resumes_that_failed"]) is None:
                shutil.rmtree(broken / "run", ignore_errors=True)
        _compare(whole, broken, found, is_stock=is_stock)
        shutil.rmtree(broken)
        print(f"{'stock' if is_stock else 'ours'}: {dict(found)}", flush=True)
    shutil.rmtree(folder)
    return {**found, "updates_of_a_training": UPDATES, "seconds": _since(begun)}


def _compare(whole: Path, broken: Path, found: Counter[str], *, is_stock: bool) -> None:
    """Compare a training with kills with one without, and add the result to the sums."""
    import torch

    found["trainings"] += 1
    ours, wanted = (torch.load(folder / "final.pt", weights_only=True) for folder in (broken, whole))
    equal = all(
        torch.equal(one[name], value) for one, other in zip(ours, wanted, strict=True) for name, value in other.items()
    )
    found["bit_equal_weights"] += equal
    found["equal_result_rows"] += _results(broken) == _results(whole)
    batches = [len((folder / "all_updates").read_text()) for folder in (broken, whole)]
    found["images_computed_again"] += (batches[0] - batches[1]) * TINY["batch"]
    found["images_wanted"] += batches[1] * TINY["batch"]
    if not is_stock:
        summary = json.loads((broken / "run" / "memory.json").read_text())
        found["images_in_weights"] += summary["images"]
        found["images_lost"] += summary["images_lost"]
        found["updates_repeated"] += summary["updates_repeated"]


def _results(folder: Path) -> list[dict[str, str]]:
    rows = csv.DictReader((folder / "run" / "results.csv").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "time" and not k.startswith("memory/")} for row in rows]


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 1)


def kills(seconds: float, wanted: int, stock_wanted: int, processes: int) -> Iterator[dict[str, Any]]:
    """Yield the content of the part, first ours alone.

    Args:
        seconds: Time that the part may take.
        wanted: Kills of our trainings.
        stock_wanted: Kills of stock's trainings.
        processes: Trainings at the same time.
    """
    call = partial(
        shared_out, "endurance_kills:kill", processes, "kills", data=drawn(IMAGES), variables={"OMP_NUM_THREADS": "1"}
    )
    found = {"ours": call(wanted, seconds=0.7 * seconds)}
    yield found
    yield {**found, "stock": call(stock_wanted, seconds=0.2 * seconds, is_stock=True, stock=True)}
