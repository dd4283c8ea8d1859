"""Ladders of earlier runs on disk, so that the same training on the same device is profiled once."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from torch import nn

from yolov12.mas.profiling.ladder import Ladder
from yolov12.mas.task import Workload

__all__ = ["LadderCache"]

_FORMAT = 2  # and of the profiles behind it: a higher one makes all anew


class LadderCache:
    """A folder of small files, each named by all that a profile depends on.

    Args:
        folder: Is made when it is needed; None remembers nothing. A folder that cannot be written to is no error.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, key: str) -> Ladder | None:
        """Ladder of a key; None if there is none that can be read."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Ladder.from_state_dict(json.loads(self._file(key).read_text("utf-8"))) if self._folder else None
        return None

    def put(self, key: str, ladder: Ladder) -> None:
        """Keep a ladder."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            unfinished = self._file(f"{key}-{os.getpid()}")  # another run may write the same one
            unfinished.write_text(json.dumps(ladder.state_dict()), "utf-8")
            unfinished.replace(self._file(key))

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.json"

    @staticmethod
    def key(model: nn.Module, layers: list[str], work: Workload, device: str, fused: int = 0) -> str:
        """Of a model as it is configured, on images of a size, on a device, under these versions and settings.

        Args:
            model: Its text tells its layers and their sizes.
            layers: That plans may name.
            work: Any batch.
            device: Its name.
            fused: BatchNorms that are one operation with their activation.
        """
        settings = torch.__version__, torch.is_autocast_enabled(), torch.are_deterministic_algorithms_enabled()
        trained = [(name, part.requires_grad, str(part.dtype)) for name, part in model.named_parameters()]
        modes = [module.training for module in model.modules()]
        told = [_FORMAT, trained, modes, model, layers, work.height, work.width, device, settings, fused]
        return hashlib.sha256("\n".join(map(str, told)).encode()).hexdigest()[:24]
