"""Rendered batches are Ultralytics' to the byte, with fewer steps; what is not known is left to Ultralytics."""

import copy
import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from ultralytics.cfg import get_cfg
from ultralytics.data import augment
from ultralytics.data.build import build_dataloader
from ultralytics.data.dataset import YOLODataset

from tests.training.data.datasets import ARGUMENTS, dataset_of
from yolov12.training.data.loader import ResumableLoader
from yolov12.training.data.pixels import Recipe
from yolov12.training.data.random_state import random_state
from yolov12.training.data.recipes import Later, samples
from yolov12.training.data.rendering import Rendering
from yolov12.training.data.resolution import ResolutionControl, resolution_steps


def both(dataset, indices, seed=0):
    """Return Ultralytics' batch and ours, each with the state of the random generators after it."""
    found = []
    for ours in (False, True):
        dataset.buffer[:] = []
        dataset.ims = [None] * len(dataset) if dataset.cache != "ram" else dataset.ims
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        loaded = samples(dataset, Later(indices) if ours else indices)
        assert all(isinstance(sample["img"], Recipe) == ours for sample in loaded)
        found.append((Rendering(dataset.collate_fn)(loaded), random_state()))
    return found


def assert_same(one, other):
    (batch, state), (rendered, state_after) = one, other
    assert list(batch) == list(rendered)
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == rendered[key].dtype
            assert torch.equal(value, rendered[key]), key
        else:
            assert value == rendered[key], key
    assert state["python"] == state_after["python"]
    assert torch.equal(state["numpy"][1], state_after["numpy"][1])
    assert torch.equal(state["torch"], state_after["torch"])


@settings(max_examples=settings.default.max_examples * 2)
@given(
    arguments=ARGUMENTS,
    imgsz=st.sampled_from([64, 96, 75, 32]),
    channels=st.sampled_from([3, 3, 1]),
    seed=st.integers(0, 10**6),
)
def test_batches_are_those_of_ultralytics_to_the_byte(data_sets, arguments, imgsz, channels, seed):
    dataset = data_sets[channels]
    dataset.transforms = augment.v8_transforms(dataset, imgsz, get_cfg(overrides=arguments))
    dataset.transforms.append(augment.Format(bgr=arguments["bgr"]))
    assert_same(*both(dataset, random.Random(seed).sample(range(len(dataset)), 4), seed))


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
@pytest.mark.parametrize("mode", ["flip", "mixup"])
def test_labels_of_other_tasks_are_those_of_ultralytics(yamls, task, mode):
    dataset = dataset_of(yamls[task], task, copy_paste=0.5, copy_paste_mode=mode, mosaic=0.8, degrees=10.0, mixup=0.3)
    for seed in range(3):
        assert_same(*both(dataset, range(8), seed))


@pytest.mark.parametrize("imgsz", [640, 500])
def test_images_of_full_size_are_those_of_ultralytics(yamls, imgsz):
    """Their rows are long enough for all of OpenCV's vector code."""
    dataset = dataset_of(yamls["detect"], imgsz=imgsz, mosaic=0.7)
    assert_same(*both(dataset, range(16)))


def appended(dataset):
    dataset.transforms.append(lambda labels: labels)


def own_transform(dataset):
    class Colors(augment.RandomHSV):
        pass

    dataset.transforms[4] = Colors(0.1, 0.1, 0.1)


def own_method(dataset):
    flip = dataset.transforms[5]
    flip.apply_image = lambda labels, params: labels


def own_function(dataset):
    mosaic = dataset.transforms[0][0]
    mosaic.get_indexes = lambda: [0, 0, 0]
    dataset.transforms[0].transforms.append(mosaic)


def albumentations(dataset):
    dataset.transforms[3].transform = SimpleNamespace()
    dataset.transforms[3].p = 0.0


def own_loading(dataset):
    load = dataset.load_image
    dataset.load_image = lambda *args, **kwargs: load(*args, **kwargs)


def own_data_set(dataset):
    class Mine(YOLODataset):
        def get_image_and_label(self, index):
            return super().get_image_and_label(index)

    dataset.__class__ = Mine


def own_loading_that_is_wrapped(dataset):
    class Mine(YOLODataset):
        def load_image(self, i, *args, **kwargs):
            return super().load_image(i, *args, **kwargs)

    dataset.__class__ = Mine
    settings = get_cfg(overrides={"imgsz": 64})
    ResolutionControl("auto", resolution_steps(64, 32, 32), 32).join(dataset, settings)


