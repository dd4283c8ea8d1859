"""A detection model of which only shapes exist: its tensors hold nothing, so its size does not matter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from yolov12.errors import ConfigError

__all__ = ["Network", "load"]


class Network:
    """A model in training mode, in the memory layout of trainings on a GPU, and the mode that it lives in.

    Args:
        model: A detection model of Ultralytics', with values. It is changed.
    """

    def __init__(self, model: Any) -> None:
        from ultralytics.cfg import get_cfg

        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = model.train().to(memory_format=torch.channels_last)
        self.model.args = get_cfg()
        for parameter in self.model.parameters():  # as Ultralytics' trainer does, whatever a checkpoint says
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


def load(name: str, classes: int | None = None) -> Network:
    """Build a model or read its weights.

    Args:
        name: `yolov12s.yaml`, a yaml of one's own, or a weight file.
        classes: That it finds; by default as the file says.

    Raises:
        ConfigError: It is no detection model.
    """
    from ultralytics.nn.tasks import DetectionModel

    from yolov12 import YOLO

    with _Uninitialised():  # type: ignore[no-untyped-call]
        model: Any = YOLO(name).model
        if type(model) is not DetectionModel:
            raise ConfigError(f"model={name} is a {type(model).__name__}: plans are made for detection models")
        if classes is not None and classes != model.yaml["nc"]:
            model = DetectionModel(dict(model.yaml), nc=classes, verbose=False)
    return Network(model.float())


class _Uninitialised(TorchFunctionMode):
    """Leaves weights as memory was: to draw those of a large model takes seconds, and nobody looks at them."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))
