"""Errors of Ultralytics and of the system, as the commands of `yolov12` report them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yolov12.errors import ConfigError, YOLOv12Error, plain

__all__ = ["disk_errors", "refusals"]

# Ultralytics uses these types for arguments, data sets and files that it refuses.
_REFUSALS = (FileNotFoundError, ValueError, TypeError, SyntaxError, NotImplementedError)


@contextmanager
def refusals(begun: Callable[[], bool] = lambda: False, missing: str = "Check the path") -> Iterator[None]:
    """Return a context that turns Ultralytics' errors about arguments, data sets and files into `ConfigError`.

    Args:
        begun: Returns True if the work has begun. Errors are failures from then on.
        missing: What to do if a file does not exist.

    Raises:
        ConfigError: Ultralytics refused something that the user has given, or what was asked for needs a package that
            is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package in ("yolov12", "ultralytics"):
            raise
        raise ConfigError(
            f"this needs the package '{package}', which is not installed. Install what the warning above names, or "
            "set YOLO_AUTOINSTALL=true to let Ultralytics install it"
        ) from error
    except _REFUSALS as error:
        if isinstance(error, YOLOv12Error) or begun():
            raise
        says_only_that = isinstance(error, FileNotFoundError) and plain(error).endswith("does not exist")
        raise ConfigError(f"{plain(error)}. {missing}" if says_only_that else plain(error)) from error


@contextmanager
def disk_errors(model: Any) -> Iterator[None]:
    """Return a context of a training that adds its folder to the error of a full disk.

    Args:
        model: The `YOLO` object that trains.

    Raises:
        YOLOv12Error: A file could not be written.
    """
    try:
        yield
    except OSError as error:
        folder = getattr(model.trainer, "save_dir", None)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or folder is None:
            raise
        last = Path(folder, "weights", "last.pt")
        then = f"then continue with model={last} resume=True" if last.exists() else "then start it again"
        where = "Make room on its disk, or in /dev/shm if that is full"
        raise YOLOv12Error(f"{plain(error)}, in the training in {folder}. {where}, {then}") from error
