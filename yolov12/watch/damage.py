"""What a power loss may leave on a disk that forgets its last writes: empty files, and files that are gone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import yaml

from yolov12.errors import DataError

__all__ = ["drop_damaged", "has_content", "last_number", "names_of_attempts", "number_of"]


def drop_damaged(file: Path) -> None:
    """Delete a JSON file that is no longer one, because its content can be made again.

    Args:
        file: The file, which may not exist.
    """
    try:
        if isinstance(json.loads(file.read_bytes()), dict):
            return
    except FileNotFoundError:
        return
    except ValueError:
        pass
    file.unlink()


def has_content(file: Path) -> bool:
    """Return False if a file is gone, is empty, or begins with zeros only.

    Args:
        file: The file.
    """
    try:
        with file.open("rb") as opened:
            return bool(opened.read(512).strip(b"\0\r\n\t "))
    except FileNotFoundError:
        return False


def last_number(history: Path) -> int:
    """Return the highest number of an attempt; 0 if there is none.

    Args:
        history: Folder of the attempts, which may not exist.
    """
    return max(map(number_of, history.glob("*-*")), default=0)


def number_of(attempt: Path) -> int:
    """Return the number of an attempt; 0 if it is another folder.

    Args:
        attempt: A folder among those of the attempts.
    """
    number = attempt.name.partition("-")[0]
    return int(number) if number.isdecimal() else 0


def names_of_attempts(history: Path, labels: Iterable[Path]) -> list[str]:
    """Return the class names of a collection whose own list is gone. Attempts have copies of it.

    Args:
        history: Folder of the attempts.
        labels: Label files of the collection.

    Returns:
        The names by class id; none if there is neither a copy nor a label.

    Raises:
        DataError: A label has a class id whose name no attempt has.
    """
    names: list[str] = []
    for file in history.glob("*/data.yaml"):
        try:
            found = yaml.safe_load(file.read_text("utf-8"))["names"]
            names = max(names, [str(found[index]) for index in range(len(found))], key=len)  # names are only added
        except (yaml.YAMLError, TypeError, KeyError, UnicodeDecodeError):
            continue
    words = {
        line.split()[0] for label in labels for line in label.read_text("utf-8", "replace").splitlines() if line.strip()
    }
    highest = max((int(word) for word in words if word.isdecimal()), default=-1)
    if highest >= len(names):
        raise DataError(
            f"the class names of the collection are gone, and no attempt in {history} has the name of the id {highest}"
        )
    return names
