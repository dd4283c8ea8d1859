"""The folder of an attempt: what its processes are told, and what they have done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yolov12.watch import moves
from yolov12.watch.arguments import Request
from yolov12.watch.collection import Collection
from yolov12.watch.damage import has_content
from yolov12.watch.phases import FILES, SPEC, Phase, State
from yolov12.watch.promotion import is_judged

__all__ = ["described", "has_saved", "lost_file", "progress", "renew", "save_spec", "spec", "verdict"]

_TAIL = 4096  # bytes, more than a row of a CSV file has


def spec(folder: Path) -> dict[str, Any]:
    """Return what the processes of an attempt are told.

    Args:
        folder: Folder of the attempt.

    Raises:
        OSError: The file cannot be read.
    """
    found: dict[str, Any] = json.loads((folder / SPEC).read_text("utf-8"))
    return found


def described(state: State, request: Request, data: str, collection: Collection) -> dict[str, Any]:
    """Return what the processes of an attempt that begins now are told.

    Args:
        state: State of the watch.
        request: Arguments of the user.
        data: Path of the data set yaml.
        collection: All images.
    """
    new = sorted(collection.new.values(), key=lambda entry: entry.image)
    return {
        "number": state.number,
        "started": state.started,
        "reason": state.reason,
        "model": str(request.model),
        "data": data,
        "images": len(new),
        "objects": collection.objects_by_class(new),
        "set_aside": collection.set_aside_since(state.previous),
        "new_images": [str(entry.image) for entry in new],
        "margin": request.margin,
        "export": request.export,
        "training": list(request.training),
    }


def save_spec(folder: Path, content: dict[str, Any]) -> None:
    """Write what the processes of an attempt are told.

    Args:
        folder: Folder of the attempt.
        content: What `spec` returns then.
    """
    moves.save_text(folder / SPEC, json.dumps(content, indent=1) + "\n")


def renew(folder: Path, training: Sequence[str] | None, **given: Any) -> bool:
    """Let an attempt go on as the watch was started last.

    A training that has saved a checkpoint goes on with its own arguments.

    Args:
        folder: Folder of the attempt.
        training: Arguments of the training; None to leave them as they are.
        given: Other entries of `spec`.

    Returns:
        True if the attempt has other arguments of the training, which stay.
    """
    before = spec(folder)
    wanted = before["training"] if training is None else list(training)
    stays = before["training"] != wanted and has_saved(folder)
    now = {**before, **given, "training": before["training"] if stays else wanted}
    if now != before:
        save_spec(folder, now)
    return stays


def verdict(folder: Path) -> dict[str, Any] | None:
    """Return how the candidate compares with the serving model; None if that is not known.

    Args:
        folder: Folder of the attempt.
    """
    try:
        found: dict[str, Any] = json.loads((folder / "verdict.json").read_text("utf-8"))
        return found
    except (FileNotFoundError, ValueError):
        return None


def lost_file(folder: Path, phase: Phase) -> Path | None:
    """Return a file without which a phase cannot go on, and which is gone, empty or of another candidate.

    Args:
        folder: Folder of the attempt.
        phase: The phase.
    """
    lost = [folder / name for name in FILES.get(phase, ()) if not has_content(folder / name)]
    candidate = folder / "candidate.pt"
    if phase is Phase.PROMOTING and not lost and not is_judged(candidate, verdict(folder)):
        return candidate
    return lost[0] if lost else None


def has_saved(folder: Path) -> bool:
    """Return whether the training of an attempt has saved a checkpoint.

    Args:
        folder: Folder of the attempt.
    """
    return (folder / "run" / "weights" / "last.pt").exists() or (folder / "candidate.pt").exists()


def progress(folder: Path) -> int:
    """Return how far the training of an attempt has come: its last step plus its last epoch, 0 at first.

    Args:
        folder: Folder of the attempt.
    """
    return sum(_last_number(folder / "run" / name) for name in ("memory.csv", "results.csv"))


def _last_number(file: Path) -> int:
    """Return the first cell of the last row that has a number there."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(file.stat().st_size - _TAIL, 0))
            rows = opened.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return 0
    cells = (row.partition(",")[0].strip() for row in reversed(rows))
    return next((int(cell) for cell in cells if cell.isdecimal()), 0)
