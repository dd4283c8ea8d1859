"""Data sets of Ultralytics with small images, arguments of their augmentation, and how close renderings are."""

from hypothesis import strategies as st
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import check_det_dataset

from yolov12.training.data import packing

SIZES = [(64, 64), (47, 81), (90, 33), (130, 200), (30, 30), (64, 48)]

PROBABILITY = st.sampled_from([0.0, 0.5, 1.0])
ARGUMENTS = st.fixed_dictionaries(
    {
        "mosaic": PROBABILITY,
        "mixup": PROBABILITY,
        "cutmix": st.sampled_from([0.0, 0.0, 0.5]),
        "degrees": st.sampled_from([0.0, 0.0, 30.0, 180.0]),
        "shear": st.sampled_from([0.0, 0.0, 20.0]),
        "perspective": st.sampled_from([0.0, 0.0, 0.001]),
        "scale": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
        "translate": st.sampled_from([0.0, 0.1, 0.9, 1.0]),
        "hsv_h": st.sampled_from([0.0, 0.015, 0.5, 1.0]),
        "hsv_s": st.sampled_from([0.0, 0.7, 1.0]),
        "hsv_v": st.sampled_from([0.0, 0.4, 1.0]),
        "fliplr": PROBABILITY,
        "flipud": PROBABILITY,
        "bgr": PROBABILITY,
    }
)


def dataset_of(yaml, task="detect", channels=3, **arguments):
    cfg = get_cfg(overrides={"imgsz": 64, "task": task, **arguments})
    data = {**check_det_dataset(yaml), "channels": channels}
    return build_yolo_dataset(cfg, data["train"], 4, data)


def assert_alike(host, device):
    """Check that images are the same to rounding.

    Args:
        host: Images that the host rendered, uint8.
        device: The same images, rendered by the device.
    """
    difference = (host.int() - device.int()).abs()
    if packing._is_fine():  # OpenCV 5 interpolates with floats: what it rounds to the other side, gains may amplify
        assert (difference > 1).sum() <= 1e-3 * difference.numel()
        assert difference.max() <= 8
    else:
        assert difference.max() <= 1
