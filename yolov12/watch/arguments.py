"""Parses the arguments of `yolov12 watch`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from yolov12.cfg.arguments import ARGUMENTS
from yolov12.cfg.reference import ultralytics_arguments
from yolov12.errors import ConfigError, MissingWeightsError
from yolov12.watch.phases import Rules

__all__ = ["Request", "check_inbox", "parse", "split"]

_DEFAULTS: Mapping[str, Any] = {
    "data": None,
    "inbox": None,
    "model": None,
    "work": None,
    "min_images": "20",
    "every": None,
    "margin": "0.02",
    "val_fraction": "0.2",
    "export": None,
    "settle": "10s",
    "poll": "5s",
    "restarts": "5",
    "once": False,
}
_SET_BY_WATCH = ("cfg", "exist_ok", "mode", "name", "project", "replay", "resume", "save", "save_dir", "task", "val")
"""Arguments of a training that the user cannot give."""
_EXPORTS = ("onnx", "engine", "torchscript")
"""Export formats that are one file."""
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Request:
    """Parsed arguments of `yolov12 watch`."""

    data: str
    """Data set that the line began with: a path, or the name of an embedded one."""
    inbox: Path
    model: Path
    work: Path
    rules: Rules
    margin: float
    val_fraction: float
    export: str | None
    settle_s: float
    poll_s: float
    once: bool
    training: tuple[str, ...]
    """Words for `yolov12 train`."""


def parse(words: Sequence[str]) -> Request:
    """Parse the arguments.

    Args:
        words: The words after `yolov12 watch`.

    Returns:
        The parsed arguments, with absolute paths.

    Raises:
        ConfigError: A word is unknown or malformed, a required one is missing, or a folder does not fit.
        MissingWeightsError: There is no such model.
    """
    given, training = split(words)
    for name, example in (("data", "line.yaml"), ("inbox", "folder"), ("model", "best.pt")):
        if given[name] is None:
            raise ConfigError(f"no {name}= given, as in {name}={example}")
    # Links stay links: somebody may let them lead to another file or folder while the watch runs.
    model, inbox = Path(given["model"]).absolute(), Path(given["inbox"]).absolute()
    if not model.is_file():
        raise MissingWeightsError(f"model={given['model']} does not exist: give the weights that serve, as in best.pt")
    if model.suffix != ".pt":
        raise ConfigError(f"model={given['model']}: give weights that can be trained, as in best.pt")
    if not inbox.is_dir():
        raise ConfigError(f"inbox={given['inbox']} is not a folder: make it, and let labelled images arrive there")
    work = Path(given["work"]).resolve() if given["work"] else model.with_name(f"{model.stem}-watch")
    if work.exists() and not work.is_dir():
        raise ConfigError(f"work={work} is not a folder")
    if _overlap(inbox, work):
        raise ConfigError(f"inbox={inbox} and work={work}: neither may be inside the other")
    data = Path(given["data"])
    if given["export"] not in (None, *_EXPORTS):
        raise ConfigError(f"export={given['export']}: give one of {', '.join(_EXPORTS)}")
    return Request(
        data=str(data.resolve()) if data.is_file() else given["data"],
        inbox=inbox,
        model=model,
        work=work,
        rules=Rules(
            _count("min_images", given["min_images"], 2),
            None if given["every"] is None else _seconds("every", given["every"], "24h"),
            _count("restarts", given["restarts"], 0),
            exports=given["export"] is not None,
        ),
        margin=_fraction("margin", given["margin"], "0.02", smallest=0.0),
        val_fraction=_fraction("val_fraction", given["val_fraction"], "0.2"),
        export=given["export"],
        settle_s=_seconds("settle", given["settle"], "10s"),
        poll_s=_seconds("poll", given["poll"], "5s"),
        once=_switch("once", given["once"]),
        training=tuple(training),
    )


def check_inbox(inbox: Path, folders: Sequence[str]) -> None:
    """Refuse an inbox that overlaps with a data set: its images would be moved.

    Args:
        inbox: The inbox.
        folders: Folders with the images of the data set, or files that list them.

    Raises:
        ConfigError: One is inside the other.
    """
    for folder in map(Path, folders):
        if _overlap(inbox, folder):
            raise ConfigError(f"inbox={inbox} and the data set's {folder}: neither may be inside the other")


def split(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Split words into those of the watch and those of its trainings.

    Args:
        words: The words after `yolov12 watch`.

    Returns:
        The values of all arguments of the watch, as they are written or by default, and the words for the training.

    Raises:
        ConfigError: A word is unknown or malformed, or watch sets the argument itself.
    """
    known = {each.name for each in ARGUMENTS} | {name for group in ultralytics_arguments().values() for name in group}
    given, training = dict(_DEFAULTS), list[str]()
    for word in words:
        key, sign, value = word.lstrip("-").partition("=")
        if sign and not value:
            raise ConfigError(f"'{word}' has no value, as in min_images=20")
        if key in _SET_BY_WATCH:
            raise ConfigError(f"watch sets {key}= of its trainings itself: leave it out")
        if key in given:
            if not sign and key != "once":
                raise ConfigError(f"'{word}' has no value, as in {key}=...")
            given[key] = value if sign else True
        elif key in known:
            training.append(word)
        else:
            near = get_close_matches(key, {*given, *known}.difference(_SET_BY_WATCH), n=1)
            raise ConfigError(f"unknown argument '{key}'" + (f". Did you mean '{near[0]}'?" if near else ""))
    return given, training


def _overlap(one: Path, other: Path) -> bool:
    one, other = one.resolve(), other.resolve()
    return one == other or one in other.parents or other in one.parents


def _count(name: str, value: Any, smallest: int) -> int:
    if not str(value).isdecimal() or int(value) < smallest:
        raise ConfigError(f"{name}={value}: give a number of at least {smallest}, as in {name}={_DEFAULTS[name]}")
    return int(value)


def _fraction(name: str, value: str, example: str, smallest: float = 1e-9) -> float:
    try:
        found = float(value)
    except ValueError:
        found = -1.0
    if not smallest <= found < 1:
        raise ConfigError(f"{name}={value}: give a fraction between 0 and 1, as in {name}={example}")
    return found


def _seconds(name: str, value: str, example: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", value.strip().lower())
    if not found or found[2] not in _SECONDS:
        raise ConfigError(f"{name}={value}: give a time, as in {name}={example}")
    return float(found[1]) * _SECONDS[found[2]]


def _switch(name: str, value: Any) -> bool:
    word = str(value).lower()
    if word not in ("true", "false"):
        raise ConfigError(f"{name}={value}: give True or False")
    return word == "true"
