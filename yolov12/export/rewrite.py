"""Cutting the large tensors of an ONNX graph until it fits, and no further.

The node that makes the peak says where. What helps there is tried: its attention in parts of the queries (queries.py),
the convolutions around it in strips (tiles.py), each in as few pieces as bring that place under the limit. Then the
next peak. A graph that fits is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import onnx_ir as ir

from yolov12.errors import ConfigError, DoesNotFitError
from yolov12.export import queries, regions, tiles
from yolov12.export.graph import Known, Plan, Shapes, Sizes, plan
from yolov12.export.windows import IMAGES, ROWS

__all__ = ["Split", "split"]

Site = queries.Attention | tiles.Region

_OPSET = 13  # from there on Softmax is over one axis, and Slice, Split and Squeeze are as they are written here
_LARGE = 0.08  # of the peak: tensors that are worth a look
_USEFUL = 0.99  # of the peak in fewer parts: a site that gains less from more parts gets no more of them
_STRIPS = 32  # at most
_NEAR = 1.1  # how near to what a graph really needs the number in an error is


@dataclass(frozen=True)
class Split:
    """A graph that fits, and how it was made to."""

    model: ir.Model
    plan: Plan
    before: Plan
    """Of the graph as it was."""
    sites: Mapping[Site, int]
    """What was cut, and into how many parts; empty if the graph fitted."""

    def describe(self) -> list[str]:
        """A line for each cut."""
        return [f"{site.name}: {parts} parts" for site, parts in self.sites.items()]


def split(
    model: ir.Model, limit: int, most: Mapping[str, Sequence[int]], least: Mapping[str, Sequence[int]] | None = None
) -> Split:
    """Rewrite a graph so that its tensors fit.

    Args:
        model: Any graph; it is not changed.
        limit: Bytes for all tensors that live at the same time, without weights and inputs.
        most: Input name → the largest shape it will run at.
        least: Input name → the smallest, where its axes are dynamic; as `most` if None. A cut graph runs at sizes
            between that the network halves without a rest, which are multiples of its stride.

    Raises:
        DoesNotFitError: It does not get that small; the message says about how small it gets.
        ConfigError: The graph cannot be planned, or not be cut.
    """
    whole = plan(model, Shapes(model, most))
    if whole.peak <= limit:
        return Split(model, whole, whole, {})
    if model.opset_imports[""] < _OPSET:
        raise ConfigError(
            f"graphs of opset {model.opset_imports['']} cannot be cut: export with opset={_OPSET} or newer"
        )
    splitting = _Splitting(model, most, least or most)
    done = splitting.run(limit)
    return done if isinstance(done, Split) else _refuse(splitting, limit, done, whole)


def _refuse(splitting: _Splitting, limit: int, least: int, whole: Plan) -> NoReturn:
    """Say what the graph needs instead: the first of slowly growing limits that it can be cut to."""
    needs = whole
    while _NEAR * least < whole.peak:
        done = splitting.run(int(_NEAR * least))
        if isinstance(done, Split):
            needs = done.plan
            break
        least = max(done, int(_NEAR * least))
    raise DoesNotFitError(
        f"the exported graph needs about {needs.peak >> 20} MiB for its tensors, cut as small as it gets, beside "
        f"{needs.weights >> 20} MiB of weights, and {limit >> 20} MiB are there for them (its peak then: "
        f"{needs.describe()}). Use a smaller imgsz= or batch=, or a larger mem_limit="
    )


class _Splitting:
    def __init__(self, model: ir.Model, most: Mapping[str, Sequence[int]], least: Mapping[str, Sequence[int]]) -> None:
        self._model, self._most = model, most
        self._sizes = Sizes(model, least, most)
        self._attentions = queries.find(model, self._sizes)
        self._known = self._sizes.shapes.known()
        self._known_of: dict[tuple[Site, int], dict[str, Known]] = {}  # new tensors of a site in so many parts
        self._before = plan(model, self._sizes.shapes)

    def run(self, goal: int) -> Split | int:
        """Cut until the peak is no higher than a goal; if it cannot be, what is needed at least."""
        done, of_node = Split(self._model, self._before, self._before, {}), dict[ir.Node, Site]()
        while done.plan.peak > goal:
            better = self._better(done, of_node, goal)
            if isinstance(better, int):
                return better
            done, of_node = better
        return done

    def _better(
        self, now: Split, of_node: Mapping[ir.Node, Site], goal: int
    ) -> tuple[Split, dict[ir.Node, Site]] | int:
        """The graph with the place of its peak cut into as few pieces as it takes; if none do, the least peak there."""
        least = now.plan.peak
        before: dict[Site, int] = {}  # its peak in fewer parts
        useless: set[Site] = set()
        for sites, site in self._proposals(now, of_node.get(now.plan.node), goal):
            if site in useless or (tried := self._apply(sites)) is None:
                continue
            peak = max(size for node, size in tried[0].plan.per_node if tried[1].get(node) == site)
            if peak <= goal and tried[0].plan.peak <= now.plan.peak:
                return tried
            if peak > _USEFUL * before.get(site, now.plan.peak):
                useless.add(site)
            before[site] = peak
            least = min(least, peak)
        return least

    def _apply(self, sites: Mapping[Site, int]) -> tuple[Split, dict[ir.Node, Site]] | None:
        model = self._model.clone()
        of_node: dict[ir.Node, Site] = {}
        known = dict(self._known)
        for site, parts in sites.items():
            new = site.apply(model, self._sizes, parts)
            if new is None:
                return None
            of_node.update(dict.fromkeys(new, site))
            known.update(self._known_of.get((site, parts), {}))
        model.graph.sort()
        shapes = Shapes(model, self._most, known)
        for site, parts in sites.items():
            if (site, parts) not in self._known_of:
                made = (value for node, its in of_node.items() if its == site for value in node.outputs)
                self._known_of[site, parts] = shapes.known(made)
        result = plan(model, shapes)
        return Split(model, result, self._before, sites), of_node

    def _proposals(self, now: Split, here: Site | None, goal: int) -> Iterator[tuple[Mapping[Site, int], Site]]:
        """What might lower the peak, in few pieces first.

        Args:
            now: The graph as it is cut.
            here: The cut that the node of its peak belongs to, if any.
            goal: Bytes; what cannot get there is left out.
        """
        sites = dict(now.sites)
        seeds = self._seeds(now.plan)
        if here is not None:
            for parts in _more(sites[here], here.most(self._sizes)):
                yield {**sites, here: parts}, here
            del sites[here]
            seeds = [here.nodes, *(each | here.nodes for each in seeds)]
        for attention in self._attentions:
            if attention not in now.sites and any(attention.nodes & each for each in seeds):
                for parts in _more(1, attention.most(self._sizes)):
                    yield {**sites, attention: parts}, attention
        taken = frozenset[str]().union(*(site.nodes for site in sites))
        for axis in (IMAGES, ROWS):
            growth = regions.Growth(self._model, self._sizes, axis, taken)
            grown = dict.fromkeys(region for each in seeds for region in growth.around(each, goal) if region != here)
            for parts in _more(1, _STRIPS):
                for region in grown:
                    if parts <= region.most(self._sizes):
                        yield {**sites, region: parts}, region

    def _seeds(self, now: Plan) -> list[frozenset[str]]:
        """Where to begin: at the node that makes the peak, and at those that compute or read its large tensors."""
        large = [value for value, size in now.live if size >= _LARGE * now.peak]
        made = {node for value in large if (node := value.producer()) is not None}
        read = {use.node for value in large for use in value.uses()}
        starts: list[set[ir.Node]] = [{now.node}]
        starts += [{node, now.node} for node in sorted(made | read, key=lambda node: str(node.name))]
        return list(dict.fromkeys(frozenset(str(node.outputs[0].name) for node in start) for start in starts))


def _more(parts: int, most: int) -> Iterator[int]:
    parts *= 2
    while parts <= most:
        yield parts
        parts *= 2
