"""Bytes of Ultralytics' detection loss, by running it: its shapes depend on values, so fake tensors do not get through.

It runs on the CPU for 2 and for 4 images, on random predictions and boxes. All of its tensors are images × something,
so two points make the line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yolov12.mas.profiling.trace import ByteTrace
from yolov12.models.assigner import in_slices
from yolov12.plan.cuda_rules import HALF, cuda_rules
from yolov12.plan.network import Network

__all__ = ["Line", "loss_bytes", "through"]

_IMAGES = (2, 4)


@dataclass(frozen=True)
class Line:
    """Bytes by images."""

    fixed_bytes: float
    bytes_per_image: float

    def __call__(self, images: int) -> int:
        """Bytes for so many images."""
        return round(self.fixed_bytes + self.bytes_per_image * images)


def through(measured: Mapping[int, int]) -> Line:
    """The line through two measurements: images → bytes."""
    (few, low), (many, high) = measured.items()
    slope = (high - low) / (many - few)
    return Line(low - slope * few, slope)


def loss_bytes(network: Network, imgsz: int, boxes: int, amp: bool) -> Line:
    """Peak of the loss and its backward pass, above predictions.

    Args:
        network: Makes the loss.
        imgsz: Height and width of images.
        boxes: In the image that has most; the others have half as many.
        amp: Whether autocast is on.
    """
    return through({images: _measured_bytes(network, imgsz, boxes, amp, images) for images in _IMAGES})


def _measured_bytes(network: Network, imgsz: int, boxes: int, amp: bool, images: int) -> int:
    criterion = network.criterion
    dtype: torch.dtype = HALF if amp else torch.float32
    draw = torch.Generator().manual_seed(0)
    sides = [imgsz // stride for stride in network.strides]
    anchors = sum(side * side for side in sides)
    distances = criterion.reg_max * 4
    with ByteTrace() as trace, cuda_rules(amp):
        predictions: dict[str, Any] = {
            "boxes": torch.randn(images, distances, anchors, generator=draw).to(dtype).requires_grad_(),
            "scores": torch.randn(images, criterion.nc, anchors, generator=draw).to(dtype).requires_grad_(),
            "feats": [torch.zeros(1, dtype=dtype).expand(images, 1, side, side) for side in sides],
        }
        batch = _boxes(images, boxes, criterion.nc, draw)
        counts = torch.bincount(batch["batch_idx"].long(), minlength=images).tolist()
        live_bytes = trace.mark()
        with in_slices(criterion.assigner, counts):
            loss = _run(criterion, predictions, batch)
        del batch, predictions  # as the frame that made them ends; what the loss still needs it holds
        loss.sum().backward()
    return int(trace.peak_bytes() - live_bytes)


def _run(criterion: Any, predictions: dict[str, Any], batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = criterion(predictions, batch)[0]
    return loss


def _boxes(images: int, most: int, classes: int, draw: torch.Generator) -> dict[str, Tensor]:
    counts = torch.tensor([most] + [-(-most // 2)] * (images - 1))
    total = int(counts.sum())
    side = 0.02 + 0.28 * torch.rand(total, 2, generator=draw)  # of the image: small to medium, as mosaics have them
    centre = side / 2 + (1 - side) * torch.rand(total, 2, generator=draw)
    return {
        "batch_idx": torch.repeat_interleave(torch.arange(images), counts).float(),
        "cls": torch.randint(0, classes, (total, 1), generator=draw).float(),
        "bboxes": torch.cat((centre, side), 1),
    }
