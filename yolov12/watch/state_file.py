"""The state file of `yolov12 watch`, from which it goes on after a kill or a power loss."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from yolov12.errors import DataError
from yolov12.watch.damage import has_content
from yolov12.watch.moves import save_text
from yolov12.watch.phases import Outcome, Phase, State

__all__ = ["load", "save"]

_VERSION = 1


def save(file: Path, state: State) -> None:
    """Write the state file in one step.

    Args:
        file: The file.
        state: The state.
    """
    save_text(file, json.dumps({"version": _VERSION, **asdict(state)}, indent=1) + "\n")


def load(file: Path) -> State | None:
    """Read the state file.

    Args:
        file: The file.

    Returns:
        The state; None if there is no such file yet, or a power loss has left it without content.

    Raises:
        DataError: The file is damaged, or another version wrote it.
    """
    if not has_content(file):
        return None
    try:
        found = json.loads(file.read_text("utf-8"))
        if found.pop("version") != _VERSION:
            raise ValueError("another version wrote it")
        return State(**{**found, "phase": Phase(found["phase"]), "outcome": Outcome(found["outcome"])})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{file} cannot be read ({error}). Move it away: the watch then starts anew with all collected images"
        ) from error
