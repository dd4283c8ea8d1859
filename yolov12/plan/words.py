"""`key=value` words of a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from yolov12.errors import ConfigError

__all__ = ["count", "read", "switch"]


def read(words: Sequence[str], defaults: Mapping[str, Any], switches: Sequence[str]) -> dict[str, Any]:
    """Put `key=value` words over defaults.

    Args:
        words: The words as written.
        defaults: Every argument there is, with its default.
        switches: Arguments that mean True without a value.

    Returns:
        Argument name → value: a string, or its default, or True.

    Raises:
        ConfigError: A word is unknown, or has no value.
    """
    given = dict(defaults)
    for word in words:
        key, _, value = word.lstrip("-").partition("=")
        if key not in given:
            near = get_close_matches(key, given, n=1)
            hint = f"Did you mean '{near[0]}'?" if near else f"Arguments of plan: {', '.join(given)}"
            raise ConfigError(f"unknown argument '{key}'. {hint}")
        if not value and key not in switches:
            raise ConfigError(f"'{word}' has no value, as in batch=256")
        given[key] = value or True
    return given


def count(name: str, value: Any, example: int) -> int:
    """Read a number of things, at least 1.

    Args:
        name: The argument that it is the value of, for errors.
        value: The number as written.
        example: A number to show in an error.

    Raises:
        ConfigError: The value is no such number.
    """
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value}: give a number, as in {name}={example}")
    return int(value)


def switch(name: str, value: Any) -> bool:
    """Read True or False; `bf16`, as in amp=bf16, is True.

    Args:
        name: The argument that it is the value of, for errors.
        value: The value as written.

    Raises:
        ConfigError: The value is neither.
    """
    word = str(value).lower()
    if word not in ("true", "false", "bf16"):
        raise ConfigError(f"{name}={value}: give True or False")
    return word != "false"
