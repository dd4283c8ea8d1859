"""Processes of an attempt: `python -m yolov12.watch.child PARENT TASK ...`. Each may be repeated after a kill.

The folder of the attempt has `attempt.json`, which says all that they need.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from yolov12 import autopatch, cli, files
from yolov12.errors import ConfigError, MissingWeightsError, UnreadableWeightsError, UntrustedWeightsError
from yolov12.watch import moves
from yolov12.watch.checks import check
from yolov12.watch.log import SparseBars
from yolov12.watch.promotion import serves

__all__ = ["guarded", "main", "run"]

_PR_SET_PDEATHSIG = 1
_VAL_ARGUMENTS = ("batch", "channels_last", "device", "imgsz", "mas", "mem_limit", "mem_safety_ratio", "micro_batch")
_PREDICT_ARGUMENTS = ("device", "imgsz", "mas", "mem_limit", "mem_safety_ratio")
_EXPORT_ARGUMENTS = (
    "device",
    "dynamic",
    "engine_builder",
    "imgsz",
    "mas",
    "mem_limit",
    "mem_safety_ratio",
    "nms",
    "opset",
    "quantize",
    "simplify",
    "workspace",
)


def main(words: list[str]) -> int:
    """Run one task, and end with the process that has started this one.

    Args:
        words: Id of the parent process, the task, and the folder of the attempt, or the text for `check`.

    Returns:
        The exit status, as those of `yolov12`.
    """
    parent, task, argument = words
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        return 1
    if task == "check":
        return guarded(lambda: check(json.loads(argument)))
    folder = Path(argument)
    lock = files.lock(folder)
    if lock is None:
        print("waiting for the process of an earlier watch, which saves its state", flush=True)
    while lock is None:
        time.sleep(0.2)
        lock = files.lock(folder)
    try:
        return run(task, folder)
    finally:
        lock.release()


def run(task: str, folder: Path) -> int:
    """Run the work of a phase.

    Args:
        task: `training`, `judging`, `exporting` or `reporting`.
        folder: Folder of the attempt.

    Returns:
        The exit status.
    """
    attempt = json.loads((folder / "attempt.json").read_text("utf-8"))
    with contextlib.redirect_stdout(SparseBars(sys.stdout)):
        return guarded(lambda: _TASKS[task](folder, attempt))


def guarded(work: Callable[[], int]) -> int:
    """Run work, and turn an error into one line on stderr and an exit status.

    Args:
        work: Returns the exit status.
    """
    try:
        autopatch.apply()
        return work()
    except cli.USER_ERRORS as error:
        return cli.failed(error)


def _train(folder: Path, attempt: Mapping[str, Any]) -> int:
    """Train, and put the candidate into the folder as the last step."""
    candidate, run_folder = folder / "candidate.pt", folder / "run"
    if candidate.exists():
        return 0
    _remove_damaged(run_folder)
    if not _is_trained(run_folder):
        own = {
            "model": folder / "before.pt",
            "data": folder / "data.yaml",
            "replay": attempt["data"],
            "save_dir": run_folder,
            "resume": "auto",
        }
        status = cli.main(["train", *attempt["training"], *(f"{key}={value}" for key, value in own.items())])
        if status:
            return status
    for name in ("classes.csv", "classes.png"):
        if (run_folder / name).exists():
            moves.copy(run_folder / name, folder / name)
    moves.copy(run_folder / "weights" / "best.pt", candidate)
    return 0


def _remove_damaged(run_folder: Path) -> None:
    """Remove a run whose checkpoint a power loss has damaged, so that the training begins again.

    A checkpoint that only cannot be read now, because of its permissions, its disk, or too little memory, stays.
    """
    from yolov12.models import weights

    for name in ("last.pt", "best.pt"):
        try:
            weights.read(run_folder / "weights" / name)
        except MissingWeightsError:
            continue
        except UntrustedWeightsError:  # not damaged
            raise
        except UnreadableWeightsError as error:
            cause = error.__cause__
            if isinstance(cause, MemoryError) or (
                isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL)
            ):
                raise
            print(f"warning: the training begins again: {error}", flush=True)
            shutil.rmtree(run_folder)
            return


def _is_trained(run_folder: Path) -> bool:
    from yolov12.training.run.resume import interrupted

    last, best = (run_folder / "weights" / name for name in ("last.pt", "best.pt"))
    return last.exists() and best.exists() and not interrupted(last)


def _judge(folder: Path, attempt: Mapping[str, Any]) -> int:
    """Compare the candidate with the model that served when the attempt began."""
    from yolov12.watch.comparison import compare

    if (folder / "verdict.json").exists():
        return 0
    verdict = compare(
        folder / "before.pt",
        folder / "candidate.pt",
        Path(attempt["data"]),
        folder / "data.yaml",
        attempt["margin"],
        val_args=_given(attempt, _VAL_ARGUMENTS),
    )
    found = {**asdict(verdict), "candidate": moves.digest(folder / "candidate.pt")}
    moves.save_text(folder / "verdict.json", json.dumps(found, indent=1) + "\n")
    return 0


def _export(folder: Path, attempt: Mapping[str, Any]) -> int:
    """Export the model that serves now, beside it."""
    from ultralytics import YOLO

    exported = Path(
        YOLO(str(folder / "candidate.pt")).export(format=attempt["export"], **_given(attempt, _EXPORT_ARGUMENTS))
    )
    model = Path(attempt["model"])
    if not serves(folder / "candidate.pt", model):
        raise ConfigError(f"{model} was replaced by somebody else since the promotion, so its export stays")
    moves.copy(exported, model.with_suffix(exported.suffix))
    return 0


def _report(folder: Path, attempt: Mapping[str, Any]) -> int:
    from yolov12.watch.comparison import ClassChange, Verdict
    from yolov12.watch.report import write

    outcome = json.loads((folder / "outcome.json").read_text("utf-8"))
    verdict, candidate = None, folder / "candidate.pt"
    if (folder / "verdict.json").exists():
        found = json.loads((folder / "verdict.json").read_text("utf-8"))
        found.pop("candidate", None)
        classes = tuple(ClassChange(**each) for each in found["classes"])
        verdict = Verdict(**{**found, "reasons": tuple(found["reasons"]), "classes": classes})
    images = [Path(image) for image in attempt["new_images"]]
    write(
        folder,
        {**attempt, **outcome, "run": str(folder / "run"), "predict": _given(attempt, _PREDICT_ARGUMENTS)},
        verdict,
        folder / "before.pt",
        candidate if candidate.exists() else None,
        [image for image in images if image.exists()],
    )
    return 0


_TASKS: Mapping[str, Callable[[Path, Mapping[str, Any]], int]] = {
    "training": _train,
    "judging": _judge,
    "exporting": _export,
    "reporting": _report,
}


def _given(attempt: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in cli.parse(attempt["training"]).items() if key in names}


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(sys.argv[1:]))
