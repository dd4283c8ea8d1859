"""Images of a batch as the first convolution reads them, in one kernel.

Ultralytics' `preprocess_batch` makes fp32 images of the loader's bytes, and divides them by 255. Autocast then converts
them to half precision, and the convolution to channels_last. If all of that is known to follow, one kernel makes the
same values, and no fp32 images are kept.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from yolov12.mas.triton_launch import compiles, launch, unfilled, unit_of
from yolov12.training.adapter.known import is_stock
from yolov12.training.adapter.users_code import forward_of, is_ultralytics
from yolov12.training.data.device_rendering import PackedTensor, has_kernel, rendered

try:
    from yolov12.training.adapter import image_kernel
except ImportError:  # PyTorch supports platforms that Triton does not
    image_kernel = None  # type: ignore[assignment]

__all__ = ["half_type", "scaled"]

_BLOCK, _WARPS = 4096, 8


def half_type(model: nn.Module, images: Any) -> torch.dtype | None:
    """Return the type to which autocast will convert images; None if code of the user's may see them before.

    Args:
        model: Model whose `forward` and loss are Ultralytics' own.
        images: Images of a part, before `preprocess_batch`.
    """
    return _autocast_type() if _applies(images) and _goes_to_convolution(model) else None


@unfilled
def scaled(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Return images with values from 0 to 1 in channels_last.

    Args:
        images: (images, channels, height, width) with values from 0 to 255, uint8. Packed ones are rendered.
        dtype: Type of the result, fp16 or bf16.
    """
    if isinstance(images, PackedTensor):
        return rendered(images.packed, dtype)
    count, channels, height, width = images.shape
    out = torch.empty(images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    pixels = height * width
    unit = unit_of(pixels)
    launch(
        image_kernel.scale,
        (-(-channels * pixels // _BLOCK), count, 1),
        (out, images),
        (pixels // unit,),
        (unit, channels, _BLOCK),
        _WARPS,
    )
    return out


def _applies(images: Any) -> bool:
    if isinstance(images, PackedTensor):
        return has_kernel(images.device)
    return (
        isinstance(images, Tensor)
        and images.is_cuda
        and images.dtype == torch.uint8
        and images.ndim == 4
        and images.is_contiguous()
        and images.numel() > 0
        and _compiles(images.device)
    )


@functools.cache
def _compiles(device: torch.device) -> bool:
    if image_kernel is None:
        return False
    pixels = torch.zeros(1, 3, 4, 4, device=device, dtype=torch.uint8)  # for the kernel that most sizes need
    return compiles(lambda: scaled(pixels, torch.float16))  # BatchNorm's kernels log the reason


def _autocast_type() -> torch.dtype | None:
    if not torch.is_autocast_enabled():
        return None
    if hasattr(torch, "get_autocast_dtype"):  # from PyTorch 2.4 on, which warns of the other
        found: torch.dtype = torch.get_autocast_dtype("cuda")
        return found
    return torch.get_autocast_gpu_dtype()


def _goes_to_convolution(model: nn.Module) -> bool:
    """Return whether only a convolution of the model reads the images, and no code of the user's."""
    layers = getattr(model, "model", None)
    if not isinstance(layers, nn.Sequential) or not len(layers):
        return False
    first = layers[0]
    convolution = getattr(first, "conv", None)
    return (
        type(convolution) is nn.Conv2d
        and convolution.weight.is_contiguous(memory_format=torch.channels_last)  # else the user wants another layout
        and is_ultralytics(forward_of(first))
        and "forward" not in vars(convolution)
        and type(first).__name__ == "Conv"
        and all(is_stock(model, name) for name in ("predict", "_predict_once"))
        and not any(module._forward_pre_hooks or module._forward_hooks for module in (model, first, convolution))
        and not torch_module._global_forward_pre_hooks
        and not torch_module._global_forward_hooks
    )
