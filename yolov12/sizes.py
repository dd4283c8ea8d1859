"""Amounts of memory as users write them, such as `16GiB` or `0.5`."""

from __future__ import annotations

import re
from typing import Any

from yolov12.errors import ConfigError

__all__ = ["check_memory_size", "parse_memory_size"]

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*((?:[KMGT]I?)?)B?", re.IGNORECASE)


def parse_memory_size(value: Any, name: str = "mem_limit") -> int | float | None:
    """Read an amount of memory.

    Args:
        value: A number with a unit (`16GiB`, `1.5GB`), bytes, a fraction of the device (`0.5`), or None.
        name: The argument that it is the value of, for errors.

    Returns:
        Bytes (int), a fraction of the device (float in (0, 1)), or None for all of the device.

    Raises:
        ConfigError: The value is malformed, or is no amount that can be used.
    """
    if value is None or str(value).lower() in ("none", ""):
        return None
    found = None if isinstance(value, bool) else _SIZE.fullmatch(str(value).strip())
    if found is None:
        raise ConfigError(f"{name}={value}: give bytes, as in 16GiB, or a fraction of the device, as in 0.5")
    number, unit = float(found[1]), found[2].upper()
    if not unit and not str(value).strip().upper().endswith("B") and number <= 1:
        return check_memory_size(number, name) if number < 1 else None
    if not unit and number < 2**20:
        raise ConfigError(f"{name}={value} is {number:g} bytes: give a unit, as in 16GiB, or a fraction, as in 0.5")
    return check_memory_size(int(number * _UNITS[unit]), name)


def check_memory_size(size: int | float, name: str = "mem_limit") -> int | float:
    """Return an amount of memory if it can be used.

    Args:
        size: Bytes (int), or a fraction of the device (float).
        name: The argument that it is the value of, for errors.

    Raises:
        ConfigError: The amount is no byte, or a fraction outside (0, 1).
    """
    if not (0 < size < 1 if isinstance(size, float) else size >= 1):
        raise ConfigError(f"{name}={size}: give bytes, as in 16GiB, or a fraction of the device, as in 0.5")
    return size
