import pytest

from yolov12.plan.micro_batch import MicroBatch
from yolov12.plan.network import load


@pytest.fixture(scope="session")
def network():
    return load("yolov12n.yaml", classes=7)


@pytest.fixture(scope="session")
def micro_batch(network):
    """Small images: in shapes only they take as long as large ones, but the loss is computed."""
    return MicroBatch(network, imgsz=128, boxes=20)
