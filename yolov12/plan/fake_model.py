"""Builds a detection model from fake tensors, which have shapes but no data and take no memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from yolov12.errors import ConfigError

__all__ = ["FakeModel", "load"]


class FakeModel:
    """A detection model in training mode and channels_last layout, whose tensors are fake.

    Attributes:
        model: The model. It runs only inside `mode`.
        mode: The fake tensor mode of the model.
        criterion: The loss of the model.
        strides: Stride of each detection scale, in pixels.

    Args:
        model: A detection model of Ultralytics with real tensors. It is changed in place.
    """

    def __init__(self, model: Any) -> None:
        from ultralytics.cfg import get_cfg

        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = model.train().to(memory_format=torch.channels_last)
        self.model.args = get_cfg()
        for parameter in self.model.parameters():  # as Ultralytics' trainer does, also for frozen checkpoints
            parameter.requires_grad_(parameter.is_floating_point())
        for path, layer in self.model.named_modules():
            if path.endswith(".dfl"):
                layer.requires_grad_(False)
        self.criterion = self.model.init_criterion()
        self.strides = [int(stride) for stride in self.model.stride]
        for layer in self.model.modules():
            self._empty(layer)

    def _empty(self, layer: nn.Module) -> None:
        for name, parameter in layer._parameters.items():
            if parameter is not None:
                fake = self.mode.from_tensor(parameter.detach())
                layer._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in layer._buffers.items():
            if buffer is not None:
                layer._buffers[name] = self.mode.from_tensor(buffer)


def load(name: str, classes: int | None = None) -> FakeModel:
    """Build a fake model.

    Args:
        name: A model yaml such as `yolov12s.yaml`, or a weight file.
        classes: Number of classes. None means: the number in the file.

    Returns:
        The fake model.

    Raises:
        ConfigError: The file is an exported model, or does not describe a detection model with one head.
    """
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils.loss import v8DetectionLoss

    from yolov12 import YOLO

    with _Uninitialised():  # type: ignore[no-untyped-call]
        model: Any = YOLO(name).model
        if isinstance(model, str):  # Ultralytics keeps the path of an exported model
            way_out = "Add format=onnx to plan this graph" if name.endswith(".onnx") else "Give its yaml or weight file"
            raise ConfigError(f"model={name} is an exported model, which cannot be trained. {way_out}")
        if type(model) is not DetectionModel:
            raise ConfigError(f"model={name} is a {type(model).__name__}: plans are made for detection models")
        if classes is not None and classes != model.yaml["nc"]:
            model = DetectionModel(dict(model.yaml), nc=classes, verbose=False)
    fake_model = FakeModel(model.float())
    if type(fake_model.criterion) is not v8DetectionLoss:
        raise ConfigError(f"model={name} has two heads: plans are made for models with one")
    return fake_model


class _Uninitialised(TorchFunctionMode):
    """Skips the initialisation of weights. For a large model it takes seconds, and the values are not used."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))
