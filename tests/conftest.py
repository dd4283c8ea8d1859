"""What every test needs: the seams applied, Ultralytics' folders in a temporary place, no network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Ultralytics reads these once, when it is imported, which happens while tests are collected.
HOME = Path(tempfile.mkdtemp(prefix="yolov12-tests-"))
os.environ["YOLO_CONFIG_DIR"] = str(HOME)
os.environ["YOLO_OFFLINE"] = "1"
os.environ["YOLO_AUTOINSTALL"] = "0"

from yolov12 import autopatch  # noqa: E402

autopatch.apply()

from ultralytics.utils import SETTINGS  # noqa: E402

SETTINGS.update({f"{name}_dir": str(HOME / name) for name in ("datasets", "weights", "runs")})


def pytest_sessionfinish() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture
def home() -> Path:
    """The folder that holds this test run's Ultralytics settings, data sets, weights and runs."""
    return HOME


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python ARGUMENTS...` in this environment; keywords set environment variables, `cwd` the folder."""

    def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=280,
        )

    return run
