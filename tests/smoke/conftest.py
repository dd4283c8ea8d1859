"""These take minutes, and are run by scripts/smoke.sh only.

`YOLOV12_REQUIRE=gpu,flash-attn,tensorrt` names what this machine ought to have. If a part is missing, no test runs, and
the exit status is not 0. A test is skipped if it needs a part that is neither there nor required.
"""

import datetime
import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.common.report import commit
from yolov12.check import read_gpu_packages, read_report
from yolov12.check.render import as_json

HERE = Path(__file__).parent
REQUIRE = "YOLOV12_REQUIRE"
PARTS = ("gpu", "flash-attn", "tensorrt")
_record = {}


def missing_parts():
    """Part → why it cannot be used on this machine."""
    found = {}
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:  # no driver, no GPU, or PyTorch without CUDA
        found["gpu"] = str(error).strip().splitlines()[0]
    for package in read_gpu_packages():
        if not package.works:
            found[package.name] = package.failure or "not installed"
    return found


def pytest_addoption(parser):
    parser.addoption("--record", help="file for the report of `yolov12 check` and the outcome of each smoke test")


def pytest_configure(config):
    if "smoke" in config.option.markexpr:
        check_required(os.environ.get(REQUIRE, ""), missing_parts())


def check_required(words, missing):
    """Raise an error if a required part is unknown or missing."""
    required = [word.strip() for word in words.split(",") if word.strip()]
    if unknown := [word for word in required if word not in PARTS]:
        raise pytest.UsageError(f"{REQUIRE} does not know {', '.join(unknown)}. It knows {', '.join(PARTS)}")
    if lacking := [f"{word} ({missing[word]})" for word in required if word in missing]:
        raise pytest.UsageError(f"{REQUIRE} asks for what this machine does not have: {', '.join(lacking)}")


def pytest_collection_modifyitems(config, items):
    smoke = "smoke" in config.option.markexpr
    missing = missing_parts() if smoke else {}
    for item in items:
        if HERE not in item.path.parents:
            continue
        if not smoke:
            item.add_marker(pytest.mark.skip(reason="scripts/smoke.sh runs these"))
        for mark in item.iter_markers("needs"):
            if lacking := [part for part in mark.args if part in missing]:
                item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(lacking)}"))


def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        _record[report.nodeid.rpartition("::")[2]] = report.outcome


def pytest_sessionfinish(session):
    if file := session.config.getoption("--record", None):
        Path(file).write_text(json.dumps(recorded(_record), indent=1) + "\n", "utf-8")


def recorded(outcomes):
    """What scripts/verified.py makes a row of the README's table of."""
    return {
        "command": "scripts/smoke.sh --record=FILE",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "check": json.loads(as_json(read_report())),
        "outcomes": outcomes,
    }
