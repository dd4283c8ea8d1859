"""Follows the journals of a run: reads only what is new, writes nothing, and takes no lock."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from yolov12.mas.journal.columns import COLUMNS, NEW_COLUMNS
from yolov12.mas.journal.conclusion import fraction
from yolov12.mas.journal.journal import OLD_COLUMNS, journal_files
from yolov12.monitor.runs import State, state_of

__all__ = ["Follower", "Tail"]

_CHUNK_BYTES = 2**24
# Rows that are kept of a run of any length: all of the latest, and of the earlier ones those in which something
# happened, and those with the tightest memory.
_ROWS, _LATEST = 4096, 1024
_NAMES = {column.name for column in COLUMNS} - NEW_COLUMNS


class Tail:
    """The rows of one growing memory.csv.

    Args:
        path: The file, which may be missing so far.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        self.rows: list[Mapping[str, str]] = []
        self._offset, self._last_line, self._names = 0, b"", list[str]()

    def read(self) -> None:
        """Read the lines that are complete since the last call. A file that was made anew is read from its begin."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            self._forget()
            return
        with file:
            # A resume cuts rows off, a new run removes the file. Both may have grown again past what was read.
            file.seek(self._offset - len(self._last_line))
            if file.read(len(self._last_line)) != self._last_line:
                self._forget()
                file.seek(0)
            while chunk := file.read(_CHUNK_BYTES):
                complete = chunk.rfind(b"\n") + 1
                self._add(chunk[:complete].splitlines(keepends=True))
                self._offset += complete
                file.seek(self._offset)
                if not complete:
                    return

    def _add(self, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        self._last_line = lines[-1]
        for values in csv.reader(line.decode("utf-8", "replace") for line in lines if b"\0" not in line):
            if not self._names:
                self._names = [OLD_COLUMNS.get(name, name) for name in values]
            elif len(values) == len(self._names) and set(self._names) >= _NAMES and values[0].isdecimal():
                self.rows.append(dict(zip(self._names, values, strict=True)))
        if len(self.rows) > _ROWS:
            early = self.rows[:-_LATEST]
            pairs = (early[index : index + 2] for index in range(0, len(early), 2))
            self.rows = [*(max(pair, key=_weight) for pair in pairs), *self.rows[-_LATEST:]]


def _weight(row: Mapping[str, str]) -> tuple[bool, bool, bool, float]:
    events = row["events"]
    return "did not fit" in events, "out-of-memory" in events, bool(events), fraction(row)


class Follower:
    """The journals of all ranks of a run.

    Args:
        folder: Run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tails: dict[int, Tail] = {}

    def read(self) -> None:
        """Read what all ranks have written since the last call."""
        for rank, path in journal_files(self.folder).items():
            self._tails.setdefault(rank, Tail(path))
        for tail in self._tails.values():
            tail.read()

    def journals(self) -> dict[int, Sequence[Mapping[str, str]]]:
        """Return rank → rows, without ranks that have none."""
        return {rank: tail.rows for rank, tail in sorted(self._tails.items()) if tail.rows}

    def state(self) -> State:
        """Return how the run stands."""
        return state_of(self.folder, steps=len(self.journals()))
