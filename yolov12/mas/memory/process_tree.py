"""Memory of the processes that this process has started, such as the workers of a data loader."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from yolov12.mas.memory.cgroups import read_fields, read_text

__all__ = ["ChildProcesses"]

_PAGE_BYTES = resource.getpagesize()  # unit of /proc/PID/statm: 64 KiB on some ARM systems
_AT_MOST = 0.01
"""Largest fraction of the time that is spent on counting."""


class ChildProcesses:
    """Child processes of this process, with their own children.

    A worker that was forked shares most of its pages with its parent. The kernel's proportional set size (PSS) divides
    each page by the number of processes that use it. The sum over all processes therefore counts each page once.

    Counting walks the page tables of all these processes: 10 to 20 ms per process, and more for large ones. It is
    therefore done at most once a second, and for at most a hundredth of the time. In between, what the children have
    grown by is added.

    Args:
        proc: Folder where `/proc` is mounted.
        now_s: Clock, in seconds.
    """

    def __init__(self, proc: Path, now_s: Callable[[], float] = time.monotonic) -> None:
        self._proc, self._now_s = proc, now_s
        self._held_bytes = 0
        self._resident: dict[int, int] = {}  # process id → resident bytes when they were counted
        self._due_s = float("-inf")

    def held_bytes(self) -> int:
        """Return the bytes that the child processes hold beside the pages that this process has too."""
        begin_s = self._now_s()
        if begin_s >= self._due_s:
            self._count()
            end_s = self._now_s()
            self._due_s = end_s + max(1.0, (end_s - begin_s) / _AT_MOST)
            return self._held_bytes
        grown = (self._resident_bytes(pid) - before for pid, before in self._resident.items())
        return self._held_bytes + sum(more for more in grown if more > 0)

    def _count(self) -> None:
        self._resident = {pid: self._resident_bytes(pid) for pid in self._descendants()}
        self._held_bytes = 0
        if self._resident:
            own, *theirs = (read_fields(self._proc / str(name) / "smaps_rollup") for name in ("self", *self._resident))
            private = sum(each.get("Private_Clean", 0) + each.get("Private_Dirty", 0) for each in theirs)
            # This sum is too small if a process outside of this family, such as a fork server, has the same pages.
            once = sum(each.get("Pss", 0) for each in (own, *theirs)) - own.get("Rss", 0)
            self._held_bytes = max(private, once)

    def _descendants(self) -> Iterable[int]:
        own = read_text(self._proc / "self/stat").partition(" ")[0]
        children = self._children() if own else {}
        found = children.get(int(own or 0), [])
        for pid in found:  # the list grows
            found.extend(children.get(pid, []))
        return found

    def _children(self) -> dict[int, list[int]]:
        """Return the children of each process of the system: process id → process ids."""
        children: dict[int, list[int]] = {}
        with suppress(OSError):  # a sandbox may forbid to list the processes
            for folder in self._proc.iterdir():
                # The name of the program, in parentheses, may contain anything. State and parent follow it.
                if folder.name.isdigit() and (fields := read_text(folder / "stat").rpartition(")")[2].split()):
                    children.setdefault(int(fields[1]), []).append(int(folder.name))
        return children

    def _resident_bytes(self, pid: int) -> int:
        fields = read_text(self._proc / str(pid) / "statm").split()
        return int(fields[1]) * _PAGE_BYTES if fields else 0
