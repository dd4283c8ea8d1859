"""The Triton kernels of a training, found by a run on meta tensors, which have shapes and no data."""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from yolov12.mas import compile_ahead
from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.compile_ahead import Wanted
from yolov12.mas.modules import LIBRARIES, each_tensor, has_global_hooks, has_hooks, module_of
from yolov12.mas.step.upsampling import Upsampling
from yolov12.models import fused_loss
from yolov12.models.activations import activations
from yolov12.training.adapter.attach import why_not
from yolov12.training.adapter.images import scaled
from yolov12.training.data import device_rendering

__all__ = ["begin", "wanted"]

_META = torch.device("meta")
_GROUPS = (2, 2)  # of images: with one group, some layers do without the kernels
_SIDE = 64


def begin(trainer: Any) -> None:
    """Begin to compile a training's kernels in other processes, on the first rank of a machine.

    Args:
        trainer: Ultralytics trainer whose model is on its device.
    """
    from ultralytics.utils.torch_utils import unwrap_model

    if os.environ.get("LOCAL_RANK", "0") != "0" or not compile_ahead.can_begin(trainer.device):
        return
    model: nn.Module = unwrap_model(trainer.model)
    if why_not(trainer, model) is not None or has_global_hooks():
        return
    if any(has_hooks(module) or not _is_known(module) for module in model.modules()):
        return  # code of the user's own would see the meta tensors
    try:
        dtype = torch.float16 if trainer.amp else torch.float32
        renders = trainer.args.augment_on != "host"
        compile_ahead.begin(wanted(model, dtype, renders=renders), trainer.device)
    except Exception as error:  # a module of Ultralytics' that cannot do without data, no home, …
        logging.getLogger("yolov12.mas").debug("kernels are compiled at their first launch: %s", error)


def _is_known(module: nn.Module) -> bool:
    """Return whether all functions of a module are of PyTorch, Ultralytics or this package."""
    own = [each for each in vars(module).values() if isinstance(each, (FunctionType, MethodType, functools.partial))]
    kinds = type(module).__mro__[:-1]
    stock = [each for kind in kinds for each in vars(kind).values() if isinstance(each, FunctionType)]
    return "forward" not in vars(module) and all(module_of(each).startswith(LIBRARIES) for each in (*own, *stock))


def wanted(model: nn.Module, dtype: torch.dtype, *, renders: bool = False) -> list[Wanted]:
    """Return the kernels that a model of Ultralytics' and yolov12's own code needs, in the order of their first use.

    Args:
        model: The model, which stays as it is.
        dtype: Type of images and activations.
        renders: True if images may be augmented on the device.
    """
    from ultralytics.nn.tasks import DetectionModel

    twin = _on_meta(model, dtype)
    norms, upsampling = GroupedBatchNorm(twin, activations(twin)), Upsampling(twin)
    channels = next(layer.in_channels for layer in twin.modules() if isinstance(layer, nn.Conv2d))
    images = torch.empty(sum(_GROUPS), channels, _SIDE, _SIDE, dtype=torch.uint8, device=_META)
    with compile_ahead.noted() as found, _LikeCuda():  # type: ignore[no-untyped-call]
        if renders:
            device_rendering.note(dtype)
        for joins in (True, False):  # layers that a plan rebuilds write to no concatenation
            norms.begin()
            with norms.within(_GROUPS, 0), upsampling.within(), nullcontext() if joins else norms.apart():
                out = twin(scaled(images, dtype))
                torch.stack([each.float().sum() for each in _tensors(out)]).sum().backward()
            if joins and type(model) is DetectionModel:
                fused_loss.note(dtype)
    return list(found.values())


class _LikeCuda(TorchDispatchMode):
    """Gives results of convolutions the layout that they have on CUDA. On the meta device, it depends on PyTorch."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        return each_tensor(out, _channels_last) if func in _CONVOLUTIONS else out


_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _on_meta(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy of a model on the meta device, with the types that autocast would give to operands."""
    norms = {id(part) for layer in model.modules() if isinstance(layer, _BatchNorm) for part in layer.parameters()}
    memo: dict[int, Any] = {}  # what stands for tensors in the copy, so that no data is copied
    for part in model.parameters():
        kind = part.dtype if id(part) in norms or not part.is_floating_point() else dtype
        memo[id(part)] = nn.Parameter(torch.empty_like(part, dtype=kind, device=_META), part.requires_grad)
    memo |= {id(part): torch.empty_like(part, device=_META) for part in model.buffers()}
    twin = copy.deepcopy(model, memo).train()
    return twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _tensors(nest: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    each_tensor(nest, found.append)
    return (each for each in found if each.requires_grad)
