"""Run folder of a training: found, and kept from other trainings before anything in it is changed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yolov12 import files
from yolov12.errors import FolderInUseError

__all__ = ["keep_group", "locked", "locked_while_made", "reserve"]

_here = threading.local()  # `locks`: those of each trainer that this thread is making


def reserve(trainer: Any) -> None:
    """Find the folder of a trainer that is being made, and lock it, before anything in it or in the process is changed.

    Args:
        trainer: Ultralytics trainer that has its arguments, and nothing else yet. With `mas=False` there is no lock.

    Raises:
        FolderInUseError: Another training runs in the folder.
    """
    from ultralytics.cfg import get_save_dir
    from ultralytics.utils import RANK

    locks: list[list[files.FolderLock]] = vars(_here).get("locks", [])
    if not locks or not trainer.args.mas or RANK > 0:
        return
    find = getattr(get_save_dir, "__wrapped__", get_save_dir)  # of this process alone
    while True:
        folder = Path(find(trainer.args))
        try:
            locks[-1].append(_lock(folder))
        except FolderInUseError:
            if getattr(trainer.args, "save_dir", None) or trainer.args.exist_ok:
                raise
            continue  # another training has just taken this name
        trainer.save_dir, trainer.args.save_dir = folder, str(folder)
        return


@contextmanager
def locked_while_made() -> Iterator[None]:
    """Return a context in which a trainer is made. The folder that `reserve` finds for it is locked until its end."""
    locks: list[list[files.FolderLock]] = vars(_here).setdefault("locks", [])
    locks.append([])
    try:
        yield
    finally:
        for lock in locks.pop():
            lock.release()


@contextmanager
def locked(trainer: Any) -> Iterator[None]:
    """Return a context that locks the folder in which a trainer trains.

    Args:
        trainer: Ultralytics trainer. With `mas=False` there is no lock, and if it starts other processes they lock.

    Raises:
        FolderInUseError: Another training runs in the folder.
    """
    from ultralytics.utils import RANK

    if not trainer.args.mas or trainer.ddp or RANK > 0:
        yield
        return
    lock = _lock(Path(trainer.save_dir))
    try:
        yield
    finally:
        lock.release()


def keep_group(trainer: Any, group: int | None, *, is_first: bool) -> None:
    """Write the BatchNorm group into args.yaml, so that runs that resume or repeat this one use the same group.

    Args:
        trainer: Ultralytics trainer.
        group: Number of images that BatchNorm normalises together.
        is_first: True on rank 0, the only one that writes.
    """
    from ultralytics.utils import YAML

    if trainer.args.bn_group == group:
        return
    trainer.args.bn_group = group
    file = Path(trainer.save_dir, "args.yaml")
    if is_first and file.exists():  # a user may have removed it, or given the trainer another folder
        settings = {**YAML.load(file), "bn_group": group}
        with files.replacing(file) as unfinished:
            YAML.save(unfinished, settings)


def _lock(folder: Path) -> files.FolderLock:
    weights = folder / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    lock = files.lock(weights)
    if lock is None:
        raise FolderInUseError(
            f"another process trains in {folder}, or another thread of this process: stop it, or give another name="
        )
    return lock
