"""The benchmark of the number of workers: what it reads from Linux, and its parts."""

import json
import sys

import pytest
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset

from benchmarks import workers
from benchmarks.worker_times import Setting, with_setting


def test_the_times_of_workers_are_those_of_linux():
    data = check_det_dataset(workers.photographs(8, 64))
    dataset = build_yolo_dataset(get_cfg(overrides={"mode": "train", "imgsz": 64}), data["train"], 2, data)
    row = with_setting(dataset, Setting(3), "cpu", 2, 0.0)
    assert row["workers"] == 3
    assert row["images_per_s"] * row["seconds"] == pytest.approx(6)  # a batch of each worker
    assert row["decode_ms"] + row["augment_ms"] > 0
    assert min(row["faults_per_image"], row["main_ms"], row["worker_user_ms"]) >= 0


def test_several_processes_get_something_done():
    (row,) = workers.processes((2,), 0.01)
    assert row["processes"] == 2
    assert min(row[name] for name in workers.PROBES) > 0


@pytest.mark.deep
def test_parts_are_kept_when_others_are_measured(tmp_path, monkeypatch):
    out = tmp_path / "workers.json"
    for part in workers.PARTS:
        monkeypatch.setattr(sys, "argv", ["workers", "--out", str(out), "--small", "--only", part])
        workers.main()
    found = json.loads(out.read_text())
    assert [row["workers"] for row in found["loaders"]["rows"]] == [2, 1, 2, 1]
    assert [row["variant"] for row in found["trainings"]["rows"]] == ["workers=8", "chosen"]
    assert all(len(row["epochs"]) == 2 for row in found["trainings"]["rows"])
    assert len(found["processes"]["rows"]) == 2
