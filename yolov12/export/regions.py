"""Finds regions of a graph whose split into strips saves memory: large tensors inside, small ones at the border."""

from __future__ import annotations

import onnx_ir as ir

from yolov12.export.shapes import Sizes
from yolov12.export.tiles import Region
from yolov12.export.windows import is_local, moves

__all__ = ["Growth"]

_LARGEST = 150  # most nodes in a region: in a larger one, halos cost more than they save


class Growth:
    """Grows regions of a graph from some of its nodes to places where the tensors at the border are smaller.

    Args:
        model: The graph.
        sizes: Sizes of its tensors.
        axis: The axis to split, `IMAGES` or `ROWS`.
        taken: Names of the first outputs of nodes that must stay outside.
    """

    def __init__(self, model: ir.Model, sizes: Sizes, axis: int, taken: frozenset[str]) -> None:
        self._sizes, self._axis = sizes, axis
        self._nodes = [node for node in model.graph if node.outputs[0] not in sizes.shapes.contents]
        self._index = {node: index for index, node in enumerate(self._nodes)}
        self._local = [node.outputs[0].name not in taken and is_local(node, axis, sizes) for node in self._nodes]
        self._before = [1 << index for index in range(len(self._nodes))]  # bit sets: a node and all nodes it depends on
        for index, node in enumerate(self._nodes):
            for value in node.inputs:
                if (maker := self._maker(value)) is not None:
                    self._before[index] |= self._before[maker]

    def around(self, seeds: frozenset[str], limit: int) -> list[Region]:
        """Return regions that contain some nodes, each larger than the last and with fewer bytes at its border.

        Args:
            seeds: Names of the nodes' first outputs.
            limit: Most bytes at the border. Tensors at the border are never split.
        """
        found: list[Region] = []
        least = limit + 1
        inside = self._closed(
            {i for i, node in enumerate(self._nodes) if self._local[i] and node.outputs[0].name in seeds}
        )
        fixed: set[ir.Value] = set()
        while inside and len(inside) <= _LARGEST:
            border = self._border(inside)
            total = sum(border.values())
            if total < least:
                least = total
                found.append(Region(frozenset(str(self._nodes[i].outputs[0].name) for i in inside), self._axis))
            open_ = [value for value in border if value not in fixed and border[value]]
            if not open_:
                break
            value = max(open_, key=lambda each: border[each])
            larger = self._closed(inside | self._across(value, inside))
            if larger is None or larger == inside:
                fixed.add(value)
            else:
                inside = larger
        return found

    def _across(self, value: ir.Value, inside: set[int]) -> set[int]:
        maker = self._maker(value)
        if maker is not None and maker not in inside:
            return {maker}
        return {self._index[use.node] for use in value.uses() if use.node in self._index}

    def _maker(self, value: ir.Value | None) -> int | None:
        node = None if value is None else value.producer()
        return None if node is None else self._index.get(node)

    def _closed(self, inside: set[int]) -> set[int] | None:
        """Return a set of nodes together with all nodes between them; None if one of these cannot be split."""
        before = 0
        for index in inside:
            before |= self._before[index]
        mask = sum(1 << index for index in inside)
        closed = {i for i in range(len(self._nodes)) if before >> i & 1 and self._before[i] & mask}
        return closed if all(self._local[i] for i in closed) else None

    def _border(self, inside: set[int]) -> dict[ir.Value, int]:
        """Return the tensors at the border, which are not split, with their bytes. Graph inputs count 0 bytes."""
        shapes = self._sizes.shapes
        border: dict[ir.Value, int] = {}
        for index in inside:
            node = self._nodes[index]
            for value in node.inputs:
                if value is not None and moves(value, self._sizes) and self._maker(value) not in inside:
                    border[value] = 0 if value.is_graph_input() else shapes.bytes_of(value)
            for value in node.outputs:
                if value.is_graph_output() or any(self._index.get(use.node, -1) not in inside for use in value.uses()):
                    border[value] = shapes.bytes_of(value)
        return border
