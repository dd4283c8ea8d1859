"""Validation and prediction in slices that fit into memory, with the same results as the whole batch.

Ultralytics validates at twice the training batch, and keeps a whole batch on the device from the images to the boxes.
Here its images stay on the host. When Ultralytics calls the model, each slice runs completely, up to its loss and
boxes, and later calls return these results.

The validator's own code sees what Ultralytics shows it. Images on the host look like images on the device, and are made
when somebody uses them. A `preprocess` of the user's own gets the whole batch, and its result is what runs in slices; a
`postprocess` of the user's own gets the outputs for the whole batch.

Several ranks divide the batches of validation among them, or the images if there is only one batch. Ultralytics gathers
the statistics. This module gathers the losses, which are also those of a validation in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils import LOGGER
from ultralytics.utils.ops import Profile

from yolov12.errors import DoesNotFitError
from yolov12.mas import Config
from yolov12.mas.inference import Slices
from yolov12.mas.modules import overridden
from yolov12.mas.oom import is_out_of_memory
from yolov12.mas.step.loss import Total
from yolov12.mas.task import Loss
from yolov12.training.adapter.deferred_tensor import DeferredTensor, TensorFacts
from yolov12.training.adapter.detection import BOXES, DetectionTask, knows_loss
from yolov12.training.adapter.known import is_stock, why_not_split
from yolov12.training.adapter.prediction import SLICES, joined, settings_of, slices_of, tell_once
from yolov12.training.run import preflight, process_group

__all__ = ["over_limit", "validate"]

_UNSPLIT = "validation runs as Ultralytics runs it"
_TRAINS = "_yolov12_trains"  # attribute of a validator that a trainer has called, True


def validate(stock: Callable[..., Any], validator: Any, trainer: Any, model: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' validation in slices that fit into memory, if the model and the validator are known.

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
        DataError: The keypoints of the data are not those of the model.
        DoesNotFitError: Not even one image fits into memory, or not a whole batch in a method of the user's own.
    """
    if not getattr(validator.args, "mas", False):
        return stock(validator, trainer, model, **kwargs)
    Config.check(settings_of(validator))  # before any data is read
    validation = _Validation(validator, trainer is not None)
    group = process_group.current()
    on_cpu = group is not None and trainer is None and group.device.type == "cpu"
    try:
        with _on_the_cpu() if on_cpu else nullcontext():
            return stock(validator, trainer, model, **kwargs)
    finally:
        validation.end()


def over_limit(validator: Any) -> str:
    """Return a line for the summary of a training if its validations went over `mem_limit`; empty if they did not."""
    slices = getattr(validator, SLICES, None)
    return f"\n  validation {slices.over_limit}" if slices is not None and slices.over_limit else ""


