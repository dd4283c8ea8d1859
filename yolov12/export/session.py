"""What happens at `model.export(...)`: the exported graph is fitted to memory, then built.

export_onnx     as Ultralytics does it; with format=onnx and mem_limit= the file is then cut to fit
export_engine   the graph, cut to what is free; the engine, by attempts; both noted in a journal beside the engine
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from ultralytics.utils import LOGGER

from yolov12 import files
from yolov12.errors import ConfigError, DoesNotFitError
from yolov12.export import engine, graph
from yolov12.export.rewrite import Split, split
from yolov12.mas import Config
from yolov12.mas.memory.meter import meter_for

__all__ = ["before_export", "export_engine", "export_onnx", "smallest_and_largest", "tensors_limit", "workspace_for"]

RESERVE_BYTES = 48 << 20
"""What a builder takes beside weights, inputs and tensors: kernels' scratch, rows padded for alignment."""

_TIGHTER = (0.7, 0.5)
"""Shares of the room for tensors that the graph is cut to in turn, if the builder ran out of memory."""

_SMALLEST = 32  # pixels: from there on Ultralytics' dynamic engines take images


@dataclass(frozen=True)
class _Room:
    """Memory for an exported graph."""

    total: int | None
    """Bytes for all of it; None: nobody said."""
    why: str
    """Where the number comes from."""


def before_export(exporter: Any) -> None:
    """Refuse what cannot work before anything is done.

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
            f"mem_limit={config.limit}: without a GPU a share is a share of nothing: give bytes, as in 2GiB"
        )


def export_onnx(stock: Callable[..., Any], exporter: Any, *args: Any, **kwargs: Any) -> Any:
    """Export to ONNX; for its own sake and with a limit, cut to it.

    Args:
        stock: Ultralytics' own method.
        exporter: Of Ultralytics.
        args: For `stock`.
        kwargs: For `stock`.

    Raises:
        DoesNotFitError: The graph cannot be cut to the limit; the uncut file stays.
    """
    file = stock(exporter, *args, **kwargs)
    settings = exporter.args
    if settings.format == "onnx" and getattr(settings, "mas", False):
        limit = Config.parse(vars(settings)).limit
        _fit(Path(file), exporter, _Room(None if limit is None else int(limit), "mem_limit"), 1.0)
    return file


def export_engine(stock: Callable[..., Any], exporter: Any, prefix: str) -> Any:
    """Export to an engine that fits into the memory that is free.

    Args:
        stock: Ultralytics' own method.
        exporter: Of Ultralytics.
        prefix: Of log lines.

    Returns:
        The engine's file.

    Raises:
        DoesNotFitError: Neither cuts nor less effort get it into memory.
        ExportError: The library refused the graph.
    """
    args = exporter.args
    if not getattr(args, "mas", False):
        return stock(exporter)
    library = engine.find(args.engine_builder)
    onnx = Path(exporter.export_onnx())
    _leave_the_gpu(exporter)
    quantize = args.quantize
    if library.is_rtx and quantize == 16:
        _to_half(onnx)
        quantize = None
    room = _room(exporter)
    job = engine.Job(
        onnx=onnx,
        engine=Path(exporter.file).with_suffix(".engine"),
        shape=tuple(exporter.im.shape),
        dynamic=args.dynamic,
        quantize=quantize,
        dla=exporter.dla,
        dataset=exporter.get_int8_calibration_dataloader(prefix) if quantize == 8 and not exporter.qat else None,
        metadata={**exporter.metadata, "engine_builder": library.name},
        verbose=args.verbose,
        prefix=prefix,
    )
    return _build(library, job, exporter, room)


def smallest_and_largest(shape: Sequence[int], dynamic: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Input shapes an exported graph may get; the largest is what Ultralytics' dynamic engines are built for.

    Args:
        shape: (images, channels, height, width) of the export.
        dynamic: Whether it has dynamic axes.
    """
    images, channels, height, width = shape
    if not dynamic:
        return tuple(shape), tuple(shape)
    return (1, channels, _SMALLEST, _SMALLEST), (images, channels, 2 * height, 2 * width)


def workspace_for(plan: graph.Plan) -> int:
    """Bytes a builder is predicted to need: tensors, weights, inputs, and some for itself."""
    return plan.peak + plan.weights + plan.inputs + RESERVE_BYTES


def tensors_limit(plan: graph.Plan, total: int) -> int:
    """Bytes that are left for a graph's tensors.

    Args:
        plan: Of the graph.
        total: Bytes for all that a builder needs.

    Raises:
        DoesNotFitError: None are.
    """
    fixed = workspace_for(replace(plan, peak=0))
    if total <= fixed:
        raise DoesNotFitError(
            f"the exported graph needs {fixed >> 20} MiB for weights, inputs and the builder alone, and there are "
            f"{total >> 20} MiB. Use a smaller model, imgsz= or batch=, or let it have more"
        )
    return total - fixed


