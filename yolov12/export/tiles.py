"""A stretch of convolutions a strip of the image at a time: the large tensors inside exist one strip at a time.

A convolution's row depends on a few rows of its input, so a strip of the last tensor needs a slightly higher strip of
each tensor before it: its halo, which neighbouring strips compute twice (fused layers, Alwani et al., 2016,
https://doi.org/10.1109/MICRO.2016.7783725; patch-based inference, Lin et al., 2021, https://arxiv.org/abs/2110.15352).
Rows outside the image are zeros to every convolution, so only strips at the border are padded. Nothing is approximated.

Where the graph takes several images at a time, the strips can be images, which have no halo.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from yolov12.export.edit import END, Bound, Editor
from yolov12.export.graph import Sizes

__all__ = ["IMAGES", "ROWS", "Region", "grow"]

Ints = np.ndarray[Any, np.dtype[np.int64]]

IMAGES, ROWS = 0, 2
"""The axes that strips run along."""

_WINDOWS = frozenset({"Conv", "MaxPool"})
_POINTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Sigmoid", "Relu", "LeakyRelu", "Tanh", "Clip", "Exp", "HardSwish"})
_REGROUP = frozenset({"Split", "Concat"})
_LARGEST = 150  # nodes in a region: beyond, halos cost more than they save


class _Window(NamedTuple):
    """How far an operator looks: row r of its output reads `span` rows of its input, from row stride·r − before.

    With `repeat`, `repeat` rows of its output are the same row of its input.
    """

    stride: int
    before: int
    span: int
    repeat: int = 1


class _Rows(NamedTuple):
    """Rows [start, end) of a tensor, at each of the sizes a graph may run at."""

    start: Ints
    end: Ints


@dataclass(frozen=True)
class Region:
    """Nodes that are run strip by strip, by the names of their first outputs, and the axis that is cut."""

    nodes: frozenset[str]
    axis: int

    @property
    def name(self) -> str:
        """For the journal."""
        first = min(self.nodes).removesuffix("_output_0").strip("/")
        return f"{len(self.nodes)} nodes from {first}, by {'images' if self.axis == IMAGES else 'rows'}"

    def most(self, sizes: Sizes) -> int:
        """Into how many strips it can be cut, at most."""
        return min(sizes.most[name][self.axis] for name in self.nodes)

    def apply(self, model: ir.Model, sizes: Sizes, parts: int) -> list[ir.Node] | None:
        """Cut it, in place.

        Args:
            model: A copy of the graph this was found in.
            sizes: Of that graph.
            parts: How many strips.

        Returns:
            The new nodes; None, and nothing is changed, if it cannot be cut into so many.
        """
        nodes = [node for node in model.graph if node.outputs[0].name in self.nodes]
        strips = _Strips(nodes, self.axis, sizes, parts)
        if not strips.possible():
            return None
        edit = Editor(model, f"/strips/{'rows' if self.axis else 'images'}{min(self.nodes).removesuffix('_output_0')}")
        cuts = strips.cuts_of(edit)
        made = [strips.build(edit, index, cuts) for index in range(parts)]
        joined = {
            value: strips.whole(edit, [each[value] for each in made], value, cuts[-1], f"whole{n}")
            for n, value in enumerate(strips.outputs)
        }
        return edit.replace(nodes, joined)


class _Strips:
    """Which rows of which tensor each strip computes, at all sizes at once that the last tensor may have."""

    def __init__(self, nodes: Sequence[ir.Node], axis: int, sizes: Sizes, parts: int) -> None:
        self.nodes, self.axis, self.parts = nodes, axis, parts
        inside = {value for node in nodes for value in node.outputs}
        self.outputs = [v for v in inside if v.is_graph_output() or any(use.node not in nodes for use in v.uses())]
        self.outputs.sort(key=lambda value: str(value.name))
        self.inputs = [
            v
            for v in dict.fromkeys(v for node in nodes for v in node.inputs)
            if v and v not in inside and _moves(v, sizes)
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
        self._cuts = [self._base * index // parts for index in range(parts + 1)]
        self._above = dict.fromkeys(tensors, 0)
        self._below = dict.fromkeys(tensors, 0)
        for node in reversed(nodes):
            self._spread(node)

    def possible(self) -> bool:
        """Whether every strip has rows, and is padded and trimmed alike at every size."""
        if not self._even or any((after <= before).any() for before, after in pairwise(self._cuts)):
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
        """What strip `index` has of a tensor."""
        scale = self._scale[value]
        start = scale * self._cuts[index] - self._above[value]
        end = scale * self._cuts[index + 1] + self._below[value]
        return _Rows(np.maximum(start, 0), np.minimum(end, scale * self._base))

    def cuts_of(self, edit: Editor) -> list[Bound]:
        """Where strips begin and end in the last tensor."""
        if len(self._base) == 1:
            return [int(cut[0]) for cut in self._cuts]
        length = edit.compute(
            "Div", edit.length(self.inputs[0], self.axis, "input"), self._scale[self.inputs[0]], "rows"
        )
        inner = [
            edit.compute("Div", edit.compute("Mul", length, i, f"times{i}"), self.parts, f"cut{i}")
            for i in range(1, self.parts)
        ]
        return [0, *inner, length]

    def build(self, edit: Editor, index: int, cuts: Sequence[Bound]) -> dict[ir.Value, ir.Value]:
        """Add the nodes of one strip.

        Returns:
            Output of the region → its rows.
        """
        new: dict[ir.Value | None, ir.Value] = {}
        for n, value in enumerate(self.inputs):
            rows = self.rows(value, index)
            start = self._place(edit, value, cuts[index], -self._above[value], rows.start, f"strip{index}/from{n}")
            end = self._end(edit, value, cuts[index + 1], rows.end, f"strip{index}/to{n}")
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
            if node.op_type in _WINDOWS and self.axis == ROWS:
                _, left, _, right = _pads(node)
                changed["pads"] = [int(pads[0][0]), left, int(pads[1][0]), right]
            new.update(zip(node.outputs, edit.copy(node, inputs, name, **changed), strict=True))
        return {
            value: self._trim(
                edit, new[value], self.rows(value, index), self._whole(value, index), f"strip{index}/out{n}"
            )
            for n, value in enumerate(self.outputs)
        }

    def whole(self, edit: Editor, parts: Sequence[ir.Value], value: ir.Value, length: Bound, name: str) -> ir.Value:
        """Put the strips of a tensor together."""
        joined = edit.add("Concat", parts, name, axis=self.axis)[0]
        if len(self._base) == 1:
            return joined
        # Builders derive lengths from lengths, and do not see that those of strips add up to the whole tensor's.
        rows = edit.compute("Mul", length, self._scale[value], f"{name}/rows")
        keep = edit.ints(0)
        shape = edit.add("Concat", [keep if axis != self.axis else rows for axis in range(4)], f"{name}/shape", axis=0)[
            0
        ]
        return edit.add("Reshape", [joined, shape], f"{name}/reshaped")[0]

    def _spread(self, node: ir.Node) -> None:
        """From what is needed of a node's outputs to what is needed of its inputs."""
        above = max(self._above[value] for value in node.outputs)
        below = max(self._below[value] for value in node.outputs)
        window = _window(node, self.axis)
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
        """Rows of its inputs that a node reads for its rows, and how many it pads above and below."""
        rows, window = self.rows(node.outputs[0], index), _window(node, self.axis)
        value = self._moving(node)[0]
        start = window.stride * (rows.start // window.repeat) - window.before
        end = window.stride * (rows.end // window.repeat - 1) - window.before + window.span
        length = self._scale[value] * self._base
        read = _Rows(np.maximum(start, 0), np.minimum(end, length))
        return read, [read.start - start, end - read.end]

    def _whole(self, value: ir.Value, index: int) -> _Rows:
        return _Rows(self._scale[value] * self._cuts[index], self._scale[value] * self._cuts[index + 1])

    def _surplus(self, value: ir.Value, index: int) -> list[Ints]:
        have, want = self.rows(value, index), self._whole(value, index)
        return [want.start - have.start, have.end - want.end]

    def _trim(self, edit: Editor, value: ir.Value, have: _Rows, want: _Rows, name: str) -> ir.Value:
        end = -int((have.end - want.end)[0])
        return edit.slice(value, self.axis, int((want.start - have.start)[0]), end or END, name)

    def _place(self, edit: Editor, value: ir.Value, cut: Bound, offset: int, at: Ints, name: str) -> Bound:
        if (at == at[0]).all():
            return int(at[0])
        place = edit.compute("Add", edit.compute("Mul", cut, self._scale[value], f"{name}/scaled"), offset, name)
        return edit.compute("Max", place, 0, f"{name}/inside") if (at == 0).any() else place

    def _end(self, edit: Editor, value: ir.Value, cut: Bound, at: Ints, name: str) -> Bound:
        short = self._scale[value] * self._base - at
        if len(self._base) > 1 and (short == short[0]).all():  # as far from the border at every size
            return -int(short[0]) or END
        return self._place(edit, value, cut, self._below[value], at, name)  # Slice stops at the border by itself


def grow(model: ir.Model, sizes: Sizes, seeds: Iterable[str], axis: int, taken: frozenset[str]) -> list[Region]:
    """Regions around some nodes, each larger than the last, with less and less to hold at their borders.

    Args:
        model: The graph.
        sizes: Of it.
        seeds: Nodes to begin with, by their first outputs.
        axis: To cut.
        taken: Nodes that must stay outside.
    """
    return _Growth(model, sizes, axis, taken).regions(seeds)


class _Growth:
    def __init__(self, model: ir.Model, sizes: Sizes, axis: int, taken: frozenset[str]) -> None:
        self._sizes, self._axis = sizes, axis
        nodes = [node for node in model.graph if node.outputs[0] not in sizes.shapes.contents]
        self._nodes = nodes
        self._index = {node: index for index, node in enumerate(nodes)}
        self._local = [node.outputs[0].name not in taken and _is_local(node, axis, sizes) for node in nodes]
        self._before = [1 << index for index in range(len(nodes))]  # bit sets: a node and all it depends on
        for index, node in enumerate(nodes):
            for value in node.inputs:
                if (maker := self._maker(value)) is not None:
                    self._before[index] |= self._before[maker]

    def regions(self, seeds: Iterable[str]) -> list[Region]:
        found: list[Region] = []
        least = np.inf
        names = set(seeds)
        inside = self._closed(
            {i for i, node in enumerate(self._nodes) if self._local[i] and node.outputs[0].name in names}
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
        """With all that lies between its nodes; None if some of that cannot be cut."""
        before = 0
        for index in inside:
            before |= self._before[index]
        mask = sum(1 << index for index in inside)
        closed = {i for i in range(len(self._nodes)) if before >> i & 1 and self._before[i] & mask}
        return closed if all(self._local[i] for i in closed) else None

    def _border(self, inside: set[int]) -> dict[ir.Value, int]:
        """Tensors that are whole at the border, with their bytes; what the caller holds costs nothing."""
        shapes = self._sizes.shapes
        border: dict[ir.Value, int] = {}
        for index in inside:
            node = self._nodes[index]
            for value in node.inputs:
                if value is not None and _moves(value, self._sizes) and self._maker(value) not in inside:
                    border[value] = 0 if value.is_graph_input() else shapes.bytes_of(value)
            for value in node.outputs:
                if value.is_graph_output() or any(self._index.get(use.node, -1) not in inside for use in value.uses()):
                    border[value] = shapes.bytes_of(value)
        return border


def _moves(value: ir.Value, sizes: Sizes) -> bool:
    """Whether a tensor is neither a constant nor computed from shapes alone."""
    return not value.is_initializer() and value not in sizes.shapes.contents and value.const_value is None


def _is_local(node: ir.Node, axis: int, sizes: Sizes) -> bool:
    shapes = [sizes.most[str(v.name)] for v in [*node.inputs, *node.outputs] if v is not None and _moves(v, sizes)]
    if any(len(shape) != 4 for shape in shapes):
        return False
    if node.op_type in _WINDOWS:
        how = node.attributes
        unusual = how.get_string("auto_pad", "NOTSET") != "NOTSET" or how.get_int("ceil_mode") == 1
        of_images = not any(value is not None and _moves(value, sizes) for value in node.inputs[1:])
        return of_images and _kernel(node) is not None and not unusual
    if node.op_type == "Resize":
        # Builders need to see that a resized length is a multiple, which they do not of a strip of any length.
        return _repeats(node) is not None and (axis != ROWS or sizes.fixed(node.outputs[0], axis) is not None)
    if node.op_type in _REGROUP:
        whole = node.op_type == "Split" or all(value is not None and _moves(value, sizes) for value in node.inputs)
        return whole and node.attributes.get_int("axis", 0) % 4 != axis
    if node.op_type not in _POINTWISE or any(shape[axis] != shapes[-1][axis] for shape in shapes):
        return False
    constants = (sizes.most[str(v.name)] for v in node.inputs if v is not None and not _moves(v, sizes))
    return all(len(shape) < 4 - axis or shape[axis - 4] == 1 for shape in constants)


def _repeats(node: ir.Node) -> int | None:
    """How often Resize repeats each row; None if that is not all it does."""
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


def _window(node: ir.Node, axis: int) -> _Window:
    if node.op_type == "Resize" and axis == ROWS:
        return _Window(1, 0, 1, repeat=_repeats(node) or 1)
    if node.op_type not in _WINDOWS or axis != ROWS:
        return _Window(1, 0, 1)
    kernel = _kernel(node) or [1]
    stride = node.attributes.get_ints("strides", [1, 1])[0]
    dilation = node.attributes.get_ints("dilations", [1, 1])[0]
    return _Window(stride, _pads(node)[0], dilation * (kernel[0] - 1) + 1)


def _kernel(node: ir.Node) -> Sequence[int] | None:
    """Height and width of a window; None if the graph does not say."""
    if "kernel_shape" in node.attributes:
        return node.attributes["kernel_shape"].as_ints()
    weights = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return None if weights is None else [int(length) for length in weights.shape.numpy()[2:]]


def _pads(node: ir.Node) -> Sequence[int]:
    return node.attributes.get_ints("pads", [0, 0, 0, 0])
