"""Boxes of augmented images: the numbers that Ultralytics computes, for all images of a mosaic at once.

Each function returns False for labels that are more than boxes (outlines, keypoints), or in another form than data sets
give them. Ultralytics' own code then does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["formatted", "joined"]


def joined(labels: dict[str, Any], layout: Sequence[dict[str, Any]], side: int) -> bool:
    """Give labels the boxes and classes of all images of a mosaic, cut at its border.

    Args:
        labels: Labels of the first image.
        layout: Ultralytics' layout of the mosaic.
        side: Height and width of the mosaic in pixels.

    Returns:
        True if it was done.
    """
    parts = [part["labels_patch"]["instances"] for part in layout]
    if not all(_is_plain(part) and part.normalized and part._bboxes.format == "xywh" for part in parts):
        return False
    counts = [len(part.bboxes) for part in parts]
    scale = np.array([part["img_shape"][::-1] for part in layout], np.float32).repeat(counts, 0)
    shift = np.array([(part["padw"], part["padh"]) for part in layout], np.float32).repeat(counts, 0)
    boxes = np.concatenate([part.bboxes for part in parts])
    half = boxes[:, 2:] / 2
    corners = boxes[:, :2] - half, boxes[:, :2] + half
    boxes = np.concatenate([corner * scale + shift for corner in corners], 1).clip(0, side)
    kept = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) > 0
    labels["cls"] = np.concatenate([part["labels_patch"]["cls"] for part in layout])[kept]
    labels["instances"] = type(parts[0])(boxes[kept], parts[0].segments, bbox_format="xyxy", normalized=False)
    labels["resized_shape"] = (side, side)
    return True


def formatted(form: Any, labels: dict[str, Any], params: dict[str, Any]) -> bool:
    """Turn the boxes and classes of labels into tensors.

    Args:
        form: Ultralytics' `Format`.
        labels: Labels without boxes and classes.
        params: Parameters of `form` for them.

    Returns:
        True if it was done.
    """
    boxes, classes, count = params["instances"], params["cls"], params["nl"]
    if form.return_mask or form.return_keypoint or form.return_obb or not (form.normalize and form.batch_idx):
        return False
    if not _is_plain(boxes) or not count:
        return False
    labels["cls"] = torch.from_numpy(classes)
    labels["bboxes"] = torch.from_numpy(boxes.bboxes / np.array([params["w"], params["h"]] * 2, np.float32))
    labels["batch_idx"] = torch.zeros(count)
    return True


def _is_plain(instances: Any) -> bool:
    """Return whether instances are nothing but boxes, as 32-bit floats."""
    return (
        not len(instances.segments)
        and instances.segments.shape[1:] == (1000, 2)
        and instances.keypoints is None
        and instances.bboxes.dtype == np.float32
    )
