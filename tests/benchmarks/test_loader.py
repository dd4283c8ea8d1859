"""The benchmark of the loaders: it measures the stages of both."""

import pytest
from ultralytics.data.utils import check_det_dataset

from benchmarks import loader


@pytest.mark.deep
def test_the_stages_of_both_loaders_are_measured():
    data = check_det_dataset(loader.photographs(48, 64))  # more images than a batch, which a loader keeps
    case = loader.in_turn(data, 1, imgsz=64)
    assert case["ratio"] == pytest.approx(case["stock_cpu_ms"] / case["ours_cpu_ms"])
    found = loader.stages(data, 1, imgsz=64)
    for stages in found.values():
        assert {"decode", "canvas", "warp", "colours", "channels, flips", "batch", "labels and the rest"} <= set(stages)
        assert all(took >= 0 for took in stages.values())
