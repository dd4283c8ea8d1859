"""Promotion: the candidate takes the place of the serving model in one step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yolov12.watch import moves

__all__ = ["is_judged", "promote", "serves"]


def promote(candidate: Path, serving: Path, before: Path) -> str:
    """Replace the serving model by the candidate. To call it again after a kill changes nothing.

    Args:
        candidate: Weights that were validated.
        serving: The serving model. Whoever opens it sees the old file or the new one, both whole.
        before: Copy of the serving model that the candidate was compared with.

    Returns:
        An empty text if the candidate serves now, else why it does not.
    """
    if serves(candidate, serving):
        return ""

    target = serving.resolve()  # a link stays a link

    def check() -> None:
        if serving.resolve() != target or not serves(before, serving):
            raise _ReplacedError

    try:
        moves.copy(candidate, target, check)
    except _ReplacedError:
        return f"{serving} was replaced by somebody else since the attempt began, so it stays"
    return ""


def is_judged(candidate: Path, verdict: Mapping[str, Any] | None) -> bool:
    """Return False if a candidate is no longer the file that was compared with the serving model.

    Args:
        candidate: Weights of an attempt.
        verdict: Content of its verdict.json, where `candidate` is the SHA-256 of the file; None if it cannot be read.
    """
    return verdict is not None and verdict.get("candidate") == moves.digest(candidate)


def serves(weights: Path, serving: Path) -> bool:
    """Return whether weights are those of the serving model.

    Args:
        weights: Weights of an attempt.
        serving: The serving model, which somebody may have removed.
    """
    return serving.exists() and moves.digest(serving) == moves.digest(weights)


class _ReplacedError(Exception):
    """Somebody else replaced the serving model."""
