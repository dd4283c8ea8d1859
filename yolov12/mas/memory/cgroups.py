"""Reads Linux control groups: the memory and the cores that they allow this process to use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["CGROUPS", "MEMBERSHIP", "cgroup_folders", "read_cgroup_memory", "read_fields", "read_text"]
__all__ += ["usable_cores"]

CGROUPS = Path("/sys/fs/cgroup")
"""Folder where Linux mounts the control groups."""
MEMBERSHIP = Path("/proc/self/cgroup")
"""File that lists the control groups of this process."""

# Names in version 2, then in version 1: the file with the limit, the file with the usage, and the field with the page
# cache, which counts as usage although the kernel gives it up on demand.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def read_cgroup_memory(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> tuple[int, int] | None:
    """Read the tightest memory limit on this process.

    Args:
        root: Folder where control groups are mounted.
        membership: File that lists the groups of this process.

    Returns:
        The limit and the part of it that is available, both in bytes; None without a limit.
    """
    found = []
    for folder in cgroup_folders("memory", root, membership):
        for limit_file, use_file, cache_name in _FILES:
            limit = read_text(folder / limit_file).strip()
            if limit.isdigit() and (used := read_text(folder / use_file).strip()):  # "max" means no limit
                cache = read_fields(folder / "memory.stat").get(cache_name, 0)
                found.append((int(limit), max(0, int(limit) - int(used) + cache)))
    if not found:
        return None
    return min(limit for limit, _ in found), min(available for _, available in found)


def cgroup_folders(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of this process' control groups, from the root down. A limit in any of them applies.

    Args:
        controller: Name of the controller, such as `memory` or `cpu`.
        root: Folder where control groups are mounted.
        membership: File that lists the groups of this process.
    """
    for line in read_text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            folder = root
        elif controller in controllers.split(","):
            folder = root / controller
        else:
            continue
        # A container may show the host's path, which does not exist inside it. The root is the container's own group
        # then.
        yield folder
        for part in filter(lambda part: part != "..", Path(path).parts[1:]):
            folder = folder / part
            yield folder


def read_text(file: Path) -> str:
    """Return the text of a file; empty if it cannot be read. Bytes that are not UTF-8 are replaced."""
    try:
        # The kernel cuts the name of a process after 15 bytes, in the middle of a letter if need be.
        return file.read_text("utf-8", "replace")
    except OSError:
        return ""


def read_fields(file: Path) -> dict[str, int]:
    """Return the numbers in a file of `name number` or `name: number kB` lines. Sizes in kB are converted to bytes."""
    fields = {}
    for line in read_text(file).splitlines():
        name, *words = line.split()
        if words and words[0].isdigit():
            fields[name.rstrip(":")] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return fields


def usable_cores(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Return the number of cores that this process may use, at least 1.

    Args:
        root: Folder where control groups are mounted.
        membership: File that lists the groups of this process.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in cgroup_folders("cpu", root, membership):  # a limit such as `docker run --cpus=2`
        words = read_text(folder / "cpu.max").split()
        words = words or [read_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if all(word.isdigit() for word in words):  # "max" and -1 mean no limit
            count = min(count, max(1, round(int(words[0]) / int(words[1]))))
    return count
