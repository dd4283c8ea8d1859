"""Ladders of earlier runs on disk: the same training on the same device is profiled only once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from torch import nn

from yolov12.mas.profiling.ladder import FORMAT, Ladder
from yolov12.mas.task import Workload

__all__ = ["LadderCache"]


class LadderCache:
    """A folder with one small file per ladder. The file's name is a hash of everything that the profile depends on.

    Args:
        folder: Created when it is first needed. None stores nothing. A folder that cannot be written to is not an
            error.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, key: str) -> Ladder | None:
        """Return the ladder stored under a key; None if there is none or it cannot be read."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Ladder.from_state_dict(json.loads(self._file(key).read_text("utf-8"))) if self._folder else None
        return None

    def put(self, key: str, ladder: Ladder) -> None:
        """Store a ladder under a key."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished = self._file(f"{key}-{os.getpid()}")  # another process may write the same ladder
            unfinished.write_text(json.dumps(ladder.state_dict()), "utf-8")
            unfinished.replace(self._file(key))

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.json"

    @staticmethod
    def key(model: nn.Module, layers: list[str], work: Workload, device: str, *, fused: int, joins: bool) -> str:
        """Return the key of a model on a device: 24 hexadecimal digits.

        The key depends on the model's configuration, the image size, the device, the PyTorch version, and settings such
        as autocast.

        Args:
            model: Its text representation gives the layers and their sizes.
            layers: Names of the layers that plans may name.
            work: Workload of any batch; only its height and width count.
            device: Name of the device.
            fused: Number of BatchNorm layers that run as one operation with their activation.
            joins: Whether BatchNorm also adds residuals and writes concatenations.
        """
        settings = torch.__version__, torch.is_autocast_enabled(), torch.are_deterministic_algorithms_enabled()
        trained = [(name, part.requires_grad, str(part.dtype)) for name, part in model.named_parameters()]
        modes = [module.training for module in model.modules()]
        told = [FORMAT, trained, modes, model, layers, work.height, work.width, device, settings, fused, joins]
        return hashlib.sha256("\n".join(map(str, told)).encode()).hexdigest()[:24]
