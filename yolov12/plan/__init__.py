"""`yolov12 plan model=yolov12s.yaml batch=256 mem=16GiB` predicts the memory of a training, without a GPU.

model=yolov12x.yaml     a model yaml or a weight file, or several with commas; model=all is yolov12{n,s,m,l,x}
batch=16 imgsz=640      as in training; also optimizer, amp, mem_safety_ratio, bn_group, micro_batch and
                        disable_mas_layers
gpu=T4 or mem=16GiB     the GPU, or its memory; with both, mem is the `mem_limit` on that GPU
boxes=100               boxes of the fullest image; mosaic combines four images into one
classes=80              classes of the model; by default those in its file
--json                  print JSON
format=onnx             plan the exported graph instead, see `yolov12 plan format=onnx --help`

The exit status is 0 if all models fit, 1 if one does not, and 2 if an argument or the model cannot be used.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from yolov12.plan.arguments import Request
    from yolov12.plan.report import Report

__all__ = ["main"]


def main(args: list[str]) -> int:
    """Plan a training, or an exported graph, and print the plan.

    Args:
        args: The words after `yolov12 plan`.

    Returns:
        The exit status: 0 if all models fit, else 1.

    Raises:
        ConfigError: An argument is unknown, malformed or missing.
    """
    wants_help = bool({"help", "-h", "--help"} & set(args))
    if any(word.lstrip("-").startswith("format=") for word in args):
        from yolov12.plan import exported

        with contextlib.redirect_stdout(sys.stderr):
            text, code = (exported.__doc__, 0) if wants_help else exported.main(args)
        print(text)
        return code
    if wants_help:
        print(__doc__)
        return 0
    # Imported here, as all of it needs torch, which neither help nor the plan of an ONNX file does.
    from yolov12.plan.arguments import parse
    from yolov12.plan.render import as_json, as_text

    request = parse(args)
    reports = _reports(request)
    print(as_json(reports) if request.json else as_text(reports, request))
    return int(not all(each.choice.fits for each in reports))


def _reports(request: Request) -> list[Report]:
    if len(request.models) == 1:
        return [_report(request.models[0], request)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(request.models), os.cpu_count() or 1), context) as pool:
        largest_first = {pool.submit(_report, name, request): name for name in reversed(request.models)}
        reports = {}
        for done in as_completed(largest_first):
            reports[largest_first[done]] = done.result()
            print(f"{largest_first[done]} planned, {len(reports)} of {len(largest_first)}", file=sys.stderr, flush=True)
    return [reports[name] for name in request.models]


def _report(name: str, request: Request) -> Report:
    with _stdout_to_stderr():
        from yolov12.plan.report import make_report

        return make_report(name, request)


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send to stderr what libraries print, and drop what SciPy's solver prints from C++: stdout is for the plan."""
    flush = ctypes.CDLL(None).fflush
    flush(None)
    stdout, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
