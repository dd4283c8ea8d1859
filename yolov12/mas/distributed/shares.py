"""How many images of each batch every rank takes, so that all are done at the same time.

A batch is split into BatchNorm groups (`groups.split_groups`), and every rank takes a run of whole ones, rank 0 the
first. As a rank can run any share, in micro-batches, shares follow speed: a card that is slower, or that has little
memory and recomputes more, takes fewer images. Where the groups are alike, the shares of least time come from giving
each group to the rank that would be done with it first (list scheduling: Graham, Bounds on multiprocessing timing
anomalies, 1969), of which all but the last few follow from the common time that ranks would have if images could be
cut.

A new share makes libraries look for kernels for seconds, so shares stay until moving is worth it. Everything follows
from what all ranks have heard, by sums, products, quotients and comparisons in a fixed order, which IEEE 754 rounds
alike everywhere: every rank comes to the same shares by itself.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

__all__ = ["Balance", "share_out", "slowest_ms"]

# Chosen by simulation, with noise of 3 %, outliers, last batches of epochs and a cost that every step has: shares of
# equal cards stay for thousands of steps, and those of a card that takes 1.1 times as long follow within 10, mostly.
_WINDOW = 31  # measurements of a rank, of which the median counts
_LATE = 9  # of these, the last: where their median is another, the rank has changed, and what was before is forgotten
_CHANGED = 0.065  # relative, of these medians; five times what the median of nine scatters by
_KEPT = 7  # measurements that stay after a change, and the least that count
_USUAL = 0.75  # of a rank's usual share, at least, for a measurement: steps have a cost besides that of their images
_GAIN = 0.025  # of the time of a step, that is worth a move
_GAIN_MORE = 0.0025  # the same, more for twice as many ranks, as the slowest of many is the one of the unluckiest noise


def share_out(groups: Sequence[int], ms_per_image: Sequence[float]) -> tuple[int, ...]:
    """Share a batch out, so that the rank that takes longest takes the least time there is.

    Of several such shares: those where the rank that takes second longest takes the least time, and so on; then those
    where lower ranks have more.

    Args:
        groups: Images in each BatchNorm group, in order; alike, but for the last two at most.
        ms_per_image: Milliseconds that each rank takes for an image, above 0; only their ratios matter.

    Returns:
        Images of each rank: the sizes of consecutive groups, added up. With fewer groups than ranks, the fastest have
        one each, and the others 0; else every rank has at least one. Takes O(n log n) for n ranks, and a look at each
        group.

    Raises:
        ValueError: Groups before the last two differ.
    """
    ranks = len(ms_per_image)
    if len(groups) < ranks:
        return _one_each(groups, ms_per_image)
    size = groups[0]
    odd = next((odd for odd in (2, 1) if len(groups) > odd and groups[-odd] != size), 0)
    alike, tail = len(groups) - odd, groups[len(groups) - odd :]
    if groups[:alike].count(size) != alike:
        raise ValueError(f"groups have to be alike, but for the last two: {size} images, and {set(groups) - {size}}")
    # The last group is the last rank's. Where two are odd, the one before it may be that rank's or its neighbour's.
    ends: list[list[int]] = [[sum(tail)] if odd else [size]]
    if odd == 2 and ranks > 1:
        ends.append(list(tail))
    found: list[list[int]] = []
    for end in ends:
        left = alike - (ranks - len(end)) - (not odd)
        if left >= 0:
            first = [size] * (ranks - len(end)) + end
            taking = ranks - (len(end) - 1)  # a last rank without the odd group before its own has no other
            found.append(_pour(size, first[:taking], ms_per_image, left) + first[taking:])
    best = min(found, key=lambda shares: slowest_ms(shares, ms_per_image))
    return tuple(best)


def slowest_ms(images: Sequence[int], ms_per_image: Sequence[float]) -> float:
    """Milliseconds of the rank that takes longest."""
    return max(share * ms for share, ms in zip(images, ms_per_image, strict=True))


class Balance:
    """The shares of one training: equal at first, then by how fast every rank has been of late.

    All ranks must be told the same, in the same order, to come to the same shares.

    Args:
        ranks: How many share each batch.
        move_ms: What new shares cost, as libraries look for kernels for them. They are taken when staying has lost as
            much, so that it all costs at most twice what knowing the future would (ski rental: Karlin, Manasse,
            Rudolph, Sleator, Competitive snoopy caching, 1988).
    """

    def __init__(self, ranks: int, move_ms: float = 0.0) -> None:
        self._move_ms, self._lost_ms = move_ms, 0.0
        self._late: list[list[float]] = [[] for _ in range(ranks)]
        self._found: list[float | None] = [None] * ranks  # of these, the medians
        self._ms: Sequence[float] = [1.0] * ranks  # per image, by which shares are as they are
        self._news = False
        self._images = 0  # of the batch before
        self._usual: Sequence[int] = [0] * ranks  # shares of the last batch that was not smaller than the one before

    @property
    def ms_per_image(self) -> Sequence[float]:
        """Of each rank, by which shares are as they are; only the ratios mean something."""
        return self._ms

    def observe(self, images: Sequence[int], ms: Sequence[float | None]) -> None:
        """Learn how long every rank's own work on its share of a step took.

        Args:
            images: The share of each rank; more where so many would have taken no longer, as it is its host that is
                waited for.
            ms: Milliseconds of its own work, without waiting for others. None or not a number where that is not known
                or says nothing, as when a size was new. A share that is none, or much less than what the rank usually
                has, says nothing either.
        """
        for rank, (share, time_ms) in enumerate(zip(images, ms, strict=True)):
            usual = share > 0 and share >= _USUAL * self._usual[rank]
            if usual and time_ms is not None and 0.0 < time_ms < math.inf:
                late = self._late[rank]
                late.append(time_ms / share)
                del late[:-_WINDOW]
                self._found[rank] = _speed(late)
                self._news = True

    def shares(self, groups: Sequence[int]) -> tuple[int, ...]:
        """Share out a batch that will be drawn now.

        Proportions stay as they are, unless others would make the slowest rank clearly faster; and always for a batch
        that is smaller than the one before, as the last of an epoch is.

        Args:
            groups: Images in each BatchNorm group of the batch, in order; alike, but for the last two at most.

        Returns:
            Images of each rank, as from `share_out`.

        Raises:
            ValueError: Groups before the last two differ.
        """
        images, before = sum(groups), self._images
        self._images = images
        shares = share_out(groups, self._ms)
        if images < before:
            return shares
        if self._news:
            self._news = False
            live = self._live()
            best = share_out(groups, live)
            gain = _GAIN + _GAIN_MORE * len(live).bit_length()
            best_ms, present_ms = slowest_ms(best, live), slowest_ms(shares, live)
            better = best_ms < (1.0 - gain) * present_ms
            self._lost_ms = self._lost_ms + present_ms - best_ms if better else 0.0
            if better and self._lost_ms >= self._move_ms:
                self._ms, shares, self._lost_ms = live, best, 0.0
        self._usual = shares
        return shares

    def _live(self) -> list[float]:
        """Milliseconds per image; a rank of which little is known is taken for a usual one."""
        known = [ms for ms in self._found if ms is not None]
        usual = _median(known) if known else 1.0
        return [usual if ms is None else ms for ms in self._found]


def _one_each(groups: Sequence[int], ms_per_image: Sequence[float]) -> tuple[int, ...]:
    fastest = sorted(range(len(ms_per_image)), key=lambda rank: ms_per_image[rank])[: len(groups)]
    shares = [0] * len(ms_per_image)
    for rank, group in zip(sorted(fastest), groups, strict=True):
        shares[rank] = group
    return tuple(shares)


def _pour(size: int, first: Sequence[int], ms_per_image: Sequence[float], count: int) -> list[int]:
    """Give each of `count` groups to the rank that would be done with it first, on top of what ranks have."""
    both = list(zip(first, ms_per_image, strict=False))
    images, speed = float(count * size), 0.0
    for load, ms in sorted(both, key=lambda each: each[0] * each[1]):
        if speed and images <= speed * (load * ms):
            break  # has more already than the others will have
        images, speed = images + load, speed + 1.0 / ms
    common_ms = images / speed * (1.0 - 1e-9)  # a little less, so that rounding cannot give away too many
    counts = [max(math.floor((common_ms / ms - load) / size), 0) for load, ms in both]
    shares = [load + size * more for load, more in zip(first, counts, strict=True)]
    done = [((share + size) * ms, rank) for rank, (share, ms) in enumerate(zip(shares, ms_per_image, strict=False))]
    heapq.heapify(done)
    for _ in range(count - sum(counts)):  # at most one a rank
        rank = done[0][1]
        shares[rank] += size
        heapq.heapreplace(done, ((shares[rank] + size) * ms_per_image[rank], rank))
    return shares


def _speed(late: list[float]) -> float | None:
    """The median of a rank's measurements since it last changed; forgets those before."""
    if len(late) < _KEPT:
        return None
    found = _median(late)
    if abs(_median(late[-_LATE:]) - found) > _CHANGED * found:
        del late[:-_KEPT]
        return _median(late)
    return found


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2.0
