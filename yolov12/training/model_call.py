"""Function around the call of a model, which runs for every call: it imports nothing unless the call is ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["model_call"]


def model_call(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Make what takes the place of a model's `__call__`: stock's, except for a logical batch.

    Args:
        stock: The stock method.
    """

    @functools.wraps(stock)
    def call(model: Any, /, *args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], dict) or type(args[0]) is dict:
            return stock(model, *args, **kwargs)
        from yolov12.training.adapter import logical_batch

        return logical_batch.call(stock, model, *args, **kwargs)

    return call
