"""Runs a benchmark as its command does, small and on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.processes import environment


@pytest.fixture
def run_small(tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Function that runs a benchmark with `--small --device cpu`, and returns the content of its file."""

    def run(name: str) -> dict[str, Any]:
        out = tmp_path / f"{name}.json"
        command = [sys.executable, "-m", "benchmarks", name, "--small", "--device", "cpu", "--out", str(out)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        content: dict[str, Any] = json.loads(out.read_text("utf-8"))
        assert content["command"] == f"python -m benchmarks {name} --small --device cpu --out {name}.json"
        assert content["gpus"] == 0
        return content

    return run
