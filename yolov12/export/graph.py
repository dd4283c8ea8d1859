"""Memory that the tensors of an ONNX graph need, by a liveness analysis over its order of nodes.

A tensor is live from the node that computes it to the last node that reads it, as in the register allocation that gave
the method its name (Aho, Lam, Sethi and Ullman, Compilers, 2nd edition, section 9.2.5). Views share the bytes of the
tensor they look at. The graph's inputs, which the caller holds, and its weights, which do not change, are counted
apart. Nothing here imports torch or Ultralytics.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from yolov12.errors import ConfigError
from yolov12.export.shapes import Shapes

__all__ = ["VIEWS", "MemoryPlan", "input_shapes", "load", "plan", "to_half"]

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""Operators whose output is their first input in another shape, without a copy."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a graph: which tensors are live when, at the shapes it was planned for."""

    peak_bytes: int
    """Bytes of all tensors that are live while `node` runs, its outputs included."""
    node: ir.Node
    """The node that makes the peak."""
    live: Sequence[tuple[ir.Value, int]]
    """The tensors that are live at the peak, with their bytes, largest first."""
    weights_bytes: int
    """Bytes of the graph's constants."""
    inputs_bytes: int
    """Bytes of the graph's inputs, which the caller holds."""
    bytes_per_node: Sequence[tuple[ir.Node, int]]
    """Bytes that are live while each node runs, in the graph's order."""

    def describe(self, count: int = 3) -> str:
        """Return the largest tensors at the peak, in words."""
        return ", ".join(f"{value.name} ({size >> 20} MiB)" for value, size in self.live[:count])


def plan(model: ir.Model, shapes: Shapes) -> MemoryPlan:
    """Find the peak of a graph that runs in the order it is written in.

    Args:
        model: The graph.
        shapes: Shapes of all its tensors, at the largest size it will run at.
    """
    nodes = [node for node in model.graph if not all(value in shapes.contents for value in node.outputs)]
    last = _last_uses(nodes, model.graph.outputs)
    sizes: dict[ir.Value, int] = {}  # live tensors that own their bytes → bytes
    owner: dict[ir.Value, ir.Value] = {}
    until: dict[ir.Value, int] = {}
    bytes_per_node: list[tuple[ir.Node, int]] = []
    dying: dict[int, list[ir.Value]] = defaultdict(list)  # node → tensors that may be read for the last time there
    total = 0
    peak, at, live = 0, nodes[0], dict[ir.Value, int]()
    for index, node in enumerate(nodes):
        for value in node.outputs:
            looked_at = node.inputs[0] if node.op_type in VIEWS else None
            root = owner[value] = owner.get(looked_at, looked_at) if looked_at is not None else value
            until[root] = max(until.get(root, -1), last.get(value, index))
            dying[until[root]].append(root)
            if root is value:
                sizes[value] = shapes.bytes_of(value)
                total += sizes[value]
        bytes_per_node.append((node, total))
        if total > peak:
            peak, at, live = total, node, dict(sizes)
        for value in dying.pop(index, ()):
            total -= sizes.pop(value, 0) if until[value] == index else 0
    return MemoryPlan(
        peak_bytes=peak,
        node=at,
        live=sorted(live.items(), key=lambda item: -item[1]),
        weights_bytes=sum(shapes.bytes_of(value) for value in _constants(model)),
        inputs_bytes=sum(shapes.bytes_of(value) for value in model.graph.inputs),
        bytes_per_node=bytes_per_node,
    )


def load(file: str | Path) -> ir.Model:
    """Read an ONNX file.

    Raises:
        ConfigError: The file is missing, or is no ONNX graph.
    """
    try:
        return ir.load(file)
    except Exception as error:  # protobuf and the file system have many kinds
        raise ConfigError(f"{file} cannot be read as an ONNX graph: {error}") from error


def to_half(model: ir.Model) -> ir.Model:
    """Return a graph that computes in FP16; its inputs and outputs keep their types.

    Args:
        model: A graph in FP32; it is not changed.
    """
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half: ir.Model = ir.from_proto(convert_float_to_float16(ir.to_proto(model), keep_io_types=True))
    half.graph.sort()  # the conversion appends its casts at the end
    return half


def input_shapes(model: ir.Model, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a graph's inputs: lengths of fixed axes as the graph has them, the others from `shape`.

    Args:
        model: The graph.
        shape: (images, channels, height, width).

    Raises:
        ConfigError: An input is no image.
    """
    for value in model.graph.inputs:
        if value.shape is not None and len(value.shape) != len(shape):
            raise ConfigError(f"the input {value.name} has {len(value.shape)} axes: graphs that take images have four")
    return {
        str(value.name): tuple(
            axis if isinstance(axis, int) else length for axis, length in zip(value.shape or shape, shape, strict=True)
        )
        for value in model.graph.inputs
    }


def _constants(model: ir.Model) -> Iterable[ir.Value]:
    yield from model.graph.initializers.values()
    yield from (node.outputs[0] for node in model.graph if node.op_type == "Constant")


def _last_uses(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> dict[ir.Value, int]:
    last = {value: index for index, node in enumerate(nodes) for value in node.inputs if value is not None}
    return {**last, **dict.fromkeys(outputs, len(nodes))}
