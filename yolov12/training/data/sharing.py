"""Shares of a batch for several ranks: every rank draws the same batches in the same order and loads its own part.

The shares of a batch, and the resolution step at which its images are loaded, are settled when the batch is drawn.
Workers draw batches ahead of the training. A measurement in a training step therefore takes effect with the first
batch that no rank has drawn yet, so that all ranks split every batch alike and load its images in one size.

Each image is augmented by its place in the run, whichever rank loads it (see `places`). So shares do not change the
data that a run trains on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from yolov12.mas.distributed.ranks import RankStatus
from yolov12.mas.distributed.shares import Balance, share_out
from yolov12.mas.scheduling.groups import split_groups
from yolov12.mas.task import Share
from yolov12.training.data.places import Placed

__all__ = ["SHARE", "Sharing"]

SHARE = "yolov12_share"
"""Key of a batch: its `mas.Share`."""


class Sharing:
    """Splits batches among ranks, and returns the images of one of them.

    Args:
        rank: Index of this rank, from 0.
        ranks: Number of ranks.
        batch: Number of images in a whole batch.
        group: Number of images in a BatchNorm group; a rank takes whole groups.
        ahead: Number of batches that are drawn before the first one is trained on, on the rank that draws furthest
            ahead.
        move_ms: Price of new shares in milliseconds, see `Balance`.
        arranges: True to arrange a batch by the boxes of its images before augmentation (see `arrangement`): a rank
            knows no more about the images of other ranks.
        resolution_step: Returns the index of the current resolution step, the same on all ranks.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        batch: int,
        group: int,
        ahead: int,
        move_ms: float = 0.0,
        *,
        arranges: bool = False,
        resolution_step: Callable[[], int] = lambda: 0,
    ) -> None:
        self._rank, self._ranks, self._group = rank, ranks, group
        self.arranges, self._resolution_step = arranges, resolution_step
        self._whole = split_groups(batch, group)
        self._ahead = ahead
        self._balance = Balance(ranks, move_ms)
        # First batch, milliseconds per image of each rank, and resolution step that hold from that batch on.
        self._settled: deque[tuple[int, Sequence[float], int]] = deque(
            [(0, self._balance.ms_per_image, resolution_step())]
        )
        self._drawn = self._trained = 0
        self._waiting: deque[Share] = deque()

    def split(self, batch: Placed, by_boxes: Sequence[int]) -> Placed:
        """Return this rank's images of a batch that is drawn.

        Args:
            batch: The whole batch.
            by_boxes: Places of its images in their order by boxes.
        """
        order = by_boxes if self.arranges else range(len(batch))
        shares = self.shares(len(batch))
        start = sum(shares[: self._rank])
        _, step = self._now()
        self._drawn += 1
        self._waiting.append(Share(len(batch), is_padding=shares[self._rank] == 0))
        return batch.part(order[start : start + shares[self._rank]] or order[:1], step)

    def equal_part(self, batch: Placed) -> Placed:
        """Return this rank's images of a batch that is not trained on: as many on each rank."""
        return batch.part(range(self._rank, len(batch), self._ranks) or range(1))

    def shares(self, images: int) -> tuple[int, ...]:
        """Return each rank's number of images in the batch that is drawn next."""
        speeds, _ = self._now()
        return share_out(split_groups(images, self._group), speeds)

    def _now(self) -> tuple[Sequence[float], int]:
        """Return milliseconds per image of each rank, and the resolution step, for the batch that is drawn next."""
        return next((speeds, step) for begin, speeds, step in reversed(self._settled) if begin <= self._drawn)

    def taken(self) -> Share:
        """Return the share of the batch that is trained on now: the first one that was drawn and not taken."""
        return self._waiting.popleft()

    def observe(self, statuses: Sequence[RankStatus]) -> None:
        """Learn the speed of each rank from a batch that was trained on."""
        self._trained += 1
        self._balance.observe([each.images for each in statuses], [each.ms for each in statuses])
        self._balance.shares(self._whole)
        settled = self._balance.ms_per_image, self._resolution_step()
        if settled != self._settled[-1][1:]:
            self._settled.append((self._trained + self._ahead, *settled))
            while len(self._settled) > 1 and self._settled[1][0] <= self._trained:
                self._settled.popleft()

    def state_dict(self) -> list[list[int]]:
        """Return the settled resolution steps as pairs: first batch, counted from the next one, and step."""
        return [[max(begin - self._trained, 0), step] for begin, _, step in self._settled]

    def load_state_dict(self, state: Sequence[Sequence[int]]) -> None:
        """Restore the result of `state_dict` before the first batch is drawn."""
        settled = state or [[0, self._resolution_step()]]
        self._settled = deque((begin, self._balance.ms_per_image, step) for begin, step in settled)

    def drop(self, ahead: int | None = None) -> None:
        """Forget the batches that were drawn and not trained on. They will be drawn again.

        Args:
            ahead: New number of batches that are drawn ahead, the same on all ranks; None if it has not changed.
        """
        self._ahead = self._ahead if ahead is None else ahead
        self._drawn = self._trained
        self._waiting.clear()
