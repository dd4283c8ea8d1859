"""The watch of benchmarks/line.py: images arrive, a neighbour takes memory, and everything is killed once."""

from __future__ import annotations

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import neighbour

RESTART_S = 1.0  # after which the watch is started again, as by systemd with RestartSec=1
POLL_S = 0.1


@dataclass(frozen=True)
class Site:
    """Folders of the line, and what `yolov12 watch` is started with."""

    folder: Path
    """Has `serving.pt` and `inbox`, and gets the work folder of the watch, its log, and that of the neighbour."""
    arguments: Mapping[str, Any]
    """Arguments of `yolov12 watch`, besides the folders."""
    kill_at: float
    """Fraction of the epochs after which everything is killed."""
    kill_after_s: float
    """Seconds after the end of that epoch."""
    epochs: int
    neighbour: tuple[Any, ...]
    """Device, pool, least and most MiB, and seed of the neighbour."""
    patience_s: float
    """Seconds after which the story has failed."""

    @property
    def run(self) -> Path:
        """Folder of the training."""
        return next(iter(self.folder.glob("work/history/*/run")), self.folder / "none")


def tell(site: Site, deliver: Callable[[Path], None]) -> dict[str, Any]:
    """Start the watch, let images arrive, kill it in the middle of its training, and wait for its report.

    Args:
        site: The line.
        deliver: Puts images into the inbox.

    Returns:
        Times, what the kill cost, memory, and the report.

    Raises:
        RuntimeError: The watch ended by itself, or the story did not end in time.
    """
    times: dict[str, float] = {}
    begun = time.monotonic()
    log = site.folder / "watch.log"

    def note(name: str) -> float:
        times[name] = round(time.monotonic() - begun, 1)
        return time.monotonic()

    def until(condition: Callable[[], Any], what: str) -> None:
        while not condition():
            if watch.poll() is not None or time.monotonic() - begun > site.patience_s:
                raise RuntimeError(f"no {what}; status {watch.poll()}: {log.read_text()[-2000:]}{_attempt_log(site)}")
            time.sleep(POLL_S)

    neighbour_log = site.folder / "neighbour.log"
    with neighbour.beside(neighbour_log, *site.neighbour):
        watch = _start(site, log)
        try:
            until(lambda: "watching" in log.read_text(), "watch")
            note("watching")
            deliver(site.folder / "inbox")
            note("images_arrived")
            until(lambda: progress(site.run)[1] > 0, "training")
            note("training")
            until(lambda: _epochs(site.run) >= site.kill_at * site.epochs, "epochs")
            time.sleep(site.kill_after_s)
            _kill_all(watch)
            killed, (epoch, step) = note("killed"), progress(site.run)
            time.sleep(RESTART_S)
            watch = _start(site, log)
            until(lambda: "resumed" in _events(site.run) and progress(site.run)[1] >= step, "return to where it was")
            back = note("back")
            until(lambda: (site.run.parent / "verdict.json").exists() or _report(site), "verdict")
            note("verdict")
            until(lambda: _report(site), "report")
            note("report")
        finally:
            _kill_all(watch)
    resumed = [row for row in _rows(site.run) if "resumed" in row["events"]]
    return {
        "times_s": times,
        "killed_in_epoch": epoch,
        "killed_after_update": step,
        "resumed_at_update": int(resumed[0]["step"]),
        "seconds_lost_to_the_kill": round(back - killed, 1),
        "restarts_by_the_supervisor": 1,
        "report": _report(site),
        "updates_in_pieces": sum(" " in row["micro_batches"] for row in _rows(site.run)),
        "memory": json.loads((site.run / "memory.json").read_text()),
        "neighbour_mib": neighbour.held(neighbour_log),
        "set_aside": [note.read_text().strip() for note in sorted(site.folder.glob("work/rejected/*.reason.txt"))],
    }


def progress(run: Path) -> tuple[int, int]:
    """Return epoch and number of the last update of a training; zeros before the first.

    Args:
        run: Folder of the training.
    """
    rows = _rows(run)
    return (int(rows[-1]["epoch"]), int(rows[-1]["step"])) if rows else (0, 0)


def _rows(run: Path) -> list[dict[str, str]]:
    """Return the whole rows of memory.csv. The last one may just be written."""
    file = run / "memory.csv"
    text = file.read_text() if file.exists() else ""
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def _events(run: Path) -> str:
    return " ".join(row["events"] for row in _rows(run))


def _epochs(run: Path) -> int:
    file = run / "results.csv"
    return max(file.read_text().count("\n") - 1, 0) if file.exists() else 0


def _report(site: Site) -> Any:
    file = next(iter(site.folder.glob("work/history/*/report.md")), None)  # it is written last
    return json.loads(file.with_suffix(".json").read_text()) if file else None


def _start(site: Site, log: Path) -> subprocess.Popen[bytes]:
    folders = {"inbox": site.folder / "inbox", "model": site.folder / "serving.pt", "work": site.folder / "work"}
    words = [f"{key}={value}" for key, value in {**folders, **site.arguments}.items()]
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "yolov12", "watch", *words], stdout=output, stderr=subprocess.STDOUT
        )


def _kill_all(watch: subprocess.Popen[bytes]) -> None:
    """Kill the watch if it runs, its training and the workers of the training, so that nothing can save anything."""
    for pid in [watch.pid, *_descendants(watch.pid)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    watch.wait()


def _descendants(pid: int) -> Iterator[int]:
    with suppress(FileNotFoundError):  # it has just ended
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from _descendants(child)


def _attempt_log(site: Site) -> str:
    file = next(iter(site.folder.glob("work/history/*/log.txt")), None)
    return file.read_text(errors="replace")[-3000:] if file else ""


def deliver(images: list[Path], names: list[str], damaged: int, inbox: Path) -> None:
    """Let labelled images arrive one after the other, each by a rename, and some that are damaged.

    Args:
        images: Images, each with a label file of the same name in the folder `labels` beside its own.
        names: Class names for the ids in the label files.
        damaged: Number of further images that are cut off.
        inbox: The inbox.
    """
    (inbox / "classes.txt").write_text("\n".join(names) + "\n")
    for number, image in enumerate(itertools.chain(images[:damaged], images)):
        stem = f"damaged-{number}" if number < damaged else image.stem
        label = image.parents[1] / "labels" / f"{image.stem}.txt"
        shutil.copy(label, inbox / f"{stem}.txt")
        arriving = inbox / f".{stem}{image.suffix}"
        content = image.read_bytes()
        arriving.write_bytes(content[: len(content) // 2] if number < damaged else content)
        arriving.rename(inbox / f"{stem}{image.suffix}")
