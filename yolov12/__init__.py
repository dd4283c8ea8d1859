"""YOLOv12 on Ultralytics, with training that adapts to the GPU memory that is free.

from yolov12 import YOLO      # the same class as `from ultralytics import YOLO` in this environment
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"
__all__ = ["YOLO", "__version__"]


def __getattr__(name: str) -> "Any":
    # Loaded on first use: this module runs at every interpreter start (see autopatch.py), so it imports nothing.
    if name == "YOLO":
        from yolov12 import autopatch

        autopatch.apply()
        from ultralytics import YOLO

        return YOLO
    raise AttributeError(f"module 'yolov12' has no attribute {name!r}")
