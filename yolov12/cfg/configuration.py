"""Configurations that Ultralytics makes, from which trainers, validators and others take their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from yolov12.cfg.arguments import defaults
from yolov12.demo.dataset import ensure, is_demo

__all__ = ["get_cfg"]


def get_cfg(stock: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' `get_cfg` with a complete configuration; `data=demo...` and `replay=demo...` become yaml files.

    A configuration that a user has loaded from a file, or made from Ultralytics' own `default.yaml`, may lack the
    arguments of this package. It gets their defaults.

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
    from ultralytics.cfg import cfg2dict

    given = inspect.signature(stock).bind(*args, **kwargs)
    given.apply_defaults()
    given.arguments["cfg"] = {**defaults(), **cfg2dict(given.arguments["cfg"])}
    cfg = stock(*given.args, **given.kwargs)
    for name in ("data", "replay"):
        if is_demo(data := getattr(cfg, name, None)):
            from ultralytics.utils import SETTINGS

            setattr(cfg, name, str(ensure(str(data), Path(SETTINGS["datasets_dir"]), name)))
    return cfg
