"""The assigner in slices: the same targets with smaller tables."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ultralytics.utils.tal import RotatedTaskAlignedAssigner, TaskAlignedAssigner, make_anchors

from yolov12.mas.profiling.trace import ByteTrace
from yolov12.models.assigner import ROWS_PER_IMAGE, in_slices, split_by_boxes

CLASSES = 5


def batch(boxes, rotated=False, side=128, seed=0):
    """Make the inputs of an assigner for the given number of boxes in each image, padded to the largest number."""
    draw = torch.Generator().manual_seed(seed)
    feats = [torch.zeros(1, 1, side // stride, side // stride) for stride in (8, 16, 32)]
    anchors, strides = make_anchors(feats, (8, 16, 32), 0.5)
    anchors = anchors * strides
    images, most = len(boxes), max(boxes)
    half = 4 + 28 * torch.rand(images, len(anchors), 2, generator=draw)
    predicted = torch.cat((anchors - half, anchors + half), -1)
    centre, size = (
        side * torch.rand(images, most, 2, generator=draw),
        4 + 60 * torch.rand(images, most, 2, generator=draw),
    )
    truth = torch.cat((centre - size / 2, centre + size / 2), -1)
    if rotated:
        angle = torch.rand(images, len(anchors), 1, generator=draw)
        predicted = torch.cat((anchors.expand(images, -1, -1), 2 * half, angle), -1)
        truth = torch.cat((centre, size, torch.rand(images, most, 1, generator=draw)), -1)
    there = (torch.arange(most) < torch.tensor(boxes)[:, None])[..., None]
    labels = torch.randint(0, CLASSES, (images, most, 1), generator=draw).float()
    scores = torch.rand(images, len(anchors), CLASSES, generator=draw)
    return scores, predicted, anchors, labels * there, truth * there, there


@pytest.mark.parametrize("kind", [TaskAlignedAssigner, RotatedTaskAlignedAssigner])
@pytest.mark.parametrize("second", [None, 4])
@pytest.mark.parametrize(
    "boxes", [[300, 5, 0, 12, 40, 7], [0, 0, 200], [1, 500], [3, 2, 1], [90] * 3 + [1] * 5], ids=str
)
def test_targets_are_those_of_all_at_once(kind, second, boxes):
    assigner = kind(topk=10, num_classes=CLASSES, alpha=0.5, beta=6.0, topk2=second)
    inputs = batch(boxes, rotated=kind is RotatedTaskAlignedAssigner)
    wanted = assigner(*inputs)
    with in_slices(assigner, boxes) as sums:
        found = assigner(*inputs)
    for ours, stock in zip(found, wanted, strict=True):
        assert ours.dtype == stock.dtype
        # Kernels compute the last values of a tensor with other instructions, so its length changes rounding.
        torch.testing.assert_close(ours, stock, rtol=1e-6 if ours.is_floating_point() else 0, atol=0)
    torch.testing.assert_close(sums[0], wanted[2].sum())
    assert (assigner.bs, assigner.n_max_boxes) == (len(boxes), max(boxes))
    assert "_forward" not in vars(assigner)
    assert not assigner._forward_hooks


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=64))
def test_slices_hold_every_image_once_and_are_level(boxes):
    slices = split_by_boxes(boxes)
    assert sorted(index for each in slices for index in each) == list(range(len(boxes)))
    for each in slices:
        assert len(each) * max(boxes[index] for index in each) <= max(ROWS_PER_IMAGE * len(boxes), *boxes)
    if max(boxes) <= ROWS_PER_IMAGE:
        assert len(slices) == 1
    assert len(slices) <= 2 + sum(boxes) // (ROWS_PER_IMAGE * len(boxes) // 2 + 1)


def test_one_crowded_image_does_not_enlarge_the_tables_of_all():
    boxes = [400] + [20] * 31
    assigner = TaskAlignedAssigner(topk=10, num_classes=CLASSES)
    inputs, peaks = batch(boxes), []
    for sliced in (False, True):
        with ByteTrace() as trace:
            if sliced:
                with in_slices(assigner, boxes):
                    assigner(*inputs)
            else:
                assigner(*inputs)
        peaks.append(trace.peak_bytes())
    assert peaks[1] < 0.2 * peaks[0]


def test_a_failed_allocation_raises_and_does_not_retry_image_by_image():
    assigner = TaskAlignedAssigner(topk=10, num_classes=CLASSES)
    assigner.get_pos_mask = lambda *args, **kwargs: torch.empty(2**60)
    with pytest.raises(MemoryError), in_slices(assigner, [300, 1]):
        assigner(*batch([300, 1]))
    assert "_forward" not in vars(assigner)


@pytest.mark.parametrize("kind", [TaskAlignedAssigner, RotatedTaskAlignedAssigner])
def test_boxes_are_counted_where_they_are_used(kind):
    """A user's own code may have added boxes or images, or taken some away. Every row of the targets is filled."""
    assigner, stock = (kind(topk=10, num_classes=CLASSES) for _ in range(2))
    with in_slices(assigner):
        for boxes in ([3, 300, 2, 40], [300, 3], [2, 1, 90, 0, 90], [0, 70]):  # one after the other, as in a training
            inputs = batch(boxes, rotated=kind is RotatedTaskAlignedAssigner)
            inputs[-1][:, 1] = False  # boxes that do not count need not be the last
            for found, wanted in zip(assigner(*inputs), stock(*inputs), strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-6 if found.is_floating_point() else 0, atol=0)


@pytest.mark.parametrize("boxes", [[300], [300, 1, 1], [300, 301]])
def test_numbers_of_boxes_of_another_batch_are_an_error(boxes):
    assigner = TaskAlignedAssigner(topk=10, num_classes=CLASSES)
    with pytest.raises(ValueError, match="2 images with up to 300 boxes"), in_slices(assigner, boxes):
        assigner(*batch([300, 1]))
