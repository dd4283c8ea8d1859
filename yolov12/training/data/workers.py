"""Number of loader workers, where the user has not given one.

It begins with Ultralytics' number, or with the number of cores if that is less. If the device waits for data in a tenth
of the time or more, the next epoch has more workers. If that is not faster, the number goes back and stays. The images
do not depend on it (see `places`).
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from yolov12.mas.distributed.ranks import Ranks
from yolov12.mas.memory.cgroups import usable_cores
from yolov12.mas.memory.host import HostMemory
from yolov12.mas.memory.reading import Stopwatch
from yolov12.training.data.host import room_for_workers
from yolov12.training.data.places import chooses_by_place

if TYPE_CHECKING:
    from yolov12.training.data.loader import ResumableLoader

__all__ = ["Pace", "PaceClock", "Verdict", "WorkersControl", "begin", "cores_of_rank", "judge", "keep_changed", "made"]
__all__ += ["more_workers"]

_MADE = "yolov12_workers"
"""Attribute of a trainer: its number of workers when it was made, if that is to be chosen here."""

_WAITS = 0.1
"""Smallest fraction of the time spent waiting for which more workers are tried."""
_FASTER = 0.03
"""Fraction of a batch's time by which it must get faster, or the number of workers goes back."""
_MOST_AT_ONCE = 1.5
"""Largest factor of one change. If all cores are slower than some of them, a number between may still be faster."""
_ROUNDS = 4
"""Number of batches of each worker that tell a pace. Workers that began together deliver in bursts."""
_WORTH_S = 30.0
"""Seconds of waiting that must lie ahead. A change costs a few, as prefetched batches are dropped."""


@dataclass(frozen=True)
class Pace:
    """Speed of a training with one number of workers."""

    batch_ms: float
    """Mean time of a batch in milliseconds, with everything but validation."""
    wait: float
    """Fraction of this time in which the device waited for data."""


class PaceClock:
    """Measures the pace of a training from batch to batch.

    Args:
        now_s: Clock, in seconds.
    """

    def __init__(self, now_s: Callable[[], float] = time.perf_counter) -> None:
        self._now_s = now_s
        self.begin(0)

    def begin(self, ahead: int) -> None:
        """Begin to measure after this number of batches, which may have been loaded ahead."""
        self._skip, self._last_s = ahead, -math.inf
        self._waits: deque[tuple[Stopwatch, float]] = deque()  # the device runs behind the host
        self._batches, self._whole_ms, self._wait_ms = 0, 0.0, 0.0

    def took(self, wait: Stopwatch, *, is_first: bool) -> None:
        """Note that the training has got a batch.

        Args:
            wait: Measures how long the device waits for it.
            is_first: True for the first batch of an epoch. Validation may lie before it.
        """
        last_s, self._last_s = self._last_s, self._now_s()
        if self._skip or is_first or last_s == -math.inf:
            self._skip -= self._skip > 0
            return
        self._waits.append((wait, 1000 * (self._last_s - last_s)))
        while self._waits and (wait_ms := self._waits[0][0].elapsed_ms()) is not None:
            self._batches += 1
            self._wait_ms += wait_ms
            self._whole_ms += self._waits.popleft()[1]

    def pace(self, batches: int) -> Pace | None:
        """Return the pace since `begin`; None if fewer batches than these were measured."""
        if self._batches < batches or not self._whole_ms:
            return None
        return Pace(self._whole_ms / self._batches, self._wait_ms / self._whole_ms)


class Verdict(Enum):
    """What a pace says of the number of workers."""

    KEEP = "keep"
    MORE = "more"
    BACK = "back"


def judge(before: Pace | None, now: Pace) -> Verdict:
    """Return what to do after an epoch.

    Args:
        before: Pace with the number of workers before, if this one is on trial; otherwise None.
        now: Pace with the present number.
    """
    if before is not None and now.batch_ms > (1 - _FASTER) * before.batch_ms:
        return Verdict.BACK
    return Verdict.MORE if now.wait >= _WAITS else Verdict.KEEP


