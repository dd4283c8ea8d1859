"""Splits operations of an ONNX graph, so that its large tensors become smaller, until the graph fits into a limit.

The search begins at the node with the highest memory, the peak. It tries to split the attention there into parts of the
queries (queries.py), and the convolutions around the node into strips (tiles.py). It tries few parts first. As soon as
the memory at this place is under the limit, the search moves on to the next peak. A graph that fits is not changed.
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

_OPSET = 13  # the first opset whose Softmax works on one axis, and whose Split and Squeeze have the inputs used here
_LARGE = 0.08  # tensors with at least this fraction of the peak are considered
# A site is given up if doubling its parts leaves its peak above this fraction of the earlier peak.
_USEFUL = 0.99
_STRIPS = 32  # most strips of a region
_NEAR = 1.1  # the bytes in an error message are found by raising the limit by this factor, until the graph fits


@dataclass(frozen=True)
class Split:
    """A graph that fits, with the splits that were needed."""

    model: ir.Model
    plan: MemoryPlan
    before: MemoryPlan
    """Plan of the unsplit graph."""
    sites: Mapping[Site, int]
    """Site → number of its parts; empty if the unsplit graph fits."""

    def describe(self) -> list[str]:
        """Return a line for each site."""
        return [f"{site.name}: {parts} parts" for site, parts in self.sites.items()]


@dataclass(frozen=True)
class _Trial:
    """A variant of the graph, with its plan."""

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
        DoesNotFitError: The graph cannot be split to the limit. The message gives the approximate bytes it needs.
        ConfigError: The graph cannot be planned or split.
    """
    return Splitter(model, most, least).split(limit)


class Splitter:
    """Rewrites one graph for any number of limits. The graph and each variant of it are planned only once.

    Args:
        model: Any graph; it is not changed.
        most: Input name → largest shape.
        least: Input name → smallest shape, if axes are dynamic; None: the same as `most`. Between both shapes, a split
            graph runs at heights and widths that are multiples of the network's stride.

    Raises:
        ConfigError: The graph cannot be planned.
    """

    def __init__(
        self, model: ir.Model, most: Mapping[str, Sequence[int]], least: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        self._model, self._most, self._least = model, most, least or most
        self._shapes = Shapes(model, most)
        self.whole = graph.plan(model, self._shapes)
        """Plan of the unsplit graph."""
        self._search: _Search | None = None

    def split(self, limit: int) -> Split:
        """Rewrite the graph so that its tensors fit.

        Args:
            limit: Bytes for all tensors that are live at the same time, without weights and inputs.

        Raises:
            DoesNotFitError: The graph cannot be split to the limit. The message gives the approximate bytes it needs.
            ConfigError: The graph cannot be split.
        """
        found = self._run(limit)
        return found if isinstance(found, Split) else self._refuse(limit, found)

    def try_split(self, limit: int) -> Split | None:
        """Rewrite the graph as `split` does, but return None if it cannot be split to the limit.

        This is faster, because it does not search for the bytes that the graph needs.

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
        """Raise an error with the bytes that the graph needs. They are found by trying larger and larger limits."""
        needs = self.whole
        while _NEAR * least < self.whole.peak_bytes:
            found = self._run(int(_NEAR * least))
            if isinstance(found, Split):
                needs = found.plan
                break
            least = max(found, int(_NEAR * least))
        raise DoesNotFitError(
            f"the exported graph needs {needs.weights_bytes >> 20} MiB for its weights. Split as far as possible, it "
            f"also needs about {needs.peak_bytes >> 20} MiB for its tensors. The limit leaves {limit >> 20} MiB for "
            f"the tensors. Largest tensors at the peak: {needs.describe()}. Use a smaller imgsz= or batch=, or a "
            "larger mem_limit="
        )


class _Search:
    """Search for sites to split. It remembers the variants that it has tried, for the next limit."""

    def __init__(self, model: ir.Model, most: Mapping[str, Sequence[int]], sizes: Sizes, whole: MemoryPlan) -> None:
        self._model, self._most, self._sizes, self._whole = model, most, sizes, whole
        self._attentions = queries.find(model, sizes)
        self._known = sizes.shapes.known()
        self._known_of: dict[tuple[Site, int], dict[str, Known]] = {}  # (site, parts) → its new tensors
        self._tried: dict[tuple[tuple[Site, int], ...], _Trial | None] = {}

    def run(self, goal: int) -> Split | int:
        """Split sites until the peak is at most a goal.

        Args:
            goal: Most bytes of the peak.

        Returns:
            The split graph. If no split brings some peak under the goal: the lowest bytes that were reached there.
        """
        done = _Trial(Split(self._model, self._whole, self._whole, {}), {})
        while done.split.plan.peak_bytes > goal:
            better = self._better(done, goal)
            if isinstance(better, int):
                return better
            done = better
        return done.split

    def _better(self, now: _Trial, goal: int) -> _Trial | int:
        """Return the first variant that brings the place of the peak under the goal, else the lowest bytes there."""
        highest = least = now.split.plan.peak_bytes
        before: dict[Site, int] = {}  # site → its peak with fewer parts
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
        key = tuple(sites.items())  # sites are split in this order, so the order matters
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
        """Yield splits that may lower the peak. Each kind of site begins with few parts.

        Args:
            now: The graph with the splits so far.
            goal: Most bytes of the peak. Regions with more bytes at their border are left out.

        Yields:
            All sites with their numbers of parts, and the site that is new or has more parts.
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
        """Return sets of nodes from which sites are searched: the node of the peak, alone and with each neighbour.

        A neighbour computes or reads a tensor that is large at the peak. Nodes are named by their first outputs.
        """
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
