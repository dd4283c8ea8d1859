"""Processes of the benchmarks: how stock Ultralytics and this package are started, and how memory is limited."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
GIB = 2**30
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Allocator setting under which freed memory of any size can be used again."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For small work on a CPU, where threads of several processes would wait for one another."""


def environment(stock: bool = False, **more: str) -> dict[str, str]:
    """Return the environment of a process that finds this repository.

    Args:
        stock: True if Ultralytics stays as it is, unless the process itself calls `autopatch.apply`.
        more: Further variables.
    """
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    hook = {"YOLOV12_AUTOPATCH": "0"} if stock else {}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), **hook, **more}


class Call:
    """Call of a benchmark's function in a process of its own, which starts at once.

    Args:
        function: Module in `benchmarks` and function, as in `attention:step`.
        stock: True if Ultralytics stays as it is.
        log: File for the output of the process; by default, it goes where that of this process goes.
        variables: Environment variables besides those of this process.
        arguments: Arguments of the function, of JSON's types.
    """

    def __init__(
        self,
        function: str,
        *,
        stock: bool = False,
        log: IO[str] | None = None,
        variables: dict[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        self._file = Path(tempfile.mkdtemp(), "result.json")
        command = [sys.executable, "-m", "benchmarks.common.processes"]
        command += [function, json.dumps(arguments), str(self._file)]
        self.process = subprocess.Popen(
            command, env=environment(stock, **(variables or {})), stdout=log, stderr=log and subprocess.STDOUT
        )

    def wait(self) -> int:
        """Wait for the end of the process, and return its exit status."""
        return self.process.wait()

    def result(self) -> Any:
        """Wait for the end of the process, and return what the function returned.

        Raises:
            subprocess.CalledProcessError: The process failed.
        """
        if status := self.wait():
            raise subprocess.CalledProcessError(status, self.process.args)
        return json.loads(self._file.read_text())


def shared_out(
    function: str, processes: int, part: str, amount: int, seed: int = 0, **arguments: Any
) -> dict[str, Any]:
    """Call a function in several processes at once, each with its own `seed` and a share of the work.

    Args:
        function: See `Call`. It returns a dictionary.
        processes: Number of processes.
        part: Argument of the function for its share of the amount.
        amount: Amount for all processes together.
        seed: Seed of the first process.
        arguments: Further arguments of the function, or of `Call`.

    Returns:
        Whole numbers as sums, other numbers as maxima and lists of names united, except that those named `..._of_a_...`
        are alike.
    """
    each = -(-amount // processes)
    calls = [Call(function, **{part: each, "seed": seed + 1000 * number}, **arguments) for number in range(processes)]
    return summed([call.result() for call in calls])


def summed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results of `shared_out` from those of the processes."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        values = [part[name] for part in parts if part.get(name) is not None]
        if "_of_a_" in name or not values or isinstance(values[0], (str, bool)):
            found[name] = values[0] if values else None
        elif isinstance(values[0], list):
            found[name] = sorted(set().union(*values))
        else:
            found[name] = sum(values) if isinstance(values[0], int) else max(values)
    return found


def limit_memory(gib: float) -> None:
    """Limit the allocator of this process to a fraction of the card, as if the card were smaller.

    Args:
        gib: Limit in GiB; the whole card if it has less.
    """
    import torch

    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(gib * GIB / torch.cuda.mem_get_info()[1], 1.0))


@contextmanager
def gpu_shared() -> Iterator[bool]:
    """Return a context in which kernels of several processes run at the same time on a GPU, where this is possible.

    Without NVIDIA's Multi-Process Service (MPS), the GPU runs kernels of one process at a time and switches between the
    processes. The context starts this service, and gives True if that succeeds. Processes that start in the context use
    it. Its program, `nvidia-cuda-mps-control`, is part of the driver.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        program = shutil.which("nvidia-cuda-mps-control")
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        if not program or subprocess.run([program, "-d"], env={**os.environ, **variables}, check=False).returncode:
            yield False
            return
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield True
        finally:
            subprocess.run([program], input="quit\n", text=True, check=False)
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def _main(function: str, arguments: str, out: str) -> None:
    module, name = function.split(":")
    found = getattr(importlib.import_module(f"benchmarks.{module}"), name)(**json.loads(arguments))
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
