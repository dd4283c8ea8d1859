"""benchmarks/checkpointing.py on a CPU, with few images: every variant runs, and all update as often per image."""

import time

import pytest

from benchmarks import checkpointing
from benchmarks.checkpointing import FIRST_GIB, LIMITS_GIB, Scope, all_layers, missing, ours
from benchmarks.common.model import Training

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
    monkeypatch.setattr(checkpointing, "BATCH", 8)
    (row,) = all_layers("n", LIMIT, training())
    assert row["images_per_update"] == 8
    assert row["batch"] == 4
    pass_s = 4 * (1 / row["images_per_s"] - row["update_ms"] / 1e3 / 8)
    by_default = 1 / (pass_s / 4 + row["update_ms"] / 1e3 / 64)
    assert row["images_per_s_nbs_64"] == pytest.approx(by_default)
    assert row["images_per_s_nbs_64"] > row["images_per_s"]  # here, 64 images are more than 8


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
