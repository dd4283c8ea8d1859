"""Choice of the run, and its state: not begun, running, ended or interrupted."""

from __future__ import annotations

import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from yolov12.errors import ConfigError
from yolov12.files import is_locked
from yolov12.mas.journal.journal import journal_files

__all__ = ["State", "find", "state_of"]

# A run on another machine cannot be seen to hold its lock. While its journal grows, it runs.
_QUIET_S = 60

_OF_A_TRAINING = ("args.yaml", "results.csv", "weights/.lock")
_PRINTED = "A training prints its folder when it begins"


@dataclass(frozen=True)
class State:
    """How a run stands."""

    text: str
    """For the first line of the view: `running`, or how the run ended."""
    ended: bool = False
    """True if there is nothing to wait for: no process trains in the folder any more, or without the engine."""


def find(run: str) -> Path:
    """Return a run folder.

    Args:
        run: Folder of a run, or its memory.csv. If empty, the run in Ultralytics' runs folder that was written last.
            A training without the engine is returned only if there is no other.

    Raises:
        ConfigError: There is no such folder, it is not that of a training, or nothing was trained yet.
    """
    if run:
        folder = Path(run).parent if run.endswith(".csv") else Path(run)
        if not folder.is_dir():
            raise ConfigError(f"there is no run folder {run}. {_PRINTED}")
        signs = [*journal_files(folder).values(), *(folder / name for name in _OF_A_TRAINING)]
        if not any(sign.exists() for sign in signs):
            # Not at any depth: the folder may be the root of a large disk.
            below = [path for pattern in ("*/args.yaml", "*/*/args.yaml") for path in folder.glob(pattern)]
            newest_below = max(below, key=_modified_s, default=None)
            way_out = f"Give one, such as {newest_below.parent}" if newest_below else _PRINTED
            raise ConfigError(f"{run} is not the folder of a training. {way_out}")
        return folder.resolve()
    runs = _runs_dir()
    journals = [(path, path.parent) for path in runs.glob("**/memory.csv")]
    starting = [(path, path.parent.parent) for path in runs.glob("**/weights/.lock")]
    found = journals + starting or [(path, path.parent) for path in runs.glob("**/args.yaml")]
    newest = max(found, key=lambda each: _modified_s(each[0]), default=None)
    if newest is None:
        raise ConfigError(f"nothing was trained yet in {runs}. Give the folder of a run: yolov12 monitor FOLDER")
    return newest[1]


def state_of(folder: Path, *, steps: int) -> State:
    """Return how a run stands. This looks at its files and takes no lock.

    Args:
        folder: Run folder.
        steps: Number of steps in its journal.
    """
    locked, summary = is_locked(folder / "weights"), folder / "memory.json"
    times_s = map(_modified_s, journal_files(folder).values())  # rank 0 is the first; its file may be elsewhere
    written_s = next((time_s for time_s in times_s if time_s != -math.inf), -math.inf)
    if written_s == -math.inf and not (locked and _is_in_first_epoch(folder)):
        return _without_journal(folder)
    if locked:
        return State("running" if steps else "starting: no step was made yet")
    if _modified_s(summary) >= written_s:
        return State(_ended(summary), ended=True)
    if time.time() - written_s < _QUIET_S:
        return State("running" if steps else "starting: no step was made yet")
    return State("interrupted: resume=auto continues it" if steps else "interrupted before its first step", ended=True)


def _without_journal(folder: Path) -> State:
    """Return how a run without memory.csv stands. The engine writes the file at the first step."""
    try:
        arguments = (folder / "args.yaml").read_text("utf-8", "replace")
    except FileNotFoundError:  # not written yet, or removed
        arguments = "mas: true"
    if re.search(r"^mas: false$", arguments, re.MULTILINE):
        return State("a training without the engine (mas=False), so it writes no memory.csv", ended=True)
    has_engine = re.search(r"^mas: true$", arguments, re.MULTILINE)  # stock Ultralytics does not know the argument
    if not has_engine or not _is_in_first_epoch(folder):
        return State("a training without the engine, so it writes no memory.csv. Its log says why", ended=True)
    if time.time() - max(_modified_s(folder), _modified_s(folder / "args.yaml")) < _QUIET_S:
        return State("starting: no memory.csv yet")
    return State("no memory.csv yet: it is starting, or was interrupted before its first step")  # maybe elsewhere


def _is_in_first_epoch(folder: Path) -> bool:
    return not (folder / "results.csv").exists()


def _modified_s(file: Path) -> float:
    """Return when a file was written; minus infinity if there is none, as a new run may remove it at any time."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return -math.inf


def _ended(summary: Path) -> str:
    try:
        figures = json.loads(summary.read_text("utf-8"))
    except (FileNotFoundError, ValueError):  # removed just now, or not whole
        return "ended"
    made, expected = figures.get("updates", 0), figures.get("updates_expected")
    if expected is None or made == expected:
        return f"ended after {made:,} updates"
    return f"ended after {made:,} of {expected:,} updates"


def _runs_dir() -> Path:
    """Return Ultralytics' runs folder. Its settings are read here, as importing Ultralytics takes seconds."""
    home = os.environ.get("YOLO_CONFIG_DIR") or os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    try:
        settings = json.loads(Path(home, "Ultralytics", "settings.json").expanduser().read_text("utf-8"))
        return Path(settings["runs_dir"])
    except (OSError, ValueError, KeyError):
        from ultralytics.utils import SETTINGS

        return Path(SETTINGS["runs_dir"])
