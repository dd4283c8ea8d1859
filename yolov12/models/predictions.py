"""Memory layout of a detection head's predictions: that in which Ultralytics' losses read them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["anchors_first", "forward_head"]

_anchors_first: ContextVar[bool] = ContextVar("yolov12_anchors_first", default=False)


@contextmanager
def anchors_first(wanted: bool) -> Iterator[None]:
    """Let the heads in this context write all values of an anchor beside each other.

    The predictions keep their shape, (images, channels, anchors), and their values. What a convolution gives in
    channels_last is then concatenated without a transposition, and the loss, which asks for (images, anchors,
    channels), does not transpose it back.

    Args:
        wanted: False for Ultralytics' own layout, as code of the user's may rely on it.
    """
    token = _anchors_first.set(wanted)
    try:
        yield
    finally:
        _anchors_first.reset(token)


def forward_head(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `Detect.forward_head` that writes the predictions as `anchors_first` asks for.

    Args:
        stock: Ultralytics' own method.
    """

    @functools.wraps(stock)
    def forward(
        self: Any, x: list[Tensor], box_head: nn.Module | None = None, cls_head: nn.Module | None = None
    ) -> Any:
        # A compiler cannot trace what follows, and the engine runs no compiled model.
        if torch.compiler.is_compiling() or not _anchors_first.get() or not self.training:
            return stock(self, x, box_head, cls_head)
        is_hooked = self._forward_hooks or torch_module._global_forward_hooks
        is_seen = is_hooked or not type(self).__module__.startswith("ultralytics.")
        if is_seen or box_head is None or cls_head is None:
            return stock(self, x, box_head, cls_head)
        boxes, scores = ([head(each) for head, each in zip(heads, x, strict=False)] for heads in (box_head, cls_head))
        return {"boxes": _joined(boxes), "scores": _joined(scores), "feats": x}

    return forward


def _joined(maps: Sequence[Tensor]) -> Tensor:
    """Return (images, channels, anchors) of all maps (images, channels, height, width)."""
    return torch.cat([each.permute(0, 2, 3, 1).flatten(1, 2) for each in maps], 1).permute(0, 2, 1)
