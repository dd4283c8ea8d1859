"""Training arguments of whole runs. The arguments of the engine are in `mas.config`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolov12.cfg.arguments import DATA, RUN, defaults
from yolov12.errors import ConfigError

__all__ = ["OPTIONS", "Interval", "check_data_arguments"]

OPTIONS: Mapping[str, Any] = defaults(RUN, DATA)
"""Defaults of the arguments of a run and of its data layer, by the names that users write."""

_MODES = ("auto", "eager", "off")
_PLACES = ("host", "device", "auto")

_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def check_data_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the values of the data layer's arguments.

    Args:
        arguments: Argument name → value, with all names of the data layer, `mas` and, if they are set, `rect` and
            `cls_remap`.

    Raises:
        ConfigError: `mas_data` or `augment_on` is not a mode, `mas_min_imgsz` is not a size, `auto_workers` is not a
            switch, `replay_fraction` is not a fraction, `rename` is not a dictionary of names, or `replay` or `rename`
            does not go with another argument.
    """
    mode, smallest = arguments["mas_data"], arguments["mas_min_imgsz"]
    if mode not in _MODES:
        raise ConfigError(f"mas_data={mode}: give one of {', '.join(_MODES)}")
    if (place := arguments["augment_on"]) not in _PLACES:
        raise ConfigError(f"augment_on={place}: give one of {', '.join(_PLACES)}")
    if smallest is not None and not (isinstance(smallest, int) and smallest >= 1):
        raise ConfigError(f"mas_min_imgsz={smallest}: give pixels, as in 320, or leave it out for half of imgsz")
    if (automatic := arguments["auto_workers"]) not in (None, True, False):
        raise ConfigError(f"auto_workers={automatic}: give True or False, or leave it out")
    replay, fraction = arguments["replay"], arguments["replay_fraction"]
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction < 1:
        raise ConfigError(f"replay_fraction={fraction}: give a fraction between 0 and 1, as in 0.3")
    if replay is not None and not (isinstance(replay, (str, Path)) and str(replay)):
        raise ConfigError(f"replay={replay}: give the path of a data set yaml, as in replay=old.yaml")
    for name, value in (("mas", False), ("rect", True)):
        if replay is not None and arguments.get(name) is value:
            raise ConfigError(f"replay={replay} does not go with {name}={value}: leave one of them out")
    rename = arguments["rename"]
    if rename is None:
        return
    if not isinstance(rename, dict) or not all(isinstance(name, str) for pair in rename.items() for name in pair):
        raise ConfigError(
            f"rename={rename}: give a dictionary of old and new class names, as in rename=\"{{'scratch': 'groove'}}\""
        )
    for name in ("mas", *(["cls_remap"] if replay is None else [])):  # labels of replay are renamed in any case
        if arguments.get(name) is False:
            raise ConfigError(f"rename={rename} does not go with {name}=False: leave one of them out")


@dataclass(frozen=True)
class Interval:
    """Interval at which a run is saved in mid-epoch. With both fields None, it is saved only when it is interrupted."""

    steps: int | None = None
    """Number of optimizer steps between two saves; None if the interval is a time."""
    seconds: float | None = None
    """Seconds between two saves; None if the interval is a number of steps."""

    @classmethod
    def parse(cls, value: Any) -> Interval:
        """Parse `save_every`.

        Args:
            value: A time such as `5min` or `30s`, a number of steps such as `100`, or 0.

        Raises:
            ConfigError: The value has none of these forms.
        """
        found = None if isinstance(value, bool) else _TIME.fullmatch(str(value).strip())
        number, unit = (float(found[1]), found[2].lower()) if found else (0.0, "?")
        if value is False or (not unit and number == 0):
            return cls()
        if not unit and number.is_integer():
            return cls(steps=int(number))
        if unit in _SECONDS and number > 0:
            return cls(seconds=number * _SECONDS[unit])
        raise ConfigError(
            f"save_every={value}: give minutes, as in 5min, or optimizer steps, as in 100; with 0 a run is saved "
            "only when it is interrupted"
        )

    def due(self, steps: int, seconds: float) -> bool:
        """Return whether to save now.

        Args:
            steps: Number of optimizer steps since the last save.
            seconds: Seconds since the last save.
        """
        if self.steps is not None:
            return steps >= self.steps
        return self.seconds is not None and seconds >= self.seconds
