"""Attention a part of the queries at a time: the scores of one part are gone before the next part's are made.

Each row of softmax(q kᵀ) v depends on its own query alone, so parts of the rows put together are the whole, bit for bit
but for the order in which a library adds (Rabe and Staats, 2021, https://arxiv.org/abs/2112.05682, split the keys as
well, which needs a running maximum). Softmax stays one plain node, which is what engines recognise and fuse.
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
    """(..., queries, keys), of q kᵀ."""
    out: str
    """(..., queries, channels), or its transpose (..., channels, queries) if `transposed`."""
    nodes: frozenset[str]
    """The first output of each node between them, both ends included."""
    transposed: bool
    """Whether the weights are transposed and multiplied from the right, as in v pᵀ."""

    @property
    def name(self) -> str:
        """For the journal."""
        return self.out.removesuffix("_output_0").strip("/")

    def most(self, sizes: Sizes) -> int:
        """Into how many parts it can be cut."""
        return sizes.most[self.scores][-2]

    def apply(self, model: ir.Model, sizes: Sizes, parts: int) -> list[ir.Node]:
        """Cut it, in place.

        Args:
            model: A copy of the graph this was found in.
            sizes: Of that graph.
            parts: How many.

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
    """Every attention of a graph: MatMul, a scale perhaps, Softmax over the keys, and MatMul from either side."""
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
    """The rows of the queries, some in each part; each is added to the graph when it is asked for."""
    if length is not None:
        cuts: list[Bound] = [*(length * index // parts for index in range(parts)), END]
        for index, (start, end) in enumerate(pairwise(cuts)):
            yield edit.slice(queries, axis, start, end, f"part{index}/queries")
        return
    # Builders set memory aside for the longest a tensor may be, which they see of "the first n of what is left".
    tokens = edit.compute("Add", edit.length(queries, axis, "queries"), parts - 1, "queries/rounded")
    each = edit.compute("Div", tokens, parts, "queries/each")
    for index in range(parts):
        start = edit.compute("Mul", each, index, f"part{index}/start") if index else 0
        left = edit.slice(queries, axis, start, END, f"part{index}/left")
        yield edit.slice(left, axis, 0, each, f"part{index}/queries")
