"""Measures the memory of the detection loss by allocating its tensors on the CPU.

Their sizes depend on the values of boxes, so fake tensors cannot be used. The loss runs for 2 and for 4 images, on
random predictions and boxes, without the kernels that fill in values on a GPU. Ultralytics' own loss runs for a model
without distributions of distances, as in a training. The size of each tensor is proportional to the number of images,
so two measurements give a linear function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yolov12.mas.profiling.trace import ByteTrace
from yolov12.models.assigner import in_slices
from yolov12.models.candidates import Labels
from yolov12.models.detection_loss import detection_loss
from yolov12.plan.cuda_rules import HALF, cuda_rules
from yolov12.plan.fake_model import FakeModel

__all__ = ["LinearBytes", "line_through", "loss_bytes"]

_IMAGES = (2, 4)


@dataclass(frozen=True)
class LinearBytes:
    """Bytes as a linear function of the number of images."""

    fixed_bytes: float
    bytes_per_image: float

    def __call__(self, images: int) -> int:
        """Return the bytes for this number of images."""
        return round(self.fixed_bytes + self.bytes_per_image * images)


def line_through(measured: Mapping[int, int]) -> LinearBytes:
    """Fit the linear function to two measurements.

    Args:
        measured: Number of images → bytes, two entries.
    """
    (few, low), (many, high) = measured.items()
    slope = (high - low) / (many - few)
    return LinearBytes(low - slope * few, slope)


def loss_bytes(fake_model: FakeModel, imgsz: int, boxes: int, amp: bool) -> LinearBytes:
    """Measure the peak of the loss and its backward pass, without the predictions.

    Args:
        fake_model: The model, which has the loss.
        imgsz: Height and width of the images in pixels.
        boxes: Boxes of the fullest image. The other images have half as many.
        amp: True for mixed precision.

    Returns:
        The peak in bytes by number of images.
    """
    _measured_bytes(fake_model, imgsz, boxes, amp, 1)  # makes the anchors, which the loss keeps for all batches
    return line_through({images: _measured_bytes(fake_model, imgsz, boxes, amp, images) for images in _IMAGES})


def _measured_bytes(fake_model: FakeModel, imgsz: int, boxes: int, amp: bool, images: int) -> int:
    criterion = fake_model.criterion
    dtype: torch.dtype = HALF if amp else torch.float32
    draw = torch.Generator().manual_seed(0)
    sides = [imgsz // stride for stride in fake_model.strides]
    anchors = sum(side * side for side in sides)
    distances = criterion.reg_max * 4
    with ByteTrace() as trace, cuda_rules(amp):
        predictions: dict[str, Any] = {
            "boxes": torch.randn(images, distances, anchors, generator=draw).to(dtype).requires_grad_(),
            "scores": torch.randn(images, criterion.nc, anchors, generator=draw).to(dtype).requires_grad_(),
            "feats": [torch.zeros(1, dtype=dtype).expand(images, 1, side, side) for side in sides],
        }
        batch = _boxes(images, boxes, criterion.nc, draw)
        allocated_bytes = trace.mark()
        loss = _run(criterion, predictions, batch)
        del batch, predictions  # a training step releases them here, too; the loss keeps what it needs
        loss.sum().backward()
    return int(trace.peak_bytes() - allocated_bytes)


def _run(criterion: Any, predictions: dict[str, Any], batch: dict[str, Tensor]) -> Tensor:
    if not criterion.use_dfl:
        return _stocks_loss(criterion, predictions, batch)
    labels = Labels(batch["batch_idx"], batch["bboxes"], batch["cls"])
    return detection_loss(criterion, predictions, labels, batch["cls"], lambda *_: None)[0]


def _stocks_loss(criterion: Any, predictions: dict[str, Any], batch: dict[str, Tensor]) -> Tensor:
    counts = torch.bincount(batch["batch_idx"].long(), minlength=len(predictions["scores"])).tolist()
    with in_slices(criterion.assigner, counts):
        loss: Tensor = criterion(predictions, batch)[0]
    return loss


def _boxes(images: int, most: int, classes: int, draw: torch.Generator) -> dict[str, Tensor]:
    counts = torch.tensor([most] + [-(-most // 2)] * (images - 1))
    total = int(counts.sum())
    side = 0.02 + 0.28 * torch.rand(total, 2, generator=draw)  # fraction of the image: small to medium, as in mosaics
    centre = side / 2 + (1 - side) * torch.rand(total, 2, generator=draw)
    return {
        "batch_idx": torch.repeat_interleave(torch.arange(images), counts).float(),
        "cls": torch.randint(0, classes, (total, 1), generator=draw).float(),
        "bboxes": torch.cat((centre, side), 1),
    }