class _Validation:
    """One validation: takes over methods of the validator and the forward pass of its model until `end`.

    What it returns from one method is recognised by the next. With any other batch, the methods do what they did.

    Args:
        validator: Ultralytics validator.
        training: True if a trainer validates, which also needs losses.
    """

    def __init__(self, validator: Any, training: bool) -> None:
        self._validator, self._training = validator, training
        if training:
            setattr(validator, _TRAINS, True)
        self._stock: dict[str, Any] = {}  # method → what the validator had
        self._own: dict[str, Any] = {}  # method → what was set on the validator itself
        self._ours: dict[str, Any] = {}  # method → what takes its place
        self._slices: Slices | None = None
        self._stack = ExitStack()
        self._task: DetectionTask | None = None
        self._batch: dict[str, Any] = {}
        self._source: Tensor | None = None  # images of the batch, as they are before `preprocess` or after it
        self._convert: Callable[[Tensor], Tensor] = _same  # makes of images of the source what the model gets
        self._result: Any = object()  # in place of the model's outputs
        self._whole: Any = object()  # the model's outputs for a batch that cannot be split
        self._items: dict[str, Tensor] = {}
        self._losses: list[tuple[Loss, int]] = []  # of each batch, with its number of images
        self._replace("init_metrics", self._begin)

    def end(self) -> None:
        """Restore the validator and the model, and release memory."""
        self._stack.close()
        mine = vars(self._validator)
        for name, method in self._ours.items():
            if mine.get(name) is method:  # a callback may have replaced it
                del mine[name]
                mine.update({name: self._own[name]} if name in self._own else {})
        if self._slices is None:
            return
        self._slices.meter.release(thorough=False)  # validations are frequent where epochs are short
        if not hasattr(self._validator, _TRAINS):
            if self._slices.over_limit:
                LOGGER.warning(f"memory: validation {self._slices.over_limit}")
            delattr(self._validator, SLICES)

    def _replace(self, name: str, method: Callable[..., Any]) -> None:
        self._stock[name], self._ours[name] = getattr(self._validator, name), method
        if name in vars(self._validator):
            self._own[name] = vars(self._validator)[name]
        setattr(self._validator, name, method)

    def _begin(self, model: nn.Module) -> None:
        """Take over, in place of `init_metrics`, which Ultralytics calls right before the first batch."""
        preflight.check_keypoints(self._validator.data, model)
        self._stock["init_metrics"](model)
        self._slices = slices_of(self._validator, self._validator.device) if self._is_known(model) else None
        if self._slices is not None:
            self._take_over(model)

    def _is_known(self, model: Any) -> bool:
        """Return whether validation runs in slices; if not, say why, unless the training has said it."""
        validator = self._validator
        if not self._training and getattr(model, "format", None) != "pt":
            return False  # an exported model has a batch size of its own
        reason = why_not_split(model if self._training else model.model, validator.args)
        if reason is None and self._training and not knows_loss(model):
            reason = "the loss is not one of Ultralytics' own"
        is_told = reason is not None and hasattr(validator, _TRAINS)
        if reason is None and not isinstance(validator, DetectionValidator):
            reason = f"{type(validator).__name__} is no DetectionValidator"
        if reason is not None and not is_told:
            tell_once(validator, f"memory: {reason}: {_UNSPLIT}")
        return reason is None

    def _take_over(self, model: nn.Module) -> None:
        validator = self._validator
        assert self._slices is not None
        self._stack.enter_context(self._slices.meter.limited())
        self._forward, self._loss = model.forward, getattr(model, "loss", None)
        self._model = model
        self._times = {name: Profile(device=validator.device) for name in ("preprocess", "loss", "postprocess")}
        self._stack.enter_context(overridden({model: self._run}))
        self._has_stock_preprocess = is_stock(validator, "preprocess")
        self._keeps_outputs = not is_stock(validator, "postprocess") or bool(model._forward_hooks)
        if self._training:
            self._task = DetectionTask(_same, multi_scale=False, overlapping_masks=validator.args.overlap_mask)
            vars(model)["loss"] = self._loss_items
            self._stack.callback(vars(model).pop, "loss", None)
        self._replace("preprocess", self._preprocess)
        self._replace("postprocess", self._postprocess)
        self._replace("finalize_metrics", self._finalize)
        if process_group.current() is not None:
            self._replace("gather_stats", self._gather)

    def _preprocess(self, batch: Any) -> Any:
        """Preprocess a batch. Ultralytics' own method gets no images until somebody uses them."""
        self._batch, self._source = {}, None  # a batch on the device is freed before the next is
        self._result = self._whole = object()
        images = batch.get("img") if isinstance(batch, dict) else None
        if not self._has_stock_preprocess or not isinstance(images, Tensor) or images.ndim != 4:
            shown = self._users_batch(batch)
            self._batch = shown if isinstance(shown, dict) else {}
            self._source, self._convert = self._batch.get("img"), _same
            return shown
        shown = self._stock["preprocess"]({**batch, "img": images[:0]})
        facts = TensorFacts(images.shape, shown["img"].dtype, shown["img"].device)
        convert = self._on_device
        shown["img"] = DeferredTensor(facts, lambda: convert(images), lambda index: convert(images[index]))
        self._batch, self._source, self._convert = shown, images, convert
        return shown

    def _users_batch(self, batch: Any) -> Any:
        """Preprocess a whole batch; once more after a failed allocation, which may be a false alarm."""
        assert self._slices is not None
        try:
            return self._stock["preprocess"](dict(batch) if isinstance(batch, dict) else batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self._slices.meter.release()
        with self._at_once("preprocess"):
            return self._stock["preprocess"](batch)

    @contextmanager
    def _at_once(self, method: str) -> Iterator[None]:
        """Return a context for a whole batch in a method of the user's own. If memory fails, say what to do."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            smaller = "a smaller batch" + " (validation takes twice the batch of the training)" * self._training
            raise DoesNotFitError(
                f"validation: with code of your own, {method} of {type(self._validator).__name__} gets whole batches, "
                f"and one does not fit into memory ({error}). Ways out: {smaller}; or smaller images"
            ) from error

    def _on_device(self, images: Tensor) -> Tensor:
        """Convert images as Ultralytics does."""
        return DetectionValidator.preprocess(self._validator, {"img": images})["img"]  # type: ignore[no-any-return]

    def _run(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a batch up to its loss and boxes, in place of the model's forward pass."""
        source, task = self._source, self._task
        if images is not self._batch.get("img") or not isinstance(source, Tensor) or source.ndim != 4:
            return self._forward(images, *args, **kwargs)
        assert self._slices is not None
        labels = {**self._batch, "img": source}
        if task is not None and not task.splits(labels):
            tell_once(self._validator, f"memory: batches have values that are not of images or objects: {_UNSPLIT}")
            self._whole = self._forward(self._convert(source), *args, **kwargs)
            return self._whole
        if task is not None:
            task.workload(labels)

        def work(start: int, stop: int) -> Any:
            with self._times["preprocess"]:
                part = self._convert(source[start:stop])
            outputs = self._forward(part, *args, **kwargs)
            loss = None
            with self._times["loss"]:
                if task is not None:
                    loss = self._loss_of(task.part(labels, start, stop), part, outputs)
            with self._times["postprocess"], torch.autocast(part.device.type, enabled=False):
                found = outputs if self._keeps_outputs else self._stock["postprocess"](outputs)
                return found, loss, stop - start

        parts = self._slices.run(len(source), source.shape[2], source.shape[3], work)
        found = [each for each, *_ in parts]
        if self._keeps_outputs:
            with self._at_once("postprocess"):
                self._result = joined(found)
        else:
            self._result = [each for part in found for each in part]
        if task is not None:
            total = _total([(loss, count) for _, loss, count in parts], task.floor)
            self._items = total.items()
            self._note(total.as_part(), len(source))
        return self._result

    def _postprocess(self, outputs: Any) -> Any:
        if outputs is not self._result:
            return self._stock["postprocess"](outputs)
        if not self._keeps_outputs:
            return outputs
        with self._at_once("postprocess"):
            return self._stock["postprocess"](outputs)

    def _loss_items(self, batch: Any, outputs: Any = None) -> Any:
        """Return no loss and the items of the batch, in place of the model's loss."""
        assert self._loss is not None
        if outputs is self._result:
            return None, self._items
        found = self._loss(batch, outputs)
        if outputs is self._whole:
            self._note(Loss(torch.zeros(()), 1.0, found[1]), len(batch["img"]))
        return found

    def _note(self, loss: Loss, images: int) -> None:
        if process_group.current() is None:
            return  # a copy to the host waits for the device
        items = {name: item.cpu() for name, item in loss.items.items()}
        normaliser = torch.as_tensor(loss.normaliser).cpu()
        self._losses.append((replace(loss, value=loss.value.cpu(), normaliser=normaliser, items=items), images))

    def _loss_of(self, part: dict[str, Any], images: Tensor, outputs: Any) -> Any:
        assert self._task is not None
        assert self._loss is not None
        boxes, loss, batch = part[BOXES], self._loss, {**self._task.opened(part), "img": images}
        return self._task.measured(self._model, boxes, lambda: loss(batch, outputs))

    def _gather(self) -> None:
        """Gather statistics as Ultralytics does, and losses; on the host, as gloo cannot reduce a matrix on a GPU."""
        validator, group = self._validator, process_group.current()
        assert group is not None
        gathered: list[Any] | None = [None] * group.ranks.size if group.ranks.rank == 0 else None
        device, validator.device = validator.device, torch.device("cpu")
        try:
            with torch.inference_mode(False):  # gloo writes into tensors from its own thread
                self._stock["gather_stats"]()
                dist.gather_object(self._losses, gathered, dst=0)
        finally:
            validator.device = device
        if gathered is not None and self._task is not None:
            loader, batches = validator.dataloader, [[each] for of_rank in gathered for each in of_rank]
            if loader.sampler.batch_size != loader.batch_size:  # then all ranks validate parts of one batch
                batches = [[part for parts in batches for part in parts]]
            found = [_total(parts, self._task.floor).items() for parts in batches]
            for name, value in validator.loss.items():
                loss = sum(float(items[name]) for items in found) / len(found)
                value.fill_(loss * len(loader))  # Ultralytics divides by the batches of this rank

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


def _total(parts: Sequence[tuple[Loss, int]], floor: float) -> Total:
    """Return the total of a batch from the losses of its parts and their numbers of images."""
    total = Total(sum(images for _, images in parts), floor)
    for loss, images in parts:
        total.add(loss, images)
    return total


def _same(value: Any) -> Any:
    return value
