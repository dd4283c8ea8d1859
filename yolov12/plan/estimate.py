"""Peak bytes of a training step, put together: what is always there, and one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

from yolov12.mas.checkpointing.checkpointing import KEEP_ALL, Plan
from yolov12.mas.scheduling.candidates import beside_bytes
from yolov12.models.optimizer_state import optimizer_state
from yolov12.plan.fixed import LIBRARY_BYTES, NOMINAL_BATCH, gradients_bytes, weights_bytes
from yolov12.plan.micro_batch import MicroBatch
from yolov12.plan.network import Network, load

__all__ = ["Estimate", "Fixed", "estimate", "fixed"]


@dataclass(frozen=True)
class Fixed:
    """Bytes that do not depend on the micro-batch."""

    weights_bytes: int
    """Parameters and buffers."""
    gradients_bytes: int
    """One set of them."""
    optimizer: str
    optimizer_bytes: int
    ema_bytes: int
    library_bytes: int
    accumulates: bool
    """Gradients stay from one batch to the next, as Ultralytics adds up batches smaller than 64."""

    @property
    def live_bytes(self) -> int:
        """Between batches."""
        held = self.weights_bytes + self.optimizer_bytes + self.ema_bytes + self.library_bytes
        return held + self.gradients_bytes * self.accumulates


@dataclass(frozen=True)
class Estimate:
    """What one step takes."""

    images: int
    """Of a micro-batch."""
    plan: Plan
    live_bytes: int
    """Before a micro-batch, from the second of a batch on."""
    micro_batch_bytes: int
    """Above that, at the peak."""

    @property
    def peak_bytes(self) -> int:
        """What `torch.cuda.max_memory_allocated` would say."""
        return self.live_bytes + self.micro_batch_bytes


def fixed(network: Network, batch: int, optimizer: str = "auto", ema: bool = True) -> Fixed:
    """Sum up what does not depend on the micro-batch.

    Args:
        network: The model.
        batch: Images of one.
        optimizer: As in `optimizer=`.
        ema: Whether a moving average of the weights is kept, as Ultralytics does.

    Raises:
        ConfigError: There is no such optimizer.
    """
    name, state_bytes = optimizer_state(network.model, optimizer)
    weights = weights_bytes(network.model)
    return Fixed(
        weights_bytes=weights,
        gradients_bytes=gradients_bytes(network.model),
        optimizer=name,
        optimizer_bytes=state_bytes,
        ema_bytes=weights if ema else 0,
        library_bytes=LIBRARY_BYTES,
        accumulates=batch <= NOMINAL_BATCH * 2 // 3,  # where round(64 / batch) is 2 or more
    )


def estimate(
    model: str | Network,
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
        model: As in `model=`, or what `load` made of it.
        micro_batch: Images at once.
        plan: What is rebuilt and recomputed.
        imgsz: Height and width of images.
        batch: Images of a batch.
        boxes: In the image that has most.
        optimizer: As in `optimizer=`.
        amp: Whether autocast is on.
        ema: Whether a moving average of the weights is kept.
        classes: That the model finds; by default as its file says.

    Raises:
        ConfigError: It is no detection model, or there is no such optimizer.
    """
    network = model if isinstance(model, Network) else load(model, classes)
    held = fixed(network, batch, optimizer, ema)
    _, peak_bytes = MicroBatch(network, imgsz, boxes, amp).trace(micro_batch, plan)
    live_bytes = beside_bytes(held.live_bytes, held.gradients_bytes, alone=batch <= micro_batch)
    return Estimate(micro_batch, plan, live_bytes, peak_bytes)