def own_labels_of_a_mosaic(dataset):
    mosaic = dataset.transforms[0][0]
    mosaic._cat_labels = lambda labels: augment.Mosaic._cat_labels(mosaic, labels)


def own_matrix(dataset):
    affine = dataset.transforms[0][2]
    affine._compute_affine_matrix = lambda image, size: augment.RandomPerspective._compute_affine_matrix(
        affine, image, size
    )


def own_format(dataset):
    form = dataset.transforms[-1]
    form._format_img = lambda image: augment.Format._format_img(form, image)


def other_partners(dataset):
    dataset.transforms[1].pre_transform = augment.Compose([dataset.transforms[0][2]])


def another_order(dataset):
    mixup = dataset.transforms.transforms.pop(1)
    dataset.transforms[0].append(mixup)


@pytest.mark.parametrize(
    "change",
    [
        appended, own_transform, own_method, own_function, albumentations, own_loading, own_data_set,
        own_loading_that_is_wrapped, own_labels_of_a_mosaic, own_matrix, own_format, other_partners, another_order,
    ],
)  # fmt: skip
def test_with_code_of_the_users_own_ultralytics_makes_the_images(yamls, change):
    dataset = dataset_of(yamls["detect"])
    assert isinstance(samples(dataset, Later([0]))[0]["img"], Recipe)
    change(dataset)
    assert isinstance(samples(dataset, Later([0]))[0]["img"], torch.Tensor)


def test_images_in_the_shape_of_the_batch_are_left_to_ultralytics(yamls):
    dataset = dataset_of(yamls["detect"], rect=True)
    assert isinstance(samples(dataset, Later([0]))[0]["img"], torch.Tensor)


def test_images_that_are_no_bytes_are_left_to_ultralytics(yamls):
    no_colors = dict.fromkeys(("hsv_h", "hsv_s", "hsv_v"), 0.0)
    dataset = dataset_of(yamls["detect"], mosaic=0.5, mixup=0.5, cache="ram", **no_colors)
    images = list(dataset.ims)
    dataset.ims = [image if index % 2 else image.astype(np.float32) for index, image in enumerate(images)]
    for batch in ([index] for index in range(8)), [range(8)]:
        for indices in batch:
            stock, ours = both_of_any_kind(dataset, indices)
            assert stock.dtype == ours.dtype
            assert torch.equal(stock, ours)


def both_of_any_kind(dataset, batch):
    found = []
    for indices in (list(batch), Later(batch)):
        random.seed(batch[0])
        np.random.seed(batch[0])  # noqa: NPY002
        found.append(Rendering(dataset.collate_fn)(samples(dataset, indices))["img"])
    return found


def test_users_loaders_of_the_training_data_get_whole_samples(yamls):
    dataset = dataset_of(yamls["detect"])
    loader = ResumableLoader(build_dataloader(dataset, 4, 0, device="cpu"), 64).take_over()
    assert next(iter(loader))["img"].shape == (4, 3, 64, 64)
    plain = DataLoader(dataset, batch_size=4, collate_fn=lambda samples: [type(sample["img"]) for sample in samples])
    assert next(iter(plain)) == [torch.Tensor] * 4


def test_a_collate_function_of_the_users_own_gets_whole_samples(yamls):
    stock = build_dataloader(dataset_of(yamls["detect"]), 4, 0, device="cpu")
    batches = copy.copy(stock.collate_fn)
    stock.collate_fn = lambda samples: {**batches(samples), "kinds": [type(sample["img"]) for sample in samples]}
    assert next(iter(ResumableLoader(stock, 64).take_over()))["kinds"] == [torch.Tensor] * 4


def test_other_processes_get_the_data_set_with_its_recipes(yamls):
    """Processes that are not forked get a pickled one."""
    loader = build_dataloader(dataset_of(yamls["detect"]), 4, 0, device="cpu")
    next(iter(ResumableLoader(loader, 64).take_over()))
    dataset, collate = pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))
    assert collate(dataset.__getitems__(Later([0, 1])))["img"].shape == (2, 3, 64, 64)


def test_a_worker_renders_into_shared_memory(yamls, monkeypatch):
    monkeypatch.setattr("yolov12.training.data.rendering.get_worker_info", lambda: object())
    dataset = dataset_of(yamls["detect"])
    batch = Rendering(dataset.collate_fn)(samples(dataset, Later(range(4))))
    assert batch["img"].is_shared()
