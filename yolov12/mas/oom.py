"""Telling a failed allocation from any other error, and the one that ends a run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from yolov12.errors import DoesNotFitError

__all__ = ["Failure", "does_not_fit", "is_out_of_memory", "tried_to_allocate"]

# What libraries say that ask the device for memory behind PyTorch's back, and PyTorch's allocator for the host.
_SIGNS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "unable to find an engine",
    "can't allocate memory",
)
_TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGT]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Failure:
    """An allocation that failed."""

    images: int
    """Of the micro-batch it hit."""
    message: str
    peak_bytes: int
    """Of live bytes, until it failed."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is a failed allocation, on the device or on the host, in any of the forms it comes in.

    An error raised from one is one: Ultralytics' loss for oriented boxes calls it a malformed data set.
    """
    if error.__cause__ is not None and is_out_of_memory(error.__cause__):
        return True
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return not isinstance(error, DoesNotFitError)
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def tried_to_allocate(message: str) -> int:
    """Bytes that an allocator's message says were asked for; 0 if it does not say."""
    found = _TRIED.search(message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def does_not_fit(needed_bytes: int, budget_bytes: int, free_bytes: int, ways_out: Sequence[str]) -> DoesNotFitError:
    """Compose the error of a run that cannot go on.

    Args:
        needed_bytes: Peak of one image, at least.
        budget_bytes: What may be used.
        free_bytes: What the device has free now.
        ways_out: What the user can do, cheapest first; three are named.
    """
    needed, budget, free = (f"{count / 2**20:,.0f} MiB" for count in (needed_bytes, budget_bytes, free_bytes))
    ways = "; or ".join(ways_out[:3])
    return DoesNotFitError(
        f"one image needs {needed} at its peak, the budget is {budget} ({free} free). Ways out: {ways}"
    )
