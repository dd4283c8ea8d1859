"""Processes of a run on this machine: start the ranks, and collect their results."""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]

ROOT = Path(__file__).parents[1]


class Processes:
    """Ranks of one run, or a single process. Each runs `ranks_work.WORK[kind]` and writes its result to a file.

    Args:
        kind: Key of `ranks_work.WORK`.
        work: Argument of that function.
        ranks: Number of ranks; 0 for one process that is no rank.
        limit_s: Seconds after which the processes are killed.
        environment: Environment variables besides those of this process.
    """

    def __init__(self, kind: str, work: dict[str, Any], ranks: int, limit_s: float, **environment: str) -> None:
        self._folder, self._deadline = Path(tempfile.mkdtemp()), time.monotonic() + limit_s
        (self._folder / "work.json").write_text(json.dumps([kind, work]))
        # It stands for the .pth file of an installed package, so that all processes of a run know our arguments.
        (self._folder / "sitecustomize.py").write_text("import yolov12.autopatch; yolov12.autopatch.install()\n")
        paths = [str(self._folder), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        common = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", **environment}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self._runs: list[subprocess.Popen[bytes]] = []
        atexit.register(self.end)
        for rank in range(max(ranks, 1)):
            sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **sizes}
            place |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
            with (self._folder / f"{rank}.log").open("w") as log:
                self._runs.append(
                    subprocess.Popen(
                        [sys.executable, str(Path(__file__).with_name("ranks_work.py")), str(self._folder)],
                        env={**os.environ, **common, **(place if ranks else {})},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )

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
            ranks = range(len(statuses))
            return {"told": [json.loads((self._folder / f"{rank}.json").read_text()) for rank in ranks]}
        logs = [(self._folder / f"{rank}.log").read_text(errors="replace")[-1500:] for rank in range(len(statuses))]
        return {
            "failed": {"exit_statuses": statuses, "ended_for_time": late},
            "log_tails": [log.replace(f"{ROOT}/", "") for log in logs],
        }
