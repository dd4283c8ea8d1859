"""Forward passes without gradients, in slices, on a simulated card."""

import pytest
import torch

from yolov12.errors import DoesNotFitError
from yolov12.mas import Config
from yolov12.mas.inference import Slices
from yolov12.mas.memory.replay import ReplayMeter

MIB = 2**20
IMAGE = 10 * MIB


class Card:
    def __init__(self, room=40, others=(0,), live=0, **config):
        self.meter = ReplayMeter(room * IMAGE, [int(images * IMAGE) for images in others], live)
        self.slices = Slices(Config(**config), self.meter)
        self.ran = []
        self.fail = lambda images: False

    def work(self, start, stop):
        if self.fail(stop - start):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        self.meter.use((stop - start) * IMAGE)
        self.ran.append(stop - start)
        return list(range(start, stop))

    def run(self, images):
        self.ran.clear()
        found = self.slices.run(images, 64, 64, self.work)
        assert [index for each in found for index in each] == list(range(images))
        return list(self.ran)


def test_grows_to_what_fits_and_stays_inside_the_budget():
    card = Card(room=40)
    assert card.run(64) == [1, 8, 28, 27]  # the budget is 36 images, and the margin 5 % of them
    assert card.run(64) == [32, 32]
    assert card.run(20) == [20]
    assert card.slices.failures == 0


def test_shrinks_when_others_come_and_grows_back():
    card = Card(room=40, others=[0, 20, 0])
    card.run(32)
    card.meter.advance()
    assert max(card.run(32)) <= 15
    card.meter.advance()
    assert card.run(32) == [32]
    assert card.slices.failures == 0


def test_a_failed_slice_runs_again_with_half_the_images():
    card = Card(room=100)
    card.run(32)
    card.fail = lambda images: images > 10
    assert card.run(32) == [8, 8, 8, 8]
    assert card.slices.failures == 2
    card.fail = lambda images: False
    later = [card.run(32) for _ in range(40)][-1]  # the failure may have been a false alarm
    assert later == [32]


def test_a_fixed_micro_batch_is_used():
    card = Card(room=100, micro_batch=7)
    assert card.run(16) == [7, 7, 2]
    card.fail = lambda images: images > 4
    assert max(card.run(16)) <= 4


def test_not_even_one_image_fits():
    card = Card(room=100, limit=50 * IMAGE)
    card.fail = lambda images: True
    with pytest.raises(DoesNotFitError, match=r"one image needs .* Ways out: a mem_limit above .*; or smaller images"):
        card.run(16)


def test_an_error_that_is_not_for_lack_of_memory_is_quoted():
    card = Card(room=100)

    def work(start, stop):
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED")

    card.work = work
    with pytest.raises(DoesNotFitError, match=r"What failed: cuDNN error: CUDNN_STATUS_NOT_INITIALIZED$"):
        card.run(16)


def test_the_limit_to_give_has_room_for_the_margin_and_for_loader_workers():
    meter = ReplayMeter(1000 * MIB, [0], limit=200 * MIB, outside_bytes=[100 * MIB])
    slices = Slices(Config(limit=200 * MIB, safety_ratio=0.1), meter)
    with pytest.raises(DoesNotFitError, match=f"a mem_limit above {(150 + 100) / 0.9:.0f} MiB"):
        slices.run(1, 64, 64, lambda start, stop: meter.use(150 * MIB))


def test_other_errors_pass():
    card = Card()
    card.fail = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        card.run(4)


def test_the_first_slice_is_one_image_and_its_peak_is_compared_with_the_limit():
    card = Card(room=100, limit=50 * IMAGE)
    assert card.slices.over_limit == ""
    card.meter = card.slices.meter = ReplayMeter(100 * IMAGE, [0], limit=50 * IMAGE)
    assert card.run(8)[0] == 1
    assert card.slices.over_limit == ""
    card.meter.allocated_bytes = 60 * IMAGE
    card.meter.peak_bytes = lambda: 60 * IMAGE  # on the host, nothing enforces a limit
    card.work = lambda start, stop: card.ran.append(stop - start) or list(range(start, stop))
    assert card.run(4) == [1, 1, 1, 1]
    assert card.slices.over_limit == "peaked at 600 MiB, over the limit of 500 MiB"


def test_slices_grow_where_one_image_needs_no_memory_that_can_be_measured():
    card = Card(room=100)
    card.meter.use = lambda count: None
    assert card.run(64) == [1, 8, 55]


def test_a_whole_batch_runs_at_once_if_that_is_wanted_and_may_fit():
    card = Card(room=40)

    def ran(images):
        card.ran.clear()
        found = card.slices.run(images, 64, 64, card.work, lambda: True)
        assert [index for each in found for index in each] == list(range(images))
        return list(card.ran)

    assert ran(20) == [20]
    assert ran(64) == [32, 32]  # it is known by now that 64 do not fit
    card.fail = lambda images: images > 12
    assert max(ran(24)) == 12
    card = Card(room=40, limit=40 * IMAGE)
    assert ran(20)[0] == 1