def _build(library: engine.Library, job: engine.Job, exporter: Any, room: _Room) -> Path:
    workspace = room.total
    if exporter.args.workspace:
        workspace = min(workspace or 1 << 62, int(exporter.args.workspace * 2**30))
        room = _Room(workspace, "workspace" if workspace != room.total else room.why)
    told = room
    if workspace is not None and not library.is_rtx and job.quantize in (16, 8):
        room = _Room(2 * workspace, f"{room.why}, twice, as the plan is of FP32")
    journal = _Journal(job.engine.with_suffix(".export.json"))
    whole = job.onnx.read_bytes() if room.total is not None else b""
    last = _fit(job.onnx, exporter, room, 1.0, journal)
    if _built(library, job, workspace, engine.EFFORTS, journal):
        return job.engine
    if last is not None and last.sites:  # a builder may know better how to run the whole
        files.write(job.onnx, lambda file: file.write(whole))
        journal.uncut()
        if _built(library, job, workspace, engine.EFFORTS[:1], journal):
            return job.engine
    for share in _TIGHTER:
        if last is None:
            break
        files.write(job.onnx, lambda file: file.write(whole))
        try:
            done = _fit(job.onnx, exporter, room, share, journal)
        except DoesNotFitError:
            break
        if done is None:
            break
        if done.plan.peak < last.plan.peak and _built(library, job, workspace, engine.EFFORTS[-1:], journal):
            return job.engine
    if last is not None:
        files.write(job.onnx, lambda file: file.write(whole))
    needs = "" if last is None else f" The graph needs about {workspace_for(last.plan) >> 20} MiB as it is planned."
    raise DoesNotFitError(
        f"{library.name} ran out of memory building {job.engine}: it may use "
        f"{'all there is' if workspace is None else f'{workspace >> 20} MiB ({told.why})'}.{needs} Use a smaller "
        f"imgsz= or batch=, half=True, or free memory on the GPU; {journal.file} has every attempt"
    )


def _built(
    library: engine.Library, job: engine.Job, workspace: int | None, efforts: Sequence[engine.Effort], journal: _Journal
) -> bool:
    for attempt in engine.build(library, job, workspace, efforts):
        journal.add(attempt)
        LOGGER.info(f"{job.prefix} {attempt.builder}: {attempt.outcome} after {attempt.seconds} s {attempt.message}")
    return attempt.outcome == "built"


def _fit(onnx: Path, exporter: Any, room: _Room, share: float, journal: _Journal | None = None) -> Split | None:
    """Cut an ONNX file in its place, if it needs that; None if there is no limit, or the graph cannot be planned."""
    if room.total is None:
        return None
    model = graph.load(onnx)
    least, most = smallest_and_largest(exporter.im.shape, bool(exporter.args.dynamic))
    try:
        largest = graph.at_most(model, most)
        whole = graph.plan(model, graph.Shapes(model, largest))
        limit = int(tensors_limit(whole, room.total) * share)
        done = split(model, limit, largest, graph.at_most(model, least))
    except ConfigError as error:
        LOGGER.warning(f"yolov12: {error}. The graph is left whole")
        return None
    except DoesNotFitError as error:
        raise DoesNotFitError(f"{error}. The limit of {room.total >> 20} MiB is {room.why}") from None
    if done.sites:
        files.write(onnx, lambda file: file.write(ir.to_proto(done.model).SerializeToString()))
        LOGGER.info(
            f"yolov12: {len(done.sites)} places of the graph cut, so that its tensors take {done.plan.peak >> 20} MiB "
            f"instead of {done.before.peak >> 20}"
        )
    if journal is not None:
        journal.graph(room, done)
    return done


class _Journal:
    """What was tried, as JSON beside the engine; whole at any time."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._rows: list[dict[str, Any]] = []
        file.unlink(missing_ok=True)  # of an earlier export

    def graph(self, room: _Room, done: Split) -> None:
        """Note how a graph was cut."""
        self._write(
            {
                "limit_bytes": room.total,
                "limit": room.why,
                "tensors_bytes": done.plan.peak,
                "tensors_uncut_bytes": done.before.peak,
                "weights_bytes": done.plan.weights,
                "peak": f"{done.plan.node.name}: {done.plan.describe()}",
                "cuts": done.describe(),
            }
        )

    def uncut(self) -> None:
        """Note that the graph is whole again."""
        self._write({"cuts": []})

    def add(self, attempt: engine.Attempt) -> None:
        """Note an attempt."""
        self._write(attempt.as_dict())

    def _write(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        files.write(self.file, lambda file: file.write(json.dumps(self._rows, indent=1).encode()))


def _leave_the_gpu(exporter: Any) -> None:
    """The builder measures kernels on the GPU, and needs its memory."""
    exporter.model.cpu()
    exporter.im = exporter.im.cpu()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _room(exporter: Any) -> _Room:
    config = Config.parse(vars(exporter.args))
    if exporter.device.type == "cpu":
        return _Room(config.limit if isinstance(config.limit, int) else None, "mem_limit")
    budget = meter_for(exporter.device, config.limit).read().budget_bytes(config.safety_ratio)
    return _Room(budget, "what is free now" if config.limit is None else "mem_limit, and what is free now")


def _to_half(file: Path) -> None:
    """A strongly typed network has the precision of its graph."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = convert_float_to_float16(onnx.load(file), keep_io_types=True)
    files.write(file, lambda target: target.write(model.SerializeToString()))
