"""Arguments of `yolov12 plan`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from yolov12.errors import ConfigError
from yolov12.mas.config import Config
from yolov12.mas.memory.reading import Reading, limited_bytes
from yolov12.plan.cards import Card, card

__all__ = ["Request", "count", "parse", "read", "switch"]

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
    """What is asked for."""

    models: tuple[str, ...]
    imgsz: int
    batch: int
    boxes: int
    """In the image that has most."""
    classes: int | None
    """None: as the model's file says."""
    optimizer: str
    amp: bool
    config: Config
    """Of the engine."""
    card: Card | None
    json: bool

    @property
    def total_bytes(self) -> int:
        """What the card has, or the limit where that is smaller."""
        if self.card is None:
            return int(self.config.limit or 0)
        return limited_bytes(self.card.total_bytes, self.config.limit)

    @property
    def budget_bytes(self) -> int:
        """What the engine may hold, if nothing else uses the card."""
        free_bytes = self.total_bytes if self.card is None else self.card.total_bytes - self.card.system_bytes
        return Reading(0, 0, free_bytes, self.total_bytes, None).budget_bytes(self.config.safety_ratio)


def parse(words: list[str]) -> Request:
    """Read `key=value` words.

    Raises:
        ConfigError: A word is unknown, malformed or missing.
    """
    given = read(words, _DEFAULTS, switches=("json", "amp"))
    found = None if given["gpu"] is None else card(given["gpu"])
    if given["model"] is None:
        raise ConfigError("no model= given. Give a yaml or a weight file, as in model=yolov12s.yaml, or model=all")
    if given["mem"] is None and given["gpu"] is None:
        raise ConfigError("how much memory is there? Give mem=16GiB, or a card, as in gpu=T4")
    if "," in given["model"] or given["model"] == "all":
        models = _EVERY_SCALE if given["model"] == "all" else tuple(given["model"].split(","))
    else:
        models = (given["model"],)
    config = Config.parse({name: given[key] for key, name in _CONFIG.items()})
    if found is None and isinstance(config.limit, float):
        raise ConfigError(
            f"mem={given['mem']} is a share of a card. Give bytes, as in mem=16GiB, or the card, as in gpu=T4"
        )
    return Request(
        models=models,
        imgsz=count("imgsz", given["imgsz"]),
        batch=count("batch", given["batch"]),
        boxes=count("boxes", given["boxes"]),
        classes=None if given["classes"] is None else count("classes", given["classes"]),
        optimizer=given["optimizer"],
        amp=switch("amp", given["amp"]),
        config=config,
        card=found,
        json=switch("json", given["json"]),
    )


def read(words: Sequence[str], defaults: Mapping[str, Any], switches: Sequence[str]) -> dict[str, Any]:
    """Put `key=value` words over defaults.

    Args:
        words: As written.
        defaults: All there are.
        switches: Those that mean True without a value.

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


def count(name: str, value: Any) -> int:
    """Read a number of things.

    Raises:
        ConfigError: It is none.
    """
    if not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value}: give a number, as in {name}={_DEFAULTS[name] or 80}")
    return int(value)


def switch(name: str, value: Any) -> bool:
    """Read True or False; `bf16`, as in amp=bf16, is on.

    Raises:
        ConfigError: It is neither.
    """
    word = str(value).lower()
    if word not in ("true", "false", "bf16"):
        raise ConfigError(f"{name}={value}: give True or False")
    return word != "false"
