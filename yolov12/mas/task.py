"""What the engine has to be told about a training: how to cut its batches and what its loss is divided by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Loss", "Task", "TensorTask", "Workload"]


@dataclass(frozen=True)
class Workload:
    """What decides the memory a batch needs, known while it is still on the host."""

    height: int
    width: int
    """Of every image, in pixels, as the model gets them."""
    boxes: tuple[int, ...]
    """Number of boxes of each image, hence also how many images there are; zeros where there is no such thing."""

    @property
    def images(self) -> int:
        """How many there are."""
        return len(self.boxes)

    @property
    def pixels(self) -> int:
        """Of one image."""
        return self.height * self.width


@dataclass(frozen=True)
class Loss:
    """The loss of part of a batch, and what it was divided by, so that parts can be put together exactly.

    The loss of a batch is numerator / max(normaliser, floor), and both are sums over its images. For a part, `value` is
    numerator / max(normaliser, floor) of that part alone: what a loss function returns anyway. The engine multiplies
    the division away, adds numerators and normalisers over all parts, and divides once.
    """

    value: Tensor
    """Any shape; its sum is differentiated."""
    normaliser: Tensor | float
    """What the value was divided by, before the floor: a sum over the part, such as its number of images or targets."""
    items: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars to report, divided as the value was."""


class Task(Protocol):
    """Joins the engine to one kind of training."""

    floor: float
    """A normaliser smaller than this counts as this: 1 for Ultralytics' detection losses, which clamp at it."""

    def workload(self, batch: Any) -> Workload:
        """Say what a batch on the host will cost memory for."""

    def part(self, batch: Any, start: int, stop: int) -> Any:
        """Cut images `start` to `stop` out of a batch on the host: nested containers of tensors, views if possible."""

    def loss(self, model: nn.Module, part: Any) -> Loss:
        """Run forward and loss on a part that is now on the model's device."""


class TensorTask:
    """Batches that are tuples of tensors, one entry per image in each.

    Args:
        loss: Called with the model and the tensors of a part; returns a `Loss`, or a mean over the part's images.
        floor: See `Task`.
    """

    def __init__(self, loss: Callable[..., Loss | Tensor], floor: float = 0.0) -> None:
        self._loss, self.floor = loss, floor

    def workload(self, batch: Sequence[Tensor]) -> Workload:
        """Take the last two dimensions of the first tensor as the image's; of a sequence, its length."""
        height, width = (*batch[0].shape[1:], 1, 1)[:2] if batch[0].ndim < 3 else batch[0].shape[-2:]
        return Workload(int(height), int(width), (0,) * len(batch[0]))

    def part(self, batch: Sequence[Tensor], start: int, stop: int) -> tuple[Tensor, ...]:
        """Cut every tensor."""
        return tuple(tensor[start:stop] for tensor in batch)

    def loss(self, model: nn.Module, part: Sequence[Tensor]) -> Loss:
        """Call the function given, and count images where it does not."""
        loss = self._loss(model, *part)
        return loss if isinstance(loss, Loss) else Loss(loss, torch.full((), len(part[0]), device=loss.device))
