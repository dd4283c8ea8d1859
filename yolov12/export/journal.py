"""The record of one engine export, as JSON beside the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from yolov12 import files
from yolov12.export.budget import MemoryLimit
from yolov12.export.engine import Attempt
from yolov12.export.rewrite import Split

__all__ = ["ExportJournal"]


class ExportJournal:
    """Record of the attempts to build an engine. The file is valid after each entry. An earlier file is deleted.

    Args:
        file: The JSON file.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._rows: list[dict[str, Any]] = []
        file.unlink(missing_ok=True)

    def add_split(self, limit: MemoryLimit, split: Split) -> None:
        """Note the graph that is built next, and its plan.

        Args:
            limit: The limit that the graph was split to.
            split: The graph with its splits, or without any if it fits.
        """
        self._add(
            {
                "limit_bytes": limit.total_bytes,
                "limit": limit.source,
                "tensors_bytes": split.plan.peak_bytes,
                "tensors_unsplit_bytes": split.before.peak_bytes,
                "weights_bytes": split.plan.weights_bytes,
                "peak": f"{split.plan.node.name}: {split.plan.describe()}",
                "splits": split.describe(),
            }
        )

    def add_whole(self) -> None:
        """Note that the unsplit graph is built next, although it does not fit according to its plan."""
        self._add({"splits": []})

    def add_attempt(self, attempt: Attempt) -> None:
        """Note an attempt to build."""
        self._add(attempt.as_dict())

    def _add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        files.write(self.file, lambda file: file.write(json.dumps(self._rows, indent=1).encode()))
