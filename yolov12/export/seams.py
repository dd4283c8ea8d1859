"""Functions around Ultralytics' exporter and its TensorRT backend, with the signatures of those they stand around."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from yolov12.export import engine
from yolov12.models.weight_names import is_packaged

__all__ = ["export", "export_engine", "get_tensorrt_logger", "load_model"]


def export(stock: Callable[..., Any], exporter: Any, /, model: Any) -> Any:
    """Run Ultralytics' `Exporter.__call__`, if the arguments can work.

    Ultralytics writes beside the weights. What is exported from the weights of this package goes to the current folder.

    Args:
        stock: Ultralytics' own method.
        exporter: Ultralytics' exporter.
        model: Model to export.

    Raises:
        ConfigError: An argument cannot work here.
    """
    from yolov12.export import session

    session.before_export(exporter)
    path = getattr(model, "pt_path", None)
    if path is None or not is_packaged(path):
        return stock(exporter, model)
    model.pt_path = Path(path).name
    try:
        return stock(exporter, model)
    finally:
        model.pt_path = path


def export_engine(stock: Callable[..., Any], exporter: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Build an engine that fits into memory. With `mas=False`, run Ultralytics' `export_engine`.

    Args:
        stock: Ultralytics' own method.
        exporter: Ultralytics' exporter.
        args: Positional arguments of `stock`: a prefix for log lines.
        kwargs: Keyword arguments of `stock`.

    Returns:
        The engine's file.
    """
    if not getattr(exporter.args, "mas", False):
        return stock(exporter, *args, **kwargs)
    from ultralytics.engine.exporter import try_export
    from ultralytics.utils import colorstr

    from yolov12.export import session

    def build(prefix: str = colorstr("TensorRT:")) -> Any:
        return session.export_engine(stock, exporter, prefix)

    return try_export(build)(*args, **kwargs)


def get_tensorrt_logger(stock: Callable[[], Any], /) -> Any:
    """The one TensorRT logger of this process, in place of Ultralytics' own.

    Args:
        stock: Ultralytics' own function, which makes a logger that remembers nothing.
    """
    import tensorrt

    return getattr(tensorrt, "yolov12_logger", None) or engine.logger(tensorrt)


def load_model(stock: Callable[..., Any], backend: Any, /, weight: Any) -> Any:
    """Run Ultralytics' `TensorRTBackend.load_model` with the library that built the engine.

    Args:
        stock: Ultralytics' own method.
        backend: Ultralytics' TensorRT backend.
        weight: The engine's file.

    Raises:
        ConfigError: TensorRT-RTX built it, which is not installed.
    """
    return engine.load(stock, backend, weight)
