"""Settings of the engine, parsed and checked in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from yolov12.cfg.arguments import ENGINE, defaults
from yolov12.errors import ConfigError
from yolov12.sizes import check_memory_size, parse_memory_size

__all__ = ["DEFAULTS", "GROUPS", "Config"]

DEFAULTS: Mapping[str, Any] = defaults(ENGINE)
"""Defaults of the engine's arguments, by the names that users write."""

GROUPS = (32, 16, 8, 4, 2, 1)
"""Group sizes that `bn_group=auto` chooses from. 32 is one GPU's part of a batch in the official recipe: 256 images on
8 GPUs."""


@dataclass(frozen=True)
class Config:
    """Settings of the engine.

    Raises:
        ConfigError: A value is outside its range.
    """

    safety_ratio: float = DEFAULTS["mem_safety_ratio"]
    """Fraction of the device's memory that is kept free, in [0, 0.9]. Users write `mem_safety_ratio`."""
    limit: int | float | None = None
    """Most memory to use: bytes (int), a fraction of the device (float in (0, 1)), or None for all of it. A string
    such as `16GiB` is converted. Users write `mem_limit`."""
    bn_group: int | None = None
    """Number of images that BatchNorm normalises together; 0: all of a micro-batch; None: the largest of `GROUPS` that
    fits."""
    micro_batch: int | None = None
    """Number of images in a micro-batch; None: as many as memory allows."""
    disabled_layers: tuple[str, ...] = ()
    """Names of layers that are never rebuilt or recomputed, see `checkpointing.layers.candidates`. Users write
    `disable_mas_layers`."""

    cuda_graphs: bool | None = DEFAULTS["cuda_graphs"]
    """True to replay small micro-batches as CUDA graphs where that is faster, see `step.graphs.replays`; None: True
    with PyTorch 2.11 or later, in a training of one process."""
    exact: bool = DEFAULTS["exact"]
    """True for the exact gradient of a loss with several normalisers, whose split batches then run their forward pass
    twice, see `task.Loss`; False to weight its parts by their numbers of images."""

    def __post_init__(self) -> None:
        if isinstance(self.limit, str):
            object.__setattr__(self, "limit", parse_memory_size(self.limit))
        if not 0 <= self.safety_ratio <= 0.9:
            raise ConfigError(f"mem_safety_ratio={self.safety_ratio}: give a fraction of the memory from 0 to 0.9")
        if self.limit is not None:
            check_memory_size(self.limit)
        if self.bn_group is not None and self.bn_group < 0:
            raise ConfigError(f"bn_group={self.bn_group}: give auto, a number of images, or 0 to use the micro-batch")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ConfigError(f"micro_batch={self.micro_batch}: give a number of images, or leave it out")
        if self.micro_batch and self.bn_group and self.micro_batch < self.bn_group:
            raise ConfigError(
                f"micro_batch={self.micro_batch} is smaller than bn_group={self.bn_group}, whose images are needed at "
                f"once: set bn_group={self.micro_batch} too, or leave one of them out"
            )

    @classmethod
    def check(cls, arguments: Mapping[str, Any]) -> None:
        """Refuse training arguments that `parse` could not read.

        Raises:
            ConfigError: A value is malformed or outside its range.
        """
        cls.parse(arguments)

    @classmethod
    def parse(cls, arguments: Mapping[str, Any]) -> Config:
        """Parse training arguments.

        Args:
            arguments: Argument name → value as users write it, see `DEFAULTS`. Other names are ignored.

        Raises:
            ConfigError: A value is malformed or outside its range.
        """
        values = {key: arguments.get(key, default) for key, default in DEFAULTS.items()}
        return cls(
            safety_ratio=_number(
                "mem_safety_ratio", values["mem_safety_ratio"], float, "a fraction of the memory, as in 0.1"
            ),
            limit=parse_memory_size(values["mem_limit"]),
            bn_group=_count("bn_group", values["bn_group"], "auto, a number of images, or 0 to use the micro-batch"),
            micro_batch=_count("micro_batch", values["micro_batch"], "a number of images, or leave it out"),
            disabled_layers=_names(values["disable_mas_layers"]),
            cuda_graphs=_switch("cuda_graphs", values["cuda_graphs"]),
            exact=bool(values["exact"]),
        )


def _names(value: Any) -> tuple[str, ...]:
    """Parse names of layers: a list, or text of a command line such as `backbone.4,neck.2`."""
    parts = value if isinstance(value, (list, tuple)) else str(value or "").strip("[]() ").split(",")
    names = tuple(str(part).strip().strip("'\"") for part in parts)
    if not all(names) and names != ("",):
        raise ConfigError(f"disable_mas_layers={value}: give names of layers, as in ['backbone.4','neck.2']")
    return names if all(names) else ()


def _switch(name: str, value: Any) -> bool | None:
    if value not in (None, True, False):
        raise ConfigError(f"{name}={value}: give True or False, or leave it out")
    return None if value is None else bool(value)


def _count(name: str, value: Any, wanted: str) -> int | None:
    if value is None or str(value).lower() in ("auto", "none"):
        return None
    return int(_number(name, value, int, wanted))


def _number(name: str, value: Any, kind: type[int] | type[float], wanted: str) -> float:
    try:
        if isinstance(value, bool) or kind(value) != float(value):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name}={value} is not a number: give {wanted}") from None
