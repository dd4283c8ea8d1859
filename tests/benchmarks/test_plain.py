"""Benchmarks that need no GPU and take no sizes as arguments: each runs with less work."""

import json
import sys

import pytest

from benchmarks import classes, exactness, export, imports, shares
from benchmarks.controller import __main__ as controller


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Function that runs the `main` of a benchmark, and returns the content of its file."""

    def call(benchmark, *words):
        out = tmp_path / "out.json"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(out), *words])
        benchmark.main()
        return json.loads(out.read_text("utf-8"))

    return call


@pytest.mark.deep
def test_the_engine_has_the_gradient_of_the_whole_batch_and_the_average_has_not(run, monkeypatch):
    monkeypatch.setattr(exactness, "STEPS", 2)
    monkeypatch.setattr(exactness, "SIZE", 64)
    rows = run(exactness)["rows"]
    assert [(row["steps_before"], row["micro_batch"]) for row in rows] == [(0, 4), (0, 1)] * 2 + [(2, 4), (2, 1)] * 2
    for row in rows:
        assert row["engine"] < (1e-9 if row["dtype"] == "torch.float64" else 0.1)  # fp32: groups of one image
        assert row["average"] > 0.01


def test_fleets_of_all_kinds_are_simulated(run, monkeypatch):
    monkeypatch.setattr(shares, "FLEETS", {2: 1, 256: 1, 1024: 1})
    monkeypatch.setattr(shares, "STEPS", 12)
    monkeypatch.setattr(shares, "LEARNED", 2)
    fleets = run(shares)["fleets"]
    assert [(each["fleet"], each["ranks"]) for each in fleets[:3]] == [("mixed", 2), ("mixed", 256), ("mixed", 1024)]
    assert len(fleets) == 12
    for each in fleets:
        assert 0 < each["to_ideal"] <= 1.1
        assert each["plan_ms"] > 0


def test_imports_of_both_variants_are_timed(run, monkeypatch):
    monkeypatch.setattr(imports, "CODE", "import json")
    found = run(imports, "--rounds", "2")
    assert all(len(times) == 2 and min(times) > 0 for times in found["cpu_s"].values())
    assert found["ours_over_stock"]["least"] == pytest.approx(
        found["least_cpu_s"]["ours"] / found["least_cpu_s"]["stock"], abs=1e-3
    )
    assert min(found["modules"].values()) > 10


@pytest.mark.deep
def test_starts_of_new_classes_and_replay_are_trained(run, monkeypatch, tmp_path):
    """From the demo's own weights, for one epoch of small images."""
    monkeypatch.setattr(classes, "TRAINING", classes.TRAINING | {"imgsz": 32, "batch": 16, "nbs": 16})
    monkeypatch.setattr(classes, "REPLAY_EPOCHS", 1)
    monkeypatch.setattr(classes, "FRACTIONS", (None, 0.5))
    words = ("--base", "yolov12n-demo.pt", "--epochs", "1", "--seeds", "0", "--runs", str(tmp_path / "runs"))
    found = run(classes, *words)
    assert [row["start"] for row in found["starts"]] == list(classes.STARTS)
    assert all(row["cls_loss"][0] > 0 for row in found["starts"])
    assert [row["replay_fraction"] for row in found["replay"]] == [0, 0.5]
    assert all(0 <= value <= 1 for row in found["replay"] for value in row["old_before"] + row["old_after"])


@pytest.mark.deep
def test_a_split_graph_finds_the_same_boxes(run, monkeypatch):
    monkeypatch.setattr(export, "MODELS", [("n", 64)])
    monkeypatch.setattr(export, "SHARES", {False: (1.0, 0.75), True: (1.0,)})
    rows = run(export, "--only", "agree")["agree"]
    assert [(row["dynamic"], row["share"]) for row in rows] == [(False, 1.0), (False, 0.75), (True, 1.0)]
    for row in rows:
        assert "problem" in row or (row["boxes_off_pixels"] < 0.01 and 0.9 < row["planned_of_measured"] < 1.1)


def test_controllers_are_compared_on_few_traces(run):
    found = run(controller, "--traces", "50", "--workers", "1")
    assert found["steps"] == 50 * 60
    assert len(found["policies"]) > 3
