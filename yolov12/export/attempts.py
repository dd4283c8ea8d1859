"""Builds an engine in several attempts, until one fits into memory: with less effort, or with more splits."""

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
"""Fractions of the memory for tensors. If the builder runs out of memory, the graph is split to one after the other."""

_FP32_OF_FP16 = 2
"""Bytes that a plan may have per byte of the limit, if the builder converts the FP32 graph to FP16 or INT8."""


def build_within(library: engine.Library, job: engine.Job, exported: ExportedGraph, limit: MemoryLimit) -> None:
    """Build an engine in limited memory, and note each attempt in a journal beside it.

    As long as the builder runs out of memory, these graphs are tried in turn:

    1. The graph with the splits that it needs according to its plan.
    2. The unsplit graph, because the builder may know a better way to run it.
    3. Graphs with more splits, because the builder may need more memory than was planned.

    Each graph is written to the ONNX file just before it is built. If all attempts fail, the file holds the unsplit
    graph.

    Args:
        library: The builder.
        job: The engine. Its ONNX file is the file of `exported`.
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
    """Return the limit for the plan of the graph. A plan counts FP32, so for FP16 and INT8 the limit is doubled."""
    if limit.total_bytes is None or library.is_rtx or job.quantize not in (16, 8):
        return limit
    return MemoryLimit(_FP32_OF_FP16 * limit.total_bytes, f"{limit.source}, doubled because the plan counts FP32")


def _failure(
    library: engine.Library, job: engine.Job, limit: MemoryLimit, first: Split | None, journal: ExportJournal
) -> DoesNotFitError:
    allowed, needs = "all there is", ""
    if limit.total_bytes is not None:
        allowed = f"{limit.total_bytes >> 20} MiB ({limit.source})"
    if first is not None:
        needs = f" By its plan, the graph needs about {workspace_for(first.plan) >> 20} MiB."
    return DoesNotFitError(
        f"{library.name} ran out of memory building {job.engine}: it may use {allowed}.{needs} Use a smaller imgsz= or "
        f"batch=, half=True, or free memory on the GPU; {journal.file} has every attempt"
    )
