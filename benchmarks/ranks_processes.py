"""Processes of a run on this machine: start the ranks, and collect their results."""

from __future__ import annotations

import atexit
import os
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]

from benchmarks.common.processes import ROOT, Call, environment


class Processes:
    """Ranks of one run, or a single process. Each calls a function of `benchmarks/ranks_work.py`.

    Args:
        function: Name of that function.
        work: Its argument.
        ranks: Number of ranks; 0 for one process that is no rank.
        limit_s: Seconds after which the processes are killed.
        stock: True if Ultralytics stays as it is.
    """

    def __init__(self, function: str, work: dict[str, Any], ranks: int, limit_s: float, stock: bool = False) -> None:
        self._folder, self._deadline = Path(tempfile.mkdtemp()), time.monotonic() + limit_s
        # It stands for the .pth file of an installed package, so that all processes of a run know our arguments.
        (self._folder / "sitecustomize.py").write_text("import yolov12.autopatch; yolov12.autopatch.install()\n")
        path = os.pathsep.join([str(self._folder), environment()["PYTHONPATH"]])
        common = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **({} if stock else {"YOLOV12_AUTOPATCH": "1"})}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self._calls: list[Call] = []
        atexit.register(self.end)
        for rank in range(max(ranks, 1)):
            sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **sizes}
            place |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            variables = {**common, **(place if ranks else {})}
            with (self._folder / f"{rank}.log").open("w") as log:
                self._calls.append(Call(f"ranks_work:{function}", stock=stock, log=log, variables=variables, work=work))

    @property
    def _runs(self) -> list[subprocess.Popen[bytes]]:
        return [call.process for call in self._calls]

    def running(self) -> bool:
        """Return whether all processes still run, within the time limit."""
        return time.monotonic() < self._deadline and all(run.poll() is None for run in self._runs)

    def kill(self, rank: int) -> None:
        """Kill one process."""
        self._runs[rank].kill()

    def any_runs(self) -> bool:
        """Return whether any process still runs, within the time limit."""
        return time.monotonic() < self._deadline and any(run.poll() is None for run in self._runs)

    def end(self) -> None:
        """Kill the processes that still run, with their children."""
        for run in self._runs:
            if run.poll() is None:
                with suppress(psutil.NoSuchProcess):
                    for child in psutil.Process(run.pid).children(recursive=True):
                        with suppress(psutil.NoSuchProcess):
                            child.kill()
                run.kill()
                run.wait()

    def finish(self) -> dict[str, Any]:
        """Wait for the processes; return their results, rank 0 first or, after a failure, the ends of their logs."""
        late = []
        for rank, run in enumerate(self._runs):
            try:
                run.wait(max(self._deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                late.append(rank)
        self.end()
        statuses = [run.returncode for run in self._runs]
        if not any(statuses):
            return {"told": [call.result() for call in self._calls]}
        logs = [(self._folder / f"{rank}.log").read_text(errors="replace")[-1500:] for rank in range(len(statuses))]
        return {
            "failed": {"exit_statuses": statuses, "ended_for_time": late},
            "log_tails": [log.replace(f"{ROOT}/", "") for log in logs],
        }
