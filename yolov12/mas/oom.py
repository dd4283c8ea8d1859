"""Failed allocations: how to recognise them among other errors, the wait for memory, and the error that ends a run."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from yolov12.errors import DoesNotFitError, YOLOv12Error, plain

__all__ = ["Failure", "does_not_fit", "is_out_of_memory", "tell_wait", "tried_to_allocate"]

# Messages of libraries that allocate memory without PyTorch's allocator, of PyTorch's host allocator, and of C++. What
# oneDNN calls a descriptor needs no memory: without one, it does not know the operation. Where NVML does not work, as
# on a Jetson, PyTorch's allocator fails while it composes its message (github.com/pytorch/pytorch/issues/122068).
# cuBLAS and cuDNN are not initialised if their handles find no memory (github.com/haotian-liu/LLaVA/issues/392), or for
# another reason: then one image fails, too, and the error that ends the run quotes it.
_SIGNS = re.compile(
    "out of memory"
    "|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
    "|CUDNN_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
    "|CUDNN_STATUS_INTERNAL_ERROR"
    "|unable to find an engine"
    "|NVML_SUCCESS == .*CUDACachingAllocator"
    "|can't allocate memory"
    "|could not create a primitive(?! descriptor)"
    "|std::bad_alloc"
)
_SHORT_WAIT_S = 2
_TRIED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGT]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Failure:
    """A failed allocation while a micro-batch was run."""

    images: int
    """Number of images in the micro-batch."""
    message: str
    """Message of the allocator or the library."""
    peak_bytes: int
    """Peak of allocated memory until the failure."""
    lacked_memory: bool = True
    """False if a pass was not the one that its CUDA graph had captured."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is a failed allocation on the device or on the host.

    An error whose cause is a failed allocation counts too: Ultralytics' loss for oriented boxes raises a TypeError
    about a malformed data set from it.

    Args:
        error: Any error of PyTorch, cuDNN, cuBLAS or Python.
    """
    if error.__cause__ is not None and is_out_of_memory(error.__cause__):
        return True
    if isinstance(error, YOLOv12Error):  # such as the report of another rank that ran out of memory
        return False
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _SIGNS.search(str(error)) is not None


def tried_to_allocate(message: str) -> int:
    """Return the bytes that were requested, according to an allocator's message; 0 if it does not tell."""
    found = _TRIED.search(message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0


def does_not_fit(
    needed_bytes: int, budget_bytes: int, free_bytes: int, ways_out: Sequence[str], cause: str = ""
) -> DoesNotFitError:
    """Compose the error of a run that cannot continue.

    Args:
        needed_bytes: Lower bound of the peak of one image.
        budget_bytes: Memory that this process may use.
        free_bytes: Free memory of the device now.
        ways_out: Things that the user can do, cheapest first. The message names the first three.
        cause: Message of what has failed, if that may have another reason than memory. Its first line is quoted.

    Returns:
        The error, with all sizes in MiB.
    """
    needed, budget, free = (f"{count / 2**20:,.0f} MiB" for count in (needed_bytes, budget_bytes, free_bytes))
    ways = "; or ".join(ways_out[:3])
    quoted = f". What failed: {plain(cause).strip().splitlines()[0]}" if cause else ""
    return DoesNotFitError(
        f"one image needs {needed} at its peak, the budget is {budget} ({free} free). Ways out: {ways}{quoted}"
    )


def tell_wait(log: Callable[[str], None], others_bytes: int | None, waited_s: float, most_s: float) -> None:
    """Log that a training waits for memory, once in a wait that is longer than two seconds.

    Shorter ones may come in every step.

    Args:
        log: Takes the line.
        others_bytes: Memory of other processes; None if unknown.
        waited_s: Seconds waited so far, a whole number.
        most_s: Most seconds that the wait takes.
    """
    if waited_s != _SHORT_WAIT_S:
        return
    held = f" ({others_bytes / 2**20:,.0f} MiB)" if others_bytes else ""
    log(
        f"memory: no image fits beside what other processes hold{held}: waiting up to {most_s - waited_s:,.0f} s for "
        "them to release memory"
    )
