"""Validation and prediction in slices that fit into memory, with the same results as the whole batch.

Ultralytics validates at twice the training batch, and keeps a whole batch on the device from the images to the boxes.
Here a batch stays on the host. When Ultralytics calls the model, each slice runs completely, up to its loss and boxes,
and later calls return these results.

Several ranks divide the batches of validation among them, or the images if there is only one batch. Ultralytics gathers
the statistics. This module gathers the losses, which are also those of a validation in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.ops import Profile

from yolov12.mas import Config
from yolov12.mas.inference import Slices
from yolov12.mas.memory.meter import meter_for
from yolov12.mas.modules import overridden
from yolov12.mas.step.loss import Total
from yolov12.training.adapter.detection import BOXES, DetectionTask, knows_loss
from yolov12.training.run import process_group

__all__ = ["predict", "validate"]

_SLICES = "_yolov12_slices"  # attribute of validators and predictors: the next call uses what was learned


def validate(stock: Callable[..., Any], validator: Any, trainer: Any, model: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' validation; for detection and the tasks derived from it, in slices that fit into memory.

    Args:
        stock: Ultralytics' own method.
        validator: Ultralytics validator.
        trainer: Trainer whose model is validated; None outside of a training.
        model: Model to validate outside of a training.
        kwargs: Keyword arguments for `stock`.

    Returns:
        Metrics, as `stock` returns them.

    Raises:
        ConfigError: A setting of the engine is malformed or outside its range.
        DoesNotFitError: Not even one image fits into memory.
    """
    if not isinstance(validator, DetectionValidator) or not getattr(validator.args, "mas", False):
        return stock(validator, trainer, model, **kwargs)
    Config.check(_settings_of(validator))  # before any data is read
    validation = _Validation(validator, trainer is not None)
    group = process_group.current()
    on_cpu = group is not None and trainer is None and group.device.type == "cpu"
    try:
        with _on_the_cpu() if on_cpu else nullcontext():
            return stock(validator, trainer, model, **kwargs)
    finally:
        validation.end()