def more_workers(workers: int, wait: float, most: int) -> int:
    """Return a larger number of workers, with which the device would not wait if each worker were as fast as now.

    Args:
        workers: Present number.
        wait: Fraction of the time in which the device waits, from 0 to 1.
        most: Largest number. The result is not above it unless the present number is.
    """
    enough = workers * min(_MOST_AT_ONCE, 1 / max(1 - wait, 1e-9))
    return max(workers, min(most, math.ceil(round(enough, 6))))


def made(trainer: Any, overrides: Mapping[str, Any]) -> None:
    """Decide whether the number of workers of a trainer is chosen by this module, and note it in its `auto_workers`.

    A run that resumes begins with Ultralytics' number at least: it may have begun on a smaller machine.

    Args:
        trainer: Ultralytics trainer that was just made. If it resumes, its arguments are those of the run.
        overrides: Arguments that the user has given, or all of them in a process that Ultralytics has started.
    """
    from ultralytics.utils import DEFAULT_CFG_DICT

    args, stock, device = trainer.args, DEFAULT_CFG_DICT["workers"], trainer.device.type
    given = overrides.get("auto_workers")
    if given is not None:
        args.auto_workers = given  # not checked yet
    elif "workers" in overrides:
        args.auto_workers = False
    elif args.auto_workers is None:
        args.auto_workers = args.workers == (0 if device == "cpu" else stock)  # Ultralytics uses none on the CPU
    if not args.auto_workers:
        return
    if trainer.resume and device == "cuda" and "workers" not in overrides:
        args.workers = max(args.workers, stock)
    if given is None:
        setattr(trainer, _MADE, args.workers)


def keep_changed(trainer: Any) -> None:
    """Take a number of workers as the user's own if it was changed after the trainer was made.

    Args:
        trainer: Ultralytics trainer that begins to train.
    """
    if getattr(trainer, _MADE, None) not in (None, trainer.args.workers):
        trainer.args.auto_workers = False


def begin(trainer: Any) -> None:
    """Let a training have no more workers than cores, and log it if these are fewer.

    Args:
        trainer: Ultralytics trainer whose loaders are not made yet.
    """
    from ultralytics.utils import LOGGER

    cores, workers = cores_of_rank(trainer), trainer.args.workers
    if trainer.args.auto_workers and workers > cores:
        LOGGER.info(f"data: workers={cores} instead of {workers}: this process has that many cores")
        trainer.args.workers = cores


