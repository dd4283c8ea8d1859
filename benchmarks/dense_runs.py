"""Runs trainings on label-dense data in processes of their own, for benchmarks/dense.py and benchmarks/cards.py."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.processes import EXPANDABLE, ONE_THREAD, ROOT, Call

MEMORY_FAILURES = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "unable to find an engine",
)
"""Parts of the messages that Ultralytics takes for a lack of memory."""


class OutOfTimeError(Exception):
    """The seconds that the command may take are over."""


class Clock:
    """Time that a command may take.

    Args:
        seconds: Number of seconds from now; 0 for no limit.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._end = time.monotonic() + seconds if seconds else None

    def wait(self, call: Call) -> int:
        """Wait for the end of a process, and return its exit status.

        Raises:
            OutOfTimeError: It did not end in time, and was killed.
        """
        left = None if self._end is None else max(self._end - time.monotonic(), 0.0)
        try:
            return call.process.wait(timeout=left)
        except subprocess.TimeoutExpired:
            call.process.kill()
            raise OutOfTimeError from None


class Training:
    """Training in a process of its own, which starts at once.

    Args:
        arguments: Arguments of the training, and `model`.
        stock: True for Ultralytics without this package.
        folder: Folder for the run; by default, a new one.
        function: What the process calls.
        call: Further arguments of `function`.
    """

    def __init__(
        self,
        arguments: dict[str, Any],
        *,
        stock: bool = False,
        folder: Path | None = None,
        function: str = "dense_trainings:train",
        **call: Any,
    ) -> None:
        self._folder = folder or Path(tempfile.mkdtemp())
        # Kernels that Triton compiled and plans that the engine stored would make the first epoch of a later run short.
        caches = {"YOLO_CONFIG_DIR": str(self._folder / "config"), "TRITON_CACHE_DIR": str(self._folder / "triton")}
        arguments = {**arguments, "project": str(self._folder), "name": "run"}
        with self._log.open("w") as log:
            threads = ONE_THREAD if arguments.get("device") == "cpu" else {}
            variables = {**EXPANDABLE, **threads, **caches, "YOLO_OFFLINE": "1"}
            self.call = Call(function, stock=stock, log=log, variables=variables, arguments=arguments, **call)

    @property
    def _log(self) -> Path:
        return self._folder / "log.txt"

    def result(self, clock: Clock | None = None) -> dict[str, Any]:
        """Wait for the end, and return what was measured, with the journal of ours, or with the end of the log.

        Raises:
            OutOfTimeError: It did not end in time.
        """
        status = (clock or Clock()).wait(self.call)
        found = {"exit_status": status, "failure": "the process died"} if status else self.call.result()
        if found["failure"]:
            found["log_tail"] = self._log.read_text()[-600:].replace(f"{ROOT}/", "")
        journal, summary = (self._folder / "run" / f"memory.{kind}" for kind in ("csv", "json"))
        found["memory_csv"] = journal.read_text().splitlines() if journal.exists() else []
        if summary.exists():
            found["summary"] = json.loads(summary.read_text())
        return dict(found)


def rows_of(run: dict[str, Any]) -> list[dict[str, str]]:
    """Return the rows of memory.csv of a run."""
    return list(csv.DictReader(run["memory_csv"]))


def told(run: dict[str, Any], images: int, epochs: int) -> dict[str, Any]:
    """Return a run with its figures: speeds, and mean and standard deviation of the peak of an optimizer step.

    Args:
        run: Result of a training.
        images: Images of an epoch.
        epochs: Epochs that were asked for. If they are not complete, there are no speeds.
    """
    if rows := rows_of(run):  # the engine resets PyTorch's peak for every micro-batch
        run = {**run, "peaks_mib": [float(row["peak_mib"]) for row in rows]}
    run = {**run, "images": images * epochs, "epochs": epochs}
    ends, peaks = run.get("epoch_end_s", []), run.get("peaks_mib", [])
    if len(ends) == epochs and not run["failure"]:
        half = epochs // 2
        run["images_per_s_all"] = images * epochs / ends[-1]
        if half:
            run["images_per_s_after_first"] = images * (epochs - 1) / (ends[-1] - ends[0])
            run["images_per_s"] = images * half / (ends[-1] - ends[-half - 1])
    if peaks:
        late = peaks[len(peaks) // 2 :]
        run |= {
            "peak_mean_mib": statistics.mean(late),
            "peak_sd_mib": statistics.pstdev(late),
            "peak_mean_all_mib": statistics.mean(peaks),
            "peak_sd_all_mib": statistics.pstdev(peaks),
        }
    return run


def is_stable(run: Mapping[str, Any]) -> bool:
    """Return whether a run of Ultralytics had the memory for its batch.

    That is: no error, no halved batch, and no assignment image by image.
    """
    return not (run.get("failure") or run.get("halvings") or run.get("assigner_fallbacks"))


def check_reason(run: Mapping[str, Any]) -> None:
    """Refuse a run that says nothing of memory.

    Args:
        run: Result of a training, with the message of its failure or the end of its log as `failure`, if it failed.

    Raises:
        RuntimeError: It failed for another reason than memory.
    """
    if run.get("failure") and not is_memory_failure(run["failure"]):
        raise RuntimeError(f"a training failed, but not for memory:\n{run.get('log_tail', run['failure'])}")


def is_memory_failure(message: str) -> bool:
    """Return whether Ultralytics takes an error for a lack of memory."""
    return any(words in message for words in MEMORY_FAILURES)
