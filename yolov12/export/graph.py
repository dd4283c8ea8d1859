"""How many bytes the tensors of an ONNX graph occupy at the same time: by liveness over its order of nodes.

A tensor lives from the node that computes it to the last node that reads it, as in the register allocation that gave
the method its name (Aho, Lam, Sethi and Ullman, Compilers, 2nd edition, section 9.2.5). Views share the bytes of what
they look at. What the caller holds (the graph's inputs) and what does not change (its weights) is counted apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from yolov12.errors import ConfigError

__all__ = ["Known", "Plan", "Shapes", "Sizes", "at_most", "load", "plan"]

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
"""Operators whose output is their first input, looked at differently."""

_SMALL = 4096  # elements: what is computed from shapes has a few, anchors and weights have more


@dataclass(frozen=True)
class Plan:
    """Which tensors are alive when, at the shapes given."""

    peak: int
    """Bytes of all tensors that live while `node` runs, its outputs included."""
    node: ir.Node
    """The node that makes the peak."""
    live: Sequence[tuple[ir.Value, int]]
    """The tensors that make it, with their bytes, largest first."""
    weights: int
    """Bytes of the graph's constants."""
    inputs: int
    """Bytes of the graph's inputs, which the caller holds."""
    per_node: Sequence[tuple[ir.Node, int]]
    """Bytes alive while each node runs, in the graph's order."""

    def describe(self, count: int = 3) -> str:
        """The tensors that make the peak, in words."""
        return ", ".join(f"{value.name} ({size >> 20} MiB)" for value, size in self.live[:count])


class Known(NamedTuple):
    """What is known of a tensor without running the graph."""

    shape: tuple[int, ...]
    dtype: ir.DataType
    array: np.ndarray[Any, Any] | None
    """Its contents, where they follow from shapes alone."""


class Shapes(dict[ir.Value, tuple[int, ...]]):
    """The shape of every tensor in a graph, for inputs of the sizes given; `contents` has what follows from them.

    Args:
        model: Any graph of standard operators, dynamic axes allowed.
        inputs: Input name → shape. Inputs with fixed shapes need none.
        known: What is known already of tensors, by name, such as of a graph this one was made from: costs no time.

    Raises:
        ConfigError: An input has an axis of unknown length, or a node an output whose shape depends on the data.
    """

    def __init__(
        self, model: ir.Model, inputs: Mapping[str, Sequence[int]], known: Mapping[str, Known] | None = None
    ) -> None:
        super().__init__()
        self.contents: dict[ir.Value, np.ndarray[Any, Any]] = {}
        self.dtypes: dict[ir.Value, ir.DataType] = {}
        self._known = known or {}
        self._opsets = [onnx.helper.make_opsetid(name, version) for name, version in model.opset_imports.items()]
        for value in model.graph.inputs:
            self._set(value, tuple(inputs.get(value.name or "") or _fixed(value)), value.dtype)
        for value in model.graph.initializers.values():
            self._constant(value, value.const_value)
        for node in model.graph:
            self._infer(node)

    def known(self, values: Iterable[ir.Value] | None = None) -> dict[str, Known]:
        """What is known of some tensors, or all, by name."""
        return {
            str(value.name): Known(self[value], self.dtypes[value], self.contents.get(value))
            for value in (self if values is None else values)
        }

    def bytes_of(self, value: ir.Value) -> int:
        """Bytes of a tensor."""
        return int(np.prod(self[value], dtype=np.int64) * self.dtypes[value].bitwidth) // 8

    def _set(self, value: ir.Value, shape: tuple[int, ...], dtype: ir.DataType | None) -> None:
        self[value], self.dtypes[value] = shape, dtype or ir.DataType.FLOAT

    def _constant(self, value: ir.Value, tensor: Any) -> None:
        self._set(value, tuple(tensor.shape.numpy()), tensor.dtype)
        if tensor.size <= _SMALL:
            self.contents[value] = tensor.numpy()

    def _infer(self, node: ir.Node) -> None:
        if all(value.name in self._known for value in node.outputs):
            for value in node.outputs:
                self._take(value, self._known[str(value.name)])
            return
        if node.op_type == "Constant":
            self._constant(
                node.outputs[0], node.outputs[0].const_value or ir.convenience.get_const_tensor(node.outputs[0])
            )
            return
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type == "Shape":
            bounds = (node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end"))
            self._know(node.outputs[0], np.asarray(self[inputs[0]][slice(*bounds)], np.int64))
        elif not (all(value in self.contents for value in inputs) and self._evaluate(node, inputs)):
            self._infer_types(node, inputs)

    def _take(self, value: ir.Value, known: Known) -> None:
        self._set(value, known.shape, known.dtype)
        if known.array is not None:
            self.contents[value] = known.array

    def _evaluate(self, node: ir.Node, inputs: Sequence[ir.Value]) -> bool:
        named = {str(value.name): self.contents[value] for value in inputs}
        types = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in named.items()
        ]
        outputs = [onnx.helper.make_empty_tensor_value_info(str(value.name)) for value in node.outputs]
        alone = onnx.helper.make_graph([ir.to_proto(node)], "node", types, outputs)
        try:
            arrays = ReferenceEvaluator(onnx.helper.make_model(alone, opset_imports=self._opsets)).run(None, named)
        except Exception:  # anything: it is one way to know more, and there is another
            return False
        for value, array in zip(node.outputs, arrays, strict=True):
            self._know(value, np.asarray(array))
        return True

    def _know(self, value: ir.Value, array: np.ndarray[Any, Any]) -> None:
        self._set(value, array.shape, ir.DataType.from_numpy(array.dtype))
        if array.size <= _SMALL:
            self.contents[value] = array

    def _infer_types(self, node: ir.Node, inputs: Sequence[ir.Value]) -> None:
        types = {
            str(value.name): onnx.helper.make_tensor_type_proto(self.dtypes[value].value, self[value])
            for value in inputs
        }
        data = {
            str(value.name): onnx.numpy_helper.from_array(self.contents[value])
            for value in inputs
            if value in self.contents
        }
        try:
            version = next(each.version for each in self._opsets if each.domain == node.domain)
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
            found = onnx.shape_inference.infer_node_outputs(
                schema, ir.to_proto(node), types, data, opset_imports=self._opsets
            )
        except (StopIteration, onnx.defs.SchemaError, onnx.shape_inference.InferenceError) as error:
            raise ConfigError(f"node {node.name} ({node.op_type}) is not one that can be planned: {error}") from error
        for value in node.outputs:
            tensor = found[str(value.name)].tensor_type if str(value.name) in found else None
            if tensor is None or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
                raise ConfigError(
                    f"the size of {value.name} (node {node.name}, {node.op_type}) depends on the image, so the graph's "
                    "memory cannot be planned: export without nms=True"
                )
            self._set(value, tuple(dim.dim_value for dim in tensor.shape.dim), ir.DataType(tensor.elem_type))


