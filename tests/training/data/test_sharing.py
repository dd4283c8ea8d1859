"""Every image of every batch is loaded by exactly one rank, however far ranks draw ahead."""

import random

import pytest
import torch
from ultralytics.data.build import InfiniteDataLoader

from yolov12.mas.distributed.ranks import RankStatus
from yolov12.training.data.loader import ResumableLoader
from yolov12.training.data.places import Order, Placed
from yolov12.training.data.sharing import Sharing


def split(sharing, indices):
    return sharing.split(Placed(indices, indices, [indices] * len(indices)), range(len(indices)))


def draws(sharing, batches, *, ahead, said):
    """Return the images that a rank loads in each batch of a training.

    `said` returns the reports of all ranks for a step.
    """
    drawn = []
    for step in range(len(batches)):
        while len(drawn) < min(step + 1 + ahead, len(batches)):
            drawn.append(split(sharing, batches[len(drawn)]))
        assert sharing.taken().batch_images == len(batches[step])
        sharing.observe(said(step))
    return drawn


@pytest.mark.parametrize("aheads", [(0, 0, 0), (9, 9, 9), (0, 4, 9)])
def test_every_image_is_loaded_once_however_far_ranks_draw_ahead(aheads):
    chance = random.Random(1)
    batches = [chance.sample(range(1000), 36 if number % 10 == 9 else 64) for number in range(80)]

    def said(step):
        slow = 3.0 if step > 30 else 1.0
        return [RankStatus(24, 24 * each) for each in (slow, 1.0, 1.5)]

    loaded = [
        draws(Sharing(rank, 3, 64, 4, max(ahead, 9)), batches, ahead=ahead, said=said)
        for rank, ahead in enumerate(aheads)
    ]
    for batch, *shares in zip(batches, *loaded, strict=True):
        assert [int(index) for share in shares for index in share] == batch
        assert all(len(share) % 4 == 0 for share in shares)
    sizes = [[len(share) for share in shares] for shares in zip(*loaded, strict=True)]
    assert sizes[0] == [24, 20, 20]
    assert sizes[28] == [24, 24, 16]  # shares follow speed
    assert sizes[-2][0] < 16


@pytest.mark.parametrize("aheads", [(0, 0), (9, 9), (0, 9)])
def test_a_batch_is_loaded_at_one_resolution_step_however_far_ranks_draw_ahead(aheads):
    batches = [list(range(16)) for _ in range(60)]
    found = []
    for rank, ahead in enumerate(aheads):
        steps = []

        def said(step, steps=steps):
            steps.append(step)
            return [RankStatus(), RankStatus()]

        def resolution_step(steps=steps):
            return 3 if 20 <= len(steps) <= 40 else 0

        sharing = Sharing(rank, 2, 16, 4, max(ahead, 9), resolution_step=resolution_step)
        loaded = draws(sharing, batches, ahead=ahead, said=said)
        found.append([share.resolution_step for share in loaded])
    assert found[0] == found[1]
    assert found[0] == [
        3 if 29 <= number < 50 else 0 for number in range(60)
    ]  # a change takes effect nine batches later


def test_a_resumed_run_loads_at_the_resolution_steps_that_were_settled():
    def steps_of(sharing, batches):
        return [split(sharing, range(16)).resolution_step for _ in range(batches)]

    def trained(sharing, steps):
        for _ in range(steps):
            sharing.observe([RankStatus(), RankStatus()])

    resolution_step = 2
    sharing = Sharing(0, 2, 16, 4, 9, resolution_step=lambda: resolution_step)
    steps_of(sharing, 9)
    trained(sharing, 5)
    resolution_step = 1
    trained(sharing, 4)
    resumed = Sharing(0, 2, 16, 4, 9, resolution_step=lambda: 0)  # its control restores the step only later
    resumed.load_state_dict(sharing.state_dict())
    assert steps_of(resumed, 12) == steps_of(sharing, 12) == [2] * 6 + [1] * 6
    old = Sharing(0, 2, 16, 4, 9, resolution_step=lambda: resolution_step)
    old.load_state_dict([])  # an old file without steps
    assert steps_of(old, 1) == [1]


def test_batches_are_arranged_by_the_boxes_that_all_ranks_know():
    boxes = [9, 1, 5, 3]
    generator = torch.Generator()
    for arranges in (True, False):
        order = Order([[0, 1, 2, 3]], generator, boxes)
        order.split = Sharing(0, 1, 4, 1, 9, arranges=arranges).split
        assert [boxes[index] for index in next(iter(order))] == ([9, 3, 5, 1] if arranges else boxes)


def test_batches_that_were_drawn_and_dropped_are_drawn_again():
    sharing = Sharing(0, 2, 8, 2, 9)
    for _ in range(3):
        split(sharing, range(8))
    sharing.taken()
    sharing.observe([RankStatus(), RankStatus()])
    sharing.drop()
    assert len(split(sharing, range(8))) == 4
    assert sharing.taken().batch_images == 8


def test_a_rank_with_an_empty_share_runs_a_padding_image():
    found = []
    for rank in range(3):
        sharing = Sharing(rank, 3, 12, 4, 9)
        indices = split(sharing, [5, 6, 7])
        found.append((list(map(int, indices)), not sharing.taken().is_padding))
    assert found == [([5, 6, 7], True), ([5], False), ([5], False)]


class Numbers(torch.utils.data.Dataset):
    """Data set of images, which are their indices."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return self.images

    def __getitem__(self, index):
        return int(index)


def order(images, workers, ahead):
    """Return the images of three epochs; the loader is reset before the last one, as when mosaic is closed."""
    generator = torch.Generator().manual_seed(5)
    loader = InfiniteDataLoader(
        Numbers(images),
        batch_size=4,
        shuffle=True,
        num_workers=workers,
        prefetch_factor=ahead,
        generator=generator,
        collate_fn=lambda samples: {"images": samples},
        worker_init_fn=lambda index: None,
    )
    sharing = Sharing(0, 1, 4, 1, max(workers * (ahead or 0) + 1, 9))
    resumable, found = ResumableLoader(loader, 64, sharing=sharing).take_over(), []
    for epoch in range(3):
        if epoch == 2:
            resumable.reset()
        for batch in resumable:
            sharing.observe([RankStatus()])
            found.append(batch["images"])
    loader.close()
    return found


@pytest.mark.parametrize("images", [22, 24])
def test_batches_are_the_same_whatever_workers_had_prefetched_when_mosaic_closes(images):
    assert order(images, 0, None) == order(images, 1, 2) == order(images, 2, 4)
