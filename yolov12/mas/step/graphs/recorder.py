"""Recorder of CUDA graphs: https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

__all__ = ["CudaRecorder", "Graphs", "Recorder", "Tensors", "graphs_for"]

_MEASURED_WITH = TorchVersion("2.11")  # earliest version of PyTorch with which graphs were measured

Tensors = list[Tensor | None]
Found = TypeVar("Found", list[Tensor], Tensors)


class Recorder(Protocol):
    """Records the kernels of functions, and replays them. All recordings share one pool of memory."""

    def apart(self) -> AbstractContextManager[None]:
        """Return a context that runs operations as a recording would, and refuses what cannot be recorded."""

    def record(self, function: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
        """Record a function that has run in `apart` before.

        Args:
            function: Takes no arguments, so that it reads and writes the same memory whenever it runs.

        Returns:
            The result of the function, which every replay overwrites, and a function that replays.

        Raises:
            RuntimeError: The function cannot be recorded, or there is not enough memory.
        """

    def release(self) -> None:
        """Free the pool. The caller has dropped all that `record` returned."""


@dataclass(frozen=True)
class Graphs:
    """What replays need to know."""

    recorder: Recorder
    """Captures networks."""
    room: Callable[[int, int], tuple[int, int, int]]
    """Called with the first image of a micro-batch and the one after its last; returns the bytes that it needs at
    most above what is allocated, those that the capture of its graph needs, and the budget in bytes."""


def graphs_for(
    device: torch.device, room: Callable[[int, int], tuple[int, int, int]], wanted: bool | None = None
) -> Graphs | None:
    """Return what replays need on a device; None if it has no CUDA graphs, or if they are not wanted.

    Args:
        device: Device of the model.
        room: See `Graphs.room`.
        wanted: None for True if PyTorch is one of the versions with which graphs were measured.
    """
    is_wanted = TorchVersion(torch.__version__) >= _MEASURED_WITH if wanted is None else wanted
    return Graphs(CudaRecorder(device), room) if is_wanted and device.type == "cuda" else None


class CudaRecorder:
    """Records with CUDA's stream capture.

    Args:
        device: CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Run operations on the stream of captures, and raise an error if one waits for the device.

        Libraries and kernels allocate their workspaces for this stream here, and not in the pool.
        """
        self._stream = self._stream or torch.cuda.Stream(self._device)
        current, mode = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # once, that this mode does not detect everything; a capture does
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            current.wait_stream(self._stream)

    def record(self, function: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
        """Capture a function, see `Recorder.record`."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # Garbage that is collected during a capture may own memory of another stream, or another graph.
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.stream(self._stream):
                # Other threads, such as those that pin memory, go on as usual.
                graph.capture_begin(self._pool, capture_error_mode="thread_local")
                try:
                    found = function()
                except BaseException:
                    self._end(graph)
                    raise
                try:
                    graph.capture_end()
                except RuntimeError:
                    self._recover()
                    raise
        finally:
            if collects:
                gc.enable()
        return found, graph.replay

    def release(self) -> None:
        """Return the memory of the pool to the device, when its graphs have finished."""
        self._pool = None
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            self._recover()

    def _recover(self) -> None:
        """Leave the state of capture in the allocator and the random generator, as an invalid capture does not.

        PyTorch raises the error of CUDA before it does so, and the graph then keeps its pool for ever
        (aten/src/ATen/cuda/CUDAGraph.cpp, `capture_end` and `reset`).
        """
        for name in ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool", "_cuda_releasePool"):
            if (end := getattr(torch._C, name, None)) is not None:
                with suppress(RuntimeError, TypeError):  # they are not part of the documented interface
                    end(self._device.index, self._pool)
        self._pool = None
        value, graph = torch.zeros(1, device=self._device).add_(1), torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        graph.capture_begin(torch.cuda.graph_pool_handle(), capture_error_mode="thread_local")
        value.add_(1)
        graph.capture_end()
