"""Every rank draws the same batches, in the same order, and loads its own share of each.

Shares are settled when a batch is drawn, which workers do ahead of the training, and so is the rung that it is loaded
on (see `data_layer`). What ranks measured in a step counts from the first batch on that no rank has drawn by then, so
that all cut each batch alike, and load its images in one size.

An image is augmented from a seed of its place in the run, whoever loads it: shares do not change what is trained on,
but for the partners of a mosaic, which are images that the same process has loaded lately (with cache=ram, any).
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from yolov12.mas.distributed.ranks import RankStatus
from yolov12.mas.distributed.shares import Balance, share_out
from yolov12.mas.scheduling.groups import split_groups
from yolov12.mas.task import Share
from yolov12.training.data.arrangement import arranged

__all__ = ["SHARE", "Sharing", "augment_by_place", "rung_of"]

SHARE = "yolov12_share"
"""Key of a batch: its `mas.Share`."""


class Sharing:
    """Cuts batches for one rank.

    Args:
        rank: Number of this rank, from 0.
        ranks: Number of ranks.
        batch: Number of images in a whole batch.
        group: Number of images in a BatchNorm group; ranks take whole groups.
        ahead: Number of batches that are drawn before the first is trained on, by the rank that draws furthest ahead.
        move_ms: What new shares cost, see `Balance`.
        boxes: Of each image of the data set, by which a batch is arranged (see `arrangement`): before augmentation, as
            no rank knows more of the images of others. None to leave the order as it is.
        rung: Tells the rung of the data layer, which is the same on all ranks.
    """

    def __init__(
        self,
        rank: int,
        ranks: int,
        batch: int,
        group: int,
        ahead: int,
        move_ms: float = 0.0,
        boxes: Sequence[int] | None = None,
        rung: Callable[[], int] = lambda: 0,
    ) -> None:
        self._rank, self._group, self._boxes, self._rung = rank, group, boxes, rung
        self._whole = split_groups(batch, group)
        self._ahead = ahead
        self._balance = Balance(ranks, move_ms)
        self._settled: deque[tuple[int, Sequence[float], int]] = deque([(0, self._balance.ms_per_image, rung())])
        """From which batch on ranks are taken to be how fast, and images are loaded on which rung."""
        self._drawn = self._trained = 0
        self._waiting: deque[Share] = deque()

    @property
    def arranges(self) -> bool:
        """Whether batches are arranged."""
        return self._boxes is not None

    def cut(self, indices: Sequence[int], name: str) -> list[int]:
        """Give this rank's images of a batch that is drawn, each with its seed.

        Args:
            indices: Of the whole batch.
            name: Of the batch, no other of the run has it.
        """
        if self._boxes is not None:
            indices = [indices[place] for place in arranged([self._boxes[index] for index in indices])]
        shares = self.shares(len(indices))
        start = sum(shares[: self._rank])
        seed, (_, rung) = zlib.crc32(name.encode()), self._now()
        mine = range(start, start + shares[self._rank]) or range(1)
        self._drawn += 1
        self._waiting.append(Share(len(indices), is_padding=shares[self._rank] == 0, seed=seed))
        return [_Drawn(indices[place], zlib.crc32(f"{name} {place}".encode()), rung) for place in mine]

    def shares(self, images: int) -> tuple[int, ...]:
        """Images of every rank in the batch that is drawn next."""
        speeds, _ = self._now()
        return share_out(split_groups(images, self._group), speeds)

    def _now(self) -> tuple[Sequence[float], int]:
        """What is settled for the batch that is drawn next."""
        return next((speeds, rung) for begin, speeds, rung in reversed(self._settled) if begin <= self._drawn)

    def taken(self) -> Share:
        """Give the share that was drawn first and not taken: that of the batch that is trained on now."""
        return self._waiting.popleft()

    def observe(self, statuses: Sequence[RankStatus]) -> None:
        """Learn from a batch that was trained on."""
        self._trained += 1
        self._balance.observe([each.images for each in statuses], [each.ms for each in statuses])
        self._balance.shares(self._whole)
        settled = self._balance.ms_per_image, self._rung()
        if settled != self._settled[-1][1:]:
            self._settled.append((self._trained + self._ahead, *settled))
            while len(self._settled) > 1 and self._settled[1][0] <= self._trained:
                self._settled.popleft()

    def state_dict(self) -> list[list[int]]:
        """Rungs that are settled: from which batch on, counted from the next to be trained on, and which."""
        return [[max(begin - self._trained, 0), rung] for begin, _, rung in self._settled]

    def load_state_dict(self, state: Sequence[Sequence[int]]) -> None:
        """Take what `state_dict` gave, before a batch is drawn."""
        self._settled = deque((begin, self._balance.ms_per_image, rung) for begin, rung in state or [[0, self._rung()]])

    def drop(self) -> None:
        """Forget what was drawn and not trained on: it will be drawn anew."""
        self._drawn = self._trained
        self._waiting.clear()


class _Drawn(int):
    """An index of a data set, with the seed of this use of it and the rung that its batch is loaded on."""

    seed: int
    rung: int

    def __new__(cls, index: int, seed: int, rung: int) -> _Drawn:
        drawn = super().__new__(cls, index)
        drawn.seed, drawn.rung = seed, rung
        return drawn

    def __reduce__(self) -> tuple[Callable[[int, int, int], _Drawn], tuple[int, int, int]]:
        return _Drawn, (int(self), self.seed, self.rung)


def rung_of(indices: Sequence[int], otherwise: int) -> int:
    """The rung that a batch is to be loaded on; `otherwise` where one process draws and loads all of it."""
    return indices[0].rung if isinstance(indices[0], _Drawn) else otherwise


def augment_by_place(dataset: Any) -> None:
    """Let a data set of Ultralytics augment each image from the seed that it was drawn with."""
    stock = getattr(dataset, "get_image_and_label", None)
    if stock is None:  # one of the user's own, whose processes draw as they do
        return

    def load(index: int) -> Any:
        if isinstance(index, _Drawn):
            random.seed(index.seed)
            np.random.seed(index.seed)  # noqa: NPY002 - Ultralytics draws from it
            torch.manual_seed(index.seed)
        return stock(int(index))

    dataset.get_image_and_label = load
