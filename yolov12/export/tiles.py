"""Convolutions for one strip of the image at a time: of the large tensors between them, only a strip exists at once.

A row of a convolution depends on a few rows of its input. A strip of the last tensor therefore needs a slightly higher
strip of each tensor before it. The additional rows are its halo, which neighbouring strips compute twice (fused layers:
Alwani et al., 2016, https://doi.org/10.1109/MICRO.2016.7783725; patch-based inference: Lin et al., 2021,
https://arxiv.org/abs/2110.15352). Rows outside the image are zeros to every convolution, so only strips at the border
are padded. Nothing is approximated.

If the graph takes several images at a time, strips can be images, which have no halo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from yolov12.export.edit import END, Bound, Editor
from yolov12.export.shapes import Sizes
from yolov12.export.windows import IMAGES, ROWS, moves, pads_of, window_of

__all__ = ["Region"]

Ints = np.ndarray[Any, np.dtype[np.int64]]


class _Rows(NamedTuple):
    """Rows [start, end) of a tensor; the arrays have an element for each size that a graph may run at."""

    start: Ints
    end: Ints


@dataclass(frozen=True)
class Region:
    """Nodes that run strip by strip, by the names of their first outputs, and the axis that is split."""

    nodes: frozenset[str]
    axis: int

    @property
    def name(self) -> str:
        """Name of the region in the journal."""
        first = min(self.nodes).removesuffix("_output_0").strip("/")
        return f"{len(self.nodes)} nodes from {first}, by {'images' if self.axis == IMAGES else 'rows'}"

    def most(self, sizes: Sizes) -> int:
        """Return the largest number of strips that it can be split into."""
        return min(sizes.most[name][self.axis] for name in self.nodes)

    def apply(self, model: ir.Model, sizes: Sizes, parts: int) -> list[ir.Node] | None:
        """Split the region, in place.

        Args:
            model: A copy of the graph that the region was found in; it is changed.
            sizes: Sizes of that graph.
            parts: Number of strips.

        Returns:
            The new nodes; None, with the graph unchanged, if the region cannot be split into so many strips.
        """
        nodes = [node for node in model.graph if node.outputs[0].name in self.nodes]
        strips = _Strips(nodes, self.axis, sizes, parts)
        if not strips.possible():
            return None
        edit = Editor(model, f"/strips/{'rows' if self.axis else 'images'}{min(self.nodes).removesuffix('_output_0')}")
        bounds = strips.bounds(edit)
        made = [strips.build(edit, index, bounds) for index in range(parts)]
        joined = {
            value: strips.whole(edit, [each[value] for each in made], value, bounds[-1], f"whole{n}")
            for n, value in enumerate(strips.outputs)
        }
        return edit.replace(nodes, joined)


class _Strips:
    """Rows of each tensor that each strip computes, for all sizes at once that the smallest tensor may have."""

    def __init__(self, nodes: Sequence[ir.Node], axis: int, sizes: Sizes, parts: int) -> None:
        self.nodes, self.axis, self.parts = nodes, axis, parts
        inside = {value for node in nodes for value in node.outputs}
        self.outputs = [v for v in inside if v.is_graph_output() or any(use.node not in nodes for use in v.uses())]
        self.outputs.sort(key=lambda value: str(value.name))
        self.inputs = [
            v
            for v in dict.fromkeys(v for node in nodes for v in node.inputs)
            if v and v not in inside and moves(v, sizes)
        ]
        tensors = [*self.inputs, *inside]
        most = {value: sizes.most[str(value.name)][axis] for value in tensors}
        least = {value: sizes.least[str(value.name)][axis] for value in tensors}
        last = min(tensors, key=lambda value: most[value])
        self._base = np.arange(least[last], most[last] + 1)
        self._scale = {value: most[value] // most[last] for value in tensors}
        self._even = all(
            self._scale[v] * most[last] == most[v] and self._scale[v] * least[last] == least[v] for v in tensors
        )
        self._bounds = [self._base * index // parts for index in range(parts + 1)]
        self._above = dict.fromkeys(tensors, 0)
        self._below = dict.fromkeys(tensors, 0)
        for node in reversed(nodes):
            self._spread(node)

    def possible(self) -> bool:
        """Return whether every strip has rows, and is padded and trimmed by the same number of rows at every size."""
        if not self._even or any((after <= before).any() for before, after in pairwise(self._bounds)):
            return False
        numbers = []
        for index in range(self.parts):
            for node in self.nodes:
                read, pads = self._reads(node, index)
                numbers += pads
                for value in self._moving(node):
                    numbers += [read.start - self.rows(value, index).start, self.rows(value, index).end - read.end]
            for value in self.outputs:
                numbers += self._surplus(value, index)
        return all((number == number[0]).all() and number[0] >= 0 for number in numbers)

    def rows(self, value: ir.Value, index: int) -> _Rows:
        """Return the rows of a tensor that strip `index` computes."""
        scale = self._scale[value]
        start = scale * self._bounds[index] - self._above[value]
        end = scale * self._bounds[index + 1] + self._below[value]
        return _Rows(np.maximum(start, 0), np.minimum(end, scale * self._base))

    def bounds(self, edit: Editor) -> list[Bound]:
        """Return where strips begin and end in the smallest tensor: one place more than there are strips."""
        if len(self._base) == 1:
            return [int(bound[0]) for bound in self._bounds]
        length = edit.compute(
            "Div", edit.length(self.inputs[0], self.axis, "input"), self._scale[self.inputs[0]], "rows"
        )
        inner = [
            edit.compute("Div", edit.compute("Mul", length, i, f"times{i}"), self.parts, f"bound{i}")
            for i in range(1, self.parts)
        ]
        return [0, *inner, length]

    def build(self, edit: Editor, index: int, bounds: Sequence[Bound]) -> dict[ir.Value, ir.Value]:
        """Add the nodes of one strip.

        Returns:
            Output of the region → its rows.
        """
        new: dict[ir.Value | None, ir.Value] = {}
        for n, value in enumerate(self.inputs):
            rows = self.rows(value, index)
            start = self._place(edit, value, bounds[index], -self._above[value], rows.start, f"strip{index}/from{n}")
            end = self._end(edit, value, bounds[index + 1], rows.end, f"strip{index}/to{n}")
            new[value] = edit.slice(value, self.axis, start, end, f"strip{index}/input{n}")
        for n, node in enumerate(self.nodes):
            read, pads = self._reads(node, index)
            name = f"strip{index}/{node.op_type}{n}"
            inputs = [
                value
                if value is None or value not in new
                else self._trim(edit, new[value], self.rows(value, index), read, f"{name}/rows{i}")
                for i, value in enumerate(node.inputs)
            ]
            changed = {}
            if self.axis == ROWS and node.op_type in ("Conv", "MaxPool"):
                _, left, _, right = pads_of(node)
                changed["pads"] = [int(pads[0][0]), left, int(pads[1][0]), right]
            new.update(zip(node.outputs, edit.copy(node, inputs, name, **changed), strict=True))
        return {
            value: self._trim(
                edit, new[value], self.rows(value, index), self._whole(value, index), f"strip{index}/out{n}"
            )
            for n, value in enumerate(self.outputs)
        }

    def whole(self, edit: Editor, parts: Sequence[ir.Value], value: ir.Value, length: Bound, name: str) -> ir.Value:
        """Join the strips of a tensor."""
        joined = edit.add("Concat", parts, name, axis=self.axis)
        if len(self._base) == 1:
            return joined
        # Builders compute with lengths, but do not see that those of the strips add up to that of the whole tensor.
        rows = edit.compute("Mul", length, self._scale[value], f"{name}/rows")
        lengths = [rows if axis == self.axis else edit.ints(0) for axis in range(4)]  # 0: unchanged
        return edit.add("Reshape", [joined, edit.add("Concat", lengths, f"{name}/shape", axis=0)], f"{name}/reshaped")

    def _spread(self, node: ir.Node) -> None:
        """Derive the halo that a node's inputs need from the halo that its outputs need."""
        above = max(self._above[value] for value in node.outputs)
        below = max(self._below[value] for value in node.outputs)
        window = window_of(node, self.axis)
        above, below = (-(-reach // window.repeat) for reach in (above, below))  # whole rows of the input
        for value in node.outputs:
            self._above[value], self._below[value] = above * window.repeat, below * window.repeat
        for value in self._moving(node):
            self._above[value] = max(self._above[value], window.stride * above + window.before)
            after = window.span - window.stride - window.before
            self._below[value] = max(self._below[value], window.stride * below + after)

    def _moving(self, node: ir.Node) -> list[ir.Value]:
        return [value for value in node.inputs if value is not None and value in self._scale]

    def _reads(self, node: ir.Node, index: int) -> tuple[_Rows, list[Ints]]:
        """Return the rows of its inputs that a node reads for a strip, and how many it pads above and below."""
        rows, window = self.rows(node.outputs[0], index), window_of(node, self.axis)
        value = self._moving(node)[0]
        start = window.stride * (rows.start // window.repeat) - window.before
        end = window.stride * (rows.end // window.repeat - 1) - window.before + window.span
        length = self._scale[value] * self._base
        read = _Rows(np.maximum(start, 0), np.minimum(end, length))
        return read, [read.start - start, end - read.end]

    def _whole(self, value: ir.Value, index: int) -> _Rows:
        return _Rows(self._scale[value] * self._bounds[index], self._scale[value] * self._bounds[index + 1])

    def _surplus(self, value: ir.Value, index: int) -> list[Ints]:
        have, want = self.rows(value, index), self._whole(value, index)
        return [want.start - have.start, have.end - want.end]

    def _trim(self, edit: Editor, value: ir.Value, have: _Rows, want: _Rows, name: str) -> ir.Value:
        end = -int((have.end - want.end)[0])
        return edit.slice(value, self.axis, int((want.start - have.start)[0]), end or END, name)

    def _place(self, edit: Editor, value: ir.Value, bound: Bound, offset: int, at: Ints, name: str) -> Bound:
        if (at == at[0]).all():
            return int(at[0])
        place = edit.compute("Add", edit.compute("Mul", bound, self._scale[value], f"{name}/scaled"), offset, name)
        return edit.compute("Max", place, 0, f"{name}/inside") if (at == 0).any() else place

    def _end(self, edit: Editor, value: ir.Value, bound: Bound, at: Ints, name: str) -> Bound:
        short = self._scale[value] * self._base - at
        if len(self._base) > 1 and (short == short[0]).all():  # equally far from the border at every size
            return -int(short[0]) or END
        return self._place(edit, value, bound, self._below[value], at, name)  # Slice itself stops at the border
