"""Formats reports as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from yolov12.plan.arguments import Request
from yolov12.plan.report import Report, modes_of

__all__ = ["as_json", "as_text", "verdict"]

_MIB, _GIB = 2**20, 2**30


def as_json(reports: Sequence[Report]) -> str:
    """Format the reports as one JSON object, with memory in bytes."""
    return json.dumps({"plans": [_plain(report) for report in reports]}, indent=2)


def _plain(report: Report) -> dict[str, Any]:
    fields = dataclasses.asdict(report)
    choice = report.choice
    del fields["choice"]
    return {
        **fields,
        "micro_batch": choice.estimate.images,
        "micro_batches": list(choice.sizes),
        "bn_group": choice.bn_group,
        "plan": str(choice.estimate.plan),
        **modes_of(choice),
        "micro_batch_bytes": choice.estimate.micro_batch_bytes,
        "peak_bytes": choice.estimate.peak_bytes,
        "fits": choice.fits,
    }


def as_text(reports: Sequence[Report], request: Request) -> str:
    """Format the reports as a table in MiB with a column for each model. The last lines are the verdicts.

    Args:
        reports: At least one report, all for the same request.
        request: The arguments of the plan.
    """
    first = reports[0]
    precision = "half precision" if request.amp else "fp32"
    rows: list[tuple[str, Callable[[Report], str]]] = [
        ("MiB", lambda report: report.model.removesuffix(".yaml")),
        ("weights", lambda report: _mib(report.fixed.weights_bytes)),
        ("gradients", lambda report: _mib(report.fixed.gradients_bytes)),
        (f"optimizer ({first.fixed.optimizer})", lambda report: _mib(report.fixed.optimizer_bytes)),
        ("moving average (EMA)", lambda report: _mib(report.fixed.ema_bytes)),
        ("weights in half precision", lambda report: _mib(report.half_weights_bytes)),
        ("cuBLAS", lambda report: _mib(report.fixed.library_bytes)),
        ("an image keeps", lambda report: _mib(report.levers.kept_bytes)),
        ("  BatchNorm+SiLU rebuilt", lambda report: _mib(report.levers.rebuilt_bytes)),
        ("  all recomputed", lambda report: _mib(report.levers.recomputed_bytes)),
        ("micro-batch", lambda report: f"{report.choice.estimate.images} × {len(report.choice.sizes)}"),
        ("BatchNorm group", lambda report: str(report.choice.bn_group)),
        ("layers rebuilt", lambda report: str(len(modes_of(report.choice)["rebuild"]))),
        ("layers recomputed", lambda report: str(len(modes_of(report.choice)["recompute"]))),
        ("predicted peak", lambda report: _mib(report.choice.estimate.peak_bytes)),
        ("budget", lambda report: _mib(report.budget_bytes)),
        ("fits", lambda report: "yes" if report.choice.fits else "NO"),
    ]
    names = max(len(name) for name, _ in rows)
    columns = [[value(report) for _, value in rows] for report in reports]
    widths = [max(map(len, column)) + 2 for column in columns]
    lines = [
        f"{first.imgsz}x{first.imgsz}, batch {first.batch}, up to {first.boxes} boxes an image, {precision}",
        f"attention: {first.attention}",
        "",
        *(
            f"{name:{names}}" + "".join(f"{column[i]:>{width}}" for column, width in zip(columns, widths, strict=True))
            for i, (name, _) in enumerate(rows)
        ),
        "",
    ]
    return "\n".join([*lines, *(verdict(report, request) for report in reports)])


def verdict(report: Report, request: Request) -> str:
    """Format one line that says whether a training fits, and with which checkpoint plan."""
    choice = report.choice
    where = f"a {request.card.name}" if request.card else _size(report.total_bytes, ".4g")  # as the user wrote it
    peak = _size(choice.estimate.peak_bytes)
    budget = f"{_size(report.budget_bytes)} of {where}"
    if choice.fits:
        plan = str(choice.estimate.plan) or "all activations kept"
        return f"{report.model} fits: {peak} at the peak, {budget} may be used; {plan}."
    least = f"{choice.estimate.images} image{'s' * (choice.estimate.images > 1)} at once"
    need = f"{least} need{'s' * (choice.estimate.images == 1)} {peak} with every layer recomputed"
    return f"{report.model} does not fit: {need}, {budget} may be used."


def _size(size_bytes: int, of_gib: str = ".1f") -> str:
    """Format a size in GiB, or in MiB if it is below 1 GiB."""
    if size_bytes >= _GIB:
        return f"{size_bytes / _GIB:{of_gib}} GiB"
    return f"{size_bytes / _MIB:,.1f}".removesuffix(".0") + " MiB"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:,.{int(size_bytes < 1000 * _MIB)}f}"