def predict(stock: Callable[..., Any], predictor: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' inference on a batch of images in slices that fit into memory.

    Args:
        stock: Ultralytics' own method.
        predictor: Ultralytics predictor.
        images: Images on the device, (images, channels, height, width).
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.

    Returns:
        Outputs of the model for the whole batch.

    Raises:
        DoesNotFitError: Not even one image fits into memory.
    """
    settings = predictor.args
    whole = (
        not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 1 or settings.embed or settings.visualize
    )
    if whole or not getattr(settings, "mas", False) or getattr(predictor.model, "format", None) != "pt":
        return stock(predictor, images, *args, **kwargs)
    slices = _slices_of(predictor, images.device)
    if slices is None:
        return stock(predictor, images, *args, **kwargs)
    count, _, height, width = images.shape

    def work(start: int, stop: int) -> Any:
        return stock(predictor, images[start:stop], *args, **kwargs)

    with slices.meter.limited():
        return _joined(slices.run(count, height, width, work))


class _Validation:
    """One validation: takes over the methods of the validator and the forward pass of its model until `end`.

    Args:
        validator: Ultralytics validator.
        training: True if a trainer validates, which also needs losses.
    """

    def __init__(self, validator: Any, training: bool) -> None:
        self._validator, self._training = validator, training
        names = "init_metrics", "preprocess", "postprocess", "finalize_metrics", "gather_stats"
        self._stock = {name: getattr(validator, name) for name in names}
        self._own = {name: vars(validator)[name] for name in self._stock if name in vars(validator)}
        self._slices: Slices | None = None
        self._stack = ExitStack()
        self._task: DetectionTask | None = None
        self._host: dict[str, Any] = {}
        self._predictions: list[Any] = []
        self._items: dict[str, Tensor] = {}
        self._sums: list[dict[str, Tensor]] = []  # for each batch: numerators of the items, and their normaliser
        validator.init_metrics = self._begin

    def end(self) -> None:
        """Restore the validator and the model, and release memory."""
        self._stack.close()
        for name in self._stock:
            vars(self._validator).pop(name, None)
        vars(self._validator).update(self._own)
        if self._slices is not None:
            self._slices.meter.release(collect=False)  # validations are frequent where epochs are short
            if not self._training:
                delattr(self._validator, _SLICES)

    def _begin(self, model: nn.Module) -> None:
        """Take over, in place of `init_metrics`, which Ultralytics calls right before the first batch."""
        validator = self._validator
        self._stock["init_metrics"](model)
        if self._training and not knows_loss(model):
            return  # nobody knows how the loss of a batch follows from those of its parts
        self._slices = _slices_of(validator, validator.device)
        if self._slices is None or not (self._training or getattr(model, "format", None) == "pt"):
            return
        self._stack.enter_context(self._slices.meter.limited())
        self._forward, self._loss = model.forward, getattr(model, "loss", None)
        self._model = model
        self._times = {name: Profile(device=validator.device) for name in ("preprocess", "loss", "postprocess")}
        self._stack.enter_context(overridden({model: self._run}))
        if self._training:
            self._task = DetectionTask(
                lambda part: part, multi_scale=False, overlapping_masks=validator.args.overlap_mask
            )
            vars(model)["loss"] = lambda batch, predictions: (None, self._items)
            self._stack.callback(vars(model).pop, "loss", None)
        validator.preprocess, validator.postprocess = self._keep, lambda _: self._predictions
        validator.finalize_metrics = self._finalize
        if process_group.current() is not None:
            validator.gather_stats = self._gather

    def _keep(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Preprocess a batch, but leave its images on the host."""
        images = batch["img"]
        self._host = dict(batch)
        return {**self._stock["preprocess"]({**batch, "img": images[:0]}), "img": images}

    def _run(self, images: Tensor, *args: Any, **kwargs: Any) -> None:
        """Run a batch up to its loss and boxes, in place of the model's forward pass."""
        assert self._slices is not None
        if self._task is not None:
            self._task.workload(self._host)

        def work(start: int, stop: int) -> Any:
            with self._times["preprocess"]:
                part = self._on_device(images[start:stop])
            predictions = self._forward(part, *args, **kwargs)
            loss = None
            with self._times["loss"]:
                if self._task is not None:
                    loss = self._loss_of(start, stop, part, predictions)
            with self._times["postprocess"], torch.autocast(part.device.type, enabled=False):
                return self._stock["postprocess"](predictions), loss, stop - start

        found = self._slices.run(len(images), images.shape[2], images.shape[3], work)
        self._predictions = [each for predictions, *_ in found for each in predictions]
        if self._task is not None:
            total = Total(len(images), self._task.floor)
            for _, loss, count in found:
                total.add(loss, count)
            self._items = total.items()
            self._sums.append(total.sums())

    def _on_device(self, images: Tensor) -> Tensor:
        images = images.to(self._validator.device, non_blocking=True)
        return (images.half() if self._validator.args.quantize == 16 else images.float()) / 255

    def _loss_of(self, start: int, stop: int, images: Tensor, predictions: Any) -> Any:
        assert self._task is not None
        assert self._loss is not None
        device = self._validator.device
        part = self._task.part(self._host, start, stop)
        part = {
            key: value.to(device) if isinstance(value, Tensor) and key != "img" else value
            for key, value in part.items()
        }
        boxes, loss = part.pop(BOXES), self._loss
        return self._task.measured(self._model, boxes, lambda: loss({**part, "img": images}, predictions))

    def _gather(self) -> None:
        """Gather statistics as Ultralytics does, and losses; on the host, as gloo cannot reduce a matrix on a GPU."""
        validator, group = self._validator, process_group.current()
        assert group is not None
        mine = [{name: float(value) for name, value in each.items()} for each in self._sums]
        gathered: list[Any] | None = [None] * group.ranks.size if group.ranks.rank == 0 else None
        device, validator.device = validator.device, torch.device("cpu")
        try:
            with torch.inference_mode(False):  # gloo writes into tensors from its own thread
                self._stock["gather_stats"]()
                dist.gather_object(mine, gathered, dst=0)
        finally:
            validator.device = device
        if gathered is not None and self._task is not None:
            loader = validator.dataloader
            batches = [each for of_rank in gathered for each in of_rank]
            if loader.sampler.batch_size != loader.batch_size:  # then all ranks validate parts of one batch
                batches = [{name: sum(part[name] for part in batches) for name in batches[0]}]
            for name, value in validator.loss.items():
                losses = [each[name] / max(each[""], self._task.floor) for each in batches]
                value.fill_(sum(losses) / len(losses) * len(loader))  # Ultralytics divides by the batches of this rank

    def _finalize(self) -> None:
        """Correct the times: Ultralytics has counted preprocessing, loss and postprocessing as inference."""
        speed, images = self._validator.speed, len(self._validator.dataloader.dataset)
        for name, time in self._times.items():
            speed[name] += time.t / images * 1e3
            speed["inference"] -= time.t / images * 1e3
        self._stock["finalize_metrics"]()


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Return a context for validation in several processes on the CPU, as Ultralytics assumes a GPU there."""
    from ultralytics.engine import validator as module

    backend, stock = module.get_torch_device_backend, module.AutoBackend
    module.get_torch_device_backend = lambda device: SimpleNamespace(current_device=lambda: 0)
    module.AutoBackend = lambda *args, **kwargs: stock(*args, **{**kwargs, "device": torch.device("cpu")})
    try:
        yield
    finally:
        module.get_torch_device_backend, module.AutoBackend = backend, stock


def _settings_of(owner: Any) -> dict[str, Any]:
    return {**vars(owner.args), "bn_group": None}  # nothing is trained


def _slices_of(owner: Any, device: torch.device) -> Slices | None:
    """Return the slices of a validator or predictor; None on a device whose memory cannot be read."""
    if device.type not in ("cuda", "cpu"):
        return None
    if not hasattr(owner, _SLICES):
        config = Config.parse(_settings_of(owner))
        setattr(owner, _SLICES, Slices(config, meter_for(device, config.limit)))
    slices: Slices = getattr(owner, _SLICES)
    return slices


def _joined(parts: list[Any]) -> Any:
    """Join the outputs of a model on parts of a batch."""
    first = parts[0]
    if isinstance(first, Tensor) and first.ndim:
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(_joined(list(each)) for each in zip(*parts, strict=True))
    return first
