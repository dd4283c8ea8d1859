"""Compiles Triton kernels in other processes, before the first batch needs them.

Triton compiles a kernel when it is first launched, which takes 0.1 to 1.1 s, and a training has about fifty. While it
is set up, other processes fill Triton's cache on disk, and the first launch of a kernel waits for the process that
compiles it. Whatever such a process cannot do, the first launch does.

Kernels have no global constants: with them, the key under which Triton stores a compiled kernel depends on what the
process has launched before, so the first launch would not find what another process has compiled.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from yolov12.mas.compile_worker import COMPILED, FAILED
from yolov12.mas.memory.cgroups import usable_cores

try:
    import triton
except ImportError:  # PyTorch supports platforms that Triton does not
    triton = None

__all__ = ["Wanted", "begin", "can_begin", "end", "note", "noted", "wait_for"]

_MOST_PROCESSES = 8
_WORKER = "import sys; sys.path[:] = {path!r}; from yolov12.mas.compile_worker import main; main()"
_Key = tuple[str, str, str, tuple[int, ...]]


@dataclass(frozen=True)
class Wanted:
    """A kernel for given types and constants."""

    module: str
    name: str
    types: tuple[str, ...]
    """Types of its tensors, such as `float16`."""
    numbers: tuple[float, ...]
    """Numbers of some launch. Only their types count."""
    constants: tuple[int, ...]
    warps: int

    @property
    def key(self) -> _Key:
        """What tells apart the kernels that Triton compiles, see `triton_launch.launch`."""
        return self.module, self.name, self.types[0], self.constants


_notes: dict[_Key, Wanted] | None = None


@contextlib.contextmanager
def noted() -> Iterator[dict[_Key, Wanted]]:
    """Note the kernels that are launched on meta tensors inside the context, in order."""
    global _notes
    before, _notes = _notes, {}
    try:
        yield _notes
    finally:
        _notes = before


def note(
    kernel: Any, tensors: Iterable[Tensor], numbers: tuple[float, ...], constants: tuple[int, ...], warps: int
) -> None:
    """Note a launch on meta tensors; see `triton_launch.launch` for the arguments."""
    if _notes is not None:
        types = tuple(_type(tensor.dtype) for tensor in tensors)
        wanted = Wanted(kernel.fn.__module__, kernel.fn.__name__, types, numbers, constants, warps)
        _notes.setdefault(wanted.key, wanted)


def _type(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Process:
    """A process that compiles kernels one after the other, and writes a line after each, see `compile_worker.main`."""

    def __init__(self, kernels: list[Wanted], capability: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER.format(path=[str(folder) for folder in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._places = {wanted.key: place for place, wanted in enumerate(kernels)}
        self._told: list[bool] = []
        given = {"capability": capability, "kernels": [astuple(wanted) for wanted in kernels]}
        with contextlib.suppress(OSError), _pipe(self._process.stdin) as pipe:  # it may have ended already
            pipe.write(json.dumps(given))

    def wait_for(self, key: _Key) -> None:
        """Wait until the process is done with a kernel, or has ended."""
        place = self._places[key]
        while len(self._told) <= place and (line := _pipe(self._process.stdout).readline()):
            self._hear(line)

    def end(self) -> bool:
        """End the process and its compilers. Return whether it has compiled all its kernels."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with _pipe(self._process.stdout) as pipe:
            for line in pipe:
                self._hear(line)
        self._process.wait()
        return self._told == [True] * len(self._places)

    def _hear(self, line: str) -> None:
        """Note an answer. Whatever else is written when Python starts is none."""
        if line.endswith((COMPILED, FAILED)):
            self._told.append(line.endswith(COMPILED))


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


class _Processes:
    """Processes that share the kernels.

    Args:
        kernels: The kernels, in the order in which they are needed.
        capability: Compute capability of the device, such as 90.
        mark: File in Triton's cache that tells that all are there.
    """

    def __init__(self, kernels: list[Wanted], capability: int, mark: Path) -> None:
        count = max(1, min(usable_cores() // 2, _MOST_PROCESSES, len(kernels)))
        self._mark, self._of = mark, dict[_Key, _Process]()
        self._all: list[_Process] = []
        self._is_complete = True
        for index in range(count):
            try:
                process = _Process(mine := kernels[index::count], capability)
            except OSError:  # no memory or no permission for another process
                self._is_complete = False
                break
            self._all.append(process)
            self._of |= dict.fromkeys((wanted.key for wanted in mine), process)

    def wait_for(self, key: _Key) -> None:
        if (process := self._of.pop(key, None)) is not None:
            process.wait_for(key)

    def end(self) -> None:
        are_complete = [process.end() for process in self._all]
        if self._is_complete and all(are_complete):
            with contextlib.suppress(OSError):
                self._mark.touch()


_processes: _Processes | None = None


def begin(kernels: Iterable[Wanted], device: torch.device) -> None:
    """Begin to compile kernels for a CUDA device in other processes, unless Triton's cache has them.

    Args:
        kernels: Kernels in the order in which they are needed.
        device: A device for which `can_begin`.

    Raises:
        OSError: Triton's cache cannot be looked at.
        RuntimeError: The user has no home.
    """
    global _processes
    end()
    wanted = list({each.key: each for each in kernels}.values())
    if not wanted:
        return
    major, minor = torch.cuda.get_device_capability(device)
    mark = _mark(wanted, 10 * major + minor)
    if not mark.exists():
        _processes = _Processes(wanted, 10 * major + minor, mark)
        atexit.register(end)


def can_begin(device: torch.device) -> bool:
    """Return whether other processes can compile kernels for a device.

    They do not on an integrated GPU: they would take its memory while the first decisions are made.
    """
    return (
        triton is not None
        and device.type == "cuda"
        and torch.version.hip is None
        and not torch.cuda.get_device_properties(device).is_integrated
        and bool(sys.executable)
        and not getattr(sys, "frozen", False)  # then it is no interpreter
        and hasattr(signal, "alarm")
    )


def wait_for(kernel: Any, dtype: torch.dtype, constants: tuple[int, ...]) -> None:
    """Wait until a kernel is compiled, if another process is to do it.

    Args:
        kernel: The kernel.
        dtype: Type of its first tensor.
        constants: Its compile-time constants.
    """
    if _processes is not None:
        _processes.wait_for((kernel.fn.__module__, kernel.fn.__name__, _type(dtype), constants))


def end() -> None:
    """End the processes."""
    global _processes
    if _processes is not None:
        ended, _processes = _processes, None
        ended.end()
        atexit.unregister(end)


def _mark(wanted: list[Wanted], capability: int) -> Path:
    """Return a file whose name depends on everything that the compiled kernels depend on."""
    told = hashlib.sha256(f"{triton.__version__} {capability} {wanted}".encode())
    for module in sorted({each.module for each in wanted}):
        told.update(Path(str(sys.modules[module].__file__)).read_bytes())
    folder = os.environ.get("TRITON_CACHE_DIR", "").strip()
    return Path(folder or Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache")) / (
        f"yolov12-{told.hexdigest()[:24]}"
    )
