"""Drawing the demo data set when a configuration asks for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from yolov12.demo.dataset import ensure, is_demo

__all__ = ["get_cfg"]


def get_cfg(stock: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' `get_cfg`; `data=demo...` and `replay=demo...` become yaml files there.

    Args:
        stock: Ultralytics' own function.
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.

    Returns:
        The configuration, a namespace.

    Raises:
        ConfigError: The data set's description is malformed.
        DataError: Something else has the name of its folder.
    """
    cfg = stock(*args, **kwargs)
    for name in ("data", "replay"):
        if is_demo(data := getattr(cfg, name, None)):
            from ultralytics.utils import SETTINGS

            setattr(cfg, name, str(ensure(str(data), Path(SETTINGS["datasets_dir"]))))
    return cfg
