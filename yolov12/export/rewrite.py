"""Cutting the large tensors of an ONNX graph until it fits, and no further.

The node that makes the peak says where. What helps there is tried: its attention in parts of the queries (queries.py),
the convolutions around it in strips (tiles.py), each in as few pieces as bring that place under the limit. Then the
next peak. A graph that fits is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from yolov12.errors import ConfigError, DoesNotFitError
from yolov12.export import queries, tiles
from yolov12.export.graph import Known, Plan, Shapes, Sizes, plan

__all__ = ["Split", "split"]

Site = queries.Attention | tiles.Region

_OPSET = 13  # from there on Softmax is over one axis, and Slice, Split and Squeeze are as they are written here
_LARGE = 0.08  # of the peak: tensors that are worth a look
_USEFUL = 0.99  # of the peak in fewer parts: a site that gains less from more parts gets no more of them
_NO_USE = -1
_GROWTHS = 3  # regions around one start that are tried: those with least at their borders
_STRIPS = 32  # at most
_TRIES = 100  # graphs that are made and planned at most: what can be cut needs some 60, and this takes half a minute


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
        DoesNotFitError: It does not get that small; the message says how small it gets.
        ConfigError: The graph cannot be planned, or not be cut.
    """
    whole = plan(model, Shapes(model, most))
    if whole.peak <= limit:
        return Split(model, whole, whole, {})
    if model.opset_imports[""] < _OPSET:
        raise ConfigError(
            f"graphs of opset {model.opset_imports['']} cannot be cut: export with opset={_OPSET} or newer"
        )
    return _Splitting(model, limit, most, least or most).run()


class _Splitting:
    def __init__(
        self, model: ir.Model, limit: int, most: Mapping[str, Sequence[int]], least: Mapping[str, Sequence[int]]
    ) -> None:
        self._model, self._limit, self._goal, self._most = model, limit, limit, most
        self._sizes = Sizes(model, least, most)
        self._attentions = queries.find(model, self._sizes)
        self._known = self._sizes.shapes.known()
        self._known_of: dict[tuple[Site, int], dict[str, Known]] = {}  # new tensors of a site in so many parts
        self._of_node: dict[ir.Node, Site] = {}
        self._tries = 0

    def run(self) -> Split:
        before = plan(self._model, self._sizes.shapes)
        done = Split(self._model, before, before, {})
        while done.plan.peak > self._goal:
            done = self._better(done)
        if done.plan.peak > self._limit:
            raise DoesNotFitError(self._sorry(done.plan))
        return done

    def _better(self, now: Split) -> Split:
        """The graph with one place cut smaller: into as few pieces as it takes there, or as small as it gets.

        Where that is not enough, the goal becomes what was reached: the other places need be no smaller, and what the
        graph needs in the end is known soon.
        """
        best, least = None, now.plan.peak
        before: dict[Site, int] = {}  # its peak in fewer parts
        for sites, site in self._proposals(now):
            if before.get(site) == _NO_USE or self._tries == _TRIES:
                continue
            tried = self._apply(sites, now.before)
            if tried is None:
                continue
            result, of_node = tried
            peak = max(size for node, size in result.plan.per_node if of_node.get(node) == site)
            before[site] = _NO_USE if peak > _USEFUL * before.get(site, now.plan.peak) else peak
            if peak < least and result.plan.peak <= now.plan.peak:
                best, least = (result, of_node), peak
            if peak <= self._goal and best is not None:
                break
        if best is None:
            self._goal = now.plan.peak
            return now
        self._goal = max(self._goal, least)
        done, self._of_node = best
        return done

    def _apply(self, sites: Mapping[Site, int], before: Plan) -> tuple[Split, dict[ir.Node, Site]] | None:
        self._tries += 1
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
        return Split(model, result, before, sites), of_node

    def _proposals(self, now: Split) -> Iterator[tuple[Mapping[Site, int], Site]]:
        """What might lower the peak, in few pieces first."""
        sites = dict(now.sites)
        here = self._of_node.get(now.plan.node)
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
        for axis in (tiles.IMAGES, tiles.ROWS):
            grown = [region for each in seeds for region in self._regions(each, axis, taken)]
            regions = [region for region in dict.fromkeys(grown) if region != here]
            for parts in _more(1, _STRIPS):
                for region in regions:
                    if parts <= region.most(self._sizes):
                        yield {**sites, region: parts}, region

    def _regions(self, seeds: frozenset[str], axis: int, taken: frozenset[str]) -> list[tiles.Region]:
        return tiles.grow(self._model, self._sizes, seeds, axis, taken)[-_GROWTHS:]

    def _seeds(self, now: Plan) -> list[frozenset[str]]:
        """Where to begin: at the node that makes the peak, and at those that compute or read its large tensors."""
        large = [value for value, size in now.live if size >= _LARGE * now.peak]
        made = {node for value in large if (node := value.producer()) is not None}
        read = {use.node for value in large for use in value.uses()}
        starts: list[set[ir.Node]] = [{now.node}]
        starts += [{node, now.node} for node in sorted(made | read, key=lambda node: str(node.name))]
        return list(dict.fromkeys(frozenset(str(node.outputs[0].name) for node in start) for start in starts))

    def _sorry(self, now: Plan) -> str:
        return (
            f"the exported graph needs {now.peak >> 20} MiB for its tensors, cut as small as it gets, beside "
            f"{now.weights >> 20} MiB of weights, and {self._limit >> 20} MiB are there for them (what is left: "
            f"{now.describe()}). Use a smaller imgsz= or batch=, or a larger mem_limit="
        )


def _more(parts: int, most: int) -> Iterator[int]:
    parts *= 2
    while parts <= most:
        yield parts
        parts *= 2
