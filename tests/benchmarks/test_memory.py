"""What benchmarks/memory.py makes of the rows of memory.csv, and its small variant on the CPU."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks import memory, memory_trainings
from benchmarks.common.processes import ROOT
from benchmarks.memory_trainings import CASES, epoch_seconds, new_sizes, prediction_errors

LIMITS = json.loads((ROOT / "benchmarks/results/memory.json").read_text("utf-8"))["limits"]


def test_errors_of_predictions_leave_out_no_step():
    assert {"8 GiB", "16 GiB"} <= LIMITS.keys()
    for limit in LIMITS.values():
        rows = limit["rows"]
        found = prediction_errors(rows)
        off = [abs(float(row["predicted_mib"]) / float(row["peak_mib"]) - 1) for row in rows]
        assert abs(found["all"]["worst_percent"]) == pytest.approx(100 * max(off))
        assert sum(found[case]["steps"] for case in CASES if case in found) == found["all"]["steps"] == len(rows)


def test_every_step_is_in_one_case():
    ways = ["32 32", "64", "64", "32 32", "64 rebuild", "64", "64"]
    rows = [
        {
            "step": str(step),
            "micro_batches": way.split(" r")[0],
            "plan": way,
            "predicted_mib": str(90 + step),
            "peak_mib": "100",
        }
        for step, way in enumerate(ways, 1)
    ]
    found = prediction_errors(rows)
    assert {case: found[case]["steps"] for case in CASES} == {"first step": 1, "new": 2, "changed": 2, "same": 2}
    assert found["new"]["worst_step"] == 2
    assert found["new"]["worst_percent"] == pytest.approx(-8)


def test_first_epochs_are_told_with_the_sizes_that_were_new_in_them():
    assert epoch_seconds("epoch,time,x\n1,39.0,0\n2,45.5,0\n") == [39.0, 6.5]
    sizes = ["8 8", "8 8", "64 16", "64 16"]
    rows = [
        {"micro_batches": each, "step": str(step), "epoch": "1", "step_ms": str(10 * step)}
        for step, each in enumerate(sizes, 1)
    ]
    found = {each["images"]: each for each in new_sizes(rows)}
    assert {images: each["step"] for images, each in found.items()} == {8: 1, 64: 3, 16: 3}
    assert (found[64]["ms"], found[64]["usual_ms"]) == (30.0, 25.0)


def test_first_epochs_share_kernels_and_no_stored_plans(monkeypatch):
    given = []

    def train(folder, stock, variables, **_):
        given.append(variables)
        folder.with_suffix(".log").write_text("")
        return SimpleNamespace(wait=lambda: 1)

    monkeypatch.setattr(memory_trainings, "_draw", lambda *_: "data.yaml")
    monkeypatch.setattr(memory_trainings, "_train", train)
    assert list(memory_trainings.first_epoch()) == ["stock", "empty cache", "filled cache"]
    assert len({each["YOLO_CONFIG_DIR"] for each in given}) == 3
    assert len({each["TRITON_CACHE_DIR"] for each in given}) == 1


@pytest.mark.deep
def test_an_update_whose_gradient_overflows_is_left_out(monkeypatch):
    """On a GPU, gradients of weights are fp16, and those of 256 images of an untrained model can exceed it."""

    def prepare(size):
        model, task, _, batch = memory.original(size)
        return model, task, torch.amp.GradScaler("cpu", init_scale=2.0**124), batch

    monkeypatch.setattr(memory, "original", memory._prepare, raising=False)
    monkeypatch.setattr(memory, "_prepare", prepare)
    found = memory.gradient("cpu", small=True)
    runs = found["runs"].values()
    assert all(run["scale"] < 2.0**124 and math.isfinite(run["loss"]) for run in runs)
    assert 0 < max(found["relative_difference"].values()) < 1e-3


@pytest.mark.deep
def test_the_small_variant_has_all_parts(run_small):
    found = run_small("memory")
    gradient = found["gradient"]
    assert [len(run["micro_batches"]) for run in gradient["runs"].values()] == [4, 1, 4]
    assert set(gradient["relative_difference"]) == {"limit", "rounding"}
    assert 0 < max(gradient["relative_difference"].values()) < 1e-3  # all is fp32
    assert max(gradient["running_statistics"].values()) < 1e-3
    assert [row["images"] for row in found["first_times"]] == [1, 2, 8]
    assert all(min(row["first_s"], row["second_s"]) > 0 for row in found["first_times"])
    assert [(row["micro_batch"], row["bn_group"]) for row in found["overhead"]] == [(8, 8), (2, 2), (8, 2)]
    assert all(row["engine_over_bare"] > 0 and len(row["rounds"]) == 2 for row in found["overhead"])

    calm, disturbed = (found["failures"][which] for which in ("undisturbed", "disturbed"))
    assert calm["failures_injected"] == calm["out_of_memories"] == 0
    assert disturbed["failures_injected"] == disturbed["out_of_memories"] > 0
    for run in (calm, disturbed):
        assert (run["updates"], run["images"], run["images_lost"]) == (8, 64, 0)
    assert found["failures"]["difference_of_weights"] < 1e-2 * found["failures"]["way_the_weights_went"]

    (limit,) = found["limits"].values()
    assert (limit["exit_status"], limit["summary"]["updates"], limit["summary"]["images_lost"]) == (0, 4, 0)
    assert limit["prediction"]["all"]["steps"] == len(limit["rows"]) == 4
    for run in found["first_epoch"].values():
        assert run["exit_status"] == 0, run["log_tail"]
        assert len(run["epoch_s"]) == 2
    for who in ("ours", "stock", "stock_alone"):
        run = found["neighbour"][who]
        assert run["exit_status"] == 0, run["log_tail"]
        assert bool(run["card_taken"]) == (who != "stock_alone")
        assert all(0 <= taken < 0.5 for _, taken in run["card_taken"])
    assert found["neighbour"]["ours"]["summary"]["images_lost"] == 0
