"""Parses the `key=value` words of a command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from yolov12.errors import ConfigError

__all__ = ["parse_count", "parse_switch", "parse_words"]


def parse_words(words: Sequence[str], defaults: Mapping[str, Any], switches: Sequence[str]) -> dict[str, Any]:
    """Parse `key=value` words.

    Args:
        words: Words such as `batch=256` or `--json`.
        defaults: Argument name → default, for every known argument.
        switches: Names of arguments that are True if they have no value.

    Returns:
        The defaults, updated with the words. Values are not converted.

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


def parse_count(name: str, value: Any, example: int) -> int:
    """Parse a positive whole number.

    Args:
        name: Name of the argument, for the message.
        value: The value to parse.
        example: A number that the message shows.

    Returns:
        The number.

    Raises:
        ConfigError: The value is not a positive whole number.
    """
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value}: give a number, as in {name}={example}")
    return int(value)


def parse_switch(name: str, value: Any) -> bool:
    """Parse True or False. `bf16`, as in amp=bf16, counts as True.

    Args:
        name: Name of the argument, for the message.
        value: The value to parse.

    Returns:
        The parsed value.

    Raises:
        ConfigError: The value is none of these.
    """
    word = str(value).lower()
    if word not in ("true", "false", "bf16"):
        raise ConfigError(f"{name}={value}: give True or False")
    return word != "false"
