"""Every image of every batch is loaded by exactly one rank, however far ranks draw ahead."""

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ultralytics.data.build import InfiniteDataLoader

from yolov12.mas.distributed.ranks import RankStatus
from yolov12.training.data.loader import ResumableLoader
from yolov12.training.data.sharing import Sharing, augment_by_place, resolution_step_of


def draws(sharing, batches, *, ahead, said):
    """Return the images that a rank loads in each batch of a training.

    `said` returns the reports of all ranks for a step.
    """
    drawn = []
    for step in range(len(batches)):
        while len(drawn) < min(step + 1 + ahead, len(batches)):
            drawn.append(sharing.split(batches[len(drawn)], f"0 {len(drawn)}"))
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
        found.append([{resolution_step_of([index], 7) for index in share} for share in loaded])
    assert found[0] == found[1]
    assert found[0] == [
        {3} if 29 <= number < 50 else {0} for number in range(60)
    ]  # a change takes effect nine batches later
    assert resolution_step_of([5], 7) == 7


def test_a_resumed_run_loads_at_the_resolution_steps_that_were_settled():
    def steps_of(sharing, batches, first=0):
        return [resolution_step_of(sharing.split(range(16), f"0 {first + number}"), 7) for number in range(batches)]

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
    assert steps_of(resumed, 12) == steps_of(sharing, 12, 9) == [2] * 6 + [1] * 6
    old = Sharing(0, 2, 16, 4, 9, resolution_step=lambda: resolution_step)
    old.load_state_dict([])  # an old file without steps
    assert steps_of(old, 1) == [1]


def test_batches_are_arranged_by_the_boxes_that_all_ranks_know():
    boxes = [9, 1, 5, 3]
    sharing = Sharing(0, 1, 4, 1, 9, 0.0, boxes)
    assert [boxes[index] for index in sharing.split([0, 1, 2, 3], "0 0")] == [9, 3, 5, 1]


def test_batches_that_were_drawn_and_dropped_are_drawn_again():
    sharing = Sharing(0, 2, 8, 2, 9)
    for number in range(3):
        sharing.split(range(8), f"0 {number}")
    sharing.taken()
    sharing.observe([RankStatus(), RankStatus()])
    sharing.drop()
    assert len(sharing.split(range(8), "0 1")) == 4
    assert sharing.taken().batch_images == 8


def test_an_image_is_augmented_by_its_place_whichever_rank_loads_it():
    def load(index):
        return index, random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002

    dataset = SimpleNamespace(get_image_and_label=load)
    augment_by_place(dataset)
    first = Sharing(0, 2, 8, 2, 9).split(range(10, 18), "7 3")
    second = Sharing(1, 2, 8, 2, 9).split(range(10, 18), "7 3")
    alone = Sharing(0, 1, 8, 2, 9).split(range(10, 18), "7 3")
    loaded = [dataset.get_image_and_label(pickle.loads(pickle.dumps(index))) for index in [*first, *second]]
    again = [dataset.get_image_and_label(index) for index in alone]
    assert [each[:3] for each in loaded] == [each[:3] for each in again]
    assert len({each[1] for each in loaded}) == 8
    assert type(loaded[0][0]) is int


def test_a_rank_with_an_empty_share_runs_a_padding_image():
    found = []
    for rank in range(3):
        sharing = Sharing(rank, 3, 12, 4, 9)
        indices = sharing.split([5, 6, 7], "0 0")
        found.append((list(map(int, indices)), not sharing.taken().is_padding))
    assert found == [([5, 6, 7], True), ([5], False), ([5], False)]


class Numbers(torch.utils.data.Dataset):
    """Data set of 22 images, which are their indices."""

    def __len__(self):
        return 22

    def __getitem__(self, index):
        return int(index)


def order(workers, ahead):
    """Return the images of three epochs; the loader is reset before the last one, as when mosaic is closed."""
    generator = torch.Generator().manual_seed(5)
    loader = InfiniteDataLoader(
        Numbers(),
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


def test_batches_are_the_same_whatever_workers_had_prefetched_when_mosaic_closes():
    assert order(0, None) == order(1, 2) == order(2, 4)
