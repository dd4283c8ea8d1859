"""Splitting the large tensors of an ONNX graph until it fits, and no further.

The node that makes the peak says where to begin. What helps there is tried: its attention in parts of the queries
(queries.py), the convolutions around it in strips (tiles.py), each in as few parts as bring that place under the limit.
Then follows the next peak. A graph that fits is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import onnx_ir as ir

from yolov12.errors import ConfigError, DoesNotFitError
from yolov12.export import graph, queries, regions, tiles
from yolov12.export.graph import MemoryPlan
from yolov12.export.shapes import Known, Shapes, Sizes
from yolov12.export.windows import IMAGES, ROWS

__all__ = ["Site", "Split", "Splitter", "split"]

Site = queries.Attention | tiles.Region
"""A place of a graph that can be split."""

_OPSET = 13  # since then Softmax is over one axis, and Slice, Split and Squeeze are as they are written here
_LARGE = 0.08  # of the peak: tensors that are worth a look
_USEFUL = 0.99  # of the peak in fewer parts: a site that gains less from more parts gets no more of them
_STRIPS = 32  # at most
_NEAR = 1.1  # how near to what a graph really needs the number in an error is


@dataclass(frozen=True)
class Split:
    """A graph that fits, and how it was made to."""

    model: ir.Model
    plan: MemoryPlan
    before: MemoryPlan
    """Plan of the whole graph."""
    sites: Mapping[Site, int]
    """What was split, and into how many parts; empty if the graph fitted."""

    def describe(self) -> list[str]:
        """Return a line for each site."""
        return [f"{site.name}: {parts} parts" for site, parts in self.sites.items()]


@dataclass(frozen=True)
class _Trial:
    """A variant of the graph that was made and planned."""

    split: Split
    site_of: Mapping[ir.Node, Site]
    """New node → the site that it belongs to."""

    def peak_bytes_at(self, site: Site) -> int:
        return max(size for node, size in self.split.plan.bytes_per_node if self.site_of.get(node) == site)


def split(
    model: ir.Model, limit: int, most: Mapping[str, Sequence[int]], least: Mapping[str, Sequence[int]] | None = None
) -> Split:
    """Rewrite a graph so that its tensors fit.

    Args:
        model: See `Splitter`.
        limit: See `Splitter.split`.
        most: See `Splitter`.
        least: See `Splitter`.

    Raises:
        DoesNotFitError: The graph does not get that small; the message says about how small it gets.
        ConfigError: The graph cannot be planned, or not be split.
    """
    return Splitter(model, most, least).split(limit)


class Splitter:
    """Rewrites one graph for any number of limits. The graph is planned once, and so is each variant that is tried.

    Args:
        model: Any graph; it is not changed.
        most: Input name → the largest shape it will run at.
        least: Input name → the smallest, if its axes are dynamic; as `most` if None. A split graph runs at sizes
            between that the network halves without a rest, which are multiples of its stride.

    Raises:
        ConfigError: The graph cannot be planned.
    """

    def __init__(
        self, model: ir.Model, most: Mapping[str, Sequence[int]], least: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        self._model, self._most, self._least = model, most, least or most
        self._shapes = Shapes(model, most)
        self.whole = graph.plan(model, self._shapes)
        """Plan of the graph as it is."""
        self._search: _Search | None = None

    def split(self, limit: int) -> Split:
        """Rewrite the graph so that its tensors fit.

        Args:
            limit: Bytes for all tensors that are live at the same time, without weights and inputs.

        Raises:
            DoesNotFitError: The graph does not get that small; the message says about how small it gets.
            ConfigError: The graph cannot be split.
        """
        found = self._run(limit)
        return found if isinstance(found, Split) else self._refuse(limit, found)

    def try_split(self, limit: int) -> Split | None:
        """Rewrite the graph as `split` does; return None if it does not get that small, without asking how small.

        Raises:
            ConfigError: The graph cannot be split.
        """
        found = self._run(limit)
        return found if isinstance(found, Split) else None

    def _run(self, limit: int) -> Split | int:
        if self.whole.peak_bytes <= limit:
            return Split(self._model, self.whole, self.whole, {})
        if self._search is None:
            version = self._model.opset_imports[""]
            if version < _OPSET:
                raise ConfigError(f"graphs of opset {version} cannot be split: export with opset={_OPSET} or newer")
            sizes = Sizes(self._model, self._least, self._most, self._shapes)
            self._search = _Search(self._model, self._most, sizes, self.whole)
        return self._search.run(limit)

    def _refuse(self, limit: int, least: int) -> NoReturn:
        """Say what the graph needs instead: the first of slowly growing limits that it can be split to."""
        needs = self.whole
        while _NEAR * least < self.whole.peak_bytes:
            found = self._run(int(_NEAR * least))
            if isinstance(found, Split):
                needs = found.plan
                break
            least = max(found, int(_NEAR * least))
        raise DoesNotFitError(
            f"the exported graph needs about {needs.peak_bytes >> 20} MiB for its tensors, split as far as possible, "
            f"beside {needs.weights_bytes >> 20} MiB of weights, and {limit >> 20} MiB are there for them (its peak "
            f"then: {needs.describe()}). Use a smaller imgsz= or batch=, or a larger mem_limit="
        )


class _Search:
    """The search for sites to split. What it has tried for one limit it remembers for the next."""

    def __init__(self, model: ir.Model, most: Mapping[str, Sequence[int]], sizes: Sizes, whole: MemoryPlan) -> None:
        self._model, self._most, self._sizes, self._whole = model, most, sizes, whole
        self._attentions = queries.find(model, sizes)
        self._known = sizes.shapes.known()
        self._known_of: dict[tuple[Site, int], dict[str, Known]] = {}  # new tensors of a site in so many parts
        self._tried: dict[tuple[tuple[Site, int], ...], _Trial | None] = {}

    def run(self, goal: int) -> Split | int:
        """Split until the peak is no higher than a goal; if that fails, return the least peak at the place it fails.

        Args:
            goal: Bytes.
        """
        done = _Trial(Split(self._model, self._whole, self._whole, {}), {})
        while done.split.plan.peak_bytes > goal:
            better = self._better(done, goal)
            if isinstance(better, int):
                return better
            done = better
        return done.split

    def _better(self, now: _Trial, goal: int) -> _Trial | int:
        """Split the place of the peak into as few parts as it takes; if none suffice, return the least peak there."""
        highest = least = now.split.plan.peak_bytes
        before: dict[Site, int] = {}  # peak of a site in fewer parts
        useless: set[Site] = set()
        for sites, site in self._proposals(now, goal):
            if site in useless or (tried := self._try(sites)) is None:
                continue
            peak = tried.peak_bytes_at(site)
            if peak <= goal and tried.split.plan.peak_bytes <= highest:
                return tried
            if peak > _USEFUL * before.get(site, highest):
                useless.add(site)
            before[site] = peak
            least = min(least, peak)
        return least

    def _try(self, sites: Mapping[Site, int]) -> _Trial | None:
        key = tuple(sites.items())  # in their order, which is that of the rewriting
        if key not in self._tried:
            self._tried[key] = self._apply(sites)
        return self._tried[key]

    def _apply(self, sites: Mapping[Site, int]) -> _Trial | None:
        model = self._model.clone()
        site_of: dict[ir.Node, Site] = {}
        known = dict(self._known)
        for site, parts in sites.items():
            new = site.apply(model, self._sizes, parts)
            if new is None:
                return None
            site_of.update(dict.fromkeys(new, site))
            known.update(self._known_of.get((site, parts), {}))
        model.graph.sort()
        shapes = Shapes(model, self._most, known)
        for site, parts in sites.items():
            if (site, parts) not in self._known_of:
                made = (value for node, its in site_of.items() if its == site for value in node.outputs)
                self._known_of[site, parts] = shapes.known(made)
        return _Trial(Split(model, graph.plan(model, shapes), self._whole, sites), site_of)

    def _proposals(self, now: _Trial, goal: int) -> Iterator[tuple[Mapping[Site, int], Site]]:
        """Yield what might lower the peak, in few parts first.

        Args:
            now: The graph as it is split so far.
            goal: Bytes; what cannot get there is left out.

        Yields:
            All sites with their parts, and the one that is new or has more parts.
        """
        sites, plan = dict(now.split.sites), now.split.plan
        seeds = self._seeds(plan)
        here = now.site_of.get(plan.node)
        if here is not None:
            for parts in _doubled(sites[here], here.most(self._sizes)):
                yield {**sites, here: parts}, here
            del sites[here]
            seeds = [here.nodes, *(each | here.nodes for each in seeds)]
        for attention in self._attentions:
            if attention not in now.split.sites and any(attention.nodes & each for each in seeds):
                for parts in _doubled(1, attention.most(self._sizes)):
                    yield {**sites, attention: parts}, attention
        taken = frozenset[str]().union(*(site.nodes for site in sites))
        for axis in (IMAGES, ROWS):
            growth = regions.Growth(self._model, self._sizes, axis, taken)
            grown = dict.fromkeys(region for each in seeds for region in growth.around(each, goal) if region != here)
            for parts in _doubled(1, _STRIPS):
                for region in grown:
                    if parts <= region.most(self._sizes):
                        yield {**sites, region: parts}, region

    def _seeds(self, plan: MemoryPlan) -> list[frozenset[str]]:
        """Return where to begin: the node that makes the peak, and those that compute or read its large tensors."""
        large = [value for value, size in plan.live if size >= _LARGE * plan.peak_bytes]
        made = {node for value in large if (node := value.producer()) is not None}
        read = {use.node for value in large for use in value.uses()}
        starts: list[set[ir.Node]] = [{plan.node}]
        starts += [{node, plan.node} for node in sorted(made | read, key=lambda node: str(node.name))]
        return list(dict.fromkeys(frozenset(str(node.outputs[0].name) for node in start) for start in starts))


def _doubled(parts: int, most: int) -> Iterator[int]:
    parts *= 2
    while parts <= most:
        yield parts
        parts *= 2
