"""What happens at `model.export(...)`: the exported graph is split to fit into memory, then built.

before_export   refuses arguments that cannot work
export_onnx     exports as Ultralytics does; with format=onnx and mem_limit= the file is then split to fit
export_engine   splits the graph to the memory that is free, and builds the engine in several attempts
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from yolov12.errors import ConfigError
from yolov12.export import engine
from yolov12.export.attempts import build_within
from yolov12.export.budget import MemoryLimit
from yolov12.export.exported_graph import ExportedGraph
from yolov12.mas import Config
from yolov12.mas.memory.meter import meter_for

__all__ = ["before_export", "export_engine", "export_onnx"]


def before_export(exporter: Any) -> None:
    """Refuse arguments that cannot work, before the export starts.

    Args:
        exporter: Ultralytics' exporter.

    Raises:
        ConfigError: An argument cannot work here.
    """
    args = exporter.args
    if not getattr(args, "mas", False):
        return
    config = Config.parse(vars(args))
    if str(args.format).lower() not in ("engine", "tensorrt", "trt"):
        if isinstance(config.limit, float):
            raise ConfigError(f"mem_limit={config.limit}: an exported graph needs bytes, as in 2GiB")
        return
    library = engine.find(args.engine_builder)
    if library.is_rtx:
        if "dla" in str(args.device):
            raise ConfigError(f"device={args.device}: {library.name} is for GeForce and RTX cards, which have no DLA")
        if args.quantize not in (None, 16, 32):
            raise ConfigError(
                f"quantize={args.quantize}: {library.name} builds FP32 and FP16 (half=True) here, not INT8"
            )
        if args.device is None and not torch.cuda.is_available():
            args.device = "cpu"  # it builds for cards that are elsewhere
    if isinstance(config.limit, float) and str(args.device) == "cpu":
        raise ConfigError(
            f"mem_limit={config.limit}: it is a fraction of a GPU, and there is none here: give bytes, as in 2GiB"
        )


def export_onnx(stock: Callable[..., Any], exporter: Any, *args: Any, **kwargs: Any) -> Any:
    """Export to ONNX. With `format=onnx`, `mas=True` and a limit, split the graph to the limit.

    Args:
        stock: Ultralytics' own method.
        exporter: Ultralytics' exporter.
        args: Passed on to `stock`.
        kwargs: Passed on to `stock`.

    Raises:
        DoesNotFitError: The graph cannot be split to the limit. A file that was there before is there again.
    """
    settings = exporter.args
    if settings.format != "onnx" or not getattr(settings, "mas", False) or not settings.mem_limit:
        return stock(exporter, *args, **kwargs)
    with _kept(Path(exporter.file).with_suffix(".onnx").resolve()):
        file = stock(exporter, *args, **kwargs)
        exported = ExportedGraph(Path(file), exporter.im.shape, bool(settings.dynamic))
        exported.write(exported.split(MemoryLimit(_limit_bytes(Config.parse(vars(settings))), "mem_limit")))
    return file


@contextmanager
def _kept(file: Path) -> Iterator[None]:
    """Put a file back, or remove what is there instead, if the block fails."""
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-before-") as folder:
        before = Path(folder, file.name)
        if file.exists():
            shutil.copy2(file, before)
        try:
            yield
        except BaseException:
            file.unlink(missing_ok=True)
            if before.exists():
                before.replace(file)
            raise


def export_engine(stock: Callable[..., Any], exporter: Any, prefix: str) -> Any:
    """Export to an engine that fits into the memory that is free.

    Args:
        stock: Ultralytics' own method.
        exporter: Ultralytics' exporter.
        prefix: Beginning of log lines.

    Returns:
        The engine's file.

    Raises:
        DoesNotFitError: Neither a split graph nor less effort fits into memory.
        ExportError: The library refuses the graph.
    """
    args = exporter.args
    if not getattr(args, "mas", False):
        return stock(exporter)
    library = engine.find(args.engine_builder)
    onnx = Path(exporter.export_onnx())
    _leave_the_gpu(exporter)
    converts = library.is_rtx and args.quantize == 16  # its networks have the precision of their graph
    shape, dynamic = tuple(exporter.im.shape), bool(args.dynamic)
    job = engine.Job(
        onnx=onnx,
        engine=Path(exporter.file).with_suffix(".engine"),
        shape=shape,
        dynamic=dynamic,
        quantize=None if converts else args.quantize,
        dla=exporter.dla,
        dataset=exporter.get_int8_calibration_dataloader(prefix) if args.quantize == 8 and not exporter.qat else None,
        metadata={**exporter.metadata, "engine_builder": library.name},
        verbose=args.verbose,
        prefix=prefix,
    )
    build_within(library, job, ExportedGraph(onnx, shape, dynamic, half=converts), _memory_limit(exporter))
    return job.engine


def _leave_the_gpu(exporter: Any) -> None:
    """Move the torch model to the host: the builder measures kernels on the GPU, and needs its memory."""
    exporter.model.cpu()
    exporter.im = exporter.im.cpu()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _memory_limit(exporter: Any) -> MemoryLimit:
    """Return what the builder may use: the memory that is free, mem_limit= or workspace=, whichever is least."""
    limit = _memory_there_is(exporter)
    if not exporter.args.workspace:
        return limit
    workspace_bytes = int(exporter.args.workspace * 2**30)
    if limit.total_bytes is not None and limit.total_bytes <= workspace_bytes:
        return limit
    return MemoryLimit(workspace_bytes, "workspace")


def _memory_there_is(exporter: Any) -> MemoryLimit:
    config = Config.parse(vars(exporter.args))
    if exporter.device.type == "cpu":
        return MemoryLimit(_limit_bytes(config), "mem_limit")
    budget_bytes = meter_for(exporter.device, config.limit).read().budget_bytes(config.safety_ratio)
    return MemoryLimit(budget_bytes, "what is free now" if config.limit is None else "mem_limit, and what is free now")


def _limit_bytes(config: Config) -> int | None:
    """Return mem_limit in bytes; `before_export` has refused fractions where there is no device they are of."""
    return config.limit if isinstance(config.limit, int) else None
