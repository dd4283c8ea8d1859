"""The benchmark of augmentation on the device: it measures both places."""

import argparse

import pytest
import torch
from ultralytics.data.utils import check_det_dataset

from benchmarks import augmentation
from tests.training.data.datasets import dataset_of


@pytest.mark.deep
def test_both_places_are_measured():
    yaml = augmentation.photographs(16, 64)
    found = augmentation.work(check_det_dataset(yaml), 1, imgsz=64)
    assert found["ratio"] == pytest.approx(found["host_cpu_ms"] / found["device_cpu_ms"])
    options = argparse.Namespace(batch=4, workers=1, seconds=0.01)
    for mode in augmentation.MODES:
        assert augmentation.speed(dataset_of(yaml), mode, torch.device("cpu"), options)["images_per_s"] > 0
