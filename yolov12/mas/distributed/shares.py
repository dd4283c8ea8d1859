"""Divides each batch between ranks so that all ranks finish at the same time.

A batch consists of BatchNorm groups (`groups.split_groups`). Each rank gets consecutive whole groups, and rank 0 gets
the first ones. A rank can run a share of any size in micro-batches, so shares follow speed: a card that is slower, or
that recomputes more because it has little memory, gets fewer images. If all groups are equal, list scheduling gives the
shares of least time: each group goes to the rank that would finish it first (Graham, Bounds on multiprocessing timing
anomalies, 1969). Most groups are given out at once, based on the time that ranks would need if images were divisible.
Only the last few are given out one by one.

After a change of shares, libraries search for new kernels, which takes seconds. Shares therefore stay until a change is
worth it. All ranks know the same measurements and compute with sums, products, quotients and comparisons in a fixed
order, which IEEE 754 rounds in the same way everywhere. So all ranks find the same shares without communication.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

__all__ = ["Balance", "share_out", "slowest_ms"]

# Chosen by simulation with 3 % noise, outliers, smaller last batches of epochs, and a constant cost per step. Shares of
# equal cards then stay for thousands of steps. If a card takes 1.1 times as long, shares mostly follow within 10 steps.
_WINDOW = 31  # measurements kept per rank; their median counts
# Number of latest measurements. If their median differs, the rank has changed, and its older measurements are dropped.
_LATE = 9
# Relative difference of these two medians; five times the standard deviation of a median of nine.
_CHANGED = 0.065
_KEPT = 7  # measurements that stay after a change, and the least number that counts
# Least size of a measured share, as a fraction of the rank's usual share. In small shares the constant cost of a step
# dominates.
_USUAL = 0.75
# Least gain that is worth a change, as a fraction of the step time.
_GAIN = 0.025
# Added to it for each doubling of the ranks: the slowest of many ranks is often just the one with the worst noise.
_GAIN_MORE = 0.0025


def share_out(groups: Sequence[int], ms_per_image: Sequence[float]) -> tuple[int, ...]:
    """Divide a batch between ranks so that the slowest rank takes the least possible time.

    If several divisions do so, the second slowest rank takes the least time, and so on. If they still tie, lower ranks
    get more.

    Args:
        groups: Images in each BatchNorm group, in order. All but the last two must be equal.
        ms_per_image: Milliseconds per image of each rank, above 0. Only their ratios matter.

    Returns:
        Images of each rank, in whole groups. If there are fewer groups than ranks, the fastest ranks get one group each
        and the others 0; otherwise every rank gets at least one group. The computation takes O(n log n) for n ranks,
        plus one comparison per group.

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
    # The last group belongs to the last rank. If the last two groups differ from the rest, the first of them may belong
    # to the last rank or to the one before it.
    ends: list[list[int]] = [[sum(tail)] if odd else [size]]
    if odd == 2 and ranks > 1:
        ends.append(list(tail))
    found: list[list[int]] = []
    for end in ends:
        left = alike - (ranks - len(end)) - (not odd)
        if left >= 0:
            first = [size] * (ranks - len(end)) + end
            # If the last rank does not have the odd group before its own, it gets no other group.
            taking = ranks - (len(end) - 1)
            found.append(_add_groups(size, first[:taking], ms_per_image, left) + first[taking:])
    best = min(found, key=lambda shares: slowest_ms(shares, ms_per_image))
    return tuple(best)


def slowest_ms(images: Sequence[int], ms_per_image: Sequence[float]) -> float:
    """Return the milliseconds of the rank that takes longest.

    Args:
        images: Images of each rank.
        ms_per_image: Milliseconds per image of each rank.
    """
    return max(share * ms for share, ms in zip(images, ms_per_image, strict=True))


