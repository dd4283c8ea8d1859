"""Attention for one part of the queries at a time: the scores of a part are freed before those of the next are made.

Each row of softmax(q kᵀ) v depends on its own query alone. Parts of the rows put together therefore equal the whole,
except for the order in which a library adds. Rabe and Staats (2021, https://arxiv.org/abs/2112.05682) split the keys as
well, which needs a running maximum. Here Softmax stays one plain node, which engines recognise and fuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from yolov12.export.edit import END, Bound, Editor, by_name, operand
from yolov12.export.shapes import Sizes

__all__ = ["Attention", "find"]


@dataclass(frozen=True)
class Attention:
    """One attention in a graph, by the names of its tensors, which are the same in every copy of the graph."""

    scores: str
    """Name of q kᵀ, of shape (..., queries, keys)."""
    out: str
    """Name of the result: (..., queries, channels), or its transpose (..., channels, queries) if `transposed`."""
    nodes: frozenset[str]
    """Names of the first outputs of the nodes from `scores` to `out`, both included."""
    transposed: bool
    """Whether the weights are transposed and multiplied from the right, as in v pᵀ."""

    @property
    def name(self) -> str:
        """Name of the attention in the journal."""
        return self.out.removesuffix("_output_0").strip("/")

    def most(self, sizes: Sizes) -> int:
        """Return the largest number of parts that it can be split into."""
        return sizes.most[self.scores][-2]

    def apply(self, model: ir.Model, sizes: Sizes, parts: int) -> list[ir.Node]:
        """Split the attention, in place.

        Args:
            model: A copy of the graph that the attention was found in; it is changed.
            sizes: Sizes of that graph.
            parts: Number of parts.

        Returns:
            The new nodes.
        """
        values = by_name(model)
        out = values[self.out]
        nodes = [node for node in model.graph if node.outputs[0].name in self.nodes]
        first = values[self.scores].producer()
        assert first is not None
        queries = operand(first, 0)
        axis = len(sizes.most[str(queries.name)]) - 2
        edit = Editor(model, self.out.removesuffix("_output_0"))
        made = []
        for index, part in enumerate(_parts(edit, queries, axis, sizes.fixed(queries, axis), parts)):
            new: dict[ir.Value | None, ir.Value] = {}
            for node in nodes:
                inputs = [new.get(value, value) for value in node.inputs]
                if node.outputs[0].name == self.scores:
                    inputs[0] = part
                new[node.outputs[0]] = edit.copy(node, inputs, f"part{index}/{node.op_type}{len(new)}")[0]
            made.append(new[out])
        joined = edit.add("Concat", made, "parts", axis=axis + self.transposed)
        return edit.replace(nodes, {out: joined})


def find(model: ir.Model, sizes: Sizes) -> list[Attention]:
    """Return every attention of a graph: MatMul, perhaps a scale, Softmax over the keys, MatMul from either side."""
    return [found for node in model.graph if node.op_type == "Softmax" and (found := _around(node, sizes)) is not None]


def _around(softmax: ir.Node, sizes: Sizes) -> Attention | None:
    rank = len(sizes.most[str(operand(softmax, 0).name)])
    if rank < 3 or softmax.attributes.get_int("axis", -1) not in (-1, rank - 1):
        return None
    before: list[ir.Node] = []
    value = operand(softmax, 0)
    while (node := value.producer()) is not None and len(value.uses()) == 1 and not value.is_graph_output():
        before.append(node)
        if node.op_type == "MatMul":
            break
        if node.op_type not in ("Mul", "Div") or sizes.count(operand(node, 1)) != 1:
            return None
        value = operand(node, 0)
    if not before or before[-1].op_type != "MatMul" or len(sizes.most[str(operand(before[-1], 0).name)]) != rank:
        return None
    after, weights = [softmax], softmax.outputs[0]
    user = _only_reader(weights)
    transposed = False
    if user is not None and user.op_type == "Transpose":
        transposed = True
        order = list(user.attributes.get_ints("perm", []))
        if order != [*range(rank - 2), rank - 1, rank - 2]:
            return None
        after.append(user)
        weights = user.outputs[0]
        user = _only_reader(weights)
    if user is None or user.op_type != "MatMul" or user.inputs[int(transposed)] is not weights:
        return None
    if len(sizes.most[str(user.outputs[0].name)]) != rank:
        return None
    nodes = frozenset(str(node.outputs[0].name) for node in [*before, *after, user])
    return Attention(str(before[-1].outputs[0].name), str(user.outputs[0].name), nodes, transposed)


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _parts(edit: Editor, queries: ir.Value, axis: int, length: int | None, parts: int) -> Iterator[ir.Value]:
    """Yield the parts of the queries. The nodes that slice one are added to the graph when it is asked for."""
    if length is not None:
        bounds: list[Bound] = [*(length * index // parts for index in range(parts)), END]
        for index, (start, end) in enumerate(pairwise(bounds)):
            yield edit.slice(queries, axis, start, end, f"part{index}/queries")
        return
    # Builders reserve memory for the longest that a tensor may be. They can tell that for "the first n of the rest".
    tokens = edit.compute("Add", edit.length(queries, axis, "queries"), parts - 1, "queries/rounded")
    each = edit.compute("Div", tokens, parts, "queries/each")
    for index in range(parts):
        start = edit.compute("Mul", each, index, f"part{index}/start") if index else 0
        left = edit.slice(queries, axis, start, END, f"part{index}/left")
        yield edit.slice(left, axis, 0, each, f"part{index}/queries")
