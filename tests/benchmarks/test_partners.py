"""The benchmark of a mosaic's other images: its choices, and what it leaves out for the cost of draws by place."""

import json
import random
import sys

import pytest
import torch
from ultralytics.data.utils import check_det_dataset

from benchmarks import partners
from benchmarks.drawings import shapes
from yolov12.training.data.places import Order

BATCHES = [list(range(begin, begin + 16)) for begin in range(0, 160, 16)]


@pytest.mark.parametrize(
    ("choice", "of_sixth_batch"), [("batch", range(80, 96)), ("last 64", range(32, 96)), ("all", range(160))]
)
def test_choices_differ_in_the_images_that_a_mosaic_draws_from(choice, of_sixth_batch):
    with partners.partners_from(choice):
        batch = list(Order(BATCHES, torch.Generator()))[5]
    assert {tuple(sorted(pool)) for pool in batch.pools} == {tuple(of_sixth_batch)}


def test_one_loader_draws_by_place_and_the_other_from_the_generators():
    data = check_det_dataset(shapes(16, 8, 64))
    for by_place in (True, False):
        batches = partners.batches_of(data, by_place, imgsz=64)
        next(batches)
        before = random.getstate()
        assert next(batches)["img"].shape == (16, 3, 64, 64)
        assert (random.getstate() == before) is by_place


@pytest.mark.deep
def test_both_parts_run(tmp_path, monkeypatch):
    out = tmp_path / "part.json"
    monkeypatch.setattr(sys, "argv", ["partners", "--out", str(out), "--small"])
    partners.main()
    found = json.loads(out.read_text())
    assert found["map"]["rows"].keys() == partners.CHOICES.keys()
    for case in partners.CASES:
        assert found["cost"][case]["ratio"] == pytest.approx(
            found["cost"][case]["by_place_cpu_ms"] / found["cost"][case]["without_cpu_ms"]
        )
