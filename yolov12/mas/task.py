"""Description of a training for the engine: how its batches are split, and by what its loss is divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Loss", "Share", "Task", "TensorTask", "Workload"]


@dataclass(frozen=True)
class Workload:
    """Properties of a batch that decide how much memory it needs, known while it is still on the host."""

    height: int
    """Height of every image as the model gets it, in pixels."""
    width: int
    """Width of every image as the model gets it, in pixels."""
    boxes: tuple[int, ...]
    """Number of boxes in each image, so its length is the number of images. Zeros for a task without boxes."""

    @property
    def images(self) -> int:
        """Number of images in the batch."""
        return len(self.boxes)

    @property
    def most_boxes(self) -> int:
        """Number of boxes in the image that has most."""
        return max(self.boxes)


@dataclass(frozen=True)
class Share:
    """One rank's part of a batch that several ranks train on together."""

    batch_images: int
    """Number of images in the whole batch, over all ranks."""
    is_padding: bool = False
    """True for an empty share. The rank runs one padding image with weight zero, so that it takes part in every
    collective."""


@dataclass(frozen=True)
class Loss:
    """Loss of a part of a batch, and the normaliser it was divided by, so that parts add up exactly.

    The loss of a batch is numerator / max(normaliser, floor), and both are sums over its images. For a part, `value` is
    numerator / max(normaliser, floor) of that part alone, which is what a loss function returns anyway. The engine
    undoes the division, adds numerators and normalisers over all parts, and divides once.

    A loss may be a sum of terms with different normalisers: then `value` and `normaliser` have one entry for each term.
    One division at the end cannot correct the gradient of such a loss, so the engine has to know the normalisers of the
    whole batch before the first backward pass. A batch that is split therefore runs its forward pass twice, the first
    time without gradients, unless `Config.exact` is False. Then parts are weighted by their numbers of images.

    Raises:
        ValueError: Shapes differ although there are several normalisers.
    """

    value: Tensor
    """Loss of the part, of any shape; its sum is differentiated."""
    normaliser: Tensor | float
    """Divisor of the value before the floor: a sum over the part, such as its number of images or of targets. A tensor
    of the value's shape for terms with different normalisers."""
    items: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars to report, divided as the value was. With several normalisers, tensors of the value's shape, whose sums
    are reported."""
    times_images: bool = False
    """True if the value is also multiplied by the number of images it covers, as Ultralytics' losses are. The engine
    then replaces the images of the part by those of the whole batch."""
    factors: Callable[[Tensor, Tensor], Tensor] | None = None
    """For several normalisers: called with value and normaliser of the whole batch, returns a factor for each term,
    such as 0 for a term that is clamped. None for no factors."""

    def __post_init__(self) -> None:
        if self.has_terms:
            shapes = [tuple(each.shape) for each in (self.normaliser, self.value, *self.items.values())]  # type: ignore[union-attr]
            if len(set(shapes)) > 1:
                raise ValueError(f"normaliser, value and items of a loss must have the same shape, not {shapes}")

    @property
    def has_terms(self) -> bool:
        """True for a loss with several normalisers."""
        return isinstance(self.normaliser, Tensor) and self.normaliser.numel() > 1


class Task(Protocol):
    """Adapter between the engine and one kind of training."""

    floor: float
    """Smallest normaliser: a smaller sum counts as this one. Ultralytics' detection losses clamp at 1."""

    def workload(self, batch: Any) -> Workload:
        """Return the properties of a batch on the host that decide its memory."""

    def part(self, batch: Any, start: int, stop: int) -> Any:
        """Return images `start` to `stop` of a batch on the host: nested containers of tensors, views if possible."""

    def loss(self, model: nn.Module, part: Any) -> Loss:
        """Run forward pass and loss on a part that is now on the model's device."""


class TensorTask:
    """Task for batches that are tuples of tensors with one entry per image.

    Args:
        loss: Called with the model and the tensors of a part; returns a `Loss`, or a mean over the part's images.
        floor: Smallest normaliser, see `Task.floor`.
        may_replay: True if the function neither keeps nor changes what the model returns. On a GPU, small micro-batches
            may then be replayed as CUDA graphs, which use the memory of the model's outputs again.
    """

    def __init__(self, loss: Callable[..., Loss | Tensor], floor: float = 0.0, *, may_replay: bool = False) -> None:
        self._loss, self.floor, self._may_replay = loss, floor, may_replay

    def may_replay(self, model: nn.Module) -> bool:
        """Return whether micro-batches may be replayed as CUDA graphs; a task without this method says no."""
        return self._may_replay

    def workload(self, batch: Sequence[Tensor]) -> Workload:
        """Take the last two dimensions of the first tensor as height and width; for sequences, the length as height."""
        height, width = (*batch[0].shape[1:], 1, 1)[:2] if batch[0].ndim < 3 else batch[0].shape[-2:]
        return Workload(int(height), int(width), (0,) * len(batch[0]))

    def part(self, batch: Sequence[Tensor], start: int, stop: int) -> tuple[Tensor, ...]:
        """Slice every tensor."""
        return tuple(tensor[start:stop] for tensor in batch)

    def loss(self, model: nn.Module, part: Sequence[Tensor]) -> Loss:
        """Call the loss function; if it returns a mean, the normaliser is the number of images."""
        loss = self._loss(model, *part)
        return loss if isinstance(loss, Loss) else Loss(loss, torch.full((), len(part[0]), device=loss.device))
