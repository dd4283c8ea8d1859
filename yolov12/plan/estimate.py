"""Estimates the peak memory of a training step: fixed memory plus one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, Plan
from yolov12.mas.scheduling.candidates import beside_bytes
from yolov12.models.optimizer_state import optimizer_state
from yolov12.plan.fake_model import FakeModel, load
from yolov12.plan.fixed_bytes import LIBRARY_BYTES, NOMINAL_BATCH, gradients_bytes, weights_bytes
from yolov12.plan.micro_batch import MicroBatchTracer

__all__ = ["Estimate", "FixedMemory", "estimate", "fixed_memory"]


@dataclass(frozen=True)
class FixedMemory:
    """Bytes that do not depend on the micro-batch."""

    weights_bytes: int
    """Parameters and buffers."""
    gradients_bytes: int
    """One gradient for each trained parameter."""
    optimizer: str
    """Name of the optimizer."""
    optimizer_bytes: int
    """State of the optimizer."""
    ema_bytes: int
    """Moving average of the weights (EMA)."""
    library_bytes: int
    """Workspace of cuBLAS."""
    accumulates: bool
    """True if gradients stay allocated between batches, because Ultralytics accumulates over small batches."""

    @property
    def allocated_bytes(self) -> int:
        """Allocated bytes between batches."""
        always_bytes = self.weights_bytes + self.optimizer_bytes + self.ema_bytes + self.library_bytes
        return always_bytes + self.gradients_bytes * self.accumulates


@dataclass(frozen=True)
class Estimate:
    """Predicted memory of one training step."""

    images: int
    """Images in the micro-batch."""
    plan: Plan
    """Checkpoint plan."""
    allocated_bytes: int
    """Allocated bytes before a micro-batch. If a batch has several micro-batches, gradients are included."""
    micro_batch_bytes: int
    """Bytes that the micro-batch adds at its peak."""

    @property
    def peak_bytes(self) -> int:
        """Predicted `torch.cuda.max_memory_allocated`."""
        return self.allocated_bytes + self.micro_batch_bytes


def fixed_memory(fake_model: FakeModel, batch: int, optimizer: str = "auto", ema: bool = True) -> FixedMemory:
    """Compute the memory that does not depend on the micro-batch.

    Args:
        fake_model: The model.
        batch: Images in a batch.
        optimizer: A value of `optimizer=`.
        ema: True if the training keeps a moving average of the weights, as Ultralytics does.

    Returns:
        The parts of that memory in bytes.

    Raises:
        ConfigError: The optimizer is unknown.
    """
    name, state_bytes = optimizer_state(fake_model.model, optimizer)
    weights = weights_bytes(fake_model.model)
    return FixedMemory(
        weights_bytes=weights,
        gradients_bytes=gradients_bytes(fake_model.model),
        optimizer=name,
        optimizer_bytes=state_bytes,
        ema_bytes=weights if ema else 0,
        library_bytes=LIBRARY_BYTES,
        accumulates=batch <= NOMINAL_BATCH * 2 // 3,  # Ultralytics accumulates round(64 / batch) batches
    )


def estimate(
    model: str | FakeModel,
    *,
    micro_batch: int,
    plan: Plan = KEEP_ALL,
    imgsz: int = 640,
    batch: int = 256,
    boxes: int = 100,
    optimizer: str = "auto",
    amp: bool = True,
    ema: bool = True,
    classes: int | None = None,
) -> Estimate:
    """Predict the peak of a training step without a GPU.

    Args:
        model: A value of `model=`, or a result of `load`.
        micro_batch: Images in a micro-batch.
        plan: The checkpoint plan.
        imgsz: Height and width of the images in pixels.
        batch: Images in a batch.
        boxes: Boxes of the fullest image.
        optimizer: A value of `optimizer=`.
        amp: True for mixed precision.
        ema: True if the training keeps a moving average of the weights.
        classes: Number of classes. None means: the number in the model's file.

    Returns:
        The predicted memory in bytes.

    Raises:
        ConfigError: The model is not a detection model, or the optimizer is unknown.
    """
    fake_model = model if isinstance(model, FakeModel) else load(model, classes)
    fixed = fixed_memory(fake_model, batch, optimizer, ema)
    _, peak_bytes = MicroBatchTracer(fake_model, imgsz, boxes, amp).trace(micro_batch, plan)
    allocated_bytes = beside_bytes(fixed.allocated_bytes, fixed.gradients_bytes, alone=batch <= micro_batch)
    return Estimate(micro_batch, plan, allocated_bytes, peak_bytes)
