"""Tools to rewrite an ONNX graph: new nodes in the place of old ones, and lengths that are known only at run time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["END", "Bound", "Editor", "by_name", "operand"]

END = np.iinfo(np.int64).max
"""The end that Slice reads as "to the end of the axis"."""

Bound = int | ir.Value
"""A position on an axis: a number, or a one-element int64 tensor if the length of the axis is dynamic."""


def by_name(model: ir.Model) -> dict[str, ir.Value]:
    """Return the inputs of a graph and the outputs of its nodes: name → tensor."""
    return {str(v.name): v for v in [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]}


def operand(node: ir.Node, index: int) -> ir.Value:
    """Return an input of a node that its operator requires."""
    value = node.inputs[index]
    assert value is not None
    return value


class Editor:
    """Adds nodes to a graph, all in one place, in the order of the calls.

    Args:
        model: The graph that is changed.
        prefix: Beginning of the names of all new nodes and tensors.
    """

    def __init__(self, model: ir.Model, prefix: str) -> None:
        self._graph = model.graph
        self._prefix = prefix
        self._new: list[ir.Node] = []
        self._constants: dict[tuple[int, ...], ir.Value] = {}

    def add(self, op: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """Append a node with one output. Return the output."""
        return self._append(op, inputs, name, 1, attributes)[0]

    def copy(self, node: ir.Node, inputs: Sequence[ir.Value | None], name: str, **changed: Any) -> list[ir.Value]:
        """Append a copy of a node with other inputs. Return its outputs."""
        return self._append(node.op_type, inputs, name, len(node.outputs), {**node.attributes, **changed})

    def ints(self, *numbers: int) -> ir.Value:
        """Return a constant int64 vector."""
        if numbers not in self._constants:
            name = self._name("const_" + "_".join(str(number) for number in numbers))
            value = ir.Value(name=name, const_value=ir.tensor(np.asarray(numbers, np.int64), name=name))
            value.shape, value.dtype = ir.Shape([len(numbers)]), ir.DataType.INT64
            self._graph.register_initializer(value)
            self._constants[numbers] = value
        return self._constants[numbers]

    def bound(self, place: Bound) -> ir.Value:
        """Return a position on an axis as a tensor."""
        return self.ints(int(place)) if isinstance(place, (int, np.integer)) else place

    def length(self, value: ir.Value, axis: int, name: str) -> ir.Value:
        """Return the length of an axis at run time: a one-element int64 tensor."""
        shape = self.add("Shape", [value], f"{name}/shape")
        return self.add("Gather", [shape, self.ints(axis)], f"{name}/length", axis=0)

    def compute(self, op: str, left: Bound, right: Bound, name: str) -> ir.Value:
        """Compute a position on an axis from two others, as a one-element int64 tensor."""
        return self.add(op, [self.bound(left), self.bound(right)], name)

    def slice(self, value: ir.Value, axis: int, start: Bound, end: Bound, name: str) -> ir.Value:
        """Return the part of a tensor from `start` to `end` on an axis; the tensor itself if that is the whole axis."""
        if isinstance(start, int) and start == 0 and isinstance(end, int) and end == END:
            return value
        return self.add("Slice", [value, self.bound(start), self.bound(end), self.ints(axis)], name)

    def replace(self, old: Sequence[ir.Node], values: Mapping[ir.Value, ir.Value]) -> list[ir.Node]:
        """Replace nodes by the nodes that were added. These are inserted at the position of the last replaced node.

        Args:
            old: Nodes in the graph's order. Other nodes read none of their outputs, except those in `values`.
            values: Output of `old` → the new tensor that takes over its name and its readers.

        Returns:
            The nodes that were added.
        """
        self._graph.insert_before(old[-1], self._new)
        for before, after in values.items():
            before.replace_all_uses_with(after, replace_graph_outputs=True)
            after.name, before.name = before.name, f"{before.name}_before"
            after.shape, after.type = before.shape, before.type
        self._graph.remove(old, safe=True)
        return self._new

    def _append(
        self, op: str, inputs: Sequence[ir.Value | None], name: str, count: int, attributes: Mapping[str, Any]
    ) -> list[ir.Value]:
        node = ir.node(op, inputs, attributes, num_outputs=count, name=self._name(name))
        for index, value in enumerate(node.outputs):
            value.name = f"{node.name}_output_{index}"
        self._new.append(node)
        return list(node.outputs)

    def _name(self, name: str) -> str:
        return f"{self._prefix}/{name}"
