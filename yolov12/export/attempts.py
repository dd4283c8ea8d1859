"""Attempts to build an engine, until one fits into memory: with less effort, and of a graph that is split further."""

from __future__ import annotations

from collections.abc import Sequence

from ultralytics.utils import LOGGER

from yolov12.errors import DoesNotFitError
from yolov12.export import engine
from yolov12.export.budget import MemoryLimit, workspace_for
from yolov12.export.exported_graph import ExportedGraph
from yolov12.export.journal import ExportJournal
from yolov12.export.rewrite import Split

__all__ = ["build_within"]

_TIGHTER = (0.7, 0.5)
"""Fractions of the bytes for tensors that the graph is split to in turn, if the builder ran out of memory."""

_FP32_OF_FP16 = 2
"""Bytes of an FP32 plan for each byte of a limit, where the builder itself runs the graph in FP16 or INT8."""


def build_within(library: engine.Library, job: engine.Job, exported: ExportedGraph, limit: MemoryLimit) -> None:
    """Build an engine in limited memory, and note each attempt in a journal beside it.

    The first attempts are with the graph as its plan says it fits. If the builder runs out of memory, the whole graph
    is next, as the builder may know a better way to run it, and then the graph split further, as the builder may need
    more than was planned. Each variant is written to the ONNX file just before it is built. If all attempts fail, the
    file holds the whole graph.

    Args:
        library: The builder.
        job: The engine and its ONNX file, which is that of `exported`.
        exported: The graph.
        limit: Memory that the builder may use.

    Raises:
        DoesNotFitError: No attempt fits into memory.
        ExportError: The library refuses the graph for another reason than memory.
    """
    journal = ExportJournal(job.engine.with_suffix(".export.json"))
    planned = _limit_of_plan(library, job, limit)

    def builds(variant: Split | None, efforts: Sequence[engine.Effort]) -> bool:
        exported.write(variant)
        if variant is not None:
            journal.add_split(planned, variant)
        outcome = ""
        for attempt in engine.build(library, job, limit.total_bytes, efforts):
            journal.add_attempt(attempt)
            outcome = attempt.outcome
            LOGGER.info(f"{job.prefix} {attempt.builder}: {outcome} after {attempt.seconds} s {attempt.message}")
        return outcome == "built"

    first = exported.split(planned)
    if builds(first, engine.EFFORTS):
        return
    if first is not None:
        if first.sites:
            journal.add_whole()
            if builds(None, engine.EFFORTS[:1]):
                return
        least_bytes = first.plan.peak_bytes
        for fraction in _TIGHTER:
            tighter = exported.split_tighter(planned, fraction)
            if tighter is None:
                break
            if tighter.plan.peak_bytes < least_bytes:
                least_bytes = tighter.plan.peak_bytes
                if builds(tighter, engine.EFFORTS[-1:]):
                    return
        exported.write()
    raise _failure(library, job, limit, first, journal)


def _limit_of_plan(library: engine.Library, job: engine.Job, limit: MemoryLimit) -> MemoryLimit:
    """Return the limit that the plan of the graph is held against, as a plan counts the graph's own precision."""
    if limit.total_bytes is None or library.is_rtx or job.quantize not in (16, 8):
        return limit
    return MemoryLimit(_FP32_OF_FP16 * limit.total_bytes, f"{limit.source}, twice, as the plan is of FP32")


def _failure(
    library: engine.Library, job: engine.Job, limit: MemoryLimit, first: Split | None, journal: ExportJournal
) -> DoesNotFitError:
    allowed, needs = "all there is", ""
    if limit.total_bytes is not None:
        allowed = f"{limit.total_bytes >> 20} MiB ({limit.source})"
    if first is not None:
        needs = f" The graph needs about {workspace_for(first.plan) >> 20} MiB as it is planned."
    return DoesNotFitError(
        f"{library.name} ran out of memory building {job.engine}: it may use {allowed}.{needs} Use a smaller imgsz= or "
        f"batch=, half=True, or free memory on the GPU; {journal.file} has every attempt"
    )