class Balance:
    """The shares of one training: equal at first, later based on the recent speed of every rank.

    Every rank has its own instance. All instances must receive the same measurements in the same order, so that they
    find the same shares.

    Args:
        ranks: Number of ranks.
        move_ms: Milliseconds that a change of shares costs, because libraries search for kernels. Shares change when
            staying has lost as much time. The total cost is then at most twice that of perfect foresight (ski rental:
            Karlin, Manasse, Rudolph, Sleator, Competitive snoopy caching, 1988).
    """

    def __init__(self, ranks: int, move_ms: float = 0.0) -> None:
        self._move_ms, self._lost_ms = move_ms, 0.0
        self._latest: list[list[float]] = [[] for _ in range(ranks)]
        self._medians: list[float | None] = [None] * ranks  # one per list in `_latest`
        self._ms: Sequence[float] = [1.0] * ranks  # per image, as used for the present shares
        self._has_news = False
        self._images = 0  # in the previous batch
        self._usual: Sequence[int] = [0] * ranks  # shares of the last batch that was not smaller than its predecessor

    @property
    def ms_per_image(self) -> Sequence[float]:
        """Milliseconds per image of each rank, the basis of the present shares. Only the ratios are meaningful."""
        return self._ms

    def observe(self, images: Sequence[int], ms: Sequence[float | None]) -> None:
        """Learn from the time that each rank took for its share of a step.

        Args:
            images: Images of each rank. If a rank is launch-bound, this is the larger number of images that would have
                taken no longer.
            ms: Milliseconds that each rank worked, without waiting for other ranks. None or NaN if the time is unknown
                or not typical, for example because a size was new. Times of shares that are empty, or much smaller than
                usual, are ignored.
        """
        for rank, (share, time_ms) in enumerate(zip(images, ms, strict=True)):
            usual = share > 0 and share >= _USUAL * self._usual[rank]
            if usual and time_ms is not None and 0.0 < time_ms < math.inf:
                late = self._latest[rank]
                late.append(time_ms / share)
                del late[:-_WINDOW]
                self._medians[rank] = _speed(late)
                self._has_news = True

    def shares(self, groups: Sequence[int]) -> tuple[int, ...]:
        """Return the shares of the next batch.

        Proportions stay the same unless other shares would make the slowest rank clearly faster. They always stay for a
        batch that is smaller than the one before, such as the last of an epoch.

        Args:
            groups: Images in each BatchNorm group of the batch, in order. All but the last two must be equal.

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
        if self._has_news:
            self._has_news = False
            current_ms = self._current_ms()
            best = share_out(groups, current_ms)
            gain = _GAIN + _GAIN_MORE * len(current_ms).bit_length()
            best_ms, present_ms = slowest_ms(best, current_ms), slowest_ms(shares, current_ms)
            better = best_ms < (1.0 - gain) * present_ms
            self._lost_ms = self._lost_ms + present_ms - best_ms if better else 0.0
            if better and self._lost_ms >= self._move_ms:
                self._ms, shares, self._lost_ms = current_ms, best, 0.0
        self._usual = shares
        return shares

    def _current_ms(self) -> list[float]:
        """Return milliseconds per image of each rank. Ranks with too few measurements get the other ranks' median."""
        known = [ms for ms in self._medians if ms is not None]
        usual = _median(known) if known else 1.0
        return [usual if ms is None else ms for ms in self._medians]


def _one_each(groups: Sequence[int], ms_per_image: Sequence[float]) -> tuple[int, ...]:
    fastest = sorted(range(len(ms_per_image)), key=lambda rank: ms_per_image[rank])[: len(groups)]
    shares = [0] * len(ms_per_image)
    for rank, group in zip(sorted(fastest), groups, strict=True):
        shares[rank] = group
    return tuple(shares)


def _add_groups(size: int, first: Sequence[int], ms_per_image: Sequence[float], count: int) -> list[int]:
    """Add `count` groups to the shares in `first`. Each group goes to the rank that would finish it first."""
    both = list(zip(first, ms_per_image, strict=False))
    images, speed = float(count * size), 0.0
    for load, ms in sorted(both, key=lambda each: each[0] * each[1]):
        if speed and images <= speed * (load * ms):
            break  # this rank and the later ones already have enough
        images, speed = images + load, speed + 1.0 / ms
    common_ms = images / speed * (1.0 - 1e-9)  # slightly less, so that rounding cannot give away too many groups
    counts = [max(math.floor((common_ms / ms - load) / size), 0) for load, ms in both]
    shares = [load + size * more for load, more in zip(first, counts, strict=True)]
    done = [((share + size) * ms, rank) for rank, (share, ms) in enumerate(zip(shares, ms_per_image, strict=False))]
    heapq.heapify(done)
    for _ in range(count - sum(counts)):  # at most one group per rank
        rank = done[0][1]
        shares[rank] += size
        heapq.heapreplace(done, ((shares[rank] + size) * ms_per_image[rank], rank))
    return shares


def _speed(late: list[float]) -> float | None:
    """Return the median of a rank's measurements since its last change, and drop those before; None if too few."""
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
