"""Data sets that several tests of the data layer load from."""

import pytest

from tests.training.data.datasets import SIZES, dataset_of


@pytest.fixture(scope="module")
def yamls(tmp_path_factory, trainings):
    """Data set of each task, with images of many sizes."""
    folder = tmp_path_factory.mktemp("data")
    return {
        task: trainings.draw_data(folder / task, task, SIZES if task == "detect" else SIZES[:3])
        for task in ("detect", "segment", "pose", "obb")
    }


@pytest.fixture(scope="module")
def data_sets(yamls):
    """Data sets in color and in grey."""
    return {channels: dataset_of(yamls["detect"], channels=channels, cache="ram") for channels in (3, 1)}
