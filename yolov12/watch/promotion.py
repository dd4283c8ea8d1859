"""Promotion: the candidate takes the place of the serving model in one step."""

from __future__ import annotations

from pathlib import Path

from yolov12.watch import moves

__all__ = ["promote"]


def promote(candidate: Path, serving: Path, before: Path) -> str:
    """Replace the serving model by the candidate. To call it again after a kill changes nothing.

    Args:
        candidate: Weights that were validated.
        serving: The serving model. Whoever opens it sees the old file or the new one, both whole.
        before: Copy of the serving model that the candidate was compared with.

    Returns:
        An empty text if the candidate serves now, else why it does not.
    """
    new = moves.digest(candidate)
    now = moves.digest(serving) if serving.exists() else ""
    if now == new:
        return ""
    if now != moves.digest(before):
        return f"{serving} was replaced by somebody else since the attempt began, so it stays"
    moves.copy(candidate, serving)
    return ""
