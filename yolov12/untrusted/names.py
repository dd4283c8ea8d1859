"""Names from files on their way to a terminal or to a path."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import suppress
from logging import Logger, LogRecord
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

from yolov12.printable import printable, printable_lines

__all__ = ["check_class_names", "check_cls_dataset", "clean_log", "display", "get_google_drive_file_info", "save_crop"]


def clean_log(logger: Logger) -> Logger:
    """Make every message of a logger printable.

    Args:
        logger: Ultralytics' logger.
    """
    if _make_printable not in logger.filters:
        logger.addFilter(_make_printable)
    return logger


def _make_printable(record: LogRecord) -> bool:
    with suppress(Exception):  # arguments that do not fit the message are reported by the handler
        message = record.getMessage()
        if (cleaned := printable_lines(message)) != message:
            record.msg, record.args = cleaned, None
    return True


def display(stock: Callable[..., None], bar: Any, /, *args: Any, **kwargs: Any) -> None:
    """Run Ultralytics' `TQDM._display` with a printable description.

    Args:
        stock: Ultralytics' own method.
        bar: The progress bar.
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.
    """
    bar.desc = printable_lines(str(bar.desc))
    stock(bar, *args, **kwargs)


def check_class_names(stock: Callable[..., Any], /, names: Any) -> Any:
    """Run Ultralytics' `check_class_names`, and make the names printable.

    Args:
        stock: Ultralytics' own function.
        names: Names of classes, of a model or a data set.

    Returns:
        Number of the class → name.
    """
    return _printable_names(stock(names))


def check_cls_dataset(stock: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' `check_cls_dataset`, and make the names of classes, which are names of folders, printable.

    Args:
        stock: Ultralytics' own function.
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.

    Returns:
        Description of the data set.
    """
    found = stock(*args, **kwargs)
    return {**found, "names": _printable_names(found["names"])}


def _printable_names(names: Any) -> Any:
    if not isinstance(names, dict):
        return names
    return {number: printable(name) if isinstance(name, str) else name for number, name in names.items()}


def save_crop(stock: Callable[..., None], results: Any, /, *args: Any, **kwargs: Any) -> None:
    """Run Ultralytics' `Results.save_crop`, which makes a folder per class, inside the given folder.

    Args:
        stock: Ultralytics' own method.
        results: Detections in one image.
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.
    """
    names = results.names
    pairs = names.items() if isinstance(names, dict) else enumerate(names or ())
    inside = copy.copy(results)
    inside.names = {number: folder_of(str(name)) for number, name in pairs}
    stock(inside, *args, **kwargs)


def folder_of(name: str) -> str:
    """Return the folder for a class, relative to the folder of all classes. A name such as `car/red` makes two levels.

    Args:
        name: Name of the class. One that would lead elsewhere, such as `../x` or `/x`, is changed.
    """
    name = printable(name)
    windows = PureWindowsPath(name)
    if not (windows.drive or windows.root or ".." in windows.parts):
        return name
    parts = [part.replace(":", "_") for part in re.split(r"[/\\]", name) if part]
    return str(PurePath(*("_" if set(part) == {"."} else part for part in parts)))


def get_google_drive_file_info(stock: Callable[..., Any], /, link: str) -> tuple[str, str | None]:
    """Run Ultralytics' `get_google_drive_file_info`, and keep only the last part of the file name that the server gave.

    Args:
        stock: Ultralytics' own function.
        link: Address of the file.

    Returns:
        The address to download from, and the name of the file; None if the server gave none.
    """
    url, name = stock(link)
    return url, name and printable(re.split(r"[/\\]", Path(name).name)[-1])
