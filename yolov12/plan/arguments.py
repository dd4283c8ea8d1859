"""Parses the arguments of `yolov12 plan`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from yolov12.errors import ConfigError
from yolov12.mas.config import Config
from yolov12.mas.memory.reading import Reading, limited_bytes
from yolov12.plan.cards import Card, card
from yolov12.plan.words import parse_count, parse_switch, parse_words
from yolov12.sizes import parse_memory_size

__all__ = ["Request", "parse"]

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
    parse_memory_size(given["mem"], "mem")  # here it has another name than in a training
    config = Config.parse({name: given[key] for key, name in _CONFIG.items()})
    if found is None and not isinstance(config.limit, int):
        raise ConfigError(
            f"mem={given['mem']} is a part of a card. Give bytes, as in mem=16GiB, or the card, as in gpu=T4"
        )
    return Request(
        models=models,
        imgsz=parse_count("imgsz", given["imgsz"], 640),
        batch=parse_count("batch", given["batch"], 16),
        boxes=parse_count("boxes", given["boxes"], 100),
        classes=None if given["classes"] is None else parse_count("classes", given["classes"], 80),
        optimizer=given["optimizer"],
        amp=parse_switch("amp", given["amp"]),
        config=config,
        card=found,
        json=parse_switch("json", given["json"]),
    )
