"""Parses and resolves `device=` with Ultralytics' grammar, without importing Ultralytics."""

from __future__ import annotations

from collections.abc import Sequence

from yolov12.check.report import Gpu
from yolov12.errors import ConfigError

__all__ = ["parse_device", "resolve_device"]

IDLE = -1
"""The number in `device=-1`, which lets Ultralytics choose an idle GPU."""


def parse_device(device: str) -> str | tuple[int, ...]:
    """Parse a device argument.

    Args:
        device: `cpu`, `mps`, `0`, `cuda:0`, `0,1`, `-1` for an idle GPU, or empty for the default.

    Returns:
        `cpu`, `mps`, or a tuple of GPU numbers, in which -1 stands for an idle GPU. The default is an empty tuple.

    Raises:
        ConfigError: The text is malformed, or names a GPU twice.
    """
    text = device.lower()
    for remove in ("cuda:", "none", "(", ")", "[", "]", "'", " "):
        text = text.replace(remove, "")
    if text in ("cpu", "mps", "mps:0"):
        return text.removesuffix(":0")
    words = ["0"] if text == "cuda" else [word for word in text.split(",") if word]
    if not all(word.isdecimal() or word == str(IDLE) for word in words):
        raise ConfigError(f"device={device} is not a device. Give cpu, mps, a GPU as in 0, several as in 0,1, or -1")
    indices = tuple(map(int, words))
    if twice := {index for index in indices if index != IDLE and indices.count(index) > 1}:
        raise ConfigError(f"device={device} names GPU {min(twice)} twice")
    return indices


def resolve_device(wanted: str | tuple[int, ...], gpus: Sequence[Gpu], visible_devices: str | None) -> tuple[str, ...]:
    """Resolve a device argument to PyTorch devices of this machine.

    Args:
        wanted: The result of `parse_device`.
        gpus: The GPUs of this machine. GPUs without an index are ignored.
        visible_devices: The value of `CUDA_VISIBLE_DEVICES`. As in Ultralytics, a GPU may be named by its number there.

    Returns:
        Device names such as `cpu` or `cuda:0`. A named device may not exist.
    """
    if isinstance(wanted, str):
        return (wanted,)
    usable = {gpu.index: gpu.free_bytes or 0 for gpu in gpus if gpu.index is not None}
    visible = [word.strip() for word in (visible_devices or "").split(",")][: len(usable)]
    named = [index for index in wanted if index != IDLE]
    if any(index not in usable for index in named) and all(str(index) in visible for index in named):
        wanted = tuple(index if index == IDLE else visible.index(str(index)) for index in wanted)
    chosen: list[int] = []
    for index in wanted:
        if index == IDLE:  # Ultralytics also compares the load of GPUs; a check needs memory only
            left = usable.keys() - set(wanted) - set(chosen)
            if not left:
                continue
            index = max(left, key=lambda index: (usable[index], -index))
        chosen.append(index)
    if not chosen:
        chosen = [0] if 0 in usable else []
    return tuple(f"cuda:{index}" for index in chosen) or ("cpu",)
