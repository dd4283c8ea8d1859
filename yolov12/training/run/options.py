"""Training arguments of whole runs; those of the engine are in `mas.config`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yolov12.cfg.arguments import DATA, RUN, defaults
from yolov12.errors import ConfigError

__all__ = ["OPTIONS", "Interval", "check_data_layer"]

OPTIONS: Mapping[str, Any] = defaults(RUN, DATA)
"""Defaults of the arguments of a run and of its data layer, by the names that users write."""

_MODES = ("auto", "eager", "off")

_SECONDS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def check_data_layer(arguments: Mapping[str, Any]) -> None:
    """Refuse what `mas_data` and `mas_min_imgsz` cannot be.

    Raises:
        ConfigError: One of them is not a mode, or a size.
    """
    mode, smallest = arguments["mas_data"], arguments["mas_min_imgsz"]
    if mode not in _MODES:
        raise ConfigError(f"mas_data={mode}: give one of {', '.join(_MODES)}")
    if smallest is not None and not (isinstance(smallest, int) and smallest >= 1):
        raise ConfigError(f"mas_min_imgsz={smallest}: give pixels, as in 320, or leave it out for half of imgsz")


@dataclass(frozen=True)
class Interval:
    """How often a run is saved in mid-epoch."""

    steps: int | None = None
    """Of the optimizer; None: by time."""
    seconds: float | None = None
    """None: by steps. Both None: only when the run is interrupted."""

    @classmethod
    def parse(cls, value: Any) -> Interval:
        """Read `save_every`: `5min`, `30s`, `100` steps, or 0.

        Raises:
            ConfigError: It is none of these.
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
        """Whether to save, so many steps and seconds after the last time."""
        if self.steps is not None:
            return steps >= self.steps
        return self.seconds is not None and seconds >= self.seconds