def cores_of_rank(trainer: Any) -> int:
    """Return the number of cores for this rank.

    Processes of one training share the cores that they may use. Other GPUs that this process sees may train something
    else, so it takes only its part of the machine, as in Ultralytics.

    Args:
        trainer: Ultralytics trainer.
    """
    gpus = torch.cuda.device_count() if trainer.device.type == "cuda" else 1
    usable = usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(usable, (os.cpu_count() or 1) // max(gpus, 1)))


@dataclass(frozen=True)
class _Trial:
    """State before a larger number of workers, which is on trial."""

    workers: int
    """Number of workers before."""
    pace: Pace
    """Pace with this number."""
    resets: int
    """Number of changes of the data set until then, see `ResumableLoader.resets`."""


class WorkersControl:
    """Changes the number of workers of one loader at the ends of epochs.

    Args:
        trainer: Ultralytics trainer.
        loader: Its training loader.
        ranks: Processes that share each batch. They change their numbers together, each its own.
        note: Called with an event for the journal.
    """

    def __init__(self, trainer: Any, loader: ResumableLoader, ranks: Ranks, note: Callable[[str], None]) -> None:
        self._trainer, self._loader, self._ranks, self._note = trainer, loader, ranks, note
        self._trial: _Trial | None = None
        self._is_warm = False  # the first epoch is slower: files are not cached, and cuDNN looks for kernels
        self._has_moved = False  # images, to the device
        # With other data sets, images depend on the workers, and a run that is repeated would see others.
        self._is_settled = not ranks.all(bool(trainer.args.auto_workers) and chooses_by_place(loader.dataset))

    def epoch_ends(self) -> None:
        """Choose the number for the next epoch. All ranks call this together."""
        loader, trial = self._loader, self._trial
        moved, self._has_moved = loader.augmentation.has_moved != self._has_moved, loader.augmentation.has_moved
        if moved:
            self._note("augmentation to the device")
        if self._is_settled:
            return
        moved = not self._ranks.all(not moved)
        if not self._is_warm or (moved and trial is None):
            self._is_warm = not loader.skipped
            loader.pace.begin(loader.ahead(loader.num_workers) if moved else 0)  # those ahead are still of the host
            return
        if trial is not None and moved:
            self._back(trial, "cannot be compared, as images are augmented on the device now", for_good=False)
            return
        if trial is not None and not self._ranks.all(loader.resets == trial.resets):
            self._back(trial, "cannot be compared, as the data has changed")  # without mosaic, batches are others
            return
        pace = self._pace()
        if pace is None:
            return
        verdict = judge(trial.pace if trial is not None else None, pace)
        if trial is not None and verdict is Verdict.BACK:
            now, before = (f"{1000 * self._trainer.batch_size / each.batch_ms:,.0f}" for each in (pace, trial.pace))
            self._back(trial, f"were not faster ({now} images/s, {before} before)")
            return
        if trial is not None:
            self._trainer.args.workers, self._trial = loader.num_workers, None  # a resumed run begins with it
        loader.pace.begin(0)
        if verdict is Verdict.MORE and not self._ranks.all(bool(self._trainer.stop)):
            self._try_more(pace)

    def _pace(self) -> Pace | None:
        """Return the pace of the slowest rank, and the longest wait: other ranks wait for it in collectives."""
        pace = self._loader.pace.pace(_batches(self._loader.num_workers))
        if not self._ranks.all(pace is not None):
            return None
        assert pace is not None
        least = self._ranks.least
        return Pace(-least(-round(1000 * pace.batch_ms)) / 1000, -least(-round(1e6 * pace.wait)) / 1e6)

    def _try_more(self, pace: Pace) -> None:
        """Begin a trial, if it is worth it, and if its result will be known in time for one epoch of the same kind."""
        trainer, loader = self._trainer, self._loader
        done, closes = trainer.epoch + 1, trainer.epochs - trainer.args.close_mosaic
        epochs = (closes if done <= closes else trainer.epochs) - done
        if pace.wait * pace.batch_ms / 1000 * len(loader) * epochs < _WORTH_S:
            return
        now = loader.num_workers
        workers = more_workers(now, pace.wait, self._most())
        measured = (epochs - 1) * (len(loader) - 1)  # the first batch of an epoch does not count
        is_enough = measured >= loader.ahead(workers) + _batches(workers)
        if self._ranks.all(workers == now) or not self._ranks.all(is_enough):
            return
        self._trial = _Trial(now, pace, loader.resets)
        who = "GPU" if trainer.device.type == "cuda" else "training"
        self._say(f"the {who} waited for data {pace.wait:.0%} of the time: trying {_named(workers, now)}")
        self._change(workers)

    def _most(self) -> int:
        """Return the largest number for which there are cores and memory, beside this process."""
        now, most = int(self._loader.num_workers), min(cores_of_rank(self._trainer) - 1, len(self._loader))
        if not now or most <= now:
            return now
        are_packed = self._loader.augmentation.may_pack
        return room_for_workers(self._trainer, most, HostMemory(), are_packed=are_packed)

    def _back(self, trial: _Trial, why: str, *, for_good: bool = True) -> None:
        self._is_settled, self._trial = for_good, None
        self._say(f"{_named(self._loader.num_workers, trial.workers)} {why}: going back")
        self._change(trial.workers)

    def _change(self, workers: int) -> None:
        loader = self._loader
        if workers != loader.num_workers:
            self._note(f"workers {loader.num_workers} to {workers}")
        loader.restart(workers, -self._ranks.least(-loader.ahead(workers)))

    def _say(self, line: str) -> None:
        from ultralytics.utils import LOGGER

        if not self._ranks.rank:
            LOGGER.info(f"data: {line}")


def _batches(workers: int) -> int:
    """Return the number of batches that tell the pace of a number of workers."""
    return max(_ROUNDS * workers, 1)


def _named(workers: int, before: int) -> str:
    """Return words for a larger number of workers, on this rank or on others only."""
    return "more workers on other ranks" if workers == before else f"{workers} workers instead of {before}"
