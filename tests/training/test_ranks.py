"""Whole trainings in several processes, over gloo on the CPU."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO

RANK = Path(__file__).with_name("rank.py")
PLAIN = {"mosaic": 0, "hsv_h": 0, "hsv_s": 0, "hsv_v": 0, "fliplr": 0, "translate": 0, "scale": 0}
"""Images as they are: one process draws augmentation in another way than several."""


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(size, *command, **environment):
    """Start a process for each rank."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "WORLD_SIZE": str(size)}
    place |= {"LOCAL_WORLD_SIZE": str(size), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]


def finish(processes, timeout_s=280):
    """Exit status and output of each."""
    outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    return [process.returncode for process in processes], outputs


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "begin.pt"
    model = YOLO("yolov12n.yaml")
    model.save(file)
    return file


@pytest.fixture(scope="module")
def settings(trainings, tmp_path_factory):
    """Of 32 images with large boxes, which no augmentation drops: all ranks know how many there are."""
    data = trainings.draw_data(tmp_path_factory.mktemp("data") / "images", sizes=((64, 64),) * 4)
    # Such that rounding stays rounding: BatchNorm over few values makes much of it.
    calm = {"imgsz": 128, "batch": 16, "nbs": 16, "bn_group": 4, "lr0": 0.002, "amp": False}
    own = {"data": data, "name": "run", **calm}
    return lambda folder, **more: {**trainings.TINY, **PLAIN, **own, "project": str(folder), **more}


@pytest.fixture(scope="module")
def alone(settings, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    arguments = settings(folder)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, RANK, weights, json.dumps(arguments), folder],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "0.pt", weights_only=True)


def results(folder):
    header, *rows = csv.reader((Path(folder) / "results.csv").read_text().splitlines())
    return [dict(zip(header, map(float, row), strict=True)) for row in rows]


@pytest.mark.parametrize("size", [2, 4])
def test_a_run_in_several_processes_ends_as_in_one(settings, weights, alone, tmp_path, size):
    arguments = settings(tmp_path)
    codes, outputs = finish(start(size, RANK, weights, json.dumps(arguments), tmp_path))
    assert codes == [0] * size, "\n".join(outputs)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(size)]
    for name, value in alone["weights"].items():
        assert all(torch.equal(value_, found[0]["weights"][name]) for value_ in (f["weights"][name] for f in found))
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(f["ema"][name], value) for f in found for name, value in found[0]["ema"].items())
    for row, wanted in zip(results(found[0]["folder"]), results(alone["folder"]), strict=True):
        for name, value in wanted.items():
            if name != "time" and not name.startswith("memory/"):
                assert row[name] == pytest.approx(value, rel=2e-3, abs=2e-3), name


def test_the_others_end_soon_and_name_the_rank_that_died(settings, weights, tmp_path):
    arguments = settings(tmp_path, epochs=50)
    begun = time.monotonic()
    processes = start(4, RANK, weights, json.dumps(arguments), tmp_path, KILL="[2, 3]")
    assert processes[2].wait(200) == -signal.SIGKILL
    died = time.monotonic()
    codes, outputs = finish([process for process in processes if process.returncode is None], 60)
    assert time.monotonic() - died < 60, (died - begun, outputs)
    assert all(code == 1 for code in codes), outputs
    assert all("rank 2 (" in output and "has not been heard of" in output for output in outputs), outputs
    assert (tmp_path / "run" / "weights" / "state.pt").exists()


@pytest.mark.slow
def test_torchrun_starts_them_again_and_the_run_ends_as_if_nothing_had_been(settings, weights, alone, tmp_path):
    arguments = settings(tmp_path, resume="auto")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=4", "--max-restarts=1", f"--master-port={port()}"]
    done = subprocess.run(
        [sys.executable, *launch, RANK, weights, json.dumps(arguments), tmp_path],
        env={**os.environ, "KILL": "[2, 3]", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on with" in done.stderr + done.stdout
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(4)]
    assert found[0]["folder"] == str(tmp_path / "run")
    for name, value in alone["weights"].items():
        assert all(torch.equal(rank["weights"][name], found[0]["weights"][name]) for rank in found)
        torch.testing.assert_close(found[0]["weights"][name], value, rtol=1e-3, atol=1e-3)
    assert len(results(found[0]["folder"])) == 2
