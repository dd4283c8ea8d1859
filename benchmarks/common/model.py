"""A model in training with a drawn batch, for benchmarks of single steps."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from typing import Any

from benchmarks.common.processes import GIB, limit_memory

BOXES_PER_IMAGE = 25


def prepare(
    images: int = 256, size: int = 640, seed: int = 0, cfg: str = "yolov12s.yaml", device: str = "cuda"
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Return a model, its task, a gradient scaler with the scale of a running training, and a batch on the host.

    The batch of a GPU is in pinned memory.

    Args:
        images: Number of images in the batch.
        size: Size of the images in pixels.
        seed: Seed of weights and images.
        cfg: Yaml of the model.
        device: `cuda` or, to try a benchmark, `cpu`.
    """
    import torch

    from yolov12 import autopatch

    if os.environ.get("YOLOV12_AUTOPATCH") != "0":  # 0 asks for stock
        autopatch.apply()
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG

    torch.manual_seed(seed)
    model = DetectionModel(cfg, nc=80, verbose=False).to(device).to(memory_format=torch.channels_last)
    model.train().args = DEFAULT_CFG
    batch = random_batch(images, size, BOXES_PER_IMAGE)
    if device == "cuda":
        batch["img"] = batch["img"].pin_memory()
    return model, task(device, only_scales=True), gradient_scaler(device), batch


class Training:
    """Model in training, with its optimizer, scaler, moving average and a batch.

    Args:
        cfg: Yaml of the model.
        images: Number of images in the batch.
        size: Their size in pixels.
        device: `cuda` or, to try a benchmark, `cpu`, where memory is the resident memory of this process.
    """

    def __init__(self, cfg: str, images: int = 256, size: int = 640, device: str = "cuda") -> None:
        import torch
        from ultralytics.utils.torch_utils import ModelEMA

        from yolov12.mas.memory.host import HostMeter

        self.images, self.device, self._on_card = images, device, device == "cuda"
        self.model, self.task, self.scaler, self.batch = prepare(images, size, cfg=cfg, device=device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
        self.ema = ModelEMA(self.model)
        self.out_of_memory = torch.cuda.OutOfMemoryError
        self._host, self._limit_bytes = HostMeter(), math.inf

    def update(self) -> None:
        """Update the weights and their moving average."""
        update(self.model, self.optimizer, self.scaler)
        self.ema.update(self.model)

    def bare(self, batch: int, start: int = 0) -> None:
        """Run the forward and backward pass of a batch as Ultralytics does.

        Args:
            batch: Number of images.
            start: First image.
        """
        with self.autocast():
            part = self.task.preprocess(part_of(self.batch, start, start + batch))
            loss, _ = self.model(part)
        self.scaler.scale(loss.sum()).backward()

    def autocast(self) -> Any:
        """Return the context of mixed precision."""
        return autocast(self.device)

    def wait(self) -> None:
        """Wait until the card has done its work."""
        wait(self.device)

    def limit(self, gib: float) -> None:
        """Limit the allocator as if the card had so many GiB. On a CPU, nothing refuses memory, see `is_over_limit`."""
        self._limit_bytes = gib * GIB
        if self._on_card:
            limit_memory(gib)

    def is_over_limit(self) -> bool:
        """Return whether more memory than the limit was used on a CPU since the mark. A GPU refuses it."""
        return not self._on_card and self._host.peak_bytes() > self._limit_bytes

    def release(self) -> None:
        """Give unused memory back to the card, or to the system."""
        import torch

        torch.cuda.empty_cache()
        if not self._on_card:
            self._host.release()

    def mark(self) -> None:
        """Begin to measure a peak."""
        import torch

        if self._on_card:
            torch.cuda.reset_peak_memory_stats()
        else:
            self._host.mark()

    def peak_bytes(self) -> int:
        """Return the highest allocated bytes since the mark."""
        import torch

        return torch.cuda.max_memory_allocated() if self._on_card else self._host.peak_bytes()

    def allocated_bytes(self) -> int:
        """Return the bytes allocated now."""
        import torch

        if self._on_card:
            return torch.cuda.memory_allocated()
        self._host.release()
        return self._host.read().reserved_bytes


def autocast(device: str) -> Any:
    """Return the context of mixed precision: fp16 on a GPU; on a CPU, all is fp32.

    Args:
        device: `cuda` or `cpu`.
    """
    import torch

    return torch.autocast("cuda", torch.float16) if device == "cuda" else contextlib.nullcontext()


def wait(device: str) -> None:
    """Wait until a GPU has done its work."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def random_batch(images: int, size: int, boxes_per_image: int) -> dict[str, Any]:
    """Return random images with random objects, as a loader of Ultralytics collates them.

    Args:
        images: Number of images.
        size: Their size in pixels.
        boxes_per_image: Mean number of objects in an image.
    """
    import torch

    counts = torch.randint(1, 2 * boxes_per_image, (images,))
    boxes = int(counts.sum())
    return {
        "img": torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8),
        "batch_idx": torch.repeat_interleave(torch.arange(images), counts).float(),
        "cls": torch.randint(0, 80, (boxes, 1)).float(),
        "bboxes": torch.rand(boxes, 4) * 0.3 + 0.2,
    }


def part_of(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return some images of a batch with their objects, without the help of this package."""
    image_of = batch["batch_idx"]
    mine = (image_of >= start) & (image_of < stop)
    return {
        "img": batch["img"][start:stop],
        "batch_idx": image_of[mine] - start,
        **{key: batch[key][mine] for key in ("cls", "bboxes")},
    }


def task(device: str, **settings: Any) -> Any:
    """Return the detection task of a batch that Ultralytics' trainer would move to a device.

    Args:
        device: `cuda` or `cpu`.
        settings: Arguments of `DetectionTask`.
    """
    import torch

    from yolov12.training.adapter.detection import DetectionTask

    def preprocess(part: dict[str, Any]) -> dict[str, Any]:  # like Ultralytics' DetectionTrainer
        part = {
            key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for key, value in part.items()
        }
        return {**part, "img": part["img"].float() / 255}

    return DetectionTask(preprocess, multi_scale=False, overlapping_masks=True, **settings)


def gradient_scaler(device: str) -> Any:
    """Return a gradient scaler with the scale of a running training; on a CPU, it is off."""
    import torch

    scaler = torch.amp.GradScaler(device, init_scale=128.0, enabled=device == "cuda")
    scaler.scale(torch.zeros((), device=device))  # it makes its scale only now
    return scaler


def update(model: Any, optimizer: Any, scaler: Any) -> None:
    """Update the weights as Ultralytics' trainer does."""
    import torch

    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def engine(model: Any, task: Any, scaler: Any, config: Mapping[str, Any], **more: Any) -> Any:
    """Return an engine that runs a model with a scaled loss.

    Args:
        model: The model.
        task: Its task.
        scaler: Gradient scaler.
        config: Fields of `mas.Config`.
        more: Further arguments of `mas.Engine`.
    """
    from yolov12 import mas
    from yolov12.models.activations import activations

    return mas.Engine(
        model,
        task,
        mas.Config(**config),
        backward=lambda loss: scaler.scale(loss).backward(),
        activations=activations(model),
        **more,
    )
