"""benchmarks/checkpointing.py on a CPU, with few images: every variant runs, and all update as often per image."""

import json
import time
from dataclasses import replace

import pytest

from benchmarks import checkpointing
from benchmarks.checkpointing import FIRST_GIB, LIMITS_GIB, Scope, all_layers, missing, ours
from benchmarks.common.model import Training
from benchmarks.common.processes import GIB, ROOT

LIMIT = Scope(limits=(10**6,), limit_s=0.0, steps=1)  # GiB: no limit for a CPU


def training():
    return Training("yolo12n.yaml", images=4, size=64, device="cpu")


def test_ours_says_what_it_tried():
    (row,) = ours("n", LIMIT, training())
    assert row["images_per_s"] > 0
    assert (row["bn_group"], row["micro_batch"], row["steps_in_smaller_groups"], row["failures"]) == (32, 4, 0, 0)
    assert len(row["steps"]) == 4
    assert row["pairs_tried"] == 1


def test_all_variants_update_as_often_per_image(monkeypatch):
    monkeypatch.setattr(checkpointing, "BATCHES", (1, 2, 4))
    (row,) = all_layers("n", replace(LIMIT, images=8), training())
    assert row["images_per_update"] == 8
    assert row["batch"] == 4
    pass_s = 4 * (1 / row["images_per_s"] - row["update_ms"] / 1e3 / 8)
    by_default = 1 / (pass_s / 4 + row["update_ms"] / 1e3 / 64)
    assert row["images_per_s_nbs_64"] == pytest.approx(by_default)
    assert row["images_per_s_nbs_64"] > row["images_per_s"]  # here, 64 images are more than 8


def test_a_batch_that_used_more_than_the_limit_of_a_cpu_is_no_result(monkeypatch):
    monkeypatch.setattr(checkpointing, "BATCHES", (1, 2, 4))
    small = training()
    peaks = iter([3, 8, 8, 5, 5])  # of a first run of 4 images, then with 4, with 2
    monkeypatch.setattr(small, "peak_bytes", lambda: next(peaks) * GIB)
    monkeypatch.setattr(small, "allocated_bytes", lambda: GIB)
    monkeypatch.setattr(small, "is_over_limit", lambda: next(peaks) > 6)
    (row,) = all_layers("n", replace(LIMIT, limits=(6,), images=4), small)
    assert (row["batch"], row["peak_mib"]) == (1, 5 * 1024)


def test_memory_of_a_cpu_is_that_of_the_process():
    small = training()
    before = small.allocated_bytes()
    small.mark()
    small.bare(4)
    small.limit(1e6)
    assert not small.is_over_limit()
    small.limit(1e-3)
    assert small.is_over_limit()
    assert small.peak_bytes() > before > 2**27


@pytest.mark.deep
def test_the_small_variant_runs_all_parts(run_small):
    found = run_small("checkpointing")
    committed, curves = (
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text("utf-8"))
        for name in ("checkpointing", "limits_h200")
    )
    assert set(found["freed"][0]) == set(committed["freed"][0])
    for row in found["freed"]:
        assert row["measured_mib"] == pytest.approx(row["predicted_mib"], rel=0.3, abs=2)
    for who in ("ours", "stock", "all"):
        rows = found[f"{who}-n"]
        assert set(curves[f"{who}-s"][0]) <= {*rows[0], "device", "commit"}
        assert [row["limit_gib"] for row in rows] == [2]
        assert {row["images_per_update"] for row in rows} == {4}
        for row in rows:
            assert row["images_per_s"] > 0
            assert 100 < row["peak_mib"] < 1024 * row["limit_gib"]
            assert row.get("micro_batch", row.get("batch")) == 4
    assert all(row["failures"] == 0 for row in found["ours-n"])
    for row, measured in zip(found["predicted"]["ours-n"], found["ours-n"], strict=True):
        assert 0 < row["predicted_mib"] < row["peak_mib"] == measured["peak_mib"]
        assert row["off_percent"] is None


def test_the_first_limit_comes_first_and_goes_on_until_two_pairs_were_tried():
    assert LIMITS_GIB[0] == FIRST_GIB == 16
    scope = Scope(limit_s=10.0)
    steps = [step(32)] * 6
    assert checkpointing._enough(steps, 8, 11.0, scope)
    assert not checkpointing._enough(steps, 16, 11.0, scope)
    assert checkpointing._enough(steps, 16, 31.0, scope)
    assert checkpointing._enough([step(64), *steps], 16, 11.0, scope)


def test_a_speed_is_that_of_steps_that_ran_in_the_same_way():
    scope = Scope(limit_s=10.0)
    steps = [*[step(32)] * 9, step(64, events=("grew 32 to 64",)), *[step(64)] * 3, step(64, replayed=1)]
    assert checkpointing._alike([*steps, step(64, replayed=4), step(64, replayed=4)]) == [step(64, replayed=4)] * 2
    assert not checkpointing._enough(steps, 8, 11.0, scope)
    assert checkpointing._enough([*steps, *[step(64, replayed=4)] * 5], 8, 11.0, scope)


def step(micro_batch, replayed=0, events=()):
    return {"micro_batch": micro_batch, "level": 0, "replayed": replayed, "events": events}


def test_time_that_is_over_leaves_out_limits_and_missing_ones_are_measured_later():
    assert list(Scope(until=time.time() - 1).reached()) == []
    assert list(Scope((16, 4)).reached()) == [16, 4]
    rows = [{"limit_gib": 16, "commit": "a"}, {"limit_gib": 4, "commit": "b"}, {"limit_gib": 8}]
    assert missing(rows, (16, 8, 4), "a") == [8, 4]