class Sizes:
    """Every tensor's shape at the smallest and at the largest inputs of a graph, by name.

    Args:
        model: The graph.
        least: Input name → smallest shape.
        most: Input name → largest shape.
    """

    def __init__(self, model: ir.Model, least: Mapping[str, Sequence[int]], most: Mapping[str, Sequence[int]]) -> None:
        self.shapes = Shapes(model, most)
        self.most = _named(self.shapes)
        self.least = self.most if least == most else _named(Shapes(model, least))

    def fixed(self, value: ir.Value, axis: int) -> int | None:
        """How long an axis is, if it is that always."""
        least, most = self.least[str(value.name)][axis], self.most[str(value.name)][axis]
        return most if least == most else None

    def count(self, value: ir.Value) -> int:
        """Elements of a tensor, at most."""
        return int(np.prod(self.most[str(value.name)], dtype=np.int64))


def plan(model: ir.Model, shapes: Shapes) -> Plan:
    """Find the peak of a graph that runs in the order it is written in.

    Args:
        model: The graph.
        shapes: Of all its tensors, at the largest size it will run at.
    """
    nodes = [node for node in model.graph if not all(value in shapes.contents for value in node.outputs)]
    last = _last_uses(nodes, model.graph.outputs)
    sizes: dict[ir.Value, int] = {}  # what is alive: the owner of the bytes → how many
    owner: dict[ir.Value, ir.Value] = {}
    until: dict[ir.Value, int] = {}
    per_node: list[tuple[ir.Node, int]] = []
    dying: dict[int, list[ir.Value]] = defaultdict(list)  # node → what may be read for the last time there
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
        per_node.append((node, total))
        if total > peak:
            peak, at, live = total, node, dict(sizes)
        for value in dying.pop(index, ()):
            total -= sizes.pop(value, 0) if until[value] == index else 0
    return Plan(
        peak=peak,
        node=at,
        live=sorted(live.items(), key=lambda item: -item[1]),
        weights=sum(shapes.bytes_of(value) for value in _constants(model)),
        inputs=sum(shapes.bytes_of(value) for value in model.graph.inputs),
        per_node=per_node,
    )


def load(file: str | Path) -> ir.Model:
    """Read an ONNX file.

    Raises:
        ConfigError: There is none, or it is something else.
    """
    try:
        return ir.load(file)
    except Exception as error:  # protobuf's, and the file system's
        raise ConfigError(f"{file} cannot be read as an ONNX graph: {error}") from error


def at_most(model: ir.Model, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The largest input shapes a graph is planned for: its own where they are fixed, `shape` where they are not.

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
            axis if isinstance(axis, int) else most for axis, most in zip(value.shape or shape, shape, strict=True)
        )
        for value in model.graph.inputs
    }


def _named(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    return {str(value.name): shape for value, shape in shapes.items()}


def _fixed(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None or not value.shape.is_static():
        raise ConfigError(f"the input {value.name} has axes of any length: say how long they are at most")
    return tuple(value.shape.numpy())


def _constants(model: ir.Model) -> Iterable[ir.Value]:
    yield from model.graph.initializers.values()
    yield from (node.outputs[0] for node in model.graph if node.op_type == "Constant")


def _last_uses(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> dict[ir.Value, int]:
    last = {value: index for index, node in enumerate(nodes) for value in node.inputs if value is not None}
    return {**last, **dict.fromkeys(outputs, len(nodes))}
