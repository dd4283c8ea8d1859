"""Control groups: what they leave to this process of the machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["CGROUPS", "MEMBERSHIP", "cgroup_folders", "read_cgroup_memory", "read_fields", "read_text"]

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

# Limit, use, and the page cache within the use that is given up on demand: version 2, then version 1.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def read_cgroup_memory(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> tuple[int, int] | None:
    """Read the tightest memory limit on this process.

    Args:
        root: Where control groups are mounted.
        membership: The file that says which groups this process is in.

    Returns:
        Bytes of the limit and bytes of it that are available; None without a limit.
    """
    found = []
    for folder in cgroup_folders("memory", root, membership):
        for limit_file, use_file, cache_name in _FILES:
            limit, used = read_text(folder / limit_file).strip(), read_text(folder / use_file).strip()
            if limit.isdigit() and used:  # "max" is no limit
                cache = read_fields(folder / "memory.stat").get(cache_name, 0)
                found.append((int(limit), max(0, int(limit) - int(used) + cache)))
    if not found:
        return None
    return min(limit for limit, _ in found), min(available for _, available in found)


def cgroup_folders(controller: str, root: Path, membership: Path) -> Iterator[Path]:
    """Name the folders of this process' control groups, from the root down: a limit on any of them holds."""
    for line in read_text(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            folder = root
        elif controller in controllers.split(","):
            folder = root / controller
        else:
            continue
        # In a container the path may be the host's, which is not there; then the root is the container's own group.
        yield folder
        for part in filter(lambda part: part != "..", Path(path).parts[1:]):
            folder = folder / part
            yield folder


def read_text(file: Path) -> str:
    """Read a file; empty where it cannot be."""
    try:
        return file.read_text()
    except OSError:
        return ""


def read_fields(file: Path) -> dict[str, int]:
    """Read the numbers of a file of `name number` or `name: number kB` lines; a size in kB becomes bytes."""
    fields = {}
    for line in read_text(file).splitlines():
        name, *words = line.split()
        if words and words[0].isdigit():
            fields[name.rstrip(":")] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return fields
