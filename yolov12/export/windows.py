"""Windows of local operators: the few rows of its input that a row of the output depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import onnx_ir as ir

from yolov12.export.shapes import Sizes

__all__ = ["IMAGES", "ROWS", "Window", "is_local", "moves", "pads_of", "window_of"]

IMAGES, ROWS = 0, 2
"""The axes of (images, channels, rows, columns) that a graph is split along."""

_WINDOWS = frozenset({"Conv", "MaxPool"})
_POINTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Sigmoid", "Relu", "LeakyRelu", "Tanh", "Clip", "Exp", "HardSwish"})
_REGROUP = frozenset({"Split", "Concat"})


class Window(NamedTuple):
    """Rows that an operator reads: row r of its output needs `span` rows of its input, from row stride·r − before.

    An operator that upsamples repeats each row of its input `repeat` times.
    """

    stride: int
    before: int
    span: int
    repeat: int = 1


def moves(value: ir.Value, sizes: Sizes) -> bool:
    """Return whether a tensor depends on the image: it is no constant, and not computed from shapes alone."""
    return not value.is_initializer() and value not in sizes.shapes.contents and value.const_value is None


def is_local(node: ir.Node, axis: int, sizes: Sizes) -> bool:
    """Return whether each row (or image) of a node's outputs is known to depend on a few rows of its inputs only."""
    shapes = [sizes.most[str(v.name)] for v in [*node.inputs, *node.outputs] if v is not None and moves(v, sizes)]
    if any(len(shape) != 4 for shape in shapes):
        return False
    if node.op_type in _WINDOWS:
        how = node.attributes
        unusual = how.get_string("auto_pad", "NOTSET") != "NOTSET" or how.get_int("ceil_mode") == 1
        of_images = not any(value is not None and moves(value, sizes) for value in node.inputs[1:])
        return of_images and _kernel(node) is not None and not unusual
    if node.op_type == "Resize":
        # Builders need to see that a resized length is a multiple, which they do not of a strip of any length.
        return _repeats(node) is not None and (axis != ROWS or sizes.fixed(node.outputs[0], axis) is not None)
    if node.op_type in _REGROUP:
        whole = node.op_type == "Split" or all(value is not None and moves(value, sizes) for value in node.inputs)
        return whole and node.attributes.get_int("axis", 0) % 4 != axis
    if node.op_type not in _POINTWISE or any(shape[axis] != shapes[-1][axis] for shape in shapes):
        return False
    constants = (sizes.most[str(v.name)] for v in node.inputs if v is not None and not moves(v, sizes))
    return all(len(shape) < 4 - axis or shape[axis - 4] == 1 for shape in constants)


def _repeats(node: ir.Node) -> int | None:
    """Return how often Resize repeats each row; None if it does anything else."""
    how = node.attributes
    scales = node.inputs[2].const_value if len(node.inputs) == 3 and node.inputs[2] is not None else None
    if scales is None or how.get_string("mode", "nearest") != "nearest":
        return None
    if (
        how.get_string("coordinate_transformation_mode", "") != "asymmetric"
        or how.get_string("nearest_mode", "") != "floor"
    ):
        return None
    images, _, rows, _ = map(float, scales.numpy())
    return int(rows) if images == 1 and rows >= 1 and rows == int(rows) else None


def window_of(node: ir.Node, axis: int) -> Window:
    """Return the window of a node along an axis."""
    if node.op_type == "Resize" and axis == ROWS:
        return Window(1, 0, 1, repeat=_repeats(node) or 1)
    if node.op_type not in _WINDOWS or axis != ROWS:
        return Window(1, 0, 1)
    kernel = _kernel(node) or [1]
    stride = node.attributes.get_ints("strides", [1, 1])[0]
    dilation = node.attributes.get_ints("dilations", [1, 1])[0]
    return Window(stride, pads_of(node)[0], dilation * (kernel[0] - 1) + 1)


def _kernel(node: ir.Node) -> Sequence[int] | None:
    """Return height and width of a window in pixels; None if the graph does not say."""
    if "kernel_shape" in node.attributes:
        return node.attributes["kernel_shape"].as_ints()
    weights = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return None if weights is None else [int(length) for length in weights.shape.numpy()[2:]]


def pads_of(node: ir.Node) -> Sequence[int]:
    """Return the padding of a node: top, left, bottom, right, in pixels."""
    return node.attributes.get_ints("pads", [0, 0, 0, 0])
