"""Parses the arguments of `yolov12 plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from yolov12.errors import ConfigError
from yolov12.mas.config import Config
from yolov12.mas.memory.reading import Reading, limited_bytes
from yolov12.plan.cards import Card, card

__all__ = ["Request", "parse", "parse_count", "parse_switch", "parse_words"]

_DEFAULTS: dict[str, Any] = {
    "model": None,
    "imgsz": 640,
    "batch": 16,
    "mem": None,
    "gpu": None,
    "boxes": 100,
    "classes": None,
    "optimizer": "auto",
    "amp": True,
    "mem_safety_ratio": 0.1,
    "bn_group": "auto",
    "micro_batch": None,
    "disable_mas_layers": None,
    "json": False,
}
_CONFIG = {key: key for key in ("mem_safety_ratio", "bn_group", "micro_batch", "disable_mas_layers")} | {
    "mem": "mem_limit"
}
_EVERY_SCALE = tuple(f"yolov12{scale}.yaml" for scale in "nsmlx")


@dataclass(frozen=True)
class Request:
    """Parsed arguments of `yolov12 plan`."""

    models: tuple[str, ...]
    imgsz: int
    batch: int
    boxes: int
    """Boxes of the fullest image."""
    classes: int | None
    """Number of classes. None means: the number in the model's file."""
    optimizer: str
    amp: bool
    config: Config
    """Settings of the engine."""
    card: Card | None
    """The GPU, or None if only its memory is given."""
    json: bool

    @property
    def total_bytes(self) -> int:
        """Memory of the GPU in bytes, or `mem` if that is smaller."""
        if self.card is None:
            return int(self.config.limit or 0)
        return limited_bytes(self.card.total_bytes, self.config.limit)

    @property
    def budget_bytes(self) -> int:
        """Bytes that the engine may use if no other process uses the GPU."""
        free_bytes = self.total_bytes if self.card is None else self.card.total_bytes - self.card.system_bytes
        return Reading(0, 0, free_bytes, self.total_bytes, None).budget_bytes(self.config.safety_ratio)


def parse(words: list[str]) -> Request:
    """Parse the arguments of a plan.

    Args:
        words: The words after `yolov12 plan`, such as `batch=256`.

    Returns:
        The parsed arguments, with defaults for those not given.

    Raises:
        ConfigError: A word is unknown or malformed, or a required one is missing.
    """
    given = parse_words(words, _DEFAULTS, switches=("json", "amp"))
    found = None if given["gpu"] is None else card(given["gpu"])
    if given["model"] is None:
        raise ConfigError("no model= given. Give a yaml or a weight file, as in model=yolov12s.yaml, or model=all")
    if given["mem"] is None and given["gpu"] is None:
        raise ConfigError("no mem= or gpu= given. Give mem=16GiB, or a card, as in gpu=T4")
    if "," in given["model"] or given["model"] == "all":
        models = _EVERY_SCALE if given["model"] == "all" else tuple(given["model"].split(","))
    else:
        models = (given["model"],)
    config = Config.parse({name: given[key] for key, name in _CONFIG.items()})
    if found is None and isinstance(config.limit, float):
        raise ConfigError(
            f"mem={given['mem']} is a fraction of a card. Give bytes, as in mem=16GiB, or the card, as in gpu=T4"
        )
    return Request(
        models=models,
        imgsz=parse_count("imgsz", given["imgsz"]),
        batch=parse_count("batch", given["batch"]),
        boxes=parse_count("boxes", given["boxes"]),
        classes=None if given["classes"] is None else parse_count("classes", given["classes"]),
        optimizer=given["optimizer"],
        amp=parse_switch("amp", given["amp"]),
        config=config,
        card=found,
        json=parse_switch("json", given["json"]),
    )


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


def parse_count(name: str, value: Any) -> int:
    """Parse a positive whole number.

    Args:
        name: Name of the argument, for the message.
        value: The value to parse.

    Returns:
        The number.

    Raises:
        ConfigError: The value is not a positive whole number.
    """
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value}: give a number, as in {name}={_DEFAULTS[name] or 80}")
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
