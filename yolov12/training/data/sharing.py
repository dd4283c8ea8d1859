"""Shares of a batch for several ranks: every rank draws the same batches in the same order and loads its own part.

The shares of a batch, and the resolution step at which its images are loaded, are settled when the batch is drawn.
Workers draw batches ahead of the training. A measurement in a training step therefore takes effect with the first
batch that no rank has drawn yet, so that all ranks split every batch alike and load its images in one size.

Each image is augmented from a seed that depends on its place in the run, whichever rank loads it. Shares then do not
change the data that a run trains on. One exception remains: the partners of a mosaic are images that the same process
has loaded recently (with `cache=ram`, any images).
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

__all__ = ["SHARE", "Sharing", "augment_by_place", "resolution_step_of"]

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
        boxes: Number of boxes in each image of the data set before augmentation, by which a batch is arranged (see
            `arrangement`): a rank knows no more about the images of other ranks. None leaves the order as it is.
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
        boxes: Sequence[int] | None = None,
        resolution_step: Callable[[], int] = lambda: 0,
    ) -> None:
        self._rank, self._ranks, self._group = rank, ranks, group
        self._boxes, self._resolution_step = boxes, resolution_step
        self._whole = split_groups(batch, group)
        self._ahead = ahead
        self._balance = Balance(ranks, move_ms)
        # First batch, milliseconds per image of each rank, and resolution step that hold from that batch on.
        self._settled: deque[tuple[int, Sequence[float], int]] = deque(
            [(0, self._balance.ms_per_image, resolution_step())]
        )
        self._drawn = self._trained = 0
        self._waiting: deque[Share] = deque()

    @property
    def arranges(self) -> bool:
        """True if batches are arranged by boxes."""
        return self._boxes is not None

    def split(self, indices: Sequence[int], name: str) -> list[int]:
        """Return this rank's images of a batch that is drawn, each with the seed of its augmentation.

        Args:
            indices: Indices of the images of the whole batch.
            name: Name of the batch, unique in the run.
        """
        if self._boxes is not None:
            indices = [indices[place] for place in arranged([self._boxes[index] for index in indices])]
        shares = self.shares(len(indices))
        start = sum(shares[: self._rank])
        seed, (_, step) = zlib.crc32(name.encode()), self._now()
        mine = range(start, start + shares[self._rank]) or range(1)
        self._drawn += 1
        self._waiting.append(Share(len(indices), is_padding=shares[self._rank] == 0, seed=seed))
        return [_Drawn(indices[place], zlib.crc32(f"{name} {place}".encode()), step) for place in mine]

    def equal_part(self, indices: Sequence[int]) -> list[int]:
        """Return this rank's images of a batch that is not trained on: as many on each rank."""
        return list(indices[self._rank :: self._ranks] or indices[:1])

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

    def drop(self) -> None:
        """Forget the batches that were drawn and not trained on. They will be drawn again."""
        self._drawn = self._trained
        self._waiting.clear()


class _Drawn(int):
    """Index of an image, with the seed of its augmentation and the resolution step of its batch."""

    seed: int
    resolution_step: int

    def __new__(cls, index: int, seed: int, resolution_step: int) -> _Drawn:
        drawn = super().__new__(cls, index)
        drawn.seed, drawn.resolution_step = seed, resolution_step
        return drawn

    def __reduce__(self) -> tuple[Callable[[int, int, int], _Drawn], tuple[int, int, int]]:
        return _Drawn, (int(self), self.seed, self.resolution_step)


def resolution_step_of(indices: Sequence[int], otherwise: int) -> int:
    """Return the resolution step at which a batch is to be loaded.

    Args:
        indices: Indices of its images, as a `Sharing` returned them or, in a training in one process, plain numbers.
        otherwise: Result for plain numbers.
    """
    return indices[0].resolution_step if isinstance(indices[0], _Drawn) else otherwise


def augment_by_place(dataset: Any) -> None:
    """Let an Ultralytics data set augment each image from the seed that it was drawn with."""
    stock = getattr(dataset, "get_image_and_label", None)
    if stock is None:  # a data set of the user's own, whose processes draw random numbers as they do
        return

    def load(index: int) -> Any:
        if isinstance(index, _Drawn):
            random.seed(index.seed)
            np.random.seed(index.seed)  # noqa: NPY002 - Ultralytics draws from it
            torch.manual_seed(index.seed)
        return stock(int(index))

    dataset.get_image_and_label = load
