import pytest

from yolov12.plan.fake_model import load
from yolov12.plan.micro_batch import MicroBatchTracer


@pytest.fixture(scope="session")
def fake_model():
    return load("yolov12n.yaml", classes=7)


@pytest.fixture(scope="session")
def tracer(fake_model):
    """Trace small images. The loss runs with real tensors, and its time grows with the image size."""
    return MicroBatchTracer(fake_model, imgsz=128, boxes=20)
