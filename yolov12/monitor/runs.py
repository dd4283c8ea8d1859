"""Choice of the run, and its state: not begun, running, ended or interrupted."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

from yolov12.errors import ConfigError
from yolov12.files import is_locked

__all__ = ["State", "find", "state_of"]

# A run on another machine cannot be seen to hold its lock. While its journal grows, it runs.
_QUIET_S = 60


@dataclass(frozen=True)
class State:
    """How a run stands."""

    text: str
    """For the first line of the view: `running`, or how the run ended."""
    ended: bool = False
    """True if no process trains in the folder any more."""


def find(run: str) -> Path:
    """Return a run folder.

    Args:
        run: Folder of a run, or its memory.csv. If empty, the run in Ultralytics' runs folder that was written last.

    Raises:
        ConfigError: There is no such folder, or no run at all.
    """
    if run:
        folder = Path(run).parent if run.endswith(".csv") else Path(run)
        if not folder.is_dir():
            raise ConfigError(f"there is no run folder {run}. A training prints its folder when it begins")
        return folder.resolve()
    runs = _runs_dir()
    journals = [(path, path.parent) for path in runs.glob("**/memory.csv")]
    starting = [(path, path.parent.parent) for path in runs.glob("**/weights/.lock")]
    newest = max(journals + starting, key=lambda found: found[0].stat().st_mtime, default=None)
    if newest is None:
        raise ConfigError(f"nothing was trained yet in {runs}. Give the folder of a run: yolov12 monitor FOLDER")
    return newest[1]


def state_of(folder: Path, *, steps: int) -> State:
    """Return how a run stands. This looks at its files and takes no lock.

    Args:
        folder: Run folder.
        steps: Number of steps in its journal.
    """
    if is_locked(folder / "weights"):
        return State("running" if steps else "starting: no step was made yet")
    written_s, summary = _modified_s(folder / "memory.csv"), folder / "memory.json"
    if written_s == -math.inf:
        return State("no memory.csv yet (with mas=False there is none)")
    if _modified_s(summary) >= written_s:
        return State(_ended(summary), ended=True)
    if time.time() - written_s < _QUIET_S:
        return State("running" if steps else "starting: no step was made yet")
    return State("interrupted: resume=auto continues it" if steps else "interrupted before its first step", ended=True)


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
