"""Workers pass images through memory that is used again, and none is overwritten before it was taken."""

import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils.torch_utils import init_seeds

from yolov12.training.data import shared_images as module
from yolov12.training.data.augmentation import Augmentation
from yolov12.training.data.device_rendering import rendered
from yolov12.training.data.loader import ResumableLoader
from yolov12.training.data.shared_images import PassedImages, SharedImages, shared_images

SHAPE = (2, 3, 4, 5)


class Collate:
    """Writes the number of a batch into all of its pixels, as a worker does."""

    def __init__(self, shared):
        self.shared = shared

    def __call__(self, samples):
        place = self.shared.empty(SHAPE)
        if place is None:
            return {"img": torch.full(SHAPE, samples[0], dtype=torch.uint8)}
        place.fill_(samples[0])
        return {"img": self.shared.passed(place)}


def batches(shared, count=12):
    loader = DataLoader(range(count), 1, num_workers=2, collate_fn=Collate(shared), prefetch_factor=3)
    return [batch["img"] for batch in loader]


def taken(image):
    return image.pin_memory() if isinstance(image, PassedImages) else image


def test_no_batch_is_overwritten_before_it_is_taken():
    """The first batch of each worker is in its place until the end, so all others get memory of their own."""
    shared = SharedImages(2, 120)
    found = batches(shared)
    assert [isinstance(image, PassedImages) for image in found] == [True] * 2 + [False] * 10
    assert [set(taken(image).flatten().tolist()) for image in found] == [{number} for number in range(12)]


def test_a_place_is_used_again_when_its_batch_was_taken():
    shared = SharedImages(2, 120)
    loader = DataLoader(range(2), 1, num_workers=2, collate_fn=Collate(shared), persistent_workers=True)
    for _ in range(3):
        found = [batch["img"] for batch in loader]
        assert all(isinstance(image, PassedImages) for image in found)
        assert [set(taken(image).flatten().tolist()) for image in found] == [{0}, {1}]


def test_new_workers_begin_with_free_places():
    shared = SharedImages(2, 120)
    for _ in range(2):  # batches of the first workers are never taken
        assert isinstance(batches(shared, 2)[0], PassedImages)


def test_images_too_large_for_a_place_get_memory_of_their_own():
    assert all(isinstance(image, torch.Tensor) for image in batches(SharedImages(2, 119), 4))
    assert SharedImages(2, 120).empty(SHAPE) is None  # no worker


def test_places_are_for_workers_whose_batches_are_pinned(monkeypatch):
    loader = SimpleNamespace(pin_memory=True, multiprocessing_context=None, num_workers=3, batch_size=2)
    assert shared_images(loader, 8) is None or torch.cuda.is_available()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    found = shared_images(loader, 8)
    assert found._places.shape == (3, 2 * 3 * 64)
    for other in ({"pin_memory": False}, {"num_workers": 0}, {"multiprocessing_context": "spawn"}):
        assert shared_images(SimpleNamespace(**{**vars(loader), **other}), 8) is None


def test_what_a_worker_sends_is_short():
    shared = SharedImages(1, 120)
    assert len(pickle.dumps(PassedImages(shared._number, 0, SHAPE))) < 200
    assert module._known[shared._number] is shared


@pytest.mark.parametrize("mode", ["host", "device"])
def test_batches_are_the_same_as_in_new_memory(tmp_path, trainings, monkeypatch, mode):
    """With `device`, images are packed."""
    augmentation = Augmentation(mode, torch.device("cpu"))
    data = check_det_dataset(trainings.draw_data(tmp_path / "set"))
    loaders = []
    for _ in range(2):
        init_seeds(0)
        dataset = build_yolo_dataset(get_cfg(overrides={"imgsz": 64}), data["train"], 2, data)
        loaders.append(build_dataloader(dataset, 2, 2, device="cpu"))
    new, again = loaders
    ResumableLoader(new, 64).take_over(augmentation)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    again.pin_memory = True
    ResumableLoader(again, 64).take_over(augmentation)
    monkeypatch.undo()
    places = 0
    for expected, batch in zip([*new, *new], itertools.chain(again, again), strict=True):
        images, wanted = batch["img"], expected["img"]
        places += isinstance(images.pixels if mode == "device" else images, PassedImages)
        if mode == "device":  # bytes between images may differ
            images, wanted = rendered(images._replace(pixels=taken(images.pixels))), rendered(wanted)
        assert torch.equal(taken(images), wanted)
        assert torch.equal(batch["bboxes"], expected["bboxes"])
    assert places >= 2
    for loader in loaders:
        loader.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")
def test_pytorch_pins_what_a_worker_has_sent():
    shared = SharedImages(2, 120)
    loader = DataLoader(range(40), 1, num_workers=2, collate_fn=Collate(shared), pin_memory=True)
    for number, batch in enumerate(loader):
        assert batch["img"].is_pinned()
        assert (batch["img"] == number).all()
